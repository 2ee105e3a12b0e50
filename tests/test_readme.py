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


def blocks(language, text=README):
    found = re.findall(rf"\.\. code-block:: {language}\n\n((?:    .*\n|\n)+)", text)
    return ["\n".join(line[4:] for line in block.splitlines()) for block in found]


def test_the_library_example_runs(tmp_path):
    code, _ = blocks("python")
    (tmp_path / "example.py").write_text(code)
    result = launch.launch(4, [tmp_path / "example.py"], folder=tmp_path / "said", timeout=120)
    assert result.code == 0, result.text
    for rank, text in enumerate(result.ranks):
        assert f"{rank} (1000, 8, 64) (1000, 8)" in text
        assert "s waiting" in text


def test_the_training_example_runs(tmp_path):
    pytest.importorskip("torch")
    _, code = blocks("python")
    (tmp_path / "train.py").write_text(code)
    result = launch.launch(4, [tmp_path / "train.py"], folder=tmp_path / "said", timeout=120)
    assert result.code == 0, result.text
    losses = [[line.split() for line in text.splitlines()] for text in result.ranks]
    assert [step for step, _ in losses[0]] == ["0", "1", "2"]
    assert all(other == losses[0] for other in losses)
    assert float(losses[0][2][1]) < float(losses[0][0][1])


def test_the_jax_example_runs(tmp_path):
    pytest.importorskip("jax")
    (code,) = blocks("python", (ROOT / "docs/jax.rst").read_text())
    (tmp_path / "jax_example.py").write_text(code)
    result = launch.launch(2, [tmp_path / "jax_example.py"], folder=tmp_path / "said", timeout=180)
    assert result.code == 0, result.text
    assert all("(1000, 8, 64)" in text for text in result.ranks)


def test_errors_that_are_explained_exist():
    """What troubleshooting.rst quotes are texts of the library, but for the numbers and names in them."""
    source = "".join(path.read_text() for path in Path(ringmpi.__file__).parent.rglob("*.py"))
    source = re.sub(r'"\s*\n\s*f?"', "", source)                     # texts that go on in the next line
    lines = [line for line in (ROOT / "docs/troubleshooting.rst").read_text().splitlines() if line.startswith("``")]
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


def test_the_file_example_runs(tmp_path):
    example = next(block for block in blocks("bash") if "make random" in block)
    for line in example.splitlines():
        words = line.split()
        if words[:1] == ["ringmpi"]:
            subprocess.run([sys.executable, "-m", *words], cwd=tmp_path, check=True, timeout=60)
        elif words:
            assert words[:4] == ["mpiexec", "-n", "4", "ringmpi"]
            arguments = [tmp_path / word if word.endswith(".h5") else word for word in words[4:]]
            result = launch.launch(4, ["-m", "ringmpi", *arguments], folder=tmp_path / "said")
            assert result.code == 0, result.text
    assert (tmp_path / "single.h5").exists()


def test_the_decoding_example_runs(tmp_path):
    """On a text of a tenth of the length."""
    (code,) = blocks("python", (ROOT / "docs/decoding.rst").read_text())
    (tmp_path / "decode.py").write_text(code)
    source = tmp_path / "text.h5"
    make = [sys.executable, "-m", "ringmpi", "make", "text", source, "--tokens", "3300"]
    subprocess.run(make, check=True, timeout=60)
    result = launch.launch(4, [tmp_path / "decode.py", source], folder=tmp_path / "said", timeout=120)
    assert result.code == 0, result.text
    (said,) = [text for text in result.ranks if "largest difference" in text]
    assert float(said.split()[-1]) < 2e-6


@pytest.mark.parametrize("script", ["jobs/cpu.sbatch", "jobs/gpu.sbatch", "jobs/array.sbatch", "jobs/local.sh"])
def test_files_it_names_exist(script):
    assert script in README
    assert (Path(__file__).parent.parent / script).exists()
