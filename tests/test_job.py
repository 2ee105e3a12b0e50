"""`ringmpi attend` under mpiexec: files in, files out; bad input; lost ranks; memory."""

import json
import re
import shutil
import sys
import time
from pathlib import Path

import h5py
import launch
import numpy as np
import oracle
import pytest
from job_files import make_random, read_arrays

from ringmpi.cli import main
from ringmpi.files.opening import open_file
from ringmpi.files.shards import verify
from ringmpi.job.inputs import Sizes
from ringmpi.job.memory import Process, predict_memory
from ringmpi.job.options import Options
from ringmpi.schedules.rates import Rates

CLI = ["-m", "ringmpi"]
IN_FOLDER = ["-c", "import os, sys; os.chdir(sys.argv.pop(1)); from ringmpi.cli import main; sys.exit(main())"]
LOST = """
import os, signal, sys
from ringmpi.cli import main
from ringmpi.passes import Pass
compute = Pass._run
def dying(self, work, *rest):
    if self.movers.carrier.comm.rank == 2 and work.step.step == 1:
        os.kill(os.getpid(), signal.SIGNAL)
    return compute(self, work, *rest)
Pass._run = dying
sys.exit(main())
"""
# Between mpiexec and a rank, so that mpiexec does not see it die: it would end some of the others before they speak.
SHIELD = ["-c", "import subprocess, sys, time\n"
                "code = subprocess.call([sys.executable, *sys.argv[1:]], close_fds=False)\n"
                "time.sleep(40 if code < 0 else 0)\n"
                "sys.exit(code)"]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_random(tmp_path_factory.mktemp("input") / "in.h5", 1003, heads=4, kv_heads=2, dim=16, documents=5)


def run(ranks, *arguments, folder, start=CLI, **options):
    return launch.launch(ranks, [*start, *arguments], folder=folder / "said", **options)


def exact(source, **mask):
    q, k, v = read_arrays(source)
    return oracle.attend(q, k, v, oracle.visible(len(q), len(k), **mask), q.shape[2]**-0.5)


def check_result(path, want):
    """Hold what a job has written against the oracle."""
    with h5py.File(path) as file:
        for name in ("out", "lse"):
            assert file[name].shape == want[name].shape
            assert oracle.error(file[name][...], want[name]) < 2e-6


def test_scores_of_a_file(source, tmp_path):
    """Softcap, and slopes and sinks from datasets; `check` knows them from the record, and that others are wrong."""
    numbers = {"alibi": np.array([0.5, 0.1, 0.02, 0.004]), "sinks": np.array([1, -2, 0, 5], "f4")}
    with open_file(source) as file, h5py.File(tmp_path / "in.h5", "w") as copy:
        for name in "qkv":
            file.copy(name, copy)
            copy[name][...] = 2 * copy[name][...]
        for name, x in numbers.items():
            copy[name] = x
    flags = ["--causal", "--softcap", "4", "--alibi", "--sinks"]
    result = run(3, "attend", tmp_path / "in.h5", tmp_path / "out.h5", *flags, "--layout", "zigzag", folder=tmp_path)
    assert result.code == 0, result.text
    q, k, v = read_arrays(tmp_path / "in.h5")
    i = np.arange(len(q))
    want = oracle.dense(q, k, v, oracle.visible(len(q), len(k), causal=True), 0.25, softcap=4, slopes=numbers["alibi"],
                        sinks=numbers["sinks"], queries=i, keys=i)
    check_result(tmp_path / "out.h5", want)
    again = ["check", str(tmp_path / "in.h5"), str(tmp_path / "out.h5"), "--rows", "200"]
    assert main(again) == 0
    assert main([*again, "--softcap", "4.01"]) == 1
    for name, x in numbers.items():
        with h5py.File(tmp_path / "in.h5", "r+") as file:
            file[name][...] = x * 1.001
        assert main(again) == 1
        with h5py.File(tmp_path / "in.h5", "r+") as file:
            file[name][...] = x
    with h5py.File(tmp_path / "in.h5", "r+") as file:
        file["alibi"][2] = np.nan
    assert main(["attend", str(tmp_path / "in.h5"), str(tmp_path / "new.h5"), "--alibi", "--dry-run"]) == 3
    with h5py.File(tmp_path / "in.h5", "r+") as file:
        file["alibi"][...] = numbers["alibi"]
        del file["sinks"]
        file["sinks"] = np.zeros(3)
    result = run(2, "attend", tmp_path / "in.h5", tmp_path / "new.h5", *flags, folder=tmp_path)
    assert result.code == 3, result.text
    assert "dataset 'sinks': expected shape (4,), one number for each head, got (3,)" in result.text
    assert not (tmp_path / "new.h5").exists()


@pytest.mark.parametrize("by_head", [False, True])
def test_a_bias_of_the_keys_of_a_file(source, tmp_path, by_head):
    """From its dataset, in another layout; `check` knows it from the record, and that another is wrong."""
    q, k, v = read_arrays(source)
    bias = oracle.key_bias("left out by head" if by_head else "left out", q.shape[1], len(k), dtype=np.float64)
    with open_file(source) as file, h5py.File(tmp_path / "in.h5", "w") as copy:
        for name in "qkv":
            file.copy(name, copy)
        copy["key_bias"] = bias if by_head else bias[:, 0]
        gone = np.flatnonzero(np.isneginf(bias).all(axis=1))           # what is there is of no account
        assert len(gone) or by_head
        for i, number in zip(gone[:2], (np.nan, 1e30), strict=False):
            copy["k"][i] = copy["v"][i] = number
    flags = ["--causal", "--key-bias", "--layout", "zigzag" if by_head else "contiguous"]
    result = run(2, "attend", tmp_path / "in.h5", tmp_path / "out.h5", *flags, folder=tmp_path)
    assert result.code == 0, result.text
    want = oracle.dense(q, k, v, oracle.visible(len(q), len(k), causal=True), 0.25, key_bias=bias)
    check_result(tmp_path / "out.h5", want)
    again = ["check", str(tmp_path / "in.h5"), str(tmp_path / "out.h5"), "--rows", "200"]
    assert main(again) == 0
    with h5py.File(tmp_path / "in.h5", "r+") as file:
        file["key_bias"][-30:] *= 1.001
    assert main(again) == 1
    with h5py.File(tmp_path / "in.h5", "r+") as file:
        file["key_bias"][-1] = np.nan
    result = run(2, "attend", tmp_path / "in.h5", tmp_path / "new.h5", *flags, folder=tmp_path)
    assert result.code == 3, result.text
    assert "dataset 'key_bias': expected finite numbers, or -inf to leave a key out, got nan" in result.text
    with h5py.File(tmp_path / "in.h5", "r+") as file:
        del file["key_bias"]
        file["key_bias"] = bias[:5]
    result = run(2, "attend", tmp_path / "in.h5", tmp_path / "new.h5", *flags, folder=tmp_path)
    assert result.code == 3, result.text
    assert f"dataset 'key_bias': expected shape ({len(k)},) or ({len(k)}, {q.shape[1]}), got" in result.text
    assert not (tmp_path / "new.h5").exists()


@pytest.mark.parametrize("of_axes", [False, True])
def test_a_bias_by_distance_of_a_file(source, tmp_path, of_axes):
    """A table, or those of the axes of a grid; `check` knows them from the record, and that others are wrong."""
    q, k, v = read_arrays(source)
    n, heads, _ = q.shape
    rng = np.random.default_rng(3)
    shape = next((n // size, size) for size in range(2, n) if n % size == 0) if of_axes else (n,)
    names = [f"relative_{axis}" for axis in range(len(shape))] if of_axes else ["relative"]
    tables = {name: rng.standard_normal((heads, 2 * reach + 1)) for name, reach in zip(names, (9, 1), strict=False)}
    with open_file(source) as file, h5py.File(tmp_path / "in.h5", "w") as copy:
        for name in "qkv":
            file.copy(name, copy)
        for name, table in tables.items():
            copy[name] = table
    flags = ["--relative", "--layout", "zigzag"]
    flags += ["--grid", "x".join(map(str, shape)), "--grid-window", "11,", "--grid-periodic", "0,1"] if of_axes else []
    result = run(2, "attend", tmp_path / "in.h5", tmp_path / "out.h5", *flags, folder=tmp_path)
    assert result.code == 0, result.text
    i = np.arange(n)
    away = oracle.distances(shape, (True, True), i, i) if of_axes else [i[:, None] - i]
    see = oracle.near(shape, (11, None), (True, True), "cut", False) if of_axes else np.ones((n, n), bool)
    want = oracle.dense(q, k, v, see, 0.25, relative=list(tables.values()), away=away)
    check_result(tmp_path / "out.h5", want)
    again = ["check", str(tmp_path / "in.h5"), str(tmp_path / "out.h5"), "--rows", "200"]
    assert main(again) == 0
    with h5py.File(tmp_path / "in.h5", "r+") as file:
        file[names[-1]][:, -1:] += 0.01
    assert main(again) == 1
    for wrong, text in ((np.full((heads, 3), np.inf), "expected finite numbers"),
                        (np.zeros((heads, 2)), "expected shape")):
        with h5py.File(tmp_path / "in.h5", "r+") as file:
            del file[names[-1]]
            file[names[-1]] = wrong
        result = run(2, "attend", tmp_path / "in.h5", tmp_path / "new.h5", *flags, folder=tmp_path)
        assert result.code == 3, result.text
        assert f"dataset '{names[-1]}': {text}" in result.text


def test_values_that_are_the_first_numbers_of_keys(source, tmp_path, capsys):
    """Read and sent once; `check` knows it from the record, and that other values are wrong."""
    q, k, _ = read_arrays(source)
    with open_file(source) as file, h5py.File(tmp_path / "in.h5", "w") as copy:
        for name in "qk":                    # there need be no values
            file.copy(name, copy)
    flags = ["--causal", "--dim-v", "5", "--layout", "striped", "--checkpoint", tmp_path / "c"]
    result = run(2, "attend", tmp_path / "in.h5", tmp_path / "out.h5", *flags, folder=tmp_path)
    assert result.code == 0, result.text
    want = oracle.dense(q, k, k[..., :5], oracle.visible(len(q), len(k), causal=True), 0.25)
    with h5py.File(tmp_path / "out.h5") as file:
        assert file["out"].shape == want["out"].shape
        assert oracle.error(file["out"][...], want["out"]) < 2e-6
    again = ["check", str(tmp_path / "in.h5"), str(tmp_path / "out.h5"), "--rows", "200"]
    assert main(again) == 0
    with h5py.File(tmp_path / "in.h5", "r+") as file:
        file["k"][-30:, :, :5] *= 1.01
    assert main(again) == 1
    said = ["attend", str(tmp_path / "in.h5"), str(tmp_path / "new.h5"), "--dim-v", "5"]
    assert main([*said, "--dry-run"]) == 0
    for more, text in ((["--backend", "cuda"], "--dim-v: does not go together with --backend cuda yet"),
                       (["--v", "w"], "--v: with --dim-v values are in the keys")):
        with pytest.raises(SystemExit):
            main([*said, *more])
        assert text in capsys.readouterr().err
    assert main([*said[:-1], "17", "--dry-run"]) == 3
    assert "expected keys of 17 numbers at least, of which the first are values, got 16" in capsys.readouterr().err


@pytest.mark.parametrize("options", [["--backend", "cuda"], ["--backend", "auto"]])
def test_without_a_gpu(source, tmp_path, options):
    result = run(2, "attend", source, tmp_path / "out.h5", *options, "--gpu-transport", "direct", folder=tmp_path,
                 env={"CUDA_VISIBLE_DEVICES": ""})
    if "cuda" in options:
        assert result.code == 4, result.text
        assert re.search("ringmpi: rank 0: backend cuda: (no GPU|CuPy is not installed)", result.text), result.text
        assert not list(tmp_path.glob("out.h5*"))
    else:
        assert result.code == 0, result.text       # the option is there for arrays on GPUs


@pytest.mark.parametrize(("ranks", "layout"), [(1, "striped"), (2, "contiguous"), (3, "zigzag"), (4, "striped")])
def test_file_to_file(source, tmp_path, ranks, layout):
    target = tmp_path / "out.h5"
    result = run(ranks, "attend", source, target, "--causal", "--layout", layout, "--json", tmp_path / "run.json",
                 "--schedule", "ring", folder=tmp_path)
    assert result.code == 0, result.text
    assert f"1,003 tokens on {ranks} rank" in result.ranks[0]
    assert not any(text.strip() for text in result.ranks[1:]), result.text
    manifest = verify(target)
    assert len(manifest.shards) == ranks
    assert manifest.record["options"]["layout"] == layout
    out, lse = exact(source, causal=True)
    with h5py.File(target) as file:
        assert oracle.error(file["out"][...], out) < 2e-6
        assert oracle.error(file["lse"][...], lse) < 2e-6
    record = json.loads((tmp_path / "run.json").read_text())
    steps = [rank["steps"] for rank in record["per_rank"]]
    assert [len(mine) for mine in steps] == [ranks] * ranks
    assert record["bytes_moved"] == sum(step["bytes_sent"] for mine in steps for step in mine)
    assert record["pairs"] == 1003 * 1004 // 2


def test_every_schedule_writes_the_same(source, tmp_path):
    """The gather the very bits of the ring; grids the same to rounding, with the same count of pairs."""
    written = []
    for schedule in ("ring", "gather", "2x2x1"):
        target = tmp_path / f"{schedule}.h5"
        result = run(4, "attend", source, target, "--causal", "--layout", "striped", "--schedule", schedule,
                     "--json", tmp_path / "record.json", folder=tmp_path)
        assert result.code == 0, result.text
        record = json.loads((tmp_path / "record.json").read_text())
        assert record["options"]["schedule"] == schedule
        assert record["grid"] == {"ring": "1x1x4:ring", "gather": "1x1x4:gather", "2x2x1": "2x2x1:ring"}[schedule]
        assert (record["pairs"], record["flop"]) == (1003 * 1004 // 2, 1003 * 1004 // 2 * 2 * 4 * 32)
        assert main(["check", str(source), str(target), "--rows", "100"]) == 0
        written.append(read_arrays(target, ("out", "lse")))
    assert all((a == b).all() for a, b in zip(*written[:2], strict=True))
    assert all(np.abs(a - b).max() < 2e-6 for a, b in zip(*written[1:], strict=True))


def test_zero_tokens_and_fewer_tokens_than_ranks(tmp_path):
    for tokens in (0, 2):
        source = make_random(tmp_path / f"in{tokens}.h5", tokens)
        target = tmp_path / f"out{tokens}.h5"
        result = run(4, "attend", source, target, "--causal", "--layout", "zigzag", folder=tmp_path)
        assert result.code == 0, result.text
        with h5py.File(target) as file:
            assert oracle.error(file["out"][...], exact(source, causal=True)[0]) < 2e-6
        assert main(["merge", str(target), str(tmp_path / f"single{tokens}.h5")]) == 0


def damaged(source, path, change):
    shutil.copy(source, path)
    if change is truncate:
        truncate(path)
        return
    with h5py.File(path, "a") as file:
        change(file)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1000])


def drop_k(file):
    del file["k"]


def flat_q(file):
    del file["q"]
    file["q"] = np.ones((10, 16), "f4")


def integer_v(file):
    shape = file["v"].shape
    del file["v"]
    file["v"] = np.ones(shape, "i4")


def other_dim(file):
    n, heads, dim = file["q"].shape
    del file["q"]
    file["q"] = np.ones((n, heads, dim + 1), "f4")


def three_heads(file):
    n, _, dim = file["q"].shape
    del file["q"]
    file["q"] = np.ones((n, 3, dim), "f4")


def documents(offsets):
    def change(file):
        del file["documents"]
        file["documents"] = offsets
    change.__name__ = f"documents{offsets}"
    return change


def link(file):
    del file["k"]
    file["k"] = h5py.ExternalLink("elsewhere.h5", "k")


BAD_INPUT = [
    (drop_k, "'k': no such dataset; the file has documents, q, v"),
    (flat_q, r"expected shape \(tokens, heads, dim\), got \(10, 16\)"),
    (integer_v, "dataset '/?v': expected items of float64.*got int32"),
    (other_dim, "q and k: expected the same dim, at least 1, got 17 and 16"),
    (three_heads, "multiple of kv_heads, got 3 heads and 2 kv_heads"),
    (documents([0, 500, 400, 1003]), "never decrease"),
    (documents([0, 500, 1004]), "must be at most the number of keys, 1003, got 1004"),
    (truncate, "truncated, damaged or no HDF5 file"),
    (link, "refused: an external link"),
]


@pytest.mark.parametrize(("change", "text"), BAD_INPUT, ids=[c.__name__ for c, _ in BAD_INPUT])
def test_bad_input(source, tmp_path, change, text):
    damaged(source, tmp_path / "in.h5", change)
    result = run(3, "attend", tmp_path / "in.h5", tmp_path / "out.h5", "--documents", folder=tmp_path)
    assert result.code == 3, result.text
    assert re.search(text, result.ranks[0]), result.text
    assert "rank 0: " in result.ranks[0]
    assert sum("ringmpi:" in rank for rank in result.ranks) == 1, result.text
    assert {p.name for p in tmp_path.iterdir()} == {"in.h5", "said"}


def test_a_file_that_one_rank_does_not_see(source, tmp_path):
    for rank in range(3):
        (tmp_path / str(rank)).mkdir()
        if rank != 1:
            shutil.copy(source, tmp_path / str(rank) / "in.h5")
    commands = [[*IN_FOLDER, tmp_path / str(rank), "attend", "in.h5", "out.h5"] for rank in range(3)]
    result = launch.launch(3, *commands, folder=tmp_path / "said")
    assert result.code == 3, result.text
    assert "rank 1: in.h5: no such file" in result.ranks[0], result.text
    assert not list(tmp_path.glob("*/out*"))


def test_different_command_lines(source, tmp_path):
    commands = [[*CLI, "attend", source, tmp_path / "out.h5", *extra] for extra in ([], ["--causal"], [])]
    result = launch.launch(3, *commands, folder=tmp_path / "said")
    assert result.code == 2, result.text
    assert "rank 1: expected the same options on every rank" in result.ranks[0], result.text
    assert "causal is True here and False on rank 0" in result.ranks[0], result.text
    assert {p.name for p in tmp_path.iterdir()} == {"said"}


def test_output_that_exists(source, tmp_path):
    target = tmp_path / "out.h5"
    target.write_text("precious")
    result = run(2, "attend", source, target, folder=tmp_path)
    assert result.code == 6, result.text
    assert "exists" in result.ranks[0]
    assert "--force" in result.ranks[0]
    assert target.read_text() == "precious"
    result = run(2, "attend", source, target, "--force", folder=tmp_path)
    assert result.code == 0, result.text
    verify(target)


@pytest.mark.parametrize("target", ["gone/out.h5", "file/out.h5", "folder"])
def test_output_that_cannot_be_written(source, tmp_path, target):
    (tmp_path / "file").write_text("no folder")
    (tmp_path / "folder").mkdir()
    result = run(3, "attend", source, tmp_path / target, folder=tmp_path)
    assert result.code == 6, result.text
    assert "folder" in result.ranks[0]
    assert {p.name for p in tmp_path.iterdir()} == {"file", "folder", "said"}


def test_disk_full_on_one_rank(source, tmp_path):
    code = ("import sys, ringmpi.files.shards as s; from mpi4py import MPI; from ringmpi.cli import main\n"
            "def full(*a): raise OSError(28, 'No space left on device')\n"
            "if MPI.COMM_WORLD.rank == 1: s.write_rows = full\n"
            "sys.exit(main())")
    result = run(3, "attend", source, tmp_path / "out.h5", folder=tmp_path, start=["-c", code])
    assert result.code == 6, result.text
    assert "No space left" in result.ranks[0]
    assert {p.name for p in tmp_path.iterdir()} == {"said"}


def test_flipped_and_removed_shards(source, tmp_path):
    target = tmp_path / "out.h5"
    assert run(3, "attend", source, target, folder=tmp_path).code == 0
    file = tmp_path / verify(target).shards[1].file
    whole = file.read_bytes()
    for change in (lambda: file.write_bytes(whole[:3000] + bytes([whole[3000] ^ 8]) + whole[3001:]), file.unlink):
        change()
        for command in (["check", source, target], ["merge", target, tmp_path / "single.h5"]):
            assert main([str(x) for x in command]) == 3
        assert not (tmp_path / "single.h5").exists()


def test_a_rank_that_stops_while_the_result_is_published(source, tmp_path):
    """The others time out; the result is there and whole, and nobody takes its shards away."""
    code = ("import os, signal, sys, time; from ringmpi.files.shards import Output; from ringmpi.cli import main\n"
            "from mpi4py import MPI\n"
            "write = Output.write\n"
            "def stop(self, rank, *rest):\n"
            "    shard = write(self, rank, *rest)\n"
            "    if rank == 2: import threading; threading.Timer(1, os.kill, (os.getpid(), signal.SIGSTOP)).start()\n"
            "    return shard\n"
            "publish = Output.publish\n"
            "def late(self, *rest):\n"
            "    time.sleep(3); publish(self, *rest)\n"
            "Output.write, Output.publish = stop, late\n"
            "sys.exit(main())")
    result = run(3, "attend", source, tmp_path / "out.h5", "--timeout", "8", "--backend", "numpy", folder=tmp_path,
                 start=[*SHIELD, "-c", code], timeout=60)
    assert result.code not in (0, 124), result.text
    verify(tmp_path / "out.h5")
    assert main(["check", str(source), str(tmp_path / "out.h5")]) == 0


def test_an_error_of_ours_on_one_rank_ends_the_job(source, tmp_path):
    """It is shown with its traceback, is not taken for a damaged input, and nobody waits for the timeout."""
    code = ("import sys, ringmpi.job.attend as job; from mpi4py import MPI; from ringmpi.cli import main\n"
            "def broken(*rest, **more): raise ValueError('a mistake')\n"
            "if MPI.COMM_WORLD.rank == 1: job.redistribute = broken\n"
            "sys.exit(main())")
    result = run(3, "attend", source, tmp_path / "out.h5", folder=tmp_path, start=["-c", code], timeout=60)
    assert result.code == 70, result.text
    assert "ValueError: a mistake" in result.ranks[1]
    assert not (tmp_path / "out.h5").exists()


def test_wrong_number_of_ranks(source, tmp_path):
    result = run(2, "attend", source, tmp_path / "out.h5", "--expect-ranks", "4", folder=tmp_path)
    assert result.code == 4, result.text
    assert "expected 4 ranks (--expect-ranks), got 2" in result.text
    assert {p.name for p in tmp_path.iterdir()} == {"said"}


@pytest.mark.parametrize("signal", ["SIGKILL", "SIGSTOP"])
def test_a_lost_rank(source, tmp_path, signal):
    """The others say where they were and whom they waited for, and end with code 5.

    A rank may have all its blocks by then, from a rank that was stopped after it sent them: it waits outside the ring.
    """
    keep = [] if launch.is_openmpi() else ["-disable-auto-cleanup"]
    start = time.perf_counter()
    result = run(4, "attend", source, tmp_path / "out.h5", "--timeout", "4", "--backend", "numpy", "--schedule", "ring",
                 folder=tmp_path, start=[*SHIELD, "-c", LOST.replace("SIGNAL", signal)], options=keep, timeout=60)
    assert time.perf_counter() - start < 20
    assert not (tmp_path / "out.h5").exists()
    if launch.is_openmpi() and signal == "SIGKILL":          # its launcher ends the job at once
        assert result.code not in (0, 124), result.text
        return
    assert result.code == 5, result.text
    said = result.ranks[1] + result.ranks[3]
    assert re.search(r"waited .*(bytes from rank 2|for rank 2 to take)", said), result.text
    for rank in (0, 1, 3):
        where = r", ring step \d of 4(: waited for|, computing)| waited for the other 3 ranks"
        assert re.search(rf"ringmpi: rank {rank} on [\w.-]+({where})", result.ranks[rank]), result.text


def test_canonical_order_writes_the_same_bits(source, tmp_path):
    """On any number of ranks, whatever the layout and the schedule."""
    written = []
    for ranks, *options in ((1,), (3, "--layout", "zigzag"), (4, "--schedule", "2x1x2:broadcast"), (2,)):
        target = tmp_path / f"{ranks}.h5"
        order = "fastest" if ranks == 2 else "canonical"
        result = run(ranks, "attend", source, target, "--causal", "--order", order, *options, folder=tmp_path)
        assert result.code == 0, result.text
        assert verify(target).record["options"]["order"] == order
        written.append(read_arrays(target, ("out", "lse")))
    one, *others, fastest = written
    assert all((a == b).all() for other in others for a, b in zip(one, other, strict=True))
    assert not all((a == b).all() for a, b in zip(one, fastest, strict=True))        # so that this test can see


@pytest.mark.parametrize(("schedule", "where", "what"), [
    ("2x1x2", "HeadExchange.to_heads", "exchange of heads"),
    ("2x1x2", "HeadExchange.to_tokens", "exchange of results"),
    ("1x4x1", "QueryExchange.ask", "exchange of queries"),
    ("1x4x1", "QueryExchange.bring_home", "exchange of states"),
    ("1x1x4:broadcast --order canonical --layout striped --backend numba", "TokenExchange.move", "exchange of keys")])
def test_a_rank_lost_in_an_exchange(source, tmp_path, schedule, where, what):
    """Whoever waits for it says where: in which exchange, and for how much from whom."""
    method = where.split(".")[1]
    die = ("import os, signal, sys\n"
           "from ringmpi.cli import main\n"
           "from ringmpi.schedules.head_exchange import HeadExchange\n"
           "from ringmpi.schedules.query_exchange import QueryExchange\n"
           "from ringmpi.schedules.token_exchange import TokenExchange\n"
           f"before = {where}\n"
           "def dying(self, *rest):\n"
           "    if self.comm.rank == 2:\n"
           "        os.kill(os.getpid(), signal.SIGKILL)\n"
           "    return before(self, *rest)\n"
           f"{where.split('.')[0]}.{method} = dying\n"
           "sys.exit(main())\n")
    keep = [] if launch.is_openmpi() else ["-disable-auto-cleanup"]
    start = time.perf_counter()
    result = run(4, "attend", source, tmp_path / "out.h5", "--timeout", "4", "--backend", "numpy", "--schedule",
                 *schedule.split(), folder=tmp_path, start=[*SHIELD, "-c", die], options=keep, timeout=60)
    assert time.perf_counter() - start < 20
    assert not (tmp_path / "out.h5").exists()
    if launch.is_openmpi():
        assert result.code not in (0, 124), result.text
        return
    assert result.code == 5, result.text
    said = "".join(result.ranks[rank] for rank in (0, 1, 3))
    assert re.search(rf"{what}: waited .*for \d+ bytes from rank 2", said), result.text


def test_demo(tmp_path):
    result = run(4, "demo", "--contexts", "512,4096", "--queries", "512", "--keep", tmp_path / "kept", folder=tmp_path,
                 timeout=120)
    assert result.code == 0, result.text
    rows = re.findall(r"^ +([\d,]+) +([\d.]+)% ", result.ranks[0], re.MULTILINE)
    assert [row[0] for row in rows] == ["512", "4,096"]
    assert float(rows[1][1]) > float(rows[0][1]) > 5, result.text
    assert "one retrieval" in result.ranks[0]
    assert main(["check", str(tmp_path / "kept" / "text-4096.h5"), str(tmp_path / "kept" / "out-4096.h5")]) == 0


def test_a_map_of_needles(tmp_path):
    """All are found at every depth; what has no room for them, or would have no effect, is refused."""
    pytest.importorskip("matplotlib")
    result = run(3, "demo", "--contexts", "1000,4000", "--map", tmp_path / "map.png", folder=tmp_path, timeout=120)
    assert result.code == 0, result.text
    rows = re.findall(r"^ +([\d,]+) +((?:\d+% +)+)", result.ranks[0], re.MULTILINE)
    assert [(context, set(shares.split())) for context, shares in rows] == [("1,000", {"100%"}), ("4,000", {"100%"})]
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    assert main(["demo", "--map", str(tmp_path / "map.png"), "--contexts", "400"]) == 2
    with pytest.raises(SystemExit):
        main(["demo", "--map", str(tmp_path / "map.png"), "--queries", "400"])


@pytest.mark.parametrize("options", [(), ("--stream",), ("--schedule", "1x1x3:gather")])
def test_a_page_on_a_run(source, tmp_path, options):
    """It says what ran; its record says what was spent, or why that is not known."""
    pytest.importorskip("matplotlib")
    page, record = tmp_path / "page.html", tmp_path / "run.json"
    result = run(3, "attend", source, tmp_path / "out.h5", "--causal", "--report", page, "--json", record, *options,
                 folder=tmp_path)
    assert result.code == 0, result.text
    text, energy = page.read_text(), json.loads(record.read_text())["energy"]
    assert text.count("<svg") == 2
    assert "3 on 1 host" in text
    node, = energy["nodes"]
    assert (energy["joules"] is None) == bool(node["not_read"])
    assert energy["joules"] is not None or node["not_read"][0] in text
    assert run(2, "attend", source, page, "--report", page, folder=tmp_path).code == 2
    with pytest.raises(SystemExit):
        main(["attend", str(source), str(tmp_path / "new.h5"), "--report", str(tmp_path / "page.txt")])


def test_memory_is_steady_and_predicted(tmp_path):
    """At fixed tokens a rank, peak memory stays within 5 % from 3 to 5 ranks, and --dry-run is within 10 %."""
    peaks = []
    for ranks in (3, 5):
        source = make_random(tmp_path / f"in{ranks}.h5", 8192 * ranks, heads=8, dim=128)
        options = [source, tmp_path / f"out{ranks}.h5", "--layout", "striped", "--causal", "--window", "64",
                   "--schedule", "ring", "--expect-ranks", str(ranks)]
        result = run(ranks, "attend", *options, "--json", tmp_path / "run.json", folder=tmp_path)
        assert result.code == 0, result.text
        peaks.append(json.loads((tmp_path / "run.json").read_text())["peak_bytes"])
        said = launch.subprocess.run([sys.executable, *CLI, "attend", *map(str, options[:1]), "x.h5", "--dry-run",
                                      *map(str, options[2:])], capture_output=True, text=True, timeout=60, check=True)
        predicted = float(re.search(r"^total +([\d.]+) MiB", said.stdout, re.MULTILINE)[1]) * 2**20
        assert abs(predicted / peaks[-1] - 1) < 0.10, (predicted, peaks)
    assert abs(peaks[1] / peaks[0] - 1) < 0.05, peaks


def test_too_little_memory_is_known_before_anything_is_read(source, tmp_path):
    """On all ranks, by what those of a node need together; what one rank has does not count."""
    result = run(3, "attend", source, tmp_path / "out.h5", folder=tmp_path, env={"SLURM_MEM_PER_NODE": "200"})
    assert result.code == 4, result.text
    needed, = re.findall(r"memory of a node: expected ([\d,]+) MiB for 3 ranks, got 200 MiB .SLURM_MEM_PER_NODE=200 on "
                         r"\S+; ask for more .Slurm: --mem=\d+M., or take fewer ranks on a node; nothing was read",
                         result.text)
    assert sum("memory of a node" in text for text in result.ranks) == 1, result.text
    assert not list(tmp_path.glob("out.h5*"))
    enough = str(int(needed.replace(",", "")) + 1)
    result = run(3, "attend", source, tmp_path / "out.h5", folder=tmp_path, env={"SLURM_MEM_PER_NODE": enough})
    assert result.code == 0, result.text
    result = run(2, "attend", source, tmp_path / "new.h5", "--memory-limit", "100KiB", folder=tmp_path)
    assert result.code == 2, result.text
    assert re.search(r"memory limit: expected \d+ bytes a rank at least .* \d+ ranks would do", result.text)
    assert not list(tmp_path.glob("new.h5*"))


def test_heads_of_keys_that_several_ranks_have_take_memory_on_each():
    """One head of the keys among four ranks is as much on each as four heads are."""
    one, four = (predict_memory(Sizes(4096, 4096, 8, kv_heads, 64, 64, "float32"), 4,
                                Options(backend="numpy", schedule="4x1x1:ring"), Process(0, 0)) for kv_heads in (1, 4))
    assert one["exchange of heads"] == four["exchange of heads"]
    one, two = (predict_memory(Sizes(4096, 4096, 8, kv_heads, 64, 64, "float32"), 4,
                               Options(backend="numpy", schedule="2x1x2:gather"), Process(0, 0)) for kv_heads in (1, 2))
    assert one["K/V buffers"] == two["K/V buffers"]


def test_mpiexec_is_there():
    assert Path(launch.mpiexec()).exists()


def test_progress_bar_on_a_terminal_only(source, tmp_path):
    """`script` gives mpiexec a terminal; with its output in a pipe there is no bar."""
    script = shutil.which("script")
    if not script or launch.is_openmpi():
        pytest.skip("needs `script`, and an mpiexec that runs as root without options")
    line = f"{launch.mpiexec()} -n 2 {sys.executable} -m ringmpi attend {source} {tmp_path}/out.h5 --force"
    for command, bar in ((line, True), (f"{line} 2>&1 | cat", False), (f"{line} --quiet", False)):
        launch.subprocess.run([script, "-qec", command, tmp_path / "typescript"], check=True, timeout=60,
                              stdin=launch.subprocess.DEVNULL, stdout=launch.subprocess.DEVNULL)
        said = (tmp_path / "typescript").read_text()
        assert ("pair/s]" in said) == bar, said


def test_bench_keeps_rates_that_auto_goes_by(tmp_path):
    """On two ranks: the file is there, and what was estimated is beside what was measured."""
    path = tmp_path / "new" / "rates.json"
    env = {"RINGMPI_RATES": str(path)}
    run = launch.launch(2, ["-m", "ringmpi", "bench", "network", "--mib", "1", "--repeat", "1"], folder=tmp_path,
                        timeout=120, env=env)
    assert run.code == 0, run.text
    assert f"kept in {path}" in run.text
    assert "2 ranks" in Rates.load(path).where
    run = launch.launch(2, ["-m", "ringmpi", "bench", "auto", "--tokens", "16", "--heads", "4/2", "--dim", "16",
                            "--repeat", "1", "--json", str(tmp_path / "auto.json")], folder=tmp_path, timeout=120,
                        env=env)
    assert run.code == 0, run.text
    assert "choice over best: 4 cases" in run.text
    record = json.loads((tmp_path / "auto.json").read_text())
    assert [row["pass"] for row in record["rows"]] == ["forward", "both"] * 2
    assert all(row["over best"] >= 1 and row["auto"] in row["all"] for row in record["rows"])
    assert record["rates"] == Rates.load(path).where
