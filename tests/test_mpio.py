"""One file that all ranks write (``--output-driver mpio``), where h5py was built with MPI: see `tests/mpio.sh`.

What needs no such h5py is tested everywhere: that there is none is an error, and files that are whole results.
"""

import hashlib
import json
import os
import socket
import time

import h5py
import launch
import numpy as np
import pytest
from job_files import attend, make_random, read_arrays

from ringmpi import ShardError
from ringmpi.cli import main
from ringmpi.files.shards import merge_shards
from ringmpi.files.single import verify_single

CLI = ["-m", "ringmpi"]
ENDED = {5, 9, 15, 137, 143}   # of ranks that others lost, or that were ended, as the launcher says it
parallel = pytest.mark.skipif(not h5py.get_config().mpi, reason="h5py was built without MPI: tests/mpio.sh builds one")
PHASE = """
import os, resource, signal, sys
from ringmpi.job import parallel
from ringmpi.cli import main
from mpi4py import MPI
inner = parallel.NAME_OF_STEP
def outer(*rest):
    if MPI.COMM_WORLD.rank == 1:
        ACT
    return inner(*rest)
parallel.NAME_OF_STEP = outer
sys.exit(main())
"""


@pytest.fixture
def source(tmp_path):
    return make_random(tmp_path / "in.h5", 203, heads=4, kv_heads=2, dim=16)


def together(ranks, source, target, *options, folder, start=CLI, **more):
    return launch.launch(ranks, [*start, "attend", source, target, "--output-driver", "mpio", "--backend", "numpy",
                                 "--schedule", "ring", *options], folder=folder / "said", **more)


def nothing_left(target):
    return not [path for path in target.parent.iterdir() if "out.h5" in path.name]


@pytest.mark.skipif(h5py.get_config().mpi, reason="this h5py was built with MPI")
def test_an_h5py_without_mpi_is_an_error(source, tmp_path, capsys):
    for ranks in (1, 2):
        result = together(ranks, source, tmp_path / "out.h5", folder=tmp_path)
        assert result.code == 2, result.text
        assert "--output-driver mpio: expected an h5py that was built with MPI" in result.text
        assert nothing_left(tmp_path / "out.h5")
    assert main(["attend", str(source), str(tmp_path / "out.h5"), "--output-driver", "mpio", "--dry-run"]) == 2
    assert "built with MPI" in capsys.readouterr().err


@parallel
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_it_is_what_the_shards_are(tmp_path, ranks, dtype):
    """The same names, shapes, types, bits and attributes as their merged file."""
    source = make_random(tmp_path / "in.h5", 203, heads=4, kv_heads=2, dim=16, dtype=dtype)
    options = ["--causal", "--layout", "striped"]
    result = together(ranks, source, tmp_path / "out.h5", *options, folder=tmp_path)
    assert result.code == 0, result.text
    shards = launch.launch(ranks, [*CLI, "attend", source, tmp_path / "shards.h5", "--backend", "numpy", "--schedule",
                                   "ring", *options], folder=tmp_path / "said")
    assert shards.code == 0, shards.text
    merge_shards(tmp_path / "shards.h5", tmp_path / "merged.h5")
    mine, merged = (read_arrays(tmp_path / name, ("out", "lse")) for name in ("out.h5", "merged.h5"))
    for a, b in zip(mine, merged, strict=True):
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
    with h5py.File(tmp_path / "out.h5") as one, h5py.File(tmp_path / "merged.h5") as other:
        assert set(one.attrs) == set(other.attrs)
        assert sorted(one) == sorted(other) == ["dim", "head", "lse", "out", "rows", "token"]
        assert [one["out"].dims[axis][0].name for axis in range(3)] == ["/token", "/head", "/dim"]
        for name in ("backend", "ranks", "grid", "ringmpi", "complete"):
            assert one.attrs[name] == other.attrs[name]
        options = [json.loads(file.attrs["options"]) for file in (one, other)]
        assert options[0] | {"output_driver": "shards"} == options[1]
    assert main(["check", str(source), str(tmp_path / "out.h5")]) == 0
    assert verify_single(tmp_path / "out.h5").ranges[-1].stop == 203
    assert len(verify_single(tmp_path / "out.h5").ranges) == ranks
    assert not list(tmp_path.glob("out.h5.shards"))


@parallel
@pytest.mark.parametrize("axes", ["heads,tokens,dim", "batch,tokens,heads,dim"])
def test_other_axes(tmp_path, axes):
    q, k, v = (x.swapaxes(0, 1) if axes.startswith("heads") else x[None] for x in
               read_arrays(make_random(tmp_path / "plain.h5", 53, heads=4, kv_heads=2, dim=16)))
    with h5py.File(tmp_path / "in.h5", "w") as file:
        file["q"], file["k"], file["v"] = q, k, v
    result = together(3, tmp_path / "in.h5", tmp_path / "out.h5", "--axes", axes, folder=tmp_path)
    assert result.code == 0, result.text
    assert verify_single(tmp_path / "out.h5").shapes["lse"][0] == 53
    assert main(["check", str(tmp_path / "in.h5"), str(tmp_path / "out.h5")]) == 0
    with h5py.File(tmp_path / "out.h5") as file:
        assert file["out"].shape == q.shape


@parallel
def test_more_ranks_than_rows_and_no_rows(tmp_path):
    for tokens in (0, 2):
        source = make_random(tmp_path / f"{tokens}.h5", tokens, heads=2, dim=8)
        result = together(3, source, tmp_path / "out.h5", "--force", folder=tmp_path)
        assert result.code == 0, result.text
        assert main(["check", str(source), str(tmp_path / "out.h5")]) == 0


@parallel
def test_a_file_that_is_there(source, tmp_path):
    (tmp_path / "out.h5").write_text("mine")
    result = together(2, source, tmp_path / "out.h5", folder=tmp_path)
    assert result.code == 6, result.text
    assert "exists" in result.text
    assert (tmp_path / "out.h5").read_text() == "mine"
    result = together(2, source, tmp_path / "out.h5", "--force", folder=tmp_path)
    assert result.code == 0, result.text
    assert main(["check", str(source), str(tmp_path / "out.h5")]) == 0
    attend(source, tmp_path / "out.h5", "--force")          # of shards
    assert list(tmp_path.glob("out.h5.shards/*/*.h5"))
    result = together(2, source, tmp_path / "out.h5", "--force", folder=tmp_path)
    assert result.code == 0, result.text
    assert not (tmp_path / "out.h5.shards").exists()
    assert main(["check", str(source), str(tmp_path / "out.h5")]) == 0


@parallel
@pytest.mark.parametrize(("step", "act", "codes"), [
    ("_write_rows", "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))", {6, *ENDED}),
    ("_read_back", "rest[2]['lse'][0] += 1", {6}),
    ("_write_rows", "os.kill(os.getpid(), signal.SIGKILL)", ENDED),
    ("_read_back", "os.kill(os.getpid(), signal.SIGKILL)", ENDED),
    ("_write_rows", "os.kill(os.getpid(), signal.SIGSTOP)", ENDED)])
def test_a_failure_leaves_no_result(source, tmp_path, step, act, codes):
    """And nobody waits longer than the timeout. A rank that is killed may leave a temporary file, for `clean`."""
    code = PHASE.replace("NAME_OF_STEP", step).replace("ACT", act)
    result = together(3, source, tmp_path / "out.h5", "--timeout", "4", folder=tmp_path, start=["-c", code], timeout=60)
    assert result.code in codes, result.text
    assert not (tmp_path / "out.h5").exists()
    if result.code in ENDED:
        for path in tmp_path.glob(".out.h5.*"):
            os.utime(path, (0, 0))
        assert main(["clean", str(tmp_path / "out.h5")]) == 0
    assert nothing_left(tmp_path / "out.h5")


@parallel
def test_a_disk_without_room(source, tmp_path):
    """Known before HDF5 writes, which may hang on it."""
    code = ("import shutil, sys\nfrom types import SimpleNamespace\nfrom ringmpi.cli import main\n"
            "shutil.disk_usage = lambda path: SimpleNamespace(free=203 * 4 * (16 + 1) * 4 - 1)\nsys.exit(main())")
    result = together(2, source, tmp_path / "out.h5", folder=tmp_path, start=["-c", code], timeout=60)
    assert result.code == 6, result.text
    assert "expected 55,216 bytes free on the disk, got 55,215" in result.text
    assert nothing_left(tmp_path / "out.h5")


@parallel
def test_a_job_that_is_ended_while_it_writes(source, tmp_path):
    code = PHASE.replace("NAME_OF_STEP", "_write_rows").replace("ACT", "os.kill(os.getppid(), signal.SIGTERM)")
    result = together(2, source, tmp_path / "out.h5", "--timeout", "4", folder=tmp_path, start=["-c", code], timeout=60)
    assert result.code != 124, result.text
    if (tmp_path / "out.h5").exists():
        assert main(["check", str(source), str(tmp_path / "out.h5")]) == 0


@parallel
@pytest.mark.parametrize("step", ["_create", "_write_rows"])
def test_a_signal_to_a_rank_that_writes(source, tmp_path, step):
    """It waits until all have come back from HDF5; a job with checkpoints finishes what it has begun."""
    code = PHASE.replace("NAME_OF_STEP", step).replace("ACT", "os.kill(os.getpid(), signal.SIGTERM)")
    start = time.monotonic()
    result = together(3, source, tmp_path / "out.h5", folder=tmp_path, start=["-c", code], timeout=60)
    assert result.code in (15, 143), result.text
    assert f"rank 1 on {socket.gethostname()} ended by SIGTERM while writing {tmp_path / 'out.h5'}" in result.text
    assert nothing_left(tmp_path / "out.h5")
    assert time.monotonic() - start < 30            # not the timeout
    result = together(3, source, tmp_path / "out.h5", "--checkpoint", tmp_path / "kept", folder=tmp_path,
                      start=["-c", code], timeout=60)
    assert result.code == 0, result.text
    assert main(["check", str(source), str(tmp_path / "out.h5")]) == 0


def merged(source, folder):
    attend(source, folder / "shards.h5", "--causal")
    merge_shards(folder / "shards.h5", folder / "out.h5")
    return folder / "out.h5"


def test_a_merged_file_can_be_checked(source, tmp_path, capsys):
    out = merged(source, tmp_path)
    assert main(["check", str(source), str(out)]) == 0
    assert main(["check", str(source), str(out), "--window", "3"]) == 1         # so it was computed, by its own options
    capsys.readouterr()
    assert main(["merge", str(out), str(tmp_path / "again.h5")]) == 3
    assert "is one file already" in capsys.readouterr().err
    rows = read_arrays(out, ("out", "lse"))
    each, = verify_single(out).ranges
    assert (each.start, each.stop) == (0, 203)
    assert [each.out, each.lse] == [hashlib.sha256(x.tobytes()).hexdigest() for x in rows]


def test_rows_that_are_not_what_was_written(source, tmp_path):
    out = merged(source, tmp_path)
    for name in ("out", "lse"):
        with h5py.File(out, "r+") as file:
            before = file[name][100, 1]
            file[name][100, 1] = np.nextafter(before, np.float32(9), dtype=np.float32)
        with pytest.raises(ShardError, match=rf"dataset '{name}', rows 0..203: damaged"):
            verify_single(out)
        with h5py.File(out, "r+") as file:
            file[name][100, 1] = before
    verify_single(out)


def forged(change):
    """A text that is sealed, and says something else."""
    def forge(path):
        with h5py.File(path, "r+") as file:
            content = json.loads(bytes(file["rows"][()]))
            text = json.dumps(change(content)).encode()
            del file["rows"]
            file["rows"] = np.bytes_(text)
            file.attrs["rows_sha256"] = np.bytes_(hashlib.sha256(text).hexdigest())
    return forge


def first(**values):
    return lambda content: content | {"ranges": [content["ranges"][0] | values]}


@pytest.mark.parametrize("change", [
    lambda content: [], lambda content: {}, first(stop=202), first(start=1), first(stop=2**70), first(stop=203.0),
    first(start=-1), first(stop="203"), first(out=5), first(lse=None), first(other=1),
    lambda content: content | {"record": 5}, lambda content: content | {"record": {"options": 5}},
    lambda content: content | {"ranges": content["ranges"] * 2}])
def test_texts_that_make_no_sense(source, tmp_path, change, capsys):
    out = merged(source, tmp_path)
    forged(change)(out)
    with pytest.raises(ShardError):
        verify_single(out)
    assert main(["check", str(source), str(out)]) == 3


def test_an_unfinished_file_is_refused(source, tmp_path):
    out = merged(source, tmp_path)
    with h5py.File(out, "r+") as file:
        file.attrs["complete"] = False
    with pytest.raises(ShardError, match="damaged"):
        verify_single(out)


def test_a_view_is_no_single_file(source, tmp_path):
    out = merged(source, tmp_path)
    with h5py.File(out, "r+") as file:
        del file["out"]
        layout = h5py.VirtualLayout((203, 4, 16), "f4")
        layout[...] = h5py.VirtualSource("other.h5", "out", (203, 4, 16))
        file.create_virtual_dataset("out", layout)
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["out"] = np.zeros((203, 4, 16), "f4")
    with pytest.raises(ShardError, match="expected plain datasets"):
        verify_single(out)
