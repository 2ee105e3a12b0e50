"""`ringmpi attend --stream`: pieces and blocks give what is right, within the limit, and go on when stopped."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import attack_mutations
import launch
import numpy as np
import oracle
import pytest
from attack_cases import REFUSED, arrays, left_over
from cases import make_mask
from job_files import read_arrays, write_arrays
from oracle import random_qkv

from ringmpi.backends import open_backend
from ringmpi.cli import main
from ringmpi.dtypes import DTYPES, TOLERANCE
from ringmpi.files.shards import verify
from ringmpi.job import stream_plan
from ringmpi.job.inputs import Sizes
from ringmpi.job.options import Options
from ringmpi.job.pieces import Block, Groups, Pieces
from ringmpi.layout import Contiguous, make
from ringmpi.mask import ARRAYS, Mask

STOPPED = 75
MORE = pytest.mark.exhaustive
LIMIT = 700                    # MiB, for jobs that are cut by `SMALL` and not by it
# Groups, pieces and blocks of some tokens, whatever fits; a rank gets a signal at the n-th block that it takes.
SMALL = """
import os, signal, sys
from ringmpi.cli import main
from ringmpi.job import stream_files, stream_plan
from ringmpi.job.pieces import Pieces
rank = int(os.environ.get('PMI_RANK') or os.environ.get('OMPI_COMM_WORLD_RANK') or 0)
group, piece, block, chosen, number = (int(sys.argv.pop(1)) for _ in range(5))
act = sys.argv.pop(1)
Planner = stream_plan.Planner
plan, take, left = Planner.plan, stream_files.BlockReader.take, [number]
def small(self, start=0):
    found = plan(self, start)
    return Pieces(start, self.group, piece * self.group, self._block(0), found.tile)
Planner.group = property(lambda self: -(-group // self.ranks) * self.ranks)
Planner._block = lambda self, limit: min(block, max(1, self.sizes.n_k))
def taking(self, *rest):
    left[0] -= 1
    if rank == chosen and not left[0]:
        exec(act)
    return take(self, *rest)
Planner.plan, stream_files.BlockReader.take = small, taking
sys.exit(main())
"""


def attend(source, target, *options, ranks=2, cut=(24, 3, 56), at=(-1, 0, "pass"), limit=LIMIT):
    """Run a job that streams, with groups, pieces (in groups) and blocks of some tokens; a rank may act at a block."""
    return launch.launch(ranks, ["-c", SMALL, *cut, *at, "attend", source, target, "--stream", "--memory-limit",
                                 f"{limit}MiB", "--timeout", "60", *options], folder=target.parent / "said")


def results(path):
    manifest = verify(path)
    return [manifest.rows(name, 0, manifest.shapes[name][0]) for name in ("out", "lse")]


CASES = [
    (1, "causal", "striped", "float32", (4, 2), 301, 301, "numpy"),
    (2, "causal", "striped", "float32", (4, 2), 301, 301, "numba"),
    (3, "all", "zigzag", "bfloat16", (3, 1), 202, 331, "numpy"),
    pytest.param(4, "documents", "contiguous", "float64", (2, 2), 259, 259, "numpy", marks=MORE),
    (4, "window", "striped", "float16", (8, 2), 400, 217, "numpy"),
    pytest.param(3, "first", "contiguous", "float32", (4, 4), 130, 300, "numpy", marks=MORE),
    pytest.param(2, "full", "zigzag", "float32", (1, 1), 5, 77, "numba", marks=MORE),
    (2, "trees", "zigzag", "float32", (2, 2), 290, 290, "numba"),
    pytest.param(3, "numbered", "striped", "float64", (2, 1), 130, 300, "numpy", marks=MORE),
    (2, "full", "striped", "float32", (2, 2), 0, 5, "numpy"),
    (2, "full", "striped", "float32", (2, 2), 5, 0, "numpy"),
]


def flags_of(mask):
    """Options of the command line for a mask of `make_mask`."""
    flags = ["--causal"] if mask.get("causal") else []
    if "window" in mask:
        flags += ["--window=" + ",".join("" if x is None else str(x) for x in mask["window"])]
    flags += [f"--{name.replace('_', '-')}={mask[name]}" for name in ("prefix", "first", "q_offset") if name in mask]
    return flags + [f"--{name.replace('_', '-')}" for name in ARRAYS if name in mask]


@pytest.mark.parametrize(("ranks", "kind", "layout", "dtype", "heads", "n_q", "n_k", "backend"), CASES)
def test_it_is_right(tmp_path, ranks, kind, layout, dtype, heads, n_q, n_k, backend):
    """Pieces and blocks that divide nothing: what a dense softmax gives, with sinks."""
    mask = make_mask(kind, n_k, n_q)
    q, k, v = random_qkv(1, n_q, n_k, *heads, 16, 12, dtype)
    sinks = np.linspace(-1, 1, heads[0])
    more = {name: np.array(mask[name]) for name in ARRAYS if name in mask}
    write_input(tmp_path / "in.h5", {"q": q, "k": k, "v": v}, {"sinks": sinks, **more})
    result = attend(tmp_path / "in.h5", tmp_path / "out.h5", *flags_of(mask), "--sinks", "--layout", layout,
                    "--backend", backend, ranks=ranks)
    assert result.code == 0, result.text
    out, lse = results(tmp_path / "out.h5")
    want = oracle.dense(q, k, v, oracle.visible(n_q, n_k, **mask), 1 / 4, sinks=sinks)
    bound = {name: 4 * x for name, x in TOLERANCE.items()} | {"bfloat16": 3e-2}
    assert out.dtype == DTYPES[dtype]
    assert oracle.error(out, want["out"]) <= bound[dtype]
    assert oracle.error(lse, want["lse"]) <= 4 * TOLERANCE["float64" if dtype == "float64" else "float32"]


def write_input(path, shards, small):
    import h5py
    write_arrays(path, shards)
    with h5py.File(path, "a") as file:
        for name, x in small.items():
            file[name] = x


@pytest.mark.parametrize(("ranks", "kind", "backend", "sinks"), [
    (3, "left out by head", "numba", False), (2, "left out", "numpy", False),
    pytest.param(2, "left out", "numpy", True, marks=MORE)])
def test_a_bias_of_the_keys(tmp_path, ranks, kind, backend, sinks):
    """Of float64, with keys that are left out, which hold NaN; queries that see no others of any block, or of some."""
    q, k, v = random_qkv(1, 251, 251, 4, 2, 16, 12, "float32")
    bias = oracle.key_bias(kind, 4, 251, dtype=np.float64)
    want = oracle.dense(q, k, v, oracle.visible(251, 251, causal=True), 1 / 4, key_bias=bias,
                        sinks=np.ones(4) if sinks else None)
    left_out = np.isneginf(bias).all(axis=1)
    k[left_out], v[left_out] = np.nan, np.nan
    small = {"key_bias": bias if "by head" in kind else bias[:, 0], "sinks": np.ones(4)}
    write_input(tmp_path / "in.h5", {"q": q, "k": k, "v": v}, small)
    options = ["--causal", "--key-bias", "--layout", "striped", "--backend", backend, *["--sinks"][:sinks],
               "--checkpoint", tmp_path / "c"]
    for number in (2, 6):                     # in the midst of pieces
        result = attend(tmp_path / "in.h5", tmp_path / "out.h5", *options, ranks=ranks,
                        at=(1, number, "os.kill(os.getpid(), signal.SIGUSR1)"))
        assert result.code == STOPPED, result.text
    import h5py
    with h5py.File(tmp_path / "in.h5", "a") as file:          # of other numbers there is no checkpoint
        file["key_bias"][0] = 3.0
    result = attend(tmp_path / "in.h5", tmp_path / "out.h5", *options, "--resume", "require", ranks=ranks)
    assert result.code == 2, result.text
    assert "key_bias (by its fingerprint)" in result.text
    with h5py.File(tmp_path / "in.h5", "a") as file:
        file["key_bias"][0] = small["key_bias"][0]
    result = attend(tmp_path / "in.h5", tmp_path / "out.h5", *options, "--resume", "require", ranks=ranks)
    assert result.code == 0, result.text
    out, lse = results(tmp_path / "out.h5")
    assert oracle.error(out, want["out"]) <= 4 * TOLERANCE["float32"]
    assert oracle.error(lse, want["lse"]) <= 4 * TOLERANCE["float32"]
    assert sinks or (np.isneginf(lse).any() and (out[np.isneginf(lse)] == 0).all())


@pytest.mark.parametrize(("ranks", "of_axes", "backend"), [(3, False, "numba"), (2, True, "numpy")])
def test_a_bias_by_distance(tmp_path, ranks, of_axes, backend):
    """By positions, or along the axes of a grid: left in the midst of pieces, and gone on with by the same tables."""
    n, rng = 250, np.random.default_rng(3)
    q, k, v = random_qkv(1, n, n, 4, 2, 16, 12, "float32")
    tables = {f"relative_{i}" if of_axes else "relative": rng.standard_normal((4, width))
              for i, width in enumerate((11, 21) if of_axes else (141,))}
    write_input(tmp_path / "in.h5", {"q": q, "k": k, "v": v}, tables)
    points, shape = np.arange(n), (10, 25)
    away = oracle.distances(shape, (False, True), points, points) if of_axes else [points[:, None] - points]
    see = (oracle.near(shape, [3, None], (False, True), "cut", False) if of_axes else
           oracle.visible(n, n, causal=True))
    want = oracle.dense(q, k, v, see, 1 / 4, relative=list(tables.values()), away=away)
    options = ["--relative", "--layout", "striped", "--backend", backend, "--checkpoint", tmp_path / "c",
               *(["--grid", "10x25", "--grid-window", "3,", "--grid-periodic", "1"] if of_axes else ["--causal"])]
    result = attend(tmp_path / "in.h5", tmp_path / "out.h5", *options, ranks=ranks,
                    at=(1, 4, "os.kill(os.getpid(), signal.SIGUSR1)"))
    assert result.code == STOPPED, result.text
    import h5py
    name, table = next(iter(tables.items()))
    for numbers, code in ((table + 1, 2), (table, 0)):
        with h5py.File(tmp_path / "in.h5", "a") as file:
            file[name][...] = numbers
        result = attend(tmp_path / "in.h5", tmp_path / "out.h5", *options, "--resume", "require", ranks=ranks)
        assert result.code == code, result.text
        assert code == 0 or "relative (by its digest)" in result.text
    out, lse = results(tmp_path / "out.h5")
    assert oracle.error(out, want["out"]) <= 4 * TOLERANCE["float32"]
    assert oracle.error(lse, want["lse"]) <= 4 * TOLERANCE["float32"]


def test_values_that_are_the_first_numbers_of_keys(tmp_path):
    """Read once with them, and a bias; left and gone on with."""
    q, k, _ = random_qkv(1, 251, 251, 4, 2, 16, 12, "float32")
    bias = oracle.key_bias("left out", 4, 251)
    want = oracle.dense(q, k, k[..., :7], oracle.visible(251, 251, causal=True), 1 / 4, key_bias=bias)
    write_input(tmp_path / "in.h5", {"q": q, "k": k}, {"key_bias": bias[:, 0]})
    options = ["--causal", "--key-bias", "--dim-v", "7", "--layout", "striped", "--backend", "numpy", "--checkpoint",
               tmp_path / "c"]
    result = attend(tmp_path / "in.h5", tmp_path / "out.h5", *options,
                    at=(1, 5, "os.kill(os.getpid(), signal.SIGUSR1)"))
    assert result.code == STOPPED, result.text
    result = attend(tmp_path / "in.h5", tmp_path / "out.h5", *options, "--resume", "require")
    assert result.code == 0, result.text
    for x, name in zip(results(tmp_path / "out.h5"), ("out", "lse"), strict=True):
        assert oracle.error(x, want[name]) <= 4 * TOLERANCE["float32"]
    sizes = Sizes(2**20, 2**20, 16, 1, 576, 512, "float32")
    planners = [stream_plan.Planner(replace(sizes, in_keys=in_keys), 2, Options(stream=True, memory_limit=2**30),
                                    type(open_backend("numpy", 1)), 2**27) for in_keys in (False, True)]
    assert [planner.block_bytes for planner in planners] == [1088 * 4, 576 * 4]


def test_a_bias_of_the_keys_that_is_no_number(tmp_path):
    """Of a block that one rank reads: an error on all, and nothing is left."""
    q, k, v = random_qkv(1, 251, 251, 4, 2, 16, 12, "float32")
    no_number = "dataset 'key_bias': expected finite numbers, or -inf to leave a key out, got nan for key 249"
    for bad, code, text in ((np.nan, 3, no_number), (1e300, 2, "key_bias: expected numbers that are finite in")):
        bias = np.zeros(251)
        bias[249] = bad
        write_input(tmp_path / "in.h5", {"q": q, "k": k, "v": v}, {"key_bias": bias})
        result = attend(tmp_path / "in.h5", tmp_path / "out.h5", "--key-bias", "--backend", "numpy", ranks=2)
        assert result.code == code, result.text
        assert text in result.text
        assert not (tmp_path / "out.h5").exists()
        (tmp_path / "in.h5").unlink()


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """An input, options, and what a job that streams on 3 ranks makes of it."""
    folder = tmp_path_factory.mktemp("stream")
    q, k, v = random_qkv(2, 301, 301, 4, 2, 16, 16, "float32")
    write_arrays(folder / "in.h5", {"q": q, "k": k, "v": v})
    result = attend(folder / "in.h5", folder / "right.h5", *OPTIONS, ranks=3)
    assert result.code == 0, result.text
    return folder / "in.h5", arrays(folder / "right.h5")


OPTIONS = ["--causal", "--layout", "striped", "--backend", "numpy"]


def test_like_all_at_once(case, tmp_path):
    result = launch.launch(3, ["-m", "ringmpi", "attend", case[0], tmp_path / "out.h5", *OPTIONS],
                           folder=tmp_path / "said")
    assert result.code == 0, result.text
    for name, x in arrays(tmp_path / "out.h5").items():
        x, y = np.frombuffer(x, "f4"), np.frombuffer(case[1][name], "f4")
        assert np.abs(x - y).max() < 2e-6 * np.abs(y).max()


@pytest.mark.parametrize("carrier", ["gather", *(pytest.param(name, marks=MORE) for name in ("broadcast", "two-way"))])
def test_carriers(case, tmp_path, carrier):
    result = attend(case[0], tmp_path / "out.h5", *OPTIONS, "--schedule", f"1x1x3:{carrier}", ranks=3)
    assert result.code == 0, result.text
    for name, x in arrays(tmp_path / "out.h5").items():
        x, y = np.frombuffer(x, "f4"), np.frombuffer(case[1][name], "f4")
        assert np.abs(x - y).max() < 2e-6 * np.abs(y).max()


def test_canonical_order_has_the_bits_of_any_other_job(tmp_path):
    """On 3 ranks in pieces and blocks, and on one all at once; two intervals for each query, and a bias of the keys."""
    tile = open_backend("numba", 1, canonical=True).canonical_tile
    q, k, v = random_qkv(3, 777, 777, 4, 2, 16, 16, "float32")
    bias = oracle.key_bias("left out", 4, 777)[:, 0]
    write_input(tmp_path / "in.h5", {"q": q, "k": k, "v": v}, {"key_bias": bias})
    options = ["--key-bias", "--causal", "--window", "200,0", "--first", "9", "--order", "canonical", "--backend",
               "numba"]
    result = attend(tmp_path / "in.h5", tmp_path / "out.h5", *options, "--layout", "striped", ranks=3,
                    cut=(24, 9, 3 * tile))
    assert result.code == 0, result.text
    assert main(["attend", str(tmp_path / "in.h5"), str(tmp_path / "one.h5"), *options, "--quiet"]) == 0
    assert arrays(tmp_path / "out.h5") == arrays(tmp_path / "one.h5")


@pytest.mark.parametrize("name", ["SIGUSR1", pytest.param("SIGTERM", marks=MORE)])
def test_stopped_on_request_and_gone_on_with(case, tmp_path, name):
    """By another rank each time, before the first piece and the second, and in the middle of some: the same bits."""
    for rank, number, resume in ((0, 1, "auto"), (0, 3, "require"), (1, 5, "require"), (2, 9, "require")):
        result = attend(case[0], tmp_path / "out.h5", *OPTIONS, "--checkpoint", tmp_path / "c", "--resume", resume,
                        ranks=3, at=(rank, number, f"os.kill(os.getpid(), signal.{name})"))
        assert result.code == STOPPED, result.text
        assert "the same command goes on from there" in result.text
        assert "overflow" not in result.text
        assert not (tmp_path / "out.h5").exists()
    result = attend(case[0], tmp_path / "out.h5", *OPTIONS, "--checkpoint", tmp_path / "c", "--resume", "require",
                    ranks=3, at=(0, 100, "raise SystemExit('too many blocks')"))
    assert result.code == 0, result.text
    assert arrays(tmp_path / "out.h5") == case[1]
    assert not (tmp_path / "c").exists()


def killed(case, tmp_path, number=9, options=()):
    """Kill a rank in the second piece or later."""
    result = attend(case[0], tmp_path / "out.h5", *OPTIONS, "--checkpoint", tmp_path / "c", *options, ranks=3,
                    at=(1, number, "os.kill(os.getpid(), signal.SIGKILL)"))
    assert result.code not in (0, STOPPED), result.text
    return result


@pytest.mark.parametrize("every", [600, 1e-9])
def test_killed_and_gone_on_with(case, tmp_path, every):
    """Killed without a word: it goes on with the piece, or in the midst of it where a checkpoint was written."""
    killed(case, tmp_path, options=["--checkpoint-every", every])
    killed(case, tmp_path, options=["--checkpoint-every", every])
    result = attend(case[0], tmp_path / "out.h5", *OPTIONS, "--checkpoint", tmp_path / "c", "--resume", "require",
                    ranks=3)
    assert result.code == 0, result.text
    assert arrays(tmp_path / "out.h5") == case[1]
    assert not (tmp_path / "c").exists()
    runs = {shard.file.split("/")[1] for shard in verify(tmp_path / "out.h5").shards}
    assert len(runs) >= 2                        # what the killed ones had finished is part of the result


def test_killed_when_all_is_computed(case, tmp_path):
    """Before OUT.h5 is written: what is left is to write it, and nothing is computed."""
    dies = ("from ringmpi.files.shards import Output\n"
            "Output.publish = lambda *_: os.kill(os.getpid(), signal.SIGKILL)")
    result = attend(case[0], tmp_path / "out.h5", *OPTIONS, "--checkpoint", tmp_path / "c", ranks=3, at=(0, 1, dies))
    assert result.code not in (0, STOPPED), result.text
    result = attend(case[0], tmp_path / "out.h5", *OPTIONS, "--checkpoint", tmp_path / "c", ranks=3,
                    at=(0, 1, "raise SystemExit('nothing is left to compute')"))
    assert result.code == 0, result.text
    assert arrays(tmp_path / "out.h5") == case[1]
    assert not (tmp_path / "c").exists()
    assert len(list((tmp_path / "out.h5.shards").iterdir())) == 1


def test_killed_when_the_output_is_there(case, tmp_path):
    """What the next job goes on with is what OUT.h5 shows, which it replaces: the shards stay."""
    dies = ("from ringmpi.job.checkpoints import Checkpoints\n"
            "Checkpoints.clear = lambda *_: os.kill(os.getpid(), signal.SIGKILL)")
    result = attend(case[0], tmp_path / "out.h5", *OPTIONS, "--checkpoint", tmp_path / "c", ranks=3, at=(0, 1, dies))
    assert result.code not in (0, STOPPED), result.text
    assert arrays(tmp_path / "out.h5") == case[1]
    result = attend(case[0], tmp_path / "out.h5", *OPTIONS, "--checkpoint", tmp_path / "c", "--force", ranks=3,
                    at=(0, 1, "raise SystemExit('nothing is left to compute')"))
    assert result.code == 0, result.text
    assert arrays(tmp_path / "out.h5") == case[1]


def test_what_a_killed_one_has_left_is_collected(case, tmp_path):
    result = attend(case[0], tmp_path / "out.h5", *OPTIONS, ranks=3,
                    at=(1, 9, "os.kill(os.getpid(), signal.SIGKILL)"))
    assert result.code not in (0, STOPPED), result.text
    assert (tmp_path / "out.h5.shards").exists()
    assert main(["clean", str(tmp_path / "out.h5"), "--older-than", "0"]) == 0
    assert not [name for name in left_over(tmp_path) if not name.startswith("said")]


def test_other_ranks_go_on_with_what_is_finished(case, tmp_path):
    killed(case, tmp_path, options=["--checkpoint-every", 1e-9])
    result = attend(case[0], tmp_path / "out.h5", "--causal", "--layout", "zigzag", "--backend", "numpy",
                    "--checkpoint", tmp_path / "c", "--resume", "require", ranks=2, cut=(40, 2, 90))
    assert result.code == 0, result.text
    for name, x in arrays(tmp_path / "out.h5").items():
        x, y = np.frombuffer(x, "f4"), np.frombuffer(case[1][name], "f4")
        assert np.abs(x - y).max() < 2e-6 * np.abs(y).max()


def test_another_job_or_damage_is_not_gone_on_with(case, tmp_path):
    killed(case, tmp_path)
    [generation] = [path.parent for path in (tmp_path / "c").glob("*/manifest.json")]
    shard = next(iter(sorted(tmp_path.glob("out.h5.shards/*/*.h5"))))

    def goes_on(*options, source=case[0], resume="require"):
        return attend(source, tmp_path / "out.h5", *OPTIONS, *options, "--checkpoint", tmp_path / "c", "--resume",
                      resume, ranks=3)

    result = goes_on("--scale", "0.5")
    assert result.code == 2, result.text
    assert "expected a checkpoint of this call: scale is None there and 0.5 here" in result.text
    q, k, v = read_arrays(case[0])
    v[300, 1, 3] += 1
    write_arrays(tmp_path / "in.h5", {"q": q, "k": k, "v": v})
    result = goes_on(source=tmp_path / "in.h5")
    assert result.code == 2, result.text
    assert "v (by its fingerprint) is" in result.text

    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    result = goes_on()
    assert result.code == 3, result.text
    assert "is damaged: it is not what was written" in result.text
    assert generation.exists()
    result = goes_on(resume="auto")
    assert result.code == 0, result.text
    assert "no checkpoint is used, and all is computed" in result.text
    assert arrays(tmp_path / "out.h5") == case[1]


def test_damaged_states_are_found_before_anything_is_computed(case, tmp_path):
    killed(case, tmp_path, options=["--checkpoint-every", 1e-9])
    [states] = (tmp_path / "c").glob("*/00001.state")
    data = bytearray(states.read_bytes())
    data[-1] ^= 1
    states.write_bytes(data)
    for resume, code, text in (("require", 3, "00001.state: is damaged"), ("auto", 0, "and all is computed")):
        result = attend(case[0], tmp_path / "out.h5", *OPTIONS, "--checkpoint", tmp_path / "c", "--resume", resume,
                        ranks=3)
        assert result.code == code, result.text
        assert text in result.text
    assert arrays(tmp_path / "out.h5") == case[1]


ODD = {
    "a shard elsewhere": lambda x: x["output"][0].update(file="../out.h5.shards/000000000000/00000.h5"),
    "a shard of another output": lambda x: x["output"][0].update(file="other.h5.shards/000000000000/00000.h5"),
    "a gap": lambda x: x["output"].pop(0),
    "a shard that is not there": lambda x: x["output"].append({**x["output"][1], "file": "out.h5.shards/0/1.h5",
                                                               "start": 32, "stop": 64}),
    "more rows": lambda x: x["output"][1].update(stop=2**40),
    "a block that is not there": lambda x: x.update(block=3),
    "no block": lambda x: x.update(block=None),
    "states of another size": lambda x: x.update(block=0),
    "ranks that are not there": lambda x: x["shards"].append(x["shards"][0]),
    "more pairs": lambda x: x["shards"][0].update(pairs=2**61),
    "fewer than no pairs": lambda x: x["shards"][1].update(pairs=-1),
    "other names": lambda x: x["pieces"].update(blocks=1),
    "text": lambda x: x["pieces"].update(piece="32"),
    "nothing": lambda x: x.pop("output"),
}
OTHERS = {
    "piece": (0, 1, 16, 24, 2**40), "group": (0, 1, 32), "block": (0, 1, 2**40), "tile": (0, 2), "start": (1, 48),
}


@pytest.mark.parametrize("name", ODD)
def test_a_checkpoint_that_makes_no_sense(tmp_path, name):
    """Its digest is right, and what it says is not: no file elsewhere is opened, nothing is computed with it."""
    made, _, read = attack_mutations.streamed(tmp_path)
    shutil.copytree(tmp_path / "out.h5.shards", tmp_path / "other.h5.shards")
    assert read() != REFUSED
    reseal(made, ODD[name])
    assert read() == REFUSED


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in OTHERS for value in OTHERS[name]])
def test_pieces_that_this_job_would_not_plan(tmp_path, name, value):
    """They may be without end, or take memory without end: it goes on after the last piece that is done, with its own.

    Pieces of 16 are among those that it might have planned.
    """
    made, _, read = attack_mutations.streamed(tmp_path)
    reseal(made, lambda x: x["pieces"].update({name: value}))
    found = read()
    assert (found == REFUSED) if (name, value) == ("piece", 16) else found[1] == "None"


def reseal(made, change):
    """Let a manifest say something else, with the right digest."""
    manifest = made / "manifest.json"
    content = json.loads(manifest.read_bytes().partition(b"\n")[2])
    change(content)
    text = json.dumps(content).encode()
    manifest.write_bytes(hashlib.sha256(text).hexdigest().encode() + b"\n" + text)


def test_without_a_checkpoint_nothing_is_left(case, tmp_path):
    result = attend(case[0], tmp_path / "out.h5", *OPTIONS, ranks=3,
                    at=(1, 9, "raise __import__('ringmpi').errors.ShardError('no more')"))
    assert result.code != 0
    assert "no more" in result.text
    assert not [name for name in left_over(tmp_path) if not name.startswith("said")], result.text


def test_a_rank_that_cannot_write(case, tmp_path):
    """All ranks end with the same error, and at once; the next job goes on after what was written before."""
    full = ("import ringmpi.files.shards as shards\n"
            "def write(self, at, out, lse, original=shards.NewShard.write, left=[4]):\n"
            "    left[0] -= 1\n"
            "    if not left[0]:\n"
            "        raise OSError(28, 'No space left on device')\n"
            "    original(self, at, out, lse)\n"
            "shards.NewShard.write = write")
    result = attend(case[0], tmp_path / "out.h5", *OPTIONS, "--checkpoint", tmp_path / "c", ranks=3, at=(1, 1, full))
    assert result.code == 6, result.text
    assert result.text.count("No space left on device") == 1, result.text
    assert not (tmp_path / "out.h5").exists()
    result = attend(case[0], tmp_path / "out.h5", *OPTIONS, "--checkpoint", tmp_path / "c", "--resume", "require",
                    ranks=3)
    assert result.code == 0, result.text
    assert arrays(tmp_path / "out.h5") == case[1]


@pytest.mark.parametrize(("options", "code", "text"), [
    (["--schedule", "2x1x1"], 2, "expected a schedule in which keys alone travel, in messages, got 2x1x1:ring; "
                                 "1x1x2:ring would do"),
    (["--schedule", "queries"], 2, "got 1x2x1:ring; 1x1x2:ring would do"),
    (["--schedule", "1x1x2:window"], 2, "1x1x2:ring would do"),
    (["--backend", "cuda"], 2, "--stream: computes on CPUs so far"),
    (["--output-driver", "mpio"], 2, "--stream: writes shards as it goes, got --output-driver mpio"),
])
def test_what_it_refuses(case, tmp_path, options, code, text):
    result = attend(case[0], tmp_path / "out.h5", *options)
    assert result.code == code, result.text
    assert result.text.count(text) == 1, result.text
    assert not [name for name in left_over(tmp_path) if not name.startswith("said")]


def test_survive_is_refused(capsys):
    with pytest.raises(SystemExit) as error:
        main(["attend", "in.h5", "out.h5", "--stream", "--survive"])
    assert error.value.code == 2
    assert "--survive: does not go together with --stream" in capsys.readouterr().err


def test_a_limit_that_is_too_small_says_which_would_do(tmp_path):
    q, k, v = random_qkv(2, 5000, 5000, 8, 1, 64, 64, "float32")
    write_arrays(tmp_path / "in.h5", {"q": q, "k": k, "v": v})

    def run(limit):
        return launch.launch(2, ["-m", "ringmpi", "attend", tmp_path / "in.h5", tmp_path / "out.h5", "--stream",
                                 "--memory-limit", limit, "--window", "99,0", "--json", tmp_path / "record.json"],
                             folder=tmp_path / "said")

    result = run("50MiB")
    assert result.code == 2, result.text
    least = int(re.search(r"expected a --memory-limit of (\d+)MiB at least", result.text)[1])
    result = run(f"{least + 16}MiB")             # the process of a rank may be some MiB larger
    assert result.code == 0, result.text
    peak = max(rank["peak_bytes"] for rank in json.loads((tmp_path / "record.json").read_text())["per_rank"])
    assert peak <= (least + 16) * 2**20


def test_layouts_of_pieces_and_blocks():
    rng = np.random.default_rng(0)
    for kind in ("contiguous", "striped", "zigzag"):
        for size in (1, 3):
            pieces = Pieces(5, 4 * size, 8 * size, 31)
            sizes = Sizes(100, 90, 1, 1, 1, 1, "float32")
            found = []
            for layout in pieces.of_queries(sizes, size, kind):
                for rank in range(size):
                    positions = layout.positions(rank)
                    assert (np.diff(positions) > 0).all()
                    assert len(positions) == layout.counts[rank]
                    x = rng.integers(-3, 110, 50)
                    assert (layout.count_below(x, rank) == (positions[None] < x[:, None]).sum(axis=1)).all()
                    found += positions.tolist()
                at = 0
                for start, group in layout.groups():
                    first = start + group.positions(0)
                    assert (layout.positions(0)[at:at + len(first)] == first).all()
                    at += len(first)
            assert sorted(found) == list(range(5, 100))
            blocks = pieces.of_keys(sizes, size)
            found = [x for block in blocks for rank in range(size) for x in block.positions(rank).tolist()]
            assert found == list(range(90))
            for block in blocks:
                x = rng.integers(0, 91, 50)
                for rank in range(size):
                    below = (block.positions(rank)[None] < x[:, None]).sum(axis=1)
                    assert (block.count_below(x, rank) == below).all()


def test_layouts_of_different_places_differ():
    a, b = (Block([3, 3], start, 20) for start in (0, 6))
    assert a != b
    one = make("striped", 4, 2)
    assert Groups(0, one, 2, make("striped", 0, 2), 20) != Groups(8, one, 2, make("striped", 0, 2), 20)
    assert a != Contiguous([3, 3])


def test_blocks_that_are_seen():
    pieces = Pieces(0, 1, 1, 10)
    mask = Mask(causal=True, window=(12, 0), first=3)
    for query in range(95):
        bounds = mask.bounds(np.array([query]), 95, 95)
        want = {j // 10 for low, high in bounds for j in range(int(low[0]), int(high[0]))}
        assert set(np.flatnonzero(pieces.seen(bounds, 95)).tolist()) == want


def test_the_fewest_pieces_within_the_limit():
    sizes = Sizes(2**20, 2**20, 1, 1, 64, 64, "float32")

    def planner(mebibytes, ranks=2):
        from ringmpi.backends.numba_.backend import NumbaBackend
        return stream_plan.Planner(sizes, ranks, Options(causal=True, stream=True, memory_limit=mebibytes * 2**20),
                                   NumbaBackend, 206 * 2**20)

    for limit in (400, 512, 1024, 4096):
        one = planner(limit)
        pieces = one.plan()
        assert one.predict(pieces)["total"] <= limit * 2**20
        seen = one.passes(Mask(causal=True), pieces)
        number = len(seen)
        assert max(seen) <= -(-sizes.n_k // pieces.block)
        assert seen == sorted(seen)
        fewer = Pieces(0, pieces.group, -(-pieces.piece * number // max(1, number - 1)), pieces.block)
        assert number == 1 or one.predict(fewer)["total"] > limit * 2**20
    assert [len(planner(limit).passes(Mask(), planner(limit).plan())) for limit in (400, 512, 1024)] == [3, 2, 1]


def test_dry_run(case, tmp_path):
    """In a process of its own: what it takes is part of the limit."""
    said = subprocess.run([sys.executable, "-m", "ringmpi", "attend", case[0], tmp_path / "out.h5", *OPTIONS,
                           "--stream", "--memory-limit", "400MiB", "--dry-run", "--expect-ranks", "3"],
                          capture_output=True, text=True, timeout=60, check=True).stdout
    for text in ("a piece of queries", "K/V blocks", "1 of 301 queries", "1 block of", "1.0 times its share", "2 hops",
                 "up to 0.0 MiB for a piece"):
        assert text in said, said
