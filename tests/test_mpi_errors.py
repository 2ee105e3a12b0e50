"""Bad input raises the same error on every rank, at once, and leaves everything usable. Runs under mpiexec."""

import re
import time
import warnings
from argparse import Namespace

import numpy as np
import pytest
from foreign import Deleted, Raising

from ringmpi import (
    BackendError,
    CommError,
    Contiguous,
    DtypeError,
    Mask,
    MaskError,
    OptionError,
    RankLost,
    RingAttention,
    RingError,
    RingTimeout,
    ShapeError,
    Striped,
    redistribute,
    ring_attention,
)

pytestmark = pytest.mark.mpi


def good(**changes):
    arrays = {"q": np.ones((4, 4, 8), "f4"), "k": np.ones((4, 2, 8), "f4"), "v": np.ones((4, 2, 6), "f4")}
    return {**arrays, **changes}


def f4(*shape):
    return np.ones(shape, "f4")


# On every rank.
EVERYWHERE = {
    "two axes": (ShapeError, r"q: expected shape \(\[batch,\]", good(q=f4(4, 8)), {}),
    "dims": (ShapeError, "the same dim, at least 1, got 8 and 9", good(k=f4(4, 2, 9)), {}),
    "no dim": (ShapeError, "at least 1", good(q=f4(4, 4, 0), k=f4(4, 2, 0)), {}),
    "v": (ShapeError, "v: expected shape", good(v=f4(5, 2, 6)), {}),
    "heads": (ShapeError, "multiple of kv_heads, got 4 heads and 3", good(k=f4(4, 3, 8), v=f4(4, 3, 6)), {}),
    "no heads": (ShapeError, "multiple of kv_heads", good(q=f4(4, 0, 8)), {}),
    "batch": (ShapeError, "q and k: expected the same batch",
              good(q=f4(2, 4, 4, 8), k=f4(3, 4, 2, 8), v=f4(3, 4, 2, 6)), {}),
    "integers": (DtypeError, "q: expected dtype float64", good(q=np.ones((4, 4, 8), int)), {}),
    "text": (DtypeError, "q: expected dtype float64", good(q="text"), {}),
    "mixed": (DtypeError, "v: expected the dtype of q, float32, got float64", good(v=np.ones((4, 2, 6))), {}),
    "layout": (OptionError, "layout: expected one of", good(), {"layout": "spiral"}),
    "layout object": (OptionError, "ranks", good(), {"layout": Striped(12, 50)}),
    "counts": (ShapeError, "expects 7 tokens of q, got 4", good(), {"layout": lambda size: Contiguous([7] * size)}),
    "scale": (OptionError, "scale: expected a finite number, got nan", good(), {"scale": float("nan")}),
    "scale text": (OptionError, "scale: expected a finite number", good(), {"scale": "big"}),
    "threads": (OptionError, "threads: expected an integer >= 1", good(), {"threads": 0}),
    "many threads": (OptionError, r"threads: expected at most \d+ CPU threads a rank on this machine, got 100000",
                     good(), {"threads": 100000}),
    "timeout": (OptionError, "timeout: expected seconds > 0", good(), {"timeout": 0}),
    "backend": (OptionError, "backend: expected one of auto, numba, numpy", good(), {"backend": "abacus"}),
    "mask": (OptionError, r"mask: expected a ringmpi.Mask", good(), {"mask": "causal"}),
    "documents": (MaskError, "the last offset must be at most the", good(), {"mask": Mask(documents=[0, 99])}),
    "masked array": (DtypeError, "k: expected an array without a mask", good(k=np.ma.masked_less(f4(4, 2, 8), 0)), {}),
    "overflowing scale": (OptionError, "scale: 1e.39 is not finite", good(), {"scale": 1e39}),
    "accumulator": (DtypeError, "accumulator: expected", good(), {"accumulator": "float16"}),
}

# On the last rank only; with one rank the last is the only one.
ONE_RANK = {
    "dtype": (DtypeError, "expected the same dtype on every rank, got float64 here and float32 on rank 0",
              {name: x.astype("f8") for name, x in good().items()}, {}),
    "heads": (ShapeError, "expected the same heads on every rank, got 8 here and 4 on rank 0", good(q=f4(4, 8, 8)), {}),
    "dim_v": (ShapeError, "expected the same dim_v", good(v=f4(4, 2, 7)), {}),
    "batch axis": (ShapeError, "expected the same batch axis", {name: x[None] for name, x in good().items()}, {}),
    "mask": (OptionError, "causal is True here and False on rank 0", good(), {"mask": Mask(causal=True)}),
    "documents": (OptionError, "documents is", good(), {"mask": Mask(documents=[0, 4])}),
    "layout": (OptionError, "layout is striped here and contiguous on rank 0", good(), {"layout": "striped"}),
    "scale": (OptionError, "scale is 0.5 here and None on rank 0", good(), {"scale": 0.5}),
    "infinite scale": (OptionError, "scale: expected a finite number, got inf", good(), {"scale": float("inf")}),
    "shape": (ShapeError, "v: expected shape", good(v=f4(5, 2, 6)), {}),
    "deleted": (DtypeError, "k: expected an array on one device, got Deleted", good(k=Deleted()), {}),
    "raising": (DtypeError, "v: expected an array, got Raising: no", good(v=Raising(RuntimeError("no"))), {}),
    "deleted scale": (OptionError, "scale: expected a finite number, got Deleted", good(), {"scale": Deleted()}),
}


def fails_alike(comm, kind, text, arrays, options):
    start = time.perf_counter()
    with pytest.raises(RingError) as caught:
        ring_attention(**arrays, comm=comm, **options)
    seconds = time.perf_counter() - start
    everyone = comm.allgather((type(caught.value).__name__, str(caught.value)))
    assert len(set(everyone)) == 1, everyone
    assert isinstance(caught.value, kind)
    assert re.search(text, str(caught.value)), str(caught.value)
    assert str(caught.value).count("rank 0: ") <= 1
    assert seconds < 10             # the first call imports what computes
    assert ring_attention(**good(), comm=comm).shape == (4, 4, 6)


@pytest.mark.parametrize("case", EVERYWHERE)
def test_on_every_rank(comm, case):
    kind, text, arrays, options = EVERYWHERE[case]
    options = {name: x(comm.size) if callable(x) else x for name, x in options.items()}
    fails_alike(comm, kind, text, arrays, options)


@pytest.mark.parametrize("case", ONE_RANK)
def test_on_one_rank(comm, case):
    kind, text, arrays, options = ONE_RANK[case]
    if comm.size == 1:
        pytest.skip("needs two ranks")
    last = comm.rank == comm.size - 1
    fails_alike(comm, kind, text, arrays if last else good(), options if last else {})


def test_errors_name_all_ranks_that_failed(comm):
    with pytest.raises(ShapeError) as caught:
        ring_attention(**good(v=f4(5, 2, 6)), comm=comm)
    others = ", ".join(str(r) for r in range(1, comm.size))
    assert str(caught.value).startswith("rank 0: v: expected")
    assert (f"[also on rank {others}]" in str(caught.value)) == (comm.size > 1)


def test_errors_are_built_in_ones_too():
    for kind, base in ((ShapeError, ValueError), (DtypeError, TypeError), (RingTimeout, TimeoutError),
                       (RankLost, ConnectionError)):
        assert issubclass(kind, base)
        assert issubclass(kind, RingError)


@pytest.mark.parametrize("bad", [None, 3, "world"])
def test_no_communicator(bad):
    with pytest.raises(CommError, match="expected an intracommunicator"):
        ring_attention(**good(), comm=bad)


def test_closed(comm):
    attention = RingAttention(comm)
    attention.close()
    attention.close()
    with pytest.raises(RingError, match="closed"):
        attention(**good())


def test_a_failing_backend_is_not_waited_for(comm, monkeypatch):
    """An error in mid-ring on one rank: it raises that error, the others are told, and the communicator is lost."""
    if comm.size == 1:
        pytest.skip("needs two ranks")
    mine = comm.Dup()
    attention = RingAttention(mine, timeout=60, schedule="ring")
    if comm.rank == 0:
        def fail(*arguments):
            raise MemoryError("no more")
            yield
        monkeypatch.setattr(attention.backend, "accumulate", fail)
    start = time.perf_counter()
    first, second = attempt(attention), attempt(attention)
    seconds = time.perf_counter() - start
    attention.close()
    outcomes = comm.allgather((first, second, seconds))      # and only then may a rank fail
    for rank, (first, second, seconds) in enumerate(outcomes):
        assert seconds < 10, outcomes
        if rank == 0:
            assert first == "MemoryError: no more", outcomes
            assert second.startswith("CommError: this communicator can't be used after"), outcomes
        elif first == "no error":                            # had all it needed; hears of it at the next call
            assert second.startswith("RankLost"), outcomes
        else:
            in_ring = rf"RankLost: rank {rank} on .*, ring step \d of {comm.size}(: waited .* rank \d|, computing;)"
            before = rf"RankLost: rank {rank} on .* waited for {others(comm)} to make the same call"
            assert re.match(in_ring, first) or re.match(before, first), outcomes
            assert "rank 0 gave up: no more" in first, outcomes
            assert second.startswith("CommError"), outcomes


def test_an_interrupt_between_messages_is_told(comm):
    if comm.size == 1:
        pytest.skip("needs two ranks")
    from ringmpi.mpi.comm import private_comm
    mine = comm.Dup()
    ring = private_comm(mine)
    comm.Barrier()                    # else the interrupt may come while a rank still connects
    said = ""
    start = time.perf_counter()
    try:
        with ring.raise_on_all(60):
            if comm.rank == 0:
                raise KeyboardInterrupt
    except (KeyboardInterrupt, RankLost) as error:
        said = f"{type(error).__name__}: {error}"
    seconds = time.perf_counter() - start
    outcomes = comm.allgather((seconds, said))
    assert outcomes[0][1] == "KeyboardInterrupt: "
    for seconds, text in outcomes[1:]:
        assert seconds < 10
        assert text.endswith("rank 0 gave up: KeyboardInterrupt"), outcomes


def test_one_rank_alone_goes_on_after_an_error():
    from mpi4py import MPI

    def interrupt(*_):
        raise KeyboardInterrupt

    with RingAttention(MPI.COMM_SELF) as attention:
        with pytest.raises(KeyboardInterrupt):
            attention(**good(), progress=interrupt)
        assert attention(**good()).shape == (4, 4, 6)


def test_a_rank_that_does_not_come(comm):
    """Every wait has a deadline, even in the first call on a communicator, and for the rank that comes late."""
    if comm.size == 1:
        pytest.skip("needs two ranks")
    used, fresh = comm.Dup(), comm.Dup()
    attention = RingAttention(used, timeout=1)
    start = time.perf_counter()
    said = ["", ""]
    if comm.rank:
        said = [attempt(attention), first_call(fresh)]
    seconds = time.perf_counter() - start
    outcomes = comm.allgather((seconds, said))
    if comm.rank == 0:
        start = time.perf_counter()
        late = first_call(fresh)
        seconds = time.perf_counter() - start
    again = first_call(fresh)
    late, seconds = comm.bcast((late, seconds) if comm.rank == 0 else None)
    for taken, (first, second) in outcomes[1:]:
        assert taken < 5, outcomes
        assert first.startswith(("RingTimeout", "RankLost")), outcomes
        assert f"waited for {others(comm)} to make the same call, forward (call 2 on this comm" in first, outcomes
        assert second.startswith("RingTimeout"), outcomes
        assert re.search(rf"waited for {others(comm)} to make (its|their) first call", second), outcomes
    assert seconds < 5
    assert late.startswith(("RingTimeout", "RankLost")), late
    assert again.startswith("CommError"), again
    comm.Barrier()


def others(comm):
    return "the other rank" if comm.size == 2 else f"the other {comm.size - 1} ranks"


def first_call(comm):
    try:
        ring_attention(**good(), comm=comm, timeout=1)
    except RingError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def test_a_communicator_that_was_freed(comm):
    mine = comm.Dup()
    attention = RingAttention(mine)
    mine.Free()
    with pytest.raises(CommError, match="freed"):
        attention(**good())
    attention.close()


def test_a_timeout_that_makes_no_sense(comm):
    for timeout in (None, "5", -1):
        with pytest.raises(OptionError, match="timeout: expected seconds > 0"):
            redistribute(np.ones(3), comm=comm, timeout=timeout)
    assert len(redistribute(np.ones(3), comm=comm)) == 3


def test_long_options_that_differ_at_the_end(comm):
    if comm.size == 1:
        pytest.skip("needs two ranks")
    from ringmpi.mpi.comm import private_comm
    with pytest.raises(OptionError, match="text is x"):
        private_comm(comm).check_same_options({"text": "x" * 5000 + str(comm.rank)}, 10)


def attempt(attention):
    try:
        attention(**good())
    except (MemoryError, RingError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def test_what_looks_like_torch_s_order_is_warned_of_once(comm):
    """On rank 0 only, and once for each plan; if a warning is an error, all ranks raise it."""
    x = f4(2, 2 * comm.size + 65, 8)
    fitting = f4(70, 70, 8)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with RingAttention(comm, backend="numpy") as attention:
            for y in (x, x, fitting):
                attention(y, y, y)
    assert len(said) == (comm.rank == 0)
    for one in said:
        assert re.search(rf"heads and {2 * comm.size} tokens in all, which looks like \(heads, tokens, dim\)",
                         str(one.message))
    with warnings.catch_warnings(), RingAttention(comm, backend="numpy") as attention:
        warnings.simplefilter("error")
        with pytest.raises(Exception, match="which looks like"):
            attention(x, x, x)
        attention(fitting, fitting, fitting)


def test_a_way_to_multiply_that_one_rank_lacks(comm, monkeypatch):
    from ringmpi.backends.numba_.backend import NumbaBackend
    from ringmpi.backends.products import PRODUCTS, bits
    made = NumbaBackend.__init__

    def make(self, *arguments):
        made(self, *arguments)
        self.ways = bits(["widen"] if comm.rank == comm.size - 1 else PRODUCTS)

    monkeypatch.setattr(NumbaBackend, "__init__", make)
    x = f4(2, 2, 8)
    with RingAttention(comm, backend="numba") as attention:
        assert attention.backend.products == "widen"
    with pytest.raises(BackendError, match=f"'pairs' is not there on rank {comm.size - 1}"):
        ring_attention(x, x, x, comm=comm, backend="numba", bfloat16_products="pairs")
    monkeypatch.setattr(NumbaBackend, "__init__", made)
    monkeypatch.setenv("RINGMPI_BFLOAT16_PRODUCTS", "native")
    with pytest.raises(OptionError, match="RINGMPI_BFLOAT16_PRODUCTS: expected one of auto, tiles, widen, pairs"):
        ring_attention(x, x, x, comm=comm)
    if comm.size > 1:
        monkeypatch.setenv("RINGMPI_BFLOAT16_PRODUCTS", "widen" if comm.rank else "auto")
        with pytest.raises(OptionError, match="bfloat16_products is"):
            ring_attention(x, x, x, comm=comm)


def test_a_benchmark_that_one_rank_cannot_compute(comm, monkeypatch):
    """No rank waits for the one that has no backend: all raise its error."""
    from ringmpi.commands.bench_calls import CallBench
    from ringmpi.engine import Engine
    from ringmpi.mpi.comm import private_comm

    def fail(_):
        raise BackendError("none here")

    with monkeypatch.context() as patch:
        if comm.rank == comm.size - 1:
            patch.setattr(Engine, "_open", fail)
        with pytest.raises(BackendError, match=f"rank {comm.size - 1}: none here"):
            CallBench(Namespace(backend="numpy", timeout=20, threads=1), comm, private_comm(comm))
    ring_attention(**good(), comm=comm, backend="numpy")
