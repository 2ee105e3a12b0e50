"""The fault matrix: every row of it happens, ends as it says, and is on the page."""

import json
import re
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

import fault_matrix as matrix
import h5py
import launch
import numpy as np
import pytest
from attack_cases import arrays, left_over
from fault_matrix import CHECKPOINT, EITHER, GROUPS, NOTHING, OLD, PAGE, RESULT, ROWS, WITH_CHECKPOINT, Damage, Fault
from job_files import make_random, write_arrays

from ringmpi.cli import main
from ringmpi.files.shards import merge_shards

HERE = Path(__file__).parent
RANKS = 2
OPTIONS = ["--causal", "--layout", "striped", "--backend", "numpy", "--schedule", "ring"]
TIMEOUT, MARGIN = 40, 25       # seconds of the jobs, and those in which one that hears of a fault has ended
MANIFEST = "manifest.json"


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """A folder with an input, the right result for it, and a checkpoint of half of the work."""
    folder = tmp_path_factory.mktemp("matrix")
    make_random(folder / "in.h5", 101, heads=4, kv_heads=2, dim=16)
    result = attend(folder, folder / "right.h5")
    assert result.code == 0, result.text
    result = attend(folder, folder / "none.h5", "--checkpoint", folder / "c", faults=[matrix.REQUEST])
    assert result.code == 75, result.text
    return folder


def attend(case, out, *options, faults=(), timeout=60):
    start = [HERE / "at_fault.py", json.dumps(faults)] if faults else ["-m", "ringmpi"]
    return launch.launch(RANKS, [*start, "attend", case / "in.h5", out, *OPTIONS, "--timeout", TIMEOUT, *options],
                         folder=out.parent / "said", timeout=timeout, grace=5.0)


def tries(kind):
    """Each try of the rows that are of this kind; all but the first of a row are exhaustive, unless it wants `each`."""
    for row in ROWS.values():
        for number, one in enumerate(row.tries):
            if isinstance(one, Damage) == (kind is Damage):
                rest = number and not row.each
                yield pytest.param(row, one, id=f"{row.name}-{number}", marks=[pytest.mark.exhaustive] * bool(rest))


@pytest.mark.parametrize(("row", "faults"), list(tries(Fault)))
def test_something_happens_to_a_rank(case, tmp_path, row, faults):
    if row.kept:
        shutil.copytree(case / "c", tmp_path / "c")
    if "--force" in row.options:
        assert attend(case, tmp_path / "out.h5").code == 0
    kept = ["--checkpoint", tmp_path / "c"] if row in GROUPS["A signal to one rank of a job with --checkpoint"] or (
        row.kept or row.name in ("full-way", "full-request")) else []
    record = ["--json", tmp_path / "run.json"] if row.name == "full-record" else []
    start = time.monotonic()
    result = attend(case, tmp_path / "out.h5", *kept, *record, *row.options, faults=faults)
    seconds = time.monotonic() - start
    if row.name in MAY_NOT_COME and faults != row.tries[0] and result.code == 0:
        assert arrays(tmp_path / "out.h5") == arrays(case / "right.h5")
        pytest.skip("no rank has come there")
    assert result.code in row.codes, result.text
    assert re.search(row.says, result.text), result.text
    assert "Traceback" not in result.text
    assert not result.left
    assert seconds < MARGIN
    LEFT[row.left](case, tmp_path, result)


# A call of the system that a rank does not come to, or not so often, on this file system.
MAY_NOT_COME = ("kill-saving", "kill-publishing", "kill-replacing")


def only(folder, *names):
    """Whether nothing but these, and whole outputs with their shards, is there."""
    found = [name for name in left_over(folder) if not name.startswith("said") and name.split("/")[0] not in names]
    assert not found


def is_result(case, folder, _):
    assert arrays(folder / "out.h5") == arrays(case / "right.h5")
    only(folder)


def is_checkpoint(case, folder, _):
    assert not (folder / "out.h5").exists()
    assert list((folder / "c").glob(f"*/{MANIFEST}"))
    result = attend(case, folder / "out.h5", "--checkpoint", folder / "c", "--resume", "require")
    assert result.code == 0, result.text
    assert "no checkpoint is used" not in result.text
    assert arrays(folder / "out.h5") == arrays(case / "right.h5")
    assert not (folder / "c").exists()


def is_nothing(_, folder, result):
    assert not list(folder.glob("*out.h5*")), result.text
    assert not list(folder.glob(f"c/*/{MANIFEST}"))


def is_either(case, folder, result):
    out = folder / "out.h5"
    if out.exists():
        assert arrays(out) == arrays(case / "right.h5")
    assert main(["clean", str(out), "--older-than", "0"]) == 0
    only(folder)
    assert out.exists() or not list(folder.glob("*out.h5*")), result.text


def is_as_it_was(case, folder, _):
    assert not (folder / "out.h5").exists()
    for path in (case / "c").rglob("*.*"):
        assert path.is_dir() or (folder / path.relative_to(case)).read_bytes() == path.read_bytes()


LEFT = {RESULT: is_result, CHECKPOINT: is_checkpoint, NOTHING: is_nothing, EITHER: is_either, OLD: is_as_it_was,
        "the old OUT.h5 or the new one, whole": is_either}


def flip(path):
    data = bytearray(path.read_bytes())
    text = data.find(b'"sha256"')                      # in an OUT.h5 there are bytes that nobody reads
    data[text if text > 0 else len(data) // 2] ^= 0x11
    path.write_bytes(data)


def cut(path):
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


def longer(path):
    path.write_bytes(path.read_bytes() + b"\0")


def gone(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def folder_instead(path):
    path.unlink()
    path.mkdir()


DAMAGES = {"flip": flip, "cut": cut, "long": longer, "gone": gone, "folder": folder_instead}


@pytest.fixture
def files(case, tmp_path):
    """One of each kind of file that is read, by its name."""
    shutil.copy(case / "in.h5", tmp_path)
    shutil.copytree(case / "c", tmp_path / "c")
    shutil.copy(case / "right.h5", tmp_path)
    shutil.copytree(case / "right.h5.shards", tmp_path / "right.h5.shards")
    merge_shards(tmp_path / "right.h5", tmp_path / "single.h5")
    (generation,) = (tmp_path / "c").iterdir()
    return {"input": tmp_path / "in.h5", "out": tmp_path / "right.h5", "single": tmp_path / "single.h5",
            "shard": next(tmp_path.glob("right.h5.shards/*/00001.h5")), "state": generation / "00001.state",
            "manifest": generation / MANIFEST, "checkpoints": tmp_path / "c"}


def command(name, files):
    """The command of a damage, on one rank, and the output that it makes."""
    out = files["input"].with_name("out.h5")
    call = ["attend", files["input"], out, *OPTIONS]
    keep = [*call, "--checkpoint", files["checkpoints"]]
    return {"attend": call, "again": [*call[:2], files["out"], *OPTIONS], "resume": keep,
            "require": [*keep, "--resume", "require"], "merge": ["merge", files["out"], out],
            "check": ["check", files["input"], files["out"]],
            "check single": ["check", files["input"], files["single"]]}[name], out


def other_call(how, files, monkeypatch, words):
    """Make the checkpoint one of something else."""
    if how == "version":
        monkeypatch.setattr("ringmpi.checkpoint.identity.__version__", "another")
    elif how == "numbers":
        with h5py.File(files["input"]) as file:
            x = {name: file[name][...] for name in "qkv"}
        x["v"][50, 1, 3] += 1
        files["input"].unlink()
        write_arrays(files["input"], x)
    elif how == "options":
        words += ["--window", "40"]


@pytest.mark.parametrize(("row", "damage"), list(tries(Damage)))
def test_something_is_wrong_with_a_file(files, monkeypatch, capsys, row, damage):
    """On one rank, in this process; a checkpoint is of two."""
    words, out = command(damage.command, files)
    if damage.file == "none":
        other_call(damage.how, files, monkeypatch, words)
    else:
        DAMAGES[damage.how](files[damage.file])
    before = contents(files["input"].parent)
    plain = [word for word in words if word not in ("--checkpoint", files["checkpoints"], "--resume", "require")]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert main(list(map(str, words))) in row.codes
    said = capsys.readouterr().err + "\n".join(str(warning.message) for warning in told)
    assert re.search(row.says, said), said
    assert "Traceback" not in said
    after = contents(files["input"].parent)
    if row.left in (RESULT, WITH_CHECKPOINT):
        assert main(list(map(str, [*plain[:2], out.with_name("right one"), *plain[3:]]))) == 0
        close(out, out.with_name("right one"))
        assert (row.left == RESULT) == (not list(files["checkpoints"].glob(f"*/{MANIFEST}")))
    else:
        assert after == before


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def close(one, other):
    """Whether two results are the same, to rounding."""
    with h5py.File(one) as a, h5py.File(other) as b:
        for name in ("out", "lse"):
            assert np.abs(a[name][...] - b[name][...]).max() < 2e-6 * np.abs(b[name][...]).max()


def two_jobs(case, *options):
    """Two jobs at the same time, each on one rank; what they said and their exit codes."""
    line = [sys.executable, "-m", "ringmpi", "attend", case / "in.h5"]
    jobs = [subprocess.Popen(list(map(str, [*line, *each, *OPTIONS])), stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT, text=True) for each in options]
    said = [job.communicate(timeout=60)[0] for job in jobs]
    return said, {job.returncode for job in jobs}


def test_two_jobs_that_replace_one_output(case, tmp_path):
    row = ROWS["race-force"]
    assert main(["attend", str(case / "in.h5"), str(tmp_path / "right one"), *OPTIONS]) == 0
    said, codes = two_jobs(case, *[[tmp_path / "out.h5", "--force"]] * 2)
    assert codes <= row.codes, said
    assert arrays(tmp_path / "out.h5") == arrays(tmp_path / "right one")
    assert main(["clean", str(tmp_path / "out.h5"), "--older-than", "0"]) == 0
    only(tmp_path, "right one", "right one.shards")


def test_two_jobs_in_one_folder_of_checkpoints(case, tmp_path):
    row = ROWS["race-checkpoints"]
    shutil.copytree(case / "c", tmp_path / "c")
    said, codes = two_jobs(case, *[[tmp_path / name, "--checkpoint", tmp_path / "c"] for name in ("a.h5", "b.h5")])
    assert codes <= row.codes, said
    for name in ("a.h5", "b.h5"):
        close(tmp_path / name, case / "right.h5")
    assert not (tmp_path / "c").exists()


def test_tests_that_rows_name_are_there_and_go_by_them():
    for row in ROWS.values():
        assert bool(row.tries) != bool(row.test), row.name
        if row.test:
            file, _, name = row.test.partition("::")
            text = (HERE / file).read_text()
            body = re.search(rf"\ndef {name}\(.*?(?=\n@pytest|\ndef |\Z)", text, re.DOTALL)
            assert body, row.test
            signals = (HERE / "attack_signals.py").read_text() if "attack_signals." in body[0] else ""
            assert f'ROWS["{row.name}"]' in body[0] + signals, row.test


def test_the_page_has_the_table():
    text = PAGE.read_text()
    assert text == matrix.page(text), "python tests/fault_matrix.py writes it anew"
