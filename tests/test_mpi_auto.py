"""The schedule that a call chooses by itself: the same on all ranks, right, within its limit. Runs under mpiexec."""

import tempfile
import warnings
from pathlib import Path

import numpy as np
import pytest
from cases import FACTORS, covering, of_size
from test_mpi_gradients import LEVELS, check

from ringmpi import Mask, OptionError, RingAttention, RingError, Schedule
from ringmpi.layout import make
from ringmpi.schedules.cost import candidates, choose, estimate
from ringmpi.schedules.machine import Machine
from ringmpi.schedules.rates import CPU, LinkRate
from ringmpi.schedules.traffic import Shape

pytestmark = pytest.mark.mpi

CASES = covering({**LEVELS, "length": [1, 103, 301]}, seed=3)
assert set(FACTORS) <= set(LEVELS)


def arrays(comm, tokens, heads=8, kv_heads=8, dim=8, dtype="float32"):
    rng = np.random.default_rng(comm.rank)
    return [rng.standard_normal((tokens, h, dim)).astype(dtype) for h in (heads, kv_heads, kv_heads)]


def told(comm, call):
    """The text of the OptionError that a call raises, which must be the same on all ranks."""
    with pytest.raises(OptionError) as error:
        call()
    texts = comm.allgather(str(error.value))
    assert len(set(texts)) == 1
    return texts[0]


@pytest.mark.parametrize("number", range(0, len(CASES), 3))
def test_dense_softmax(comm, number):
    check(comm, **of_size(CASES[number], comm.size), schedule="auto", seed=number)


def test_every_shape_has_a_schedule_of_its_own(comm):
    """The same on all ranks; the ring before any call; a call that keeps nothing may have another."""
    chosen = []
    with RingAttention(comm, mask=Mask(causal=True), layout="striped", timeout=60) as attention:
        assert attention.schedule == Schedule(keys=comm.size)
        for tokens, heads in ((8, 8), (300, 8), (8, 3)):
            for keep in (True, False, True):
                attention(*arrays(comm, tokens, heads, heads), keep=keep)
                chosen.append(str(attention.schedule))
                assert attention.schedule.ranks == comm.size
                assert heads % attention.schedule.heads == 0
    assert len(set(map(tuple, comm.allgather(chosen)))) == 1
    assert chosen[0::3] == chosen[2::3]


@pytest.mark.parametrize("kept", [2, 1])
def test_what_was_chosen_is_kept(comm, monkeypatch, kept):
    """For as many shapes as are kept, of all ranks together; it is what is chosen without."""
    monkeypatch.setattr("ringmpi.attention.CHOICES", kept)
    calls = []

    def counted(*arguments, **options):
        calls.append(1)
        return choose(*arguments, **options)

    monkeypatch.setattr("ringmpi.attention.choose", counted)
    shapes = [8, 8 + 300 * (comm.rank == comm.size - 1)]
    chosen = {0: set(), 1: set()}
    with RingAttention(comm, mask=Mask(causal=True), timeout=60) as attention:
        for which in (0, 1, 0, 1, 1, 0):
            attention(*arrays(comm, shapes[which]))
            chosen[which].add(str(attention.schedule))
            assert len(attention._chosen) <= kept
        times = len(calls)
        with RingAttention(comm, mask=Mask(causal=True), timeout=60) as other:
            for which in chosen:
                other(*arrays(comm, shapes[which]))
                assert chosen[which] == {str(other.schedule)}
    if comm.size > 1:
        assert times == (2 if kept == 2 else 5)
    assert len(set(map(str, comm.allgather(chosen)))) == 1


def test_one_rank_that_keeps_nothing(comm):
    """Does not choose another schedule than those that do."""
    with RingAttention(comm, timeout=60) as attention:
        attention(*arrays(comm, 16), keep=comm.rank == 0)
        assert len(set(comm.allgather(str(attention.schedule)))) == 1


def test_rank_0_has_the_rates(comm, monkeypatch, rates_file):
    """Other ranks have others in their files, by which they would choose otherwise."""
    if comm.size == 1:
        pytest.skip("needs two ranks")
    mine = comm.Dup()
    slow_exchange = CPU if comm.rank else CPU.__class__(**{**vars(CPU), "exchange": LinkRate(10.0, 1e3)})
    slow_exchange.save(Path(rates_file))
    monkeypatch.setenv("RINGMPI_RATES", rates_file)
    with RingAttention(mine, timeout=60) as attention:
        attention(*arrays(mine, 8))
        assert attention.schedule.keys == comm.size           # nobody wants an exchange
    mine.Free()


@pytest.fixture
def rates_file():
    """A file of rates that is none, on each rank."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rates.json"
        path.write_text("{")
        yield str(path)


def test_a_damaged_file_on_rank_0(comm, monkeypatch, rates_file, recwarn):
    if comm.size == 1:
        pytest.skip("a rank alone has nothing to choose")
    mine = comm.Dup()
    monkeypatch.setenv("RINGMPI_RATES", rates_file)
    with RingAttention(mine, timeout=60) as attention:
        attention(*arrays(mine, 8))
    warned = [str(x.message) for x in recwarn if "default rates" in str(x.message)]
    assert len(warned) == (comm.rank == 0)
    mine.Free()


def test_a_warning_that_is_an_error(comm, monkeypatch, rates_file):
    """All ranks have it, and the communicator is as good as before."""
    if comm.size == 1:
        pytest.skip("a rank alone has nothing to choose")
    mine = comm.Dup()
    monkeypatch.setenv("RINGMPI_RATES", rates_file)
    with RingAttention(mine, timeout=60) as attention:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises((UserWarning, RingError), match="chosen by default rates"):
                attention(*arrays(mine, 8))
        monkeypatch.delenv("RINGMPI_RATES")
        attention(*arrays(mine, 8))
    mine.Free()


def test_a_memory_limit(comm):
    x = arrays(comm, 64)
    machine = Machine(comm.size, comm.size)
    shape = Shape(64 * comm.size, 64 * comm.size, 8, 8, 8, 8, most_q=64, most_k=64)
    needs = {schedule: estimate(shape, schedule, machine).memory for schedule in candidates(machine, 8)}
    least = min(needs.values())
    with RingAttention(comm, memory_limit=least, timeout=60) as attention:
        attention(*x)
        assert needs[attention.schedule] == least
    for schedule in ("auto", "ring", "queries"):
        with RingAttention(comm, schedule=schedule, memory_limit="2KiB", timeout=60) as attention:
            text = told(comm, lambda: attention(*x))
        if schedule == "auto":
            assert f"expected {least} bytes a rank at least" in text
        assert "got 2048; more ranks need less each" in text
    said = told(comm, lambda: RingAttention(comm, memory_limit="much"))
    assert "memory_limit: expected bytes, or text like 2GiB" in said


def test_limits_that_differ(comm):
    if comm.size > 1:
        assert "memory_limit" in told(comm, lambda: RingAttention(comm, memory_limit=2**30 + comm.rank))
        assert "schedule" in told(comm, lambda: RingAttention(comm, schedule="auto" if comm.rank else "ring"))


def test_ranks_that_cannot_share_memory_take_what_is_next(comm, monkeypatch):
    """A window that is chosen, and refused by the system on one rank, is left for another carrier."""
    if comm.size == 1:
        pytest.skip("needs two ranks")
    from ringmpi.schedules.window import Window

    def refuse(self):
        with self.comm.raise_on_all(self.timeout):
            if self.comm.rank == 0:
                raise OptionError("no memory to share")
    monkeypatch.setattr(Window, "connect", refuse)
    monkeypatch.setattr("ringmpi.attention.choose", lambda *_, among, **__: sorted(
        among, key=lambda x: (x.carrier != "window", x.heads, x.queries))[0])
    q, k, v = arrays(comm, 8)
    with RingAttention(comm, timeout=60) as attention, RingAttention(comm, schedule="ring", timeout=60) as ring:
        assert np.allclose(attention(q, k, v), ring(q, k, v))
        assert attention.schedule.carrier != "window"


def test_bytes_are_those_that_are_estimated(comm):
    """Of every grid and carrier, both ways: what all ranks' traces have counted."""
    q, k, v = arrays(comm, 6, 12, 4)
    shape = Shape(6 * comm.size, 6 * comm.size, 12, 4, 8, 8)
    machine = Machine(comm.size, comm.size)
    for schedule in candidates(machine, 12):
        with RingAttention(comm, schedule=schedule, timeout=60, threads=1, backend="numpy") as attention:
            for backward in (False, True):
                attention.backward(q) if backward else attention(q, k, v)
                trace = attention.trace
                sent = comm.allreduce(trace.bytes_sent + trace.gradient_bytes_sent + trace.exchanged_bytes_sent)
                want = estimate(shape, schedule, machine, backward=backward).bytes_sent
                assert abs(sent - want * comm.size) <= comm.size, (schedule, backward)


def test_a_mesh_of_16_ranks(comm):
    """Bytes counted, beside the ring's and the formulas: 3 blocks and 3 shards of queries and states for 15 blocks."""
    if comm.size != 16:
        pytest.skip("needs 16 ranks")
    tokens, heads, dim = 2, 4, 8
    sent = {}
    for schedule in ("ring", "4x1x4:ring", "1x4x4:ring"):
        with RingAttention(comm, schedule=schedule, timeout=120, threads=1, backend="numpy") as attention:
            attention(*arrays(comm, tokens, heads, heads, dim))
            sent[schedule] = comm.allreduce(attention.trace.bytes_sent + attention.trace.exchanged_bytes_sent)
    block = tokens * heads * 2 * dim * 4
    assert sent["ring"] == 16 * 15 * block
    assert sent["1x4x4:ring"] == 16 * 3 * (block + tokens * heads * (2 * dim + 2) * 4)
    assert sent["1x4x4:ring"] < 0.43 * sent["ring"]


def test_what_is_seen_is_estimated_by_samples(comm):
    """Shares of pairs and blocks that a mask lets be seen, on any layout."""
    from ringmpi.call import Call, Inputs, Records
    from ringmpi.problem import Problem, masked
    n = 24
    rows = comm.allgather(Call.check(Inputs(*arrays(comm, n)), 0.0, None).record())
    seen = {}
    for name, mask, layout in (("full", Mask(), "contiguous"), ("causal", Mask(causal=True), "contiguous"),
                               ("striped", Mask(causal=True), "striped"), ("window", Mask(window=4), "contiguous")):
        problem = Problem.check(mask, layout, None, None, None, None, 0.0, None)
        records = Records(rows)
        seen[name] = masked(problem.shape(records), problem.mask, *problem.resolve(records))
        assert make(layout, n * comm.size, comm.size).length == seen[name].n_k
    p, full = comm.size, n * comm.size
    assert (seen["full"].seen, seen["full"].uneven, seen["full"].reach, seen["full"].scattered) == (1, 1, 1, False)
    assert seen["causal"].seen == pytest.approx((full + 1) / 2 / full)
    assert seen["causal"].uneven == pytest.approx((n * (p - 1) + (n + 1) / 2) / ((full + 1) / 2))
    assert seen["causal"].reach == (0.5 if p > 1 else 1)
    assert seen["striped"].uneven < 1.1
    assert (seen["striped"].reach, seen["striped"].scattered) == (1, p > 1)
    assert seen["window"].seen == pytest.approx((9 * full - 20) / full**2)
    assert seen["window"].reach == pytest.approx(min(1, 2 / p) if p > 1 else 1)
