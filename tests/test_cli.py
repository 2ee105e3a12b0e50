"""The command line where no MPI is needed: help, argument errors, make, check, merge, dry runs, info."""

import argparse
import errno
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import oracle
import pytest

from ringmpi import Grid, InternalError, LaunchError, OptionError, ResourceError
from ringmpi.backends.numba_ import amx
from ringmpi.cli import COMMANDS, main
from ringmpi.commands.options import add_attention
from ringmpi.files.shards import Output, read_manifest
from ringmpi.job.attend import attend
from ringmpi.job.masks import make_mask
from ringmpi.job.options import Options
from ringmpi.job.run import PhaseTimer
from ringmpi.mask import ARRAYS
from ringmpi.mpi import world as mpi_world
from ringmpi.mpi.library import load
from ringmpi.process import STOPS

NO_MPI = "import sys; sys.modules['mpi4py'] = None; from ringmpi.cli import main; sys.exit(main())"


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    for name in list(os.environ):
        if name.startswith(("SLURM_", "PMI_", "OMPI_COMM")):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def without_mpi(*arguments):
    return subprocess.run([sys.executable, "-c", NO_MPI, *map(str, arguments)], capture_output=True, text=True,
                          timeout=120, check=False)


def code(*arguments):
    """Exit code of a command line, argparse's included."""
    try:
        return main([str(x) for x in arguments])
    except SystemExit as stop:
        return stop.code


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_help_needs_no_mpi(command):
    said = without_mpi(*command, "--help")
    assert said.returncode == 0, said.stderr
    assert "exit codes" in said.stdout
    assert all(f"{128 + number} {number.name}" in said.stdout for number in STOPS)
    assert "usage: ringmpi" in said.stdout


@pytest.mark.parametrize(("arguments", "text"), [
    ([], "expected a COMMAND: attend, make, check, analyse, merge, clean, plan, info, plot, demo, bench"),
    (["fly"], "invalid choice"),
    (["attend", "in.h5"], "OUT.h5"),
    (["attend", "a", "b", "--window", "3,4,5"], "expected LEFT"),
    (["attend", "a", "b", "--window", "x"], "integer"),
    (["attend", "a", "b", "--layout", "spiral"], "invalid choice"),
    (["attend", "a", "b", "--prefix", "3"], "--prefix widens only --causal"),
    (["attend", "a", "b", "--first", "3", "--causal"], "--first widens only --window"),
    (["attend", "a", "b", "--timeout", "-1"], "seconds > 0"),
    (["attend", "a", "b", "--relative", "--backend", "cuda"], "--relative: does not go together with --backend cuda"),
    (["attend", "a", "b", "--threads", "0"], "integer >= 1"),
    (["make", "random", "a"], "--tokens"),
    (["make", "noise", "a"], "invalid choice"),
    (["make", "random", "a", "--tokens", "5", "--heads", "3", "--kv-heads", "2"], "multiple of --kv-heads"),
    (["make", "text", "a", "--tokens", "5", "--queries", "6"], "--queries must be at most"),
    (["bench", "everything"], "invalid choice"),
    (["analyse", "a", "b"], "RESULT.h5"),
    (["analyse", "a", "b", "c", "--top", "0"], "integer >= 1"),
    (["analyse", "a", "b", "c", "--rows", "1,x"], "integer >= 0"),
])
def test_argument_errors_need_no_mpi(arguments, text):
    said = without_mpi(*arguments)
    assert said.returncode == 2, said.stderr
    assert text in said.stderr


def test_no_mpi_is_an_error_of_the_environment(tmp_path):
    assert code("make", "random", "in.h5", "--tokens", "4") == 0
    said = without_mpi("attend", "in.h5", "out.h5")
    assert said.returncode == 4
    assert "no MPI library" in said.stderr
    assert not (tmp_path / "out.h5").exists()


def test_info_without_mpi():
    said = without_mpi("info")
    assert said.returncode == 0
    assert "no MPI library" in said.stdout
    assert "numpy" in said.stdout
    assert "backend cuda" in said.stdout
    assert "GPU transport" in said.stdout


def test_python_m():
    said = subprocess.run([sys.executable, "-m", "ringmpi", "--version"], capture_output=True, text=True, timeout=60,
                          check=True)
    assert said.stdout.startswith("ringmpi ")


def test_the_page_lists_the_commands():
    page = (Path(__file__).parent.parent / "docs/commandline.rst").read_text()
    assert dict(re.findall(r"^``(\w+)``  +(.+)$", page, re.M)) == COMMANDS


@pytest.mark.parametrize(("line", "words"), [
    ("ringmpi at", {"attend"}), ("ringmpi attend in.h5 out.h5 --lay", {"--layout"}),
    ("ringmpi attend in.h5 out.h5 --layout s", {"striped"}), ("ringmpi bench ker", {"kernel"}),
    ("ringmpi check in", {"in.h5"})])
def test_bash_completes(line, words, tmp_path):
    pytest.importorskip("shtab")
    (tmp_path / "in.h5").touch()
    said = without_mpi("--print-completion", "bash")
    assert said.returncode == 0, said.stderr
    (tmp_path / "completion").write_text(said.stdout)
    subprocess.run(["bash", "-n", "completion"], cwd=tmp_path, check=True, timeout=20)
    ask = f"""source ./completion; COMP_WORDS=({line}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
_shtab_ringmpi; printf '%s\\n' "${{COMPREPLY[@]}}\""""
    found = subprocess.run(["bash", "-c", ask], cwd=tmp_path, capture_output=True, text=True, timeout=20)
    assert found.returncode == 0, found.stderr
    assert set(found.stdout.split()) == words


def test_completion_for_other_shells(tmp_path):
    pytest.importorskip("shtab")
    for shell in ("zsh", "tcsh"):
        said = without_mpi("--print-completion", shell)
        assert said.returncode == 0, said.stderr
        assert all(name in said.stdout for name in COMMANDS)
    assert without_mpi("--print-completion", "fish").returncode == 2


def test_completion_without_shtab():
    code = "import sys; sys.modules['shtab'] = None; from ringmpi.cli import main; sys.exit(main())"
    said = subprocess.run([sys.executable, "-c", code, "--print-completion", "bash"], capture_output=True, text=True,
                          timeout=60)
    assert said.returncode == 4
    assert "pip install shtab" in said.stderr


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_make_attend_check_merge(capsys, dtype):
    assert code("make", "random", "in.h5", "--tokens", 300, "--queries", 200, "--heads", 4, "--kv-heads", 2,
                "--dim", 16, "--dim-v", 24, "--dtype", dtype, "--documents", 3) == 0
    options = ["--causal", "--window", "50,", "--first", "2", "--documents", "--q-offset", "100", "--prefix", "9",
               "--scale", "0.3"]
    assert code("attend", "in.h5", "out.h5", *options, "--layout", "zigzag", "--json", "run.json") == 0
    assert "200 tokens on 1 rank: " in capsys.readouterr().out
    assert code("check", "in.h5", "out.h5", "--rows", "40") == 0
    assert "passed: 40 rows" in capsys.readouterr().out
    assert code("check", "in.h5", "out.h5", "--window", "7,7") == 1          # another mask than was run
    assert code("merge", "out.h5", "single.h5") == 0
    with h5py.File("out.h5") as a, h5py.File("single.h5") as b:
        assert a["out"].shape == (200, 4, 24)
        for name in ("out", "lse"):
            np.testing.assert_array_equal(a[name][...], b[name][...])
    record = json.loads(Path("run.json").read_text())
    assert record["options"]["window"] == [50, None]
    assert record["pairs"] > 0
    assert record["per_rank"][0]["steps"][0]["pairs"] == record["pairs"]


MASKS = {
    "causal": (["--causal"], {"causal": True}),
    "window": (["--window", "9"], {"window": (9, 9)}),
    "sides": (["--window", "4,"], {"window": (4, None)}),
    "first": (["--window", "5,0", "--first", "3"], {"window": (5, 0), "first": 3}),
    "prefix": (["--causal", "--prefix", "30"], {"causal": True, "prefix": 30}),
    "offset": (["--causal", "--q-offset", "-7"], {"causal": True, "q_offset": -7}),
    "documents": (["--documents", "--q-offset", "30"], {"documents": [0, 20, 50, 90], "q_offset": 30}),
    "trees": (["--documents", "--q-offset", "30", "--causal", "--prompts", "--parents", "--spans"],
              {"documents": [0, 20, 50, 90], "q_offset": 30, "causal": True, "prompts": [(-1, -1), (3, 9), (-1, -1)],
               "parents": [-1, -1, 0], "spans": [(60, 70), (10, 13)]}),
    "numbered": (["--document-ids", "--q-offset", "10"],
                 {"document_ids": np.arange(90) // 10 % 4 - 1, "q_offset": 10}),
    "holes": (["--key-mask", "--keys", "81"], {"key_mask": np.arange(90) % 11 > 1, "keys": 81}),
    "offsets of queries": (["--causal", "--documents", "--q-documents"],
                           {"causal": True, "documents": [0, 20, 50, 90], "q_documents": [0, 20, 25, 58]}),
    "everything": (["--causal", "--window", "20,5", "--first", "2", "--prefix", "11", "--documents",
                    "--q-offset", "13"],
                   {"causal": True, "window": (20, 5), "first": 2, "prefix": 11, "documents": [0, 30, 55, 81, 90],
                    "q_offset": 13}),
}


@pytest.mark.parametrize("name", MASKS)
def test_every_mask_option_does_what_it_says(name):
    options, mask = MASKS[name]
    assert code("make", "random", "in.h5", "--tokens", 90, "--queries", 60, "--heads", 2, "--dim", 8, "--dtype",
                "float64") == 0
    with h5py.File("in.h5", "r+") as file:
        for array in set(mask) & set(ARRAYS):
            file[array] = mask[array]
    assert code("attend", "in.h5", "out.h5", *options, "--scale", "0.7", "--quiet") == 0
    with h5py.File("in.h5") as file, h5py.File("out.h5") as result:
        q, k, v = (file[x][...] for x in "qkv")
        want, want_lse = oracle.attend(q, k, v, oracle.visible(60, 90, **mask), 0.7)
        assert oracle.error(result["out"][...], want) < 1e-13
        assert oracle.error(result["lse"][...], want_lse) < 1e-13
    assert code("check", "in.h5", "out.h5") == 0


@pytest.mark.parametrize(("options", "grid"), [
    (["--grid", "6x7", "--grid-window", "2:0"], ((6, 7), [(2, 0), (2, 0)])),
    (["--grid", "42", "--grid-window", "3:1", "--grid-periodic", "0"], (42, [(3, 1)], True)),
    (["--grid", "2x3x7", "--grid-window", "1,,0:2", "--grid-edges", "shifted", "--causal"],
     ((2, 3, 7), [1, None, (0, 2)], False, "shifted", True)), (["--grid", "6x7"], ((6, 7), None))])
def test_a_grid_by_its_options(options, grid):
    """One window for every axis, and one for each."""
    assert make_mask(Options.from_record(vars(parsed(options)))) == Grid(*grid)


@pytest.mark.parametrize(("options", "message"), [
    (["--grid", "6x"], "numbers from 0 on"), (["--grid", "6x7", "--grid-window", "1:2:3"], "before:after"),
    (["--grid", "6x7", "--grid-window", "1,2,3"], "each of 2 axes"), (["--grid", "6x7", "--q-offset", "0"], "q_offset"),
    (["--grid-periodic", "1"], "belongs to a grid"), (["--grid-edges", "shifted"], "belongs to a grid"),
    (["--grid", "6x7", "--grid-periodic", "2"], "axes from 0 to 1"), (["--grid", "6x7", "--spans"], "spans"),
    (["--grid", "6x7", "--keys", "5"], "keys")])
def test_options_of_a_grid_that_make_no_sense(options, message):
    with pytest.raises(OptionError, match=message):
        make_mask(Options.from_record(vars(parsed(options))))


def parsed(options):
    parser = argparse.ArgumentParser()
    add_attention(parser)
    return parser.parse_args(options)


@pytest.mark.parametrize(("name", "array", "message"), [
    ("document_ids", np.full(90, 2**63, "u8"), "below 2.63"), ("spans", [3, 4], r"expected shape \(ranges, ends\)"),
    ("spans", [[1, 2, 3]], "expected pairs of integers"),
    ("spans", [[0, 8], [7, 9]], r"do not overlap, got \[0, 8\] and \[7, 9\]"), ("spans", [[80, 91]], "ends at 91"),
    ("spans", [[0.5, 1]], "expected integers"), ("document_ids", [1, 2, 3], "expected one for each of 90 keys, got 3"),
    ("parents", [-1, -1], "each of 3 documents"), ("parents", [1, 2, 0], "its own ancestor"),
    ("prompts", [[0, 95]] * 3, "ends at 95"), ("key_mask", np.arange(90), "expected booleans"),
    ("key_mask", [True, False], "each of 90 keys, got 2"), ("spans", [[True, False]], "expected integers"),
    ("q_documents", [0, 20, 40, 91], "at most the number of queries, 90, got 91")])
def test_arrays_of_a_mask_that_make_no_sense(name, array, message, capsys):
    assert code("make", "random", "in.h5", "--tokens", 90, "--heads", 2, "--dim", 8) == 0
    with h5py.File("in.h5", "r+") as file:
        file[name] = array
        file["documents"] = [0, 20, 50, 90]
    packed = [] if name == "document_ids" else ["--documents"]
    assert code("attend", "in.h5", "out.h5", *packed, "--" + name.replace("_", "-")) == 3
    assert re.search(message, capsys.readouterr().err)
    assert not Path("out.h5").exists()


def test_more_threads_than_anybody_means_are_refused(capsys):
    assert code("make", "random", "in.h5", "--tokens", 50, "--heads", 2) == 0
    for command in (["attend", "in.h5", "out.h5"], ["attend", "in.h5", "out.h5", "--dry-run"],
                    ["bench", "kernel", "--shape", "8x8"], ["bench", "ring", "--tokens", 8]):
        capsys.readouterr()
        assert code(*command, "--threads", 100000) == 2
        assert "threads: expected at most" in capsys.readouterr().err


def test_a_warning_is_one_line():
    """It names no line of our code."""
    assert code("make", "random", "in.h5", "--tokens", 3, "--heads", 70) == 0
    command = ["attend", "in.h5", "out.h5", "--backend", "numpy", "--quiet"]
    done = subprocess.run([sys.executable, "-m", "ringmpi", *command],
                          capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr.startswith("ringmpi: q, k and v: 70 heads and 3 tokens in all, which looks like (heads, tokens")
    assert done.stderr.count("\n") == 1


def test_documents_may_be_empty_and_leave_padding(capsys):
    assert code("make", "random", "in.h5", "--tokens", 90, "--heads", 2, "--dim", 8, "--documents", 3) == 0
    with h5py.File("in.h5", "r+") as file:
        file["documents"][...] = [0, 30, 30, 80]
        q, k, v = (file[name][...] for name in "qkv")
    assert code("attend", "in.h5", "out.h5", "--documents", "--causal") == 0
    assert code("check", "in.h5", "out.h5", "--rows", 90) == 0
    with h5py.File("out.h5") as file:
        out, lse = file["out"][...], file["lse"][...]
    want, _ = oracle.attend(q, k, v, oracle.visible(90, 90, causal=True, documents=[0, 30, 30, 80]), 8**-0.5)
    assert oracle.error(out, want) < 2e-6
    assert (out[80:] == 0).all()
    assert (lse[80:] == -np.inf).all()


def test_run_options_do_what_they_say(capsys):
    assert code("make", "random", "in.h5", "--tokens", 50, "--heads", 2) == 0
    capsys.readouterr()
    for products in ("auto", "widen"):
        assert code("attend", "in.h5", "o.h5", "--force", "--bfloat16-products", products, "--json", "r.json") == 0
        record = json.loads(Path("r.json").read_text())
        assert record["bfloat16_products"] == ("widen" if products == "widen" or amx.missing() else "tiles")
        assert record["options"]["bfloat16_products"] == products
        assert record["float32_products"] == ("fma" if amx.missing() else "pieces")
    assert code("attend", "in.h5", "o.h5", "--force", "--backend", "numpy", "--bfloat16-products", "pairs") == 4
    assert "'pairs' is not there on rank 0" in capsys.readouterr().err
    for backend in ("numpy", "numba"):
        assert code("attend", "in.h5", f"{backend}.h5", "--backend", backend, "--threads", 3, "--json", "r.json",
                    "--accumulator", "float64", "--quiet") == 0
        record = json.loads(Path("r.json").read_text())
        assert record["backend"] == backend
        assert record["per_rank"][0]["threads"] == 3
        with h5py.File(f"{backend}.h5") as file:
            assert file["lse"].dtype == np.float64
            assert file["out"].dtype == np.float32
        assert code("check", "in.h5", f"{backend}.h5") == 0
        assert "passed" in capsys.readouterr().out
    assert code("attend", "in.h5", "out.h5", "--quiet") == 0
    assert capsys.readouterr().out == ""
    assert record["flop"] == 50 * 50 * 2 * 2 * (64 + 64)


def test_one_file_can_not_be_two_things(tmp_path):
    assert code("make", "random", "in.h5", "--tokens", 5) == 0
    before = Path("in.h5").read_bytes()
    for arguments in (["in.h5", "in.h5", "--force"], ["in.h5", "out.h5", "--json", "./in.h5"],
                      ["in.h5", "out.h5", "--json", "out.h5"], ["in.h5", "out.h5", "--json", "gone/x.json"]):
        assert code("attend", *arguments) == (6 if "gone/x.json" in arguments else 2)
        assert code("attend", *arguments, "--dry-run") == (6 if "gone/x.json" in arguments else 2)
    assert Path("in.h5").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["in.h5"]


@pytest.mark.parametrize("wrong", ["sign of a quiet head", "lse", "one element"])
def test_check_sees_errors_beside_large_numbers(wrong):
    """An error in a head of small values must not hide behind a head of large ones."""
    assert code("make", "random", "in.h5", "--tokens", 60, "--heads", 2, "--dim", 8) == 0
    with h5py.File("in.h5", "a") as file:
        file["v"][:, 0] *= 1e7
    assert code("attend", "in.h5", "out.h5", "--quiet") == 0
    assert code("check", "in.h5", "out.h5", "--rows", 60) == 0
    manifest = read_manifest("out.h5")
    out, lse = (manifest.rows(name, 0, 60) for name in ("out", "lse"))
    if wrong == "lse":
        lse[17, 1] += 1e-4
    elif wrong == "one element":
        out[17, 1, 3] += 1e-4
    else:
        out[:, 1] *= -1
    output = Output("wrong.h5", "run", False)
    output.prepare()
    output.publish([output.write(0, 0, out, lse)], {"out": (out.shape, out.dtype), "lse": (lse.shape, lse.dtype)},
                   manifest.record)
    assert code("check", "in.h5", "wrong.h5", "--rows", 60) == 1


def test_check_allows_what_rounding_explains_for_large_scores():
    assert code("make", "random", "in.h5", "--tokens", 300, "--heads", 2, "--dim", 64) == 0
    assert code("attend", "in.h5", "out.h5", "--scale", "20", "--quiet") == 0
    assert code("check", "in.h5", "out.h5", "--rows", 300) == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_check_with_numbers_that_are_not_finite(bad):
    """A key that most rows do not see excuses no error in those rows, and makes no right result wrong."""
    assert code("make", "random", "in.h5", "--tokens", 40, "--heads", 1, "--dim", 8) == 0
    with h5py.File("in.h5", "a") as file:
        file["k"][-1] = bad
    assert code("attend", "in.h5", "out.h5", "--causal", "--quiet") == 0
    assert code("check", "in.h5", "out.h5", "--rows", 40) == 0
    manifest = read_manifest("out.h5")
    out, lse = (manifest.rows(name, 0, 40) for name in ("out", "lse"))
    output = Output("wrong.h5", "run", False)
    output.prepare()
    output.publish([output.write(0, 0, out + 1, lse)], {"out": (out.shape, out.dtype), "lse": (lse.shape, lse.dtype)},
                   manifest.record)
    assert code("check", "in.h5", "wrong.h5", "--rows", 40) == 1


def test_names_that_hdf5_would_expand(tmp_path):
    assert code("make", "random", "in.h5", "--tokens", 5) == 0
    assert code("attend", "in.h5", "o%b.h5") == 2
    assert [p.name for p in tmp_path.iterdir()] == ["in.h5"]


def test_scale_beyond_the_accumulator(capsys):
    assert code("make", "random", "in.h5", "--tokens", 5) == 0
    assert code("attend", "in.h5", "out.h5", "--scale", "1e39") == 2
    assert "not finite in the accumulator's dtype, float32" in capsys.readouterr().err


def test_make_random_is_reproducible_and_seeded():
    for name, seed in (("a.h5", 1), ("b.h5", 1), ("c.h5", 2)):
        assert code("make", "random", name, "--tokens", 20, "--seed", seed) == 0
    with h5py.File("a.h5") as a, h5py.File("b.h5") as b, h5py.File("c.h5") as c:
        assert (a["q"][...] == b["q"][...]).all()
        assert not (a["q"][...] == c["q"][...]).any()
        assert not (a["q"][...] == a["k"][...]).any()


def test_check_finds_a_wrong_number():
    assert code("make", "random", "in.h5", "--tokens", 50) == 0
    assert code("attend", "in.h5", "out.h5") == 0
    assert code("make", "random", "in.h5", "--tokens", 50, "--seed", 1, "--force") == 0
    assert code("check", "in.h5", "out.h5") == 1
    assert code("make", "random", "in.h5", "--tokens", 51, "--force") == 0
    assert code("check", "in.h5", "out.h5") == 3


def test_zero_tokens(capsys):
    assert code("make", "random", "in.h5", "--tokens", 0) == 0
    assert code("attend", "in.h5", "out.h5", "--causal") == 0
    assert code("check", "in.h5", "out.h5") == 0
    assert code("merge", "out.h5", "single.h5") == 0
    with h5py.File("single.h5") as file:
        assert file["out"].shape == (0, 8, 64)
    with h5py.File("out.h5") as file:
        assert file["lse"].shape == (0, 8)


def test_a_schedule_takes_the_buffers_that_a_dry_run_says(tmp_path):
    code("make", "random", "in.h5", "--tokens", 2**16, "--heads", 8, "--kv-heads", 2)
    buffers = {}
    for schedule in ("ring", "gather"):
        for backend in ("numpy", "cuda"):
            said = without_mpi("attend", "in.h5", "out.h5", "--dry-run", "--expect-ranks", "8", "--backend", backend,
                               "--schedule", schedule).stdout
            assert {"ring": "in 7 hops", "gather": "to 7 ranks"}[schedule] in said
            buffers[schedule, backend] = float(re.search(r"K/V buffers +([\d.]+) MiB", said).group(1))
    block = buffers["ring", "numpy"] / 2
    assert block > 0
    assert buffers == {("ring", "numpy"): 2 * block, ("ring", "cuda"): 2 * block, ("gather", "numpy"): 7 * block,
                       ("gather", "cuda"): 8 * block}


def test_a_dry_run_counts_what_a_grid_exchanges(tmp_path):
    """As much as a rank then takes: queries and states of others, and heads."""
    code("make", "random", "in.h5", "--tokens", 2**12, "--heads", 8, "--kv-heads", 2)
    said = {schedule: without_mpi("attend", "in.h5", "out.h5", "--dry-run", "--expect-ranks", "8", "--schedule",
                                  schedule).stdout for schedule in ("mesh", "heads", "queries", "2x2x2:gather")}
    assert ["queries of others" in said[name] for name in said] == [True, False, True, True]
    assert ["exchange of heads" in said[name] for name in said] == [False, True, False, True]
    assert ["query traffic" in said[name] for name in said] == [True, False, True, True]
    assert ["head traffic" in said[name] for name in said] == [False, True, False, True]
    dry = "attend", "in.h5", "out.h5", "--dry-run", "--expect-ranks", "8"
    for backend in ("numba", "cuda"):
        tiled = without_mpi(*dry, "--order", "canonical", "--backend", backend).stdout
        assert "K/V in tiles" in tiled
        assert "down a tree to 7 ranks" in tiled
    for options, said in ((("--schedule", "mesh"), "1x1x8:broadcast would do"),
                          (("--schedule", "4x1x2:broadcast"), "to divide the 2 heads of the keys"),
                          (("--backend", "numpy"), "whose sums have a fixed order, numba or cuda, got numpy; take")):
        wrong = without_mpi(*dry, "--order", "canonical", *options)
        assert wrong.returncode == 2
        assert said in wrong.stderr
    wrong = without_mpi(*dry, "--schedule", "3x1x3")
    assert wrong.returncode == 2
    assert "expected heads x queries x keys to be the number of ranks, 8, got 9; 1x1x8:ring would do" in wrong.stderr


def test_a_bias_of_the_keys_is_counted():
    """It travels with k and v."""
    code("make", "random", "in.h5", "--tokens", 2**15, "--heads", 4, "--kv-heads", 2, "--dim", 16)
    with h5py.File("in.h5", "r+") as file:
        file["key_bias"] = np.zeros((2**15, 4), "f4")
    dry = "attend", "in.h5", "out.h5", "--dry-run", "--expect-ranks", "4", "--schedule"
    sent = [float(re.search(r"K/V traffic +(\S+) MiB", without_mpi(*dry, "ring", *flags).stdout)[1])
            for flags in ([], ["--key-bias"])]
    assert sent == [6.0, 6.4]                    # 8,192 keys of 256 bytes, 3 hops; and 16 bytes more of each


def test_a_dry_run_says_what_auto_would_choose_within_a_limit(tmp_path):
    """And a run refuses a limit that nothing meets, with the smallest need."""
    code("make", "random", "in.h5", "--tokens", 2**12, "--heads", 8, "--kv-heads", 2)
    dry = "attend", "in.h5", "out.h5", "--dry-run", "--expect-ranks", "8"
    said = without_mpi(*dry).stdout
    assert re.search(r"schedule +\d+x\d+x\d+:[\w-]+ chosen as if all ranks were on this node", said)
    wrong = without_mpi(*dry, "--memory-limit", "10KiB")
    assert wrong.returncode == 2
    least = int(re.search(r"memory limit: expected (\d+) bytes a rank at least", wrong.stderr).group(1))
    assert f"{least / 2**20:.1f} MiB" in wrong.stderr
    assert without_mpi(*dry, "--memory-limit", str(least)).returncode == 0
    assert without_mpi(*dry, "--memory-limit", "much").returncode == 2
    assert code("attend", "in.h5", "out.h5", "--memory-limit", "10KiB", "--quiet") == 2
    assert not Path("out.h5").exists()


@pytest.mark.parametrize("schedule", ["auto", "ring"])
def test_a_limit_that_is_too_little_names_the_ranks_that_would_do(schedule):
    code("make", "random", "in.h5", "--tokens", 2**12, "--heads", 8, "--kv-heads", 2)
    dry = "attend", "in.h5", "out.h5", "--dry-run", "--memory-limit", "1MiB", "--schedule", schedule, "--expect-ranks"
    wrong = without_mpi(*dry, "2")
    assert wrong.returncode == 2
    enough = int(re.search(r"more ranks need less each: (\d+) ranks would do", wrong.stderr).group(1))
    assert without_mpi(*dry, enough).returncode == 0
    assert without_mpi(*dry, enough - 1).returncode == 2
    wrong = without_mpi("attend", "in.h5", "out.h5", "--dry-run", "--memory-limit", "1KiB", "--expect-ranks", "2")
    assert "but no number of ranks would do" in wrong.stderr


def test_a_dry_run_says_time_and_output_and_what_is_never_made():
    code("make", "random", "in.h5", "--tokens", 2**14, "--heads", 8, "--kv-heads", 2)
    dry = "attend", "in.h5", "out.h5", "--dry-run", "--expect-ranks", "4", "--threads", "1"
    said = [without_mpi(*dry, *mask).stdout for mask in ((), ("--causal",), ("--backend", "numpy"))]
    found = [re.search(r"^computing +([\d.]+) (m?)s about", text, re.MULTILINE) for text in said]
    full, causal, by_numpy = (float(text[1]) / (1000 if text[2] else 1) for text in found)
    assert 1.9 < full / (causal / 7 * 4) < 2.1              # the last rank has 7 of 16 parts of the triangle
    assert by_numpy > full
    assert re.search(r"^matrix of scores +8 GiB of all ranks, which is never made$", said[0], re.MULTILINE)
    code("attend", "in.h5", "out.h5", "--causal", "--window", 8, "--quiet")
    predicted = float(re.search(r"^output +([\d.]+) MiB on disk", said[0], re.MULTILINE)[1]) * 2**20
    size = sum(path.stat().st_size for path in Path("out.h5.shards").rglob("*.h5"))
    assert abs(size / predicted - 1) < 0.01
    assert "computing" not in without_mpi(*dry, "--backend", "cuda").stdout


@pytest.mark.parametrize(("said", "ranks"), [
    ({"SLURM_MEM_PER_NODE": "700"}, 4), ({"SLURM_MEM_PER_CPU": "70", "SLURM_CPUS_ON_NODE": "10"}, 4),
    ({"SLURM_MEM_PER_NODE": "360", "SLURM_NNODES": "2"}, 2)])
def test_a_dry_run_knows_what_slurm_gives(monkeypatch, said, ranks):
    """To all ranks of a node together; it says how many nodes would do."""
    code("make", "random", "in.h5", "--tokens", 2**16, "--heads", 8, "--kv-heads", 2, "--force")
    dry = "attend", "in.h5", "out.h5", "--dry-run", "--backend", "numpy", "--schedule", "ring", "--expect-ranks"
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    wrong = without_mpi(*dry, "4")
    assert wrong.returncode == 4, wrong.stderr
    found = re.search(rf"memory of a node: expected ([\d,]+) MiB for {ranks} ranks, got [37][06]0 MiB .SLURM_.* ask "
                      r"for more .Slurm: --mem=(\d+)M., or take ([\d,]+) ranks on (\d+) nodes", wrong.stderr)
    assert found, wrong.stderr
    needed, asked, more, nodes = (int(text.replace(",", "")) for text in found.groups())
    assert abs(needed - asked) <= 1
    assert more == nodes * ranks
    monkeypatch.setenv("SLURM_NNODES", str(nodes))
    assert without_mpi(*dry, more).returncode == 0
    monkeypatch.setenv("SLURM_NNODES", str(nodes - 1))
    assert without_mpi(*dry, (nodes - 1) * ranks).returncode == 4
    monkeypatch.setenv("SLURM_NNODES", said.get("SLURM_NNODES", "1"))
    monkeypatch.setenv("SLURM_MEM_PER_NODE", str(asked))
    assert without_mpi(*dry, "4").returncode == 0
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "100")                 # less than the libraries take
    assert "or take fewer ranks on a node" in without_mpi(*dry, "4").stderr
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "0")                   # all of the node
    monkeypatch.delenv("SLURM_MEM_PER_CPU", raising=False)
    assert without_mpi(*dry, "4").returncode == 0


def test_dry_run_needs_no_mpi_and_writes_nothing(tmp_path):
    code("make", "random", "in.h5", "--tokens", 4096, "--heads", 8, "--kv-heads", 2)
    said = without_mpi("attend", "in.h5", "out.h5", "--dry-run", "--expect-ranks", "4", "--layout", "striped")
    assert said.returncode == 0, said.stderr
    assert "K/V buffers" in said.stdout
    assert "in 3 hops" in said.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["in.h5"]
    gpu = without_mpi("attend", "in.h5", "out.h5", "--dry-run", "--expect-ranks", "4", "--backend", "cuda")
    assert gpu.returncode == 0, gpu.stderr
    assert "K/V buffers" in gpu.stdout
    assert "process and libraries" not in gpu.stdout          # what is said is of the GPU's memory
    assert without_mpi("attend", "gone.h5", "out.h5", "--dry-run").returncode == 3
    assert without_mpi("attend", "in.h5", "out.h5", "--dry-run", "--documents").returncode == 3


@pytest.mark.parametrize(("variable", "value"), [
    ("SLURM_NTASKS", "4"), ("PMI_SIZE", "3"), ("OMPI_COMM_WORLD_SIZE", "2"), ("SLURM_STEP_NUM_TASKS", "2")])
def test_ranks_that_do_not_know_each_other(monkeypatch, capsys, variable, value):
    code("make", "random", "in.h5", "--tokens", 4)
    monkeypatch.setenv(variable, value)
    assert code("attend", "in.h5", "out.h5") == 4
    assert f"expected {value} ranks ({variable}), got 1" in capsys.readouterr().err
    assert code("attend", "in.h5", "out.h5", "--expect-ranks", "1") == 0
    # a batch script that runs `check` after srun has SLURM_NTASKS too
    assert code("make", "random", "b.h5", "--tokens", 4) == (0 if variable == "SLURM_NTASKS" else 4)
    assert (f"make runs in one process, got {value}" in capsys.readouterr().err) == (variable != "SLURM_NTASKS")


def test_an_mpiexec_knows_better_than_the_slurm_around_it(monkeypatch):
    """In a batch script it starts its ranks through a step of Slurm's, with one task a node."""
    code("make", "random", "in.h5", "--tokens", 4)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.setenv("PMI_SIZE", "1")
    assert code("attend", "in.h5", "out.h5") == 0


def test_expect_ranks(capsys):
    code("make", "random", "in.h5", "--tokens", 4)
    assert code("attend", "in.h5", "out.h5", "--expect-ranks", "4") == 4
    assert "expected 4 ranks (--expect-ranks), got 1" in capsys.readouterr().err


@pytest.mark.parametrize(("error", "number", "text"), [
    (ZeroDivisionError("what"), 70, "Traceback (most recent call last):"),
    (InternalError("rank 3: Traceback"), 70, "ringmpi: rank 3: Traceback"),
    (MemoryError("Unable to allocate 9 GiB"), 4, "not enough memory: Unable to allocate 9 GiB; `ringmpi attend --dry"),
    (ResourceError("a cache"), 4, "ringmpi: a cache"),
    (OSError(errno.EIO, "Input/output error", "in.h5"), 3, "Input/output error: 'in.h5'"),
    (OSError(errno.ENOSPC, "No space left on device"), 6, "No space left on device"),
    (OSError(errno.EMFILE, "Too many open files"), 4, "Too many open files"),
    (OSError("no number"), 70, "Traceback (most recent call last):"),
    (KeyboardInterrupt(), 130, "interrupted"),
])
def test_the_exit_code_says_whose_error_it_is(monkeypatch, capsys, error, number, text):
    """And a traceback is printed for errors of our own, and for no others."""
    def run(_):
        raise error
    monkeypatch.setattr("ringmpi.commands.info.run", run)
    assert code("info") == number
    said = capsys.readouterr().err
    assert text in said
    assert ("Traceback" in said) == (number == 70)


def actions(parser):
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for sub in action.choices.values():
                yield from actions(sub)
        else:
            yield action


@pytest.mark.parametrize("command", COMMANDS)
def test_help_says_every_default(command):
    parser = argparse.ArgumentParser()
    importlib.import_module(f"ringmpi.commands.{command}").add_arguments(parser)
    for action in actions(parser):
        if action.option_strings and action.default not in (None, False, argparse.SUPPRESS):
            assert "default: " in (action.help or ""), action.option_strings
        assert action.help or not action.option_strings, action.option_strings


def test_the_name_of_the_mpi_library(monkeypatch):
    """Open MPI's version ends in a NUL; MPICH's has tabs."""
    class Library:
        Get_library_version = staticmethod(lambda: "Open MPI\tv5.0,  package: X\0\nmore\n")
    monkeypatch.setattr("ringmpi.mpi.world.load", lambda: Library)
    assert mpi_world.library() == "Open MPI v5.0, package: X"


def test_where_debians_mpich_is(monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    monkeypatch.setattr("ringmpi.mpi.library.debian_mpich", lambda: "/usr/lib/x/libmpich.so.12")
    with pytest.raises(LaunchError, match=r"ln -s /usr/lib/x/libmpich.so.12 ~/mpich/libmpi.so.12 && export LD_LIB"):
        load()
    monkeypatch.setattr("ringmpi.mpi.library.debian_mpich", lambda: "")
    with pytest.raises(LaunchError, match=r"pip install 'ringmpi\[mpich\]'$"):
        load()


@pytest.mark.parametrize("name", ["quiet", "not"])
def test_waits_are_said_unless_quiet(name):
    """The library's log is shown, even without a terminal."""
    run = ("import logging, sys; from ringmpi.commands import info\n"
           "def run(_): logging.getLogger('ringmpi').warning('waiting for rank 3'); return 0\n"
           "info.run = run\n"
           "info.add_arguments = lambda parser: parser.add_argument('--quiet', action='store_true')\n"
           "from ringmpi.cli import main; sys.exit(main())")
    said = subprocess.run([sys.executable, "-c", run, "info", *(["--quiet"] if name == "quiet" else [])],
                          capture_output=True, text=True, timeout=60, check=True)
    assert said.stderr == ("" if name == "quiet" else "ringmpi: waiting for rank 3\n")


def test_the_log_of_a_job(capsys, monkeypatch):
    assert code("make", "random", "in.h5", "--tokens", 300, "--heads", 4, "--kv-heads", 2, "--dim", 16) == 0
    assert code("attend", "in.h5", "before.h5", "--causal", "--threads", 2) == 0       # compiles, and may say so
    capsys.readouterr()
    assert code("attend", "in.h5", "out.h5", "--causal", "--threads", 2) == 0
    said = capsys.readouterr().err
    assert re.fullmatch(r"ringmpi: 1 rank on \S+, 2 threads \(numba\); in.h5: 300 queries, 300 keys, heads 4/2, "
                        r"dim 16, float32; predicted: [\d,]+ MiB a rank, some seconds\n", said)
    assert code("attend", "in.h5", "out.h5", "--force", "--quiet") == 0
    assert capsys.readouterr().err == ""
    assert code("attend", "in.h5", "out.h5", "--force", "--threads", 9) == 0
    assert "one rank alone (9 threads): is it meant?" in capsys.readouterr().err
    monkeypatch.setenv("SLURM_NTASKS", "4")
    assert code("attend", "in.h5", "out.h5", "--force", "--threads", 2, "--expect-ranks", 1) == 0
    assert "one rank alone (SLURM_NTASKS says 4): is it meant?" in capsys.readouterr().err


def test_names_of_datasets():
    code("make", "random", "in.h5", "--tokens", 30)
    with h5py.File("in.h5", "a") as file:
        file.move("q", "layer/query")
    assert code("attend", "in.h5", "out.h5", "--q", "layer/query") == 0
    assert code("check", "in.h5", "out.h5") == 0


def test_attend_from_python(tmp_path):
    code("make", "random", "in.h5", "--tokens", 30)
    report = attend(tmp_path / "in.h5", tmp_path / "out.h5", Options(causal=True))
    assert report.pairs == 30 * 31 // 2
    assert report.ranks == 1
    assert report.gflops > 0
    assert "compile" in report.phases            # nothing, where the process has compiled before


def test_compiling_is_no_part_of_attending():
    timer = PhaseTimer()
    timer.phases["attend"] = 3.0
    timer.move(1.0, source="attend", target="compile")
    assert timer.phases == {"attend": 2.0, "compile": 1.0}


def test_bench(capsys):
    assert code("bench", "kernel", "--shape", "64x64", "--repeat", 1, "--json", "b.json") == 0
    assert code("bench", "ring", "--tokens", 64, "--repeat", 1, "--causal") == 0
    assert code("bench", "ring", "--tokens", 64, "--repeat", 1, "--causal", "--pass", "backward", "--order",
                "canonical") == 0
    said = capsys.readouterr().out
    assert "GFLOP/s" in said
    assert "zigzag" in said
    assert said.count("striped, canonical order") == 1
    rows = json.loads(Path("b.json").read_text())["rows"]
    assert {row["kernel"] for row in rows} >= {"numpy", "numba"}
    assert {row["pass"] for row in rows} == {"forward"}


def test_bench_of_a_bias():
    for kind in ("key", "head"):
        assert code("bench", "kernel", "--shape", "64x64", "--dim", 8, "--repeat", 1, "--key-bias", kind, "--pass",
                    "forward", "backward", "--kernels", "numba", "numpy", "--json", "b.json") == 0
        rows = json.loads(Path("b.json").read_text())["rows"]
        assert {row["kernel"] for row in rows} == {"numba", "numba, key_bias", "numpy", "numpy, key_bias"}
        assert all(row["x plain"] == 1 for row in rows if "key_bias" not in row["kernel"])


def test_rates_that_cannot_be_kept(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert code("bench", "network", "--mib", 1, "--repeat", 1, "--save", tmp_path / "file" / "rates.json") == 6
    assert "take another with --save FILE" in capsys.readouterr().err


def test_bench_of_a_step(capsys):
    assert code("bench", "decode", "--keys", 3, 70, "--heads", 4, "--kv-heads", 2, "--dim", 8, "--repeat", 1,
                "--json", "d.json") == 0
    rows = json.loads(Path("d.json").read_text())["rows"]
    assert [(row["keys a rank"], row["read us"]) for row in rows] == [(3, None), (70, None)]
    assert all(row["x Allgathers"] == row["step us"] / row["2 Allgathers us"] for row in rows)
    assert "x Allgathers" in capsys.readouterr().out
    assert code("bench", "decode", "--heads", 3, "--kv-heads", 2) == 2
    assert "multiple of --kv-heads 2" in capsys.readouterr().err


def test_bench_of_small_calls(capsys):
    assert code("bench", "small", "--shape", "1x3", "5x7", "--heads", "4/2", "--dim", 8, "--threads", 1, "--repeat", 1,
                "--json", "s.json") == 0
    rows = json.loads(Path("s.json").read_text())["rows"]
    assert [(row["queries"], row["keys"], row["heads"]) for row in rows] == [(1, 3, "4/2"), (5, 7, "4/2")]
    for row in rows:
        flop = 4 * row["queries"] * row["keys"] * 4 * 8
        assert row["GFLOP/s"] == pytest.approx(flop / row["us"] / 1e3)
        assert row["of peak"] == pytest.approx(row["GFLOP/s"] / row["peak GFLOP/s"])
    assert "of peak" in capsys.readouterr().out


def test_bench_of_torchs_call():
    """Beside the same call in its own layout; what a model generates is what one process does."""
    pytest.importorskip("transformers")
    assert code("bench", "torch", "--tokens", 9, "--heads", "2/1", "--dim", 8, "--causal", "--repeat", 1, "--generate",
                5, "--prompt", 12, "--threads", 1, "--json", "t.json") == 0
    rows = json.loads(Path("t.json").read_text())["rows"]
    assert [row["what"] for row in rows] == ["forward", "forward and backward", "generate"]
    assert all(row["ratio"] == pytest.approx(row["peer ms"] / row["ms"]) for row in rows)
    assert rows[-1]["same text"] is True


def test_bench_of_a_window():
    assert code("bench", "ring", "--tokens", 60, "--heads", 1, "--dim", 8, "--window", 2, "--repeat", 1, "--json",
                "w.json") == 0
    rows = json.loads(Path("w.json").read_text())["rows"]
    flop = (60 * 5 - 2 * (1 + 2)) * 4 * 8
    assert all(row["GFLOP/s"] * row["seconds"] * 1e9 == pytest.approx(flop) for row in rows)


@pytest.mark.parametrize("mask", ["full", "causal", "window", "documents"])
def test_bench_of_the_backward_pass(capsys, mask):
    assert code("bench", "kernel", "--shape", "600x600", "--dim", 8, "--mask", mask, "--repeat", 1,
                "--pass", "forward", "backward", "--json", "b.json") == 0
    rows = json.loads(Path("b.json").read_text())["rows"]
    assert [row["pass"] for row in rows] == ["forward"] * (len(rows) // 2) + ["backward"] * (len(rows) // 2)
    first, last = rows[0], rows[-1]
    assert last["GFLOP/s"] * last["seconds"] == pytest.approx(2.5 * first["GFLOP/s"] * first["seconds"])
