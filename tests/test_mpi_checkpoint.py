"""Calls that are left and gone on with, on this run's ranks: the same bits as without. See test_launch.py."""

import hashlib
import json
import re
import shutil
import warnings
from contextlib import suppress
from pathlib import Path

import numpy as np
import oracle
import pytest
from cases import make_layout, make_mask
from oracle import random_qkv

from ringmpi import InternalError, Mask, OptionError, OutputError, RingAttention, RingError, ShardError
from ringmpi import plan as plan_
from ringmpi.call import Inputs
from ringmpi.checkpoint import folded
from ringmpi.checkpoint.search import Keeping
from ringmpi.dtypes import TOLERANCE
from ringmpi.files.generations import NewGeneration
from ringmpi.layout import make
from ringmpi.schedules.spec import CARRIERS
from ringmpi.schedules.window import Window

pytestmark = pytest.mark.mpi
MANIFEST = "manifest.json"


class Asked:
    """Asks to stop at the n-th question, on one rank or on all."""

    def __init__(self, comm, at, ranks):
        self.left = at if comm.rank in ranks else -1

    def __call__(self):
        self.left -= 1
        return self.left == -1


def until(comm, at, *ranks):
    """Make a `stop` that is true at the question `at`, on these ranks, by default on the last."""
    return Asked(comm, at, ranks or (comm.size - 1,))


class Case:
    """A call on this run's ranks: its arguments here, and its options."""

    def __init__(self, comm, layout="contiguous", mask="causal", heads=(4, 2), length=151, dtype="float32", batch=None,
                 sinks=False, bias="", dim_v=None, seed=0, **options):
        rng = np.random.default_rng(seed)
        q_layout = make_layout(layout, length, comm.size)
        mine = q_layout.positions(comm.rank)
        arrays = [random_qkv(seed + i, length, length, *heads, 16, 12, dtype) for i in range(batch or 1)]
        self.whole = arrays
        self.arrays = [np.stack([x[n][mine] for x in arrays]) if batch else arrays[0][n][mine] for n in range(3)]
        self.given = {"sinks": rng.standard_normal(heads[0]).astype("f4")} if sinks else {}
        if dim_v is not None:                 # values are in the keys
            self.arrays.pop()
            self.given["dim_v"] = dim_v
        if bias:
            biases = [oracle.key_bias(bias, heads[0], length, seed + i)[mine] for i in range(batch or 1)]
            self.given["key_bias"] = np.stack(biases) if batch else biases[0]
        named = layout in ("striped", "zigzag")
        self.options = {"mask": Mask(**make_mask(mask, length)), "layout": layout if named else q_layout,
                        "timeout": 60, "schedule": "ring"} | options
        self.comm = comm

    def whole_run(self):
        with RingAttention(self.comm, **self.options) as attention:
            result = attention(*self.arrays, **self.given, return_lse=True)
            self.trace = attention.trace
            return result

    def leave(self, folder, stop):
        """Be left by `stop`, and saved; say whether it was."""
        with RingAttention(self.comm, **self.options) as attention:
            left = attention(*self.arrays, **self.given, return_lse=True, stop=stop) is None
            if left:
                attention.save(folder)
        assert len(set(self.comm.allgather(left))) == 1
        return left

    def go_on(self, folder, stop=None, **options):
        with RingAttention.restore(folder, self.comm, **{**self.options, **options}) as attention:
            more = {} if stop is None else {"stop": stop}
            result = attention(*self.arrays, **self.given, **more, return_lse=True)
            if result is None:
                attention.save(folder)
            self.trace = attention.trace
            return result


def same(got, want):
    return all(a.dtype == b.dtype and a.tobytes() == b.tobytes() for a, b in zip(got, want, strict=True))


def states(folder):
    """The folders of generations that are complete."""
    return sorted(path.parent.name for path in Path(folder).glob(f"*/{MANIFEST}"))


CASES = [
    {"mask": "full", "layout": "contiguous", "backend": "numpy"},
    {"mask": "causal", "layout": "striped", "backend": "numba", "length": 1003},
    {"mask": "all", "layout": "zigzag", "backend": "numba", "sinks": True, "dropout": 0.3},
    {"mask": "window", "layout": "uneven", "backend": "numba", "dtype": "bfloat16", "batch": 2},
    {"mask": "documents", "layout": "empty", "backend": "numpy", "dtype": "float16", "heads": (3, 1)},
    {"mask": "first", "layout": "custom", "backend": "numba", "dtype": "float64", "softcap": 5.0,
     "alibi": [0.1, 0.2, 0.3, 0.4]},
    {"mask": "trees", "layout": "uneven", "backend": "numba"},
    {"mask": "window", "layout": "uneven", "backend": "numba", "batch": 2, "bias": "left out by head"},
    {"mask": "causal", "layout": "zigzag", "backend": "numba", "dim_v": 5},
]


@pytest.mark.parametrize("number", range(len(CASES)))
def test_left_after_each_step_and_gone_on_with_has_the_same_bits(comm, folder, number):
    case = Case(comm, **CASES[number])
    want = case.whole_run()
    left = [at for at in range(comm.size + 1) if case.leave(folder / str(at), until(comm, at))]
    assert left or CASES[number]["layout"] == "empty"       # a rank without keys may have nothing to leave
    for at in left:
        assert same(case.go_on(folder / str(at)), want)


@pytest.mark.parametrize("carrier", CARRIERS)
def test_carriers(comm, folder, carrier):
    case = Case(comm, schedule=f"1x1x{comm.size}:{carrier}", mask="full", backend="numba", length=203)
    want = case.whole_run()
    assert same(case.whole_run(), want)
    for at in range(1, comm.size):
        if case.leave(folder / str(at), until(comm, at, 0)):
            assert same(case.go_on(folder / str(at)), want)


def test_each_rank_stops_where_it_is(comm, folder, monkeypatch):
    """All ranks are asked to at once, each at another place: pieces of the rows have met different blocks."""
    monkeypatch.setattr(folded, "TILES", 1)
    case = Case(comm, mask="full", backend="numba", heads=(8, 1), length=300 + 200 * comm.size)
    want = case.whole_run()
    for at in (0, 1, 2, 4, 5):
        assert case.leave(folder / str(at), until(comm, at + comm.rank, *range(comm.size)))
        assert same(case.go_on(folder / str(at)), want)


def test_stopped_again_and_again(comm, folder, monkeypatch):
    monkeypatch.setattr(folded, "TILES", 1)
    case = Case(comm, mask="causal", layout="striped", backend="numba", heads=(8, 2), length=400 + 200 * comm.size,
                batch=2)
    want = case.whole_run()
    assert case.leave(folder / "c", until(comm, 2))
    times = 0
    while (got := case.go_on(folder / "c", stop=until(comm, comm.size, *range(comm.size)))) is None:
        times += 1
        assert len(states(folder / "c")) == 1
    assert times
    assert same(got, want)


def test_heads_are_shared_and_gone_on_with(comm, folder):
    if comm.size % 2 or comm.size < 4:
        pytest.skip("needs an even number of ranks, 4 at least")
    case = Case(comm, schedule=f"2x1x{comm.size // 2}", mask="causal", backend="numba")
    want = case.whole_run()
    assert case.leave(folder / "c", until(comm, 1))
    assert same(case.go_on(folder / "c"), want)


def test_canonical_order(comm, folder):
    case = Case(comm, schedule="auto", order="canonical", layout="striped", backend="numba", length=333)
    want = case.whole_run()
    for at in range(1, comm.size):
        if case.leave(folder / str(at), until(comm, at)):
            assert same(case.go_on(folder / str(at)), want)


def test_auto_takes_a_schedule_that_can_be_left_and_that_of_the_checkpoint(comm, folder):
    case = Case(comm, schedule="auto", mask="full")
    assert case.leave(folder / "c", until(comm, 0))
    with RingAttention.restore(folder / "c", comm, **case.options) as attention:
        got = attention(*case.arrays, return_lse=True)
        used = str(attention.schedule)
        [manifest] = [json.loads(path.read_bytes().partition(b"\n")[2]) for path in folder.glob(f"c/*/{MANIFEST}")]
        assert used == manifest["placement"]["schedule"]
        again = attention(*case.arrays, return_lse=True)
    assert same(got, case.whole_run()) or used != "ring"
    assert got[0].shape == again[0].shape


def test_a_queries_schedule_says_what_would_do(comm, folder):
    if comm.size == 1:
        return
    case = Case(comm, schedule="queries")
    with pytest.raises(OptionError, match=rf"no queries travel.*1x1x{comm.size}:ring would do"):
        case.leave(folder / "c", until(comm, 0))
    with RingAttention(comm, layout="replicated") as attention, pytest.raises(OptionError, match="dealt out"):
        attention(*case.whole[0][:1], *case.arrays[1:], stop=lambda: False)


def test_a_call_that_is_not_left_is_as_any_other(comm):
    case = Case(comm, backend="numba")
    want = case.whole_run()
    with RingAttention(comm, **case.options) as attention:
        assert same(attention(*case.arrays, return_lse=True, stop=lambda: False), want)
        dout = np.ones_like(want[0])
        got = attention.backward(dout)
        with pytest.raises(RingError, match=r"was left by its stop="):
            attention.save("nowhere")
    with RingAttention(comm, **case.options) as attention:
        attention(*case.arrays)
        assert same(got, attention.backward(dout))


OTHERS = [
    {"mask": "causal", "layout": "striped", "backend": "numba", "heads": (8, 1)},
    {"mask": "all", "layout": "zigzag", "backend": "numba", "sinks": True, "dropout": 0.3, "heads": (8, 1)},
    {"mask": "full", "layout": "uneven", "backend": "numba", "dtype": "bfloat16", "batch": 2, "heads": (8, 1)},
    {"mask": "documents", "layout": "empty", "backend": "numba", "dtype": "float64", "heads": (8, 1),
     "alibi": [0.1 * i for i in range(8)]},
    {"mask": "first", "layout": "striped", "backend": "numba", "dtype": "float16", "heads": (4, 4), "softcap": 5.0,
     "batch": 2, "sinks": True},
    {"mask": "window", "layout": "uneven", "backend": "numba", "heads": (6, 2), "dropout": 0.2},
    {"mask": "prefix", "layout": "contiguous", "backend": "numba", "length": 2},           # fewer tokens than ranks
    {"mask": "numbered", "layout": "striped", "backend": "numba"},
    {"mask": "causal", "layout": "zigzag", "backend": "numba", "heads": (4, 2), "bias": "left out by head"},
    {"mask": "causal", "layout": "striped", "backend": "numba", "bias": "left out by head", "dim_v": 5},
]


def go_on_with(comm, number, options, folder, at, **more):
    """Go on with some of the ranks, and in another layout; with `at` be left again. Give the results if there are."""
    from mpi4py import MPI
    some = comm.Split(0 if comm.rank < number else MPI.UNDEFINED)
    got = None
    if some != MPI.COMM_NULL:
        case = Case(some, **{"length": 397, **options, **more})
        stop = until(some, at, *range(some.size)) if at is not None else None
        if list(folder.glob(f"*/{MANIFEST}")):
            got = case.go_on(folder, stop=stop)
            got = got and (*got, case.trace.pairs)
        else:
            assert case.leave(folder, stop) or case.leave(folder, until(some, 0, *range(some.size)))
        some.Free()
    comm.Barrier()
    return got


@pytest.mark.parametrize("number", range(len(OTHERS)))
def test_other_ranks_in_other_layouts_go_on(comm, folder, monkeypatch, number):
    """Left again by one rank, some and all; and then all of them to the end, in other layouts, with other carriers."""
    monkeypatch.setattr(folded, "TILES", 1)
    options, here = OTHERS[number], folder / "c"
    layouts = ["contiguous", "striped", "zigzag", "empty"]
    for turn, ranks in enumerate([comm.size, 1, max(1, comm.size - 1), comm.size]):
        layout = layouts[(number + turn) % 4] if turn else options["layout"]
        go_on_with(comm, ranks, options, here, 1, layout=layout)
        comm.Barrier()
        assert len(states(here)) == 1
    carriers = [("striped", "ring"), ("uneven", "two-way"), ("zigzag", "broadcast"), ("empty", "gather"),
                ("custom", "window")]
    for layout, carrier in carriers if number < 3 else carriers[number - 3::2]:
        case = Case(comm, **{"length": 397, **options, "layout": layout})
        want = case.whole_run()
        got = go_on_with(comm, comm.size, options, here, None, layout=layout, schedule=f"1x1x{comm.size}:{carrier}")
        rest, whole = comm.allreduce(got[2]), comm.allreduce(case.trace.pairs)
        assert 0 < rest <= whole
        cut = options["mask"] in ("causal", "full")             # else there may be no place to leave but the start
        if cut or (comm.size > 2 and "length" not in options):
            assert rest < whole
        for x, y in zip(got[:2], want, strict=True):
            seen = np.isfinite(y.astype("f8"))
            assert (np.isfinite(x.astype("f8")) == seen).all()
            assert oracle.error(x[seen], y[seen]) <= oracle_bound(options)


def oracle_bound(options):
    return 2 * TOLERANCE[options.get("dtype", "float32")]


def test_other_ranks_need_a_schedule_that_shares_no_heads(comm, folder):
    if comm.size % 2:
        return
    assert Case(comm, schedule=f"2x1x{comm.size // 2}:ring", mask="full").leave(folder / "c", until(comm, 0, *range(
        comm.size)))
    with pytest.raises(OptionError, match=f"only from a schedule that shares no heads, got 2x1x{comm.size // 2}"):
        Case(comm, mask="full").go_on(folder / "c")


def test_stop_on_some_ranks_only_is_an_error_on_all(comm):
    if comm.size == 1:
        return
    case = Case(comm)
    with RingAttention(comm, **case.options) as attention, pytest.raises(OptionError, match="with stop="):
        attention(*case.arrays, **({"stop": lambda: False} if comm.rank else {}))


def test_another_call_takes_no_states_from_one_that_was_left(comm, folder):
    case, other = Case(comm, mask="full"), Case(comm, mask="full", seed=1)
    want = case.whole_run()
    with RingAttention(comm, **case.options) as attention, RingAttention(comm, **other.options) as second:
        assert attention(*case.arrays, return_lse=True, stop=until(comm, 0)) is None
        second(*other.arrays)
        attention.save(folder / "c")
    assert same(case.go_on(folder / "c"), want)


CHANGED = {
    "causal": {"mask": Mask()}, "scale": {"scale": 0.5}, "softcap": {"softcap": 3.0}, "dropout": {"dropout": 0.1},
    "order": {"order": "canonical", "schedule": "auto"}, "accumulator": {"accumulator": "float64"},
    "backend": {"backend": "numpy"},
}


def test_another_call_is_refused(comm, folder):
    case = Case(comm, backend="numba")
    assert case.leave(folder / "c", until(comm, 0))
    before = states(folder / "c")
    for name, options in CHANGED.items():
        with pytest.raises(OptionError, match=f"expected a checkpoint of this call: {name} is"):
            case.go_on(folder / "c", **options)
    changes = {"q (by": 0, "k (by": 1, "v (by": 2}
    for name, which in changes.items():
        arrays = [x.copy() for x in case.arrays]
        if comm.rank == comm.size - 1:
            arrays[which].reshape(-1)[-1] += 1
        with RingAttention.restore(folder / "c", comm, **case.options) as attention, pytest.raises(
                OptionError, match=f"of this call: {re.escape(name)}"):
            attention(*arrays)
    with RingAttention.restore(folder / "c", comm, **case.options) as attention, pytest.raises(
            OptionError, match="of this call: sinks"):
        attention(*case.arrays, sinks=np.zeros(4))
    with RingAttention.restore(folder / "c", comm, **case.options) as attention, pytest.raises(
            OptionError, match="of this call: key_bias"):
        attention(*case.arrays, key_bias=np.zeros(len(case.arrays[1])))
    with RingAttention.restore(folder / "c", comm, **case.options) as attention, pytest.raises(
            OptionError, match="of this call: relative"):
        attention(*case.arrays, relative=np.zeros((4, 3)))
    assert states(folder / "c") == before
    assert same(case.go_on(folder / "c"), case.whole_run())


def test_a_bias_by_distance(comm, folder):
    """It is part of the call: the same table goes on to the same bits, another one is refused."""
    case = Case(comm)
    case.given["relative"] = np.random.default_rng(2).standard_normal((4, 41))
    want = case.whole_run()
    assert case.leave(folder / "c", until(comm, 0))
    table = case.given["relative"]
    case.given["relative"] = 1.5 * table
    with pytest.raises(OptionError, match="expected a checkpoint of this call: relative"):
        case.go_on(folder / "c")
    case.given["relative"] = table
    assert same(case.go_on(folder / "c"), want)


def test_nothing_to_go_on_from(comm, folder):
    case = Case(comm)
    for name in ("none", "empty"):
        if name == "empty" and comm.rank == 0:
            (folder / name / "00000001-0123456789ab").mkdir(parents=True)
        comm.Barrier()
        with pytest.raises(ShardError, match="has no complete checkpoint"):
            case.go_on(folder / name)
    with pytest.raises(OptionError, match="path: expected"):
        case.go_on(3)


def test_a_folder_that_cannot_be_written(comm, folder):
    case = Case(comm, mask="full")
    with RingAttention(comm, **case.options) as attention:
        assert attention(*case.arrays, stop=until(comm, 0)) is None
        for wrong in (folder / "no" / "such", Path("/dev/null")):
            with pytest.raises(OutputError, match=r"can.t be written|expected a folder"):
                attention.save(wrong)
        attention.save(folder / "c")
    assert len(states(folder / "c")) == 1


def reseal(comm, folder, change):
    """Change what the manifest of a checkpoint says, and give it the right digest."""
    if comm.rank == 0:
        file = next(folder.glob(f"*/{MANIFEST}"))
        content = json.loads(file.read_bytes().partition(b"\n")[2])
        change(content)
        text = json.dumps(content).encode()
        file.write_bytes(hashlib.sha256(text).hexdigest().encode() + b"\n" + text)
    comm.Barrier()


def damage(file, how):
    whole = file.read_bytes()
    if how == "flipped":
        file.write_bytes(whole[:40] + bytes([whole[40] ^ 1]) + whole[41:])
    elif how == "cut":
        file.write_bytes(whole[:-8])
    elif how == "longer":
        file.write_bytes(whole + b"x" * 8)
    elif how == "gone":
        file.unlink()
    else:
        file.unlink()
        file.mkdir()


@pytest.mark.parametrize("how", ["flipped", "cut", "longer", "gone", "folder"])
def test_damage_is_found_on_all_ranks(comm, folder, how):
    case = Case(comm, mask="full")
    assert case.leave(folder / "right", until(comm, 0))
    for name in (f"{comm.size - 1:05d}.state", MANIFEST):
        if comm.rank == 0:
            shutil.copytree(folder / "right", folder / name)
            damage(next((folder / name).glob(f"*/{name}")), how)
        comm.Barrier()
        with pytest.raises((ShardError, OptionError), match="rank"):
            case.go_on(folder / name)


def test_another_version_is_refused(comm, folder):
    case = Case(comm, mask="full")
    assert case.leave(folder / "c", until(comm, 0))
    reseal(comm, folder / "c", lambda content: content.update(format=2))
    with pytest.raises(ShardError, match="of another version of ringmpi"):
        case.go_on(folder / "c")


def test_fingerprints_do_not_go_by_who_has_what(comm):
    from ringmpi.backends.numpy_ import NumpyBackend
    from ringmpi.checkpoint.fingerprint import fingerprint
    x = np.random.default_rng(0).standard_normal((2, 57, 3, 5)).astype("f4")
    backend, found = NumpyBackend(1), set()
    for layout in ("contiguous", "striped", "zigzag"):
        mine = make(layout, 57, comm.size).positions(comm.rank)
        found.add(sum(comm.allgather(fingerprint(x[:, mine], mine, backend))) % 2**64)
    found.add(fingerprint(x, np.arange(57), backend))
    assert len(found) == 1
    others = {fingerprint(y, np.arange(y.shape[1]), backend) for y in (
        x[::-1], x[:, ::-1], x[:, :, ::-1], x[..., ::-1], np.roll(x, 1, axis=1), x + 0.001, x[:, :56])}
    assert len(others | found) == 8


@pytest.mark.parametrize("kept_bytes", [-1, plan_.KEPT_BYTES])
@pytest.mark.parametrize("others", [False, True])
@pytest.mark.parametrize("mask", ["causal", "all"])
def test_calls_after_one_that_goes_on(comm, folder, monkeypatch, kept_bytes, others, mask):
    """A backward pass of it, and a second call: as if nothing had been left, whether or not plans keep columns."""
    monkeypatch.setattr(plan_, "KEPT_BYTES", kept_bytes)
    monkeypatch.setattr(folded, "TILES", 1)
    options = {"mask": mask, "layout": "zigzag", "backend": "numba", "heads": (8, 1), "length": 397}
    case = Case(comm, **options)
    assert case.leave(folder / "c", until(comm, 1 if mask == "causal" else 0, *range(comm.size)))
    if others:
        case = Case(comm, **options | {"layout": "striped"})
    rng = np.random.default_rng(comm.rank)
    with RingAttention(comm, **case.options) as attention:
        want = attention(*case.arrays, return_lse=True)
        dout = rng.standard_normal(want[0].shape).astype("f4")
        gradients = attention.backward(dout)
    with RingAttention.restore(folder / "c", comm, **case.options) as attention:
        first = attention(*case.arrays, return_lse=True)
        back = attention.backward(dout)
        second = attention(*case.arrays, return_lse=True)
        again = attention.backward(dout)
        of_any = attention.backward_of(dout, *case.arrays, *second)
    assert same(second, want)
    assert same(again, gradients)
    assert same(of_any, gradients)
    if not others:
        assert same(first, want)
        assert same(back, gradients)
    for x, y in zip((*first, *back), (*want, *gradients), strict=True):
        seen = np.isfinite(y)
        assert (np.isfinite(x) == seen).all()
        np.testing.assert_allclose(x[seen], y[seen], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("layout", ["striped", "zigzag"])
def test_progress_comes_to_all_pairs(comm, folder, monkeypatch, layout):
    """What was done before counts at once, and the rest as it is done; each pair once."""
    monkeypatch.setattr(folded, "TILES", 1)
    options = {"mask": "causal", "backend": "numba", "heads": (8, 1), "length": 397}
    case = Case(comm, layout="striped", **options)
    done = []

    def progress(pairs, total):
        done.append((pairs, total))

    with RingAttention(comm, **case.options) as attention:
        assert attention(*case.arrays, stop=until(comm, 1, *range(comm.size)), progress=progress) is None
        attention.save(folder / "c")
    before = sum(pairs for pairs, _ in done)
    assert before == attention.trace.pairs
    case = Case(comm, layout=layout, **options)
    done.clear()
    with RingAttention.restore(folder / "c", comm, **case.options) as attention:
        attention(*case.arrays, progress=progress)
        left = attention.trace.pairs
    pairs, totals = zip(*done, strict=True)
    assert len(set(totals)) == 1
    assert sum(pairs) == totals[0]
    assert pairs[0] == totals[0] - left
    whole = comm.allreduce(totals[0])
    assert comm.allreduce(left) + comm.allreduce(before) == whole


def attend_auto(comm, case, folder, resume="auto", **options):
    """Attend as a job does, from whatever is there."""
    with RingAttention(comm, **{**case.options, **options}) as attention:
        keeping = Keeping(folder, None, resume)
        result = attention._call_resumable(Inputs(*case.arrays), True, False, None, None, keeping)
        return result, attention.schedule


def test_nodes_that_refuse_the_carrier_of_the_checkpoint(comm, folder, monkeypatch):
    """`auto` takes another schedule then, and goes on to rounding."""
    case = Case(comm, schedule=f"1x1x{comm.size}:window", mask="full", backend="numba")
    want = case.whole_run()
    left = case.leave(folder / "c", until(comm, 0))
    if not left:
        assert comm.size == 1
        return

    def refuse(grid, on_gpu):
        raise OptionError("no shared memory on these nodes")

    monkeypatch.setattr(Window, "check", staticmethod(refuse))
    for resume in ("auto", "require"):
        got, schedule = attend_auto(comm, case, folder / "c", resume, schedule="auto")
        assert schedule.carrier != "window" or comm.size == 1
        for x, y in zip(got, want, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


def test_a_checkpoint_in_which_queries_travel(comm, folder):
    """No version has written one: `auto` says why it is not used, and what is required is an error on all."""
    if comm.size == 1:
        pytest.skip("one rank has nobody to send queries to")
    case = Case(comm, mask="full", backend="numba")
    want = case.whole_run()
    assert case.leave(folder / "c", until(comm, 0))
    for schedule in (f"1x{comm.size}x1:ring", "1x2x2:ring", f"1x{comm.size}x1:nothing", "mesh", None, 3, "2x2x1:ring"):
        reseal(comm, folder / "c", lambda content, x=schedule: content["placement"].update(schedule=x))
        for asked in ("auto", f"1x1x{comm.size}"):
            if schedule == "1x1x1:ring" and comm.size == 1:
                continue
            with pytest.raises((OptionError, ShardError)):
                attend_auto(comm, case, folder / "c", "require", schedule=asked)
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                got, _ = attend_auto(comm, case, folder / "c", schedule=asked)
            assert ("no checkpoint is used" in "".join(str(one.message) for one in said)) == (comm.rank == 0)
            np.testing.assert_allclose(got[0], want[0], rtol=1e-5, atol=1e-5)


ODD = [float("inf"), float("nan"), -1, 1.5, 2**63, 10**30, True, "3", None, [], {}, [[1]], [10**30], [-1, 1], ["x"],
       [float("inf")], [0] * 300000, [2.0]]
PLACES = [("placement", "n_q"), ("placement", "n_k"), ("placement", "layout"), ("placement", "blocks"),
          ("placement", "blocks", "n_k"), ("placement", "blocks", "layout"), ("placement", "ranks"),
          ("shards", 0, "groups"), ("placement", "moved"), ("placement", "kv_layout")]


@pytest.mark.parametrize("place", PLACES)
def test_odd_numbers_in_a_manifest(comm, folder, place):
    """What is used is checked first; where it is not used the result is right."""
    case, moved = Case(comm, mask="full", layout="striped"), Case(comm, mask="full", layout="zigzag")
    want = moved.whole_run()
    assert case.leave(folder / "right", until(comm, 0))
    for number, value in enumerate(ODD):
        here = folder / str(number)
        if comm.rank == 0:
            shutil.copytree(folder / "right", here)

        def change(content, value=value):
            for name in place[:-1]:
                content = content[name]
            content[place[-1]] = value

        reseal(comm, here, change)
        got = None
        with suppress(ShardError, OptionError):
            got = moved.go_on(here)
        if got:
            np.testing.assert_allclose(got[0], want[0], rtol=1e-5, atol=1e-5)


def test_where_warnings_are_errors_all_ranks_raise_them(comm, folder, monkeypatch):
    case = Case(comm, mask="full")
    assert case.leave(folder / "c", until(comm, 0))
    if comm.rank == 0:
        damage(next((folder / "c").glob("*/00000.state")), "flipped")
    comm.Barrier()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(InternalError, match="no checkpoint is used, and all is computed"):
            attend_auto(comm, case, folder / "c")

        def write(self, rank, arrays):
            raise OutputError("no space is left")

        monkeypatch.setattr(NewGeneration, "write", write)       # this is no warning: it comes in mid-way
        with RingAttention(comm, **case.options) as attention:
            got = attention._call_resumable(Inputs(*case.arrays), True, False, None, None,
                                            Keeping(folder / "d", 0.0, "never"))
    assert same(got, case.whole_run())
