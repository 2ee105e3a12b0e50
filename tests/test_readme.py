"""README.rst and docs/: what they show can be pasted and runs."""

import re
import subprocess
import sys
from pathlib import Path

import launch
import pytest

import ringmpi

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.rst").read_text()


def page(name):
    return (ROOT / f"docs/{name}.rst").read_text()


def blocks(language, text):
    found = re.findall(rf"\.\. code-block:: {language}\n\n((?:    .*\n|\n)+)", text)
    return ["\n".join(line[4:] for line in block.splitlines()) for block in found]


def run(code, ranks, tmp_path):
    """Run a program on so many ranks; give what each said."""
    (tmp_path / "program.py").write_text(code)
    result = launch.launch(ranks, [tmp_path / "program.py"], folder=tmp_path / "said", timeout=180)
    assert result.code == 0, result.text
    return result.ranks


def run_commands(text, folder):
    """Run the lines that are `ringmpi ...` or `mpiexec -n N ringmpi ...`; give how many."""
    lines = [line.split() for line in text.splitlines() if line.startswith(("ringmpi ", "mpiexec "))]
    for words in lines:
        if words[0] == "ringmpi":
            subprocess.run([sys.executable, "-m", *words], cwd=folder, check=True, timeout=120)
        else:
            assert [*words[:2], words[3]] == ["mpiexec", "-n", "ringmpi"]
            arguments = [folder / word if word.endswith((".h5", ".json")) else word for word in words[4:]]
            result = launch.launch(int(words[2]), ["-m", "ringmpi", *arguments], folder=folder / "said", timeout=180)
            assert result.code == 0, result.text
    return len(lines)


def test_the_library_example_runs(tmp_path):
    (code,) = blocks("python", README)
    for rank, text in enumerate(run(code, 4, tmp_path)):
        assert f"{rank} (1000, 8, 64) (1000, 8)" in text
        assert "s waiting" in text


def test_the_first_program_is_right(tmp_path):
    (code,) = blocks("python", page("start"))
    for rank, text in enumerate(run(code, 3, tmp_path)):
        assert f"rank {rank} of 3: 200 tokens" in text
        assert float(text.split()[-1]) < 1e-13


def test_the_example_in_a_code_runs(tmp_path):
    (code,) = blocks("python", page("library"))
    *attending, other = run(code, 4, tmp_path)
    assert [text.split()[:4] for text in attending] == [[str(rank), f"({100 + 50 * rank},", "4,", "32)"]
                                                        for rank in range(3)]
    assert not other.strip()


def test_the_training_example_runs(tmp_path):
    pytest.importorskip("torch")
    (code,) = blocks("python", page("gradients"))
    losses = [[line.split() for line in text.splitlines() if line[:1].isdigit()] for text in run(code, 4, tmp_path)]
    assert [step for step, _ in losses[0]] == ["0", "1", "2"]
    assert all(other == losses[0] for other in losses)
    assert float(losses[0][2][1]) < float(losses[0][0][1])


def test_the_jax_example_runs(tmp_path):
    pytest.importorskip("jax")
    (code,) = blocks("python", page("jax"))
    assert all("(1000, 8, 64)" in text for text in run(code, 2, tmp_path))


def test_errors_that_are_explained_exist():
    """What troubleshooting.rst quotes are texts of the library, but for the numbers and names in them."""
    source = "".join(path.read_text() for path in Path(ringmpi.__file__).parent.rglob("*.py"))
    source = re.sub(r'"\s*\n\s*f?"', "", source)                     # texts that go on in the next line
    lines = [line for line in page("troubleshooting").splitlines() if line.startswith("``")]
    assert len(lines) >= 8
    for line in lines:
        parts = re.split(r"\.\.\.|\d+|[()]|striped|PMI_SIZE|node|of q|MiB| tokens| ranks? ", line.split("``")[1])
        assert max(parts, key=len).strip(" ,:;") in source, line


def test_the_pages_are_built(tmp_path):
    """By Sphinx, without a warning: references, every public name's docstring, and every page in the contents."""
    pytest.importorskip("sphinx")
    for module in ("pydata_sphinx_theme", "numpydoc", "myst_nb"):
        pytest.importorskip(module)
    for module in ("numpydoc", "matplotlib", "torch", "transformers", "jax"):
        pytest.importorskip(module)
    made = subprocess.run([sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", ROOT / "docs",
                           tmp_path], capture_output=True, text=True, timeout=300)
    assert made.returncode == 0, made.stderr
    text = (tmp_path / "api.html").read_text()
    for name in ringmpi.__all__:
        assert f'id="ringmpi.{name}"' in text or f'id="ringmpi.errors.{name}"' in text, name


@pytest.mark.parametrize(("name", "commands", "made"), [
    ("commandline", 5, "single.h5"), ("start", 3, "out.h5"), ("laptop", 6, "page.html")])
def test_the_commands_for_files_run(name, commands, made, tmp_path):
    if name == "laptop":
        pytest.importorskip("matplotlib")
    assert run_commands("\n".join(blocks("bash", page(name))), tmp_path) == commands
    assert (tmp_path / made).exists()


def test_the_decoding_example_runs(tmp_path):
    """On a text of a tenth of the length."""
    (code,) = blocks("python", page("decoding"))
    (tmp_path / "decode.py").write_text(code)
    source = tmp_path / "text.h5"
    make = [sys.executable, "-m", "ringmpi", "make", "text", source, "--tokens", "3300"]
    subprocess.run(make, check=True, timeout=60)
    result = launch.launch(4, [tmp_path / "decode.py", source], folder=tmp_path / "said", timeout=120)
    assert result.code == 0, result.text
    (said,) = [text for text in result.ranks if "largest difference" in text]
    assert float(said.split()[-1]) < 2e-6


def test_files_it_names_exist():
    paths = re.findall(r"(?:docs|jobs|packaging)/[\w.]*|[A-Z]+\.(?:rst|cff)", README)
    assert {"docs/start.rst", "docs/limits.rst", "jobs/cpu.sbatch", "packaging/", "DEVELOPING.rst"} <= set(paths)
    assert not [path for path in paths if not (ROOT / path).exists()]


def test_the_test_command_is_one():
    command = next(block for block in blocks("bash", README) if "pytest" in block)
    assert command in blocks("bash", page("install"))
