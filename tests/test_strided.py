"""Views of larger arrays: read where they are, with the bits of copies; what can't be is copied. One process."""

import tracemalloc

import numpy as np
import pytest

from ringmpi import Mask, RingAttention
from ringmpi.backends import HOST_NAMES
from ringmpi.backends.numba_ import amx
from ringmpi.backends.numba_.arguments import tokens
from ringmpi.backends.numba_.vector import machine
from ringmpi.backends.strided import in_place
from ringmpi.call import Call, Inputs
from ringmpi.dtypes import BFLOAT16, DTYPES, accumulator
from ringmpi.schedules.links import HostLink, Peer


@pytest.fixture
def alone():
    from mpi4py import MPI
    return MPI.COMM_SELF


def longer(x):
    """What is filled of a cache."""
    return np.pad(x, [(0, 0), (0, 9), (0, 0), (0, 0)])[:, :x.shape[1]]


def torch_order(x):
    return np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2)


def among_others(x):
    """One of two arrays whose tokens, heads and numbers take turns with what is between them."""
    return np.pad(np.stack([-x, x], 2).repeat(2, 3), [(0, 0)] * 4 + [(0, 3)])[:, :, 1, 1::2, :x.shape[3]]


def same_tokens(x):
    return np.broadcast_to(x[:, :1], x.shape)


def same_heads(x):
    return np.broadcast_to(x[:, :, :1], x.shape)


def same_batch(x):
    return np.broadcast_to(x[:1], x.shape)


def overlapping(x):
    """Each token's numbers begin within those of the one before."""
    n = x.shape[1]
    flat = x.reshape(len(x), -1)
    return np.lib.stride_tricks.as_strided(flat, x.shape, (flat.strides[0], x.itemsize, n * x.itemsize, x.itemsize))


def read_only(x):
    x = longer(x)
    x.flags.writeable = False
    return x


IN_PLACE = [np.asarray, longer, torch_order, among_others, same_tokens, same_heads, same_batch, overlapping, read_only]


def unaligned(x):
    memory = np.zeros(x.nbytes + 1, np.uint8)[1:]
    view = memory.view(x.dtype).reshape(x.shape)
    view[...] = x
    assert not view.flags.aligned
    return view


def backwards(x):
    return np.ascontiguousarray(x[:, ::-1])[:, ::-1]


def with_gaps(x):
    return x.repeat(2, axis=3)[..., ::2]


def fields(x):
    """Numbers at distances that are no multiple of their size."""
    table = np.zeros(x.shape[:3], np.dtype([("x", x.dtype, x.shape[3:]), ("flag", np.uint8)]))
    table["x"] = x
    return table["x"]


COPIED = [unaligned, backwards, with_gaps, fields]


def arrays(dtype, n_q, seed=0, n_k=150, dim=18, dim_v=33):
    """q, k and v of a batch of two, with NaN in a value that few see."""
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((2, n, heads, d)).astype(DTYPES[dtype])
               for n, heads, d in ((n_q, 4, dim), (n_k, 2, dim), (n_k, 2, dim_v)))
    v[0, -1, 1, 5] = np.nan
    return q, k, v


def passes(attention, q, k, v):
    """Everything that comes out, forward and backward."""
    out, lse = attention(q, k, v, return_lse=True)
    dout = np.random.default_rng(9).standard_normal(out.shape).astype(out.dtype)
    return out, lse, *attention.backward(dout)


@pytest.mark.parametrize("n_q", [2, 150])
@pytest.mark.parametrize(("backend", "dtype"), [*((name, dtype) for name in HOST_NAMES for dtype in DTYPES),
                                                ("numba", "pairs"), ("numba", "tiles")])
def test_views_give_the_bits_of_copies(alone, backend, dtype, n_q):
    if (dtype == "pairs" and not machine().pairs) or (dtype == "tiles" and amx.missing()):
        pytest.skip(f"this CPU has no {dtype}")
    products = dtype if dtype in ("pairs", "tiles") else "widen"
    given = arrays("bfloat16" if products == dtype else dtype, n_q)
    with RingAttention(alone, backend=backend, threads=1, mask=Mask(causal=True), bfloat16_products=products
                       ) as attention:
        for make in (*IN_PLACE, *COPIED):
            views = [make(x) for x in given]
            want = passes(attention, *(np.array(x, order="C") for x in views))
            got = passes(attention, *views)
            same = [np.array_equal(x, y, equal_nan=True) for x, y in zip(got, want, strict=True)]
            assert all(same), (make.__name__, same)
            assert np.isfinite(want[0][:, 0].astype("f8")).all()      # what is not seen does not matter


@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_are_given_the_caller_s_memory(dtype):
    given = arrays(dtype, 7)
    for make in IN_PLACE:
        q, k, v = (make(x) for x in given)
        call = Call.check(Inputs(q, k, v), 0.0, None)
        for x, taken in ((q, call.q), (k, call.k), (v, call.v)):
            assert taken.ctypes.data == x.ctypes.data, make.__name__
            assert taken.strides == x.strides
            for element, mine in zip(taken, x, strict=True):
                flat = tokens(element)
                assert flat.array.ctypes.data == mine.ctypes.data
                row = flat.array[3 * flat.token + flat.head:][:x.shape[3]]
                assert row.tobytes() == mine[3, 1].tobytes()
                assert flat.array.flags.c_contiguous
                assert flat.array.flags.writeable
    for make in COPIED:
        x = make(given[1])
        assert not np.shares_memory(in_place(x), x), make.__name__
        assert in_place(x).flags.c_contiguous
        assert in_place(x).flags.aligned


def test_the_last_number_of_a_view_is_the_last_that_is_shown():
    """A view may end where its memory does."""
    for make in (longer, torch_order, among_others, same_tokens, overlapping):
        x = make(arrays("float32", 1)[1])[-1]
        low, high = np.lib.array_utils.byte_bounds(x)
        assert tokens(x).array.nbytes == high - low


def test_no_tokens_and_pairs_that_begin_between_two():
    assert tokens(np.zeros((0, 2, 8), np.float32)).shape == (0, 2, 8)
    x = np.arange(65, dtype=np.uint16)[1:].view(BFLOAT16).reshape(4, 1, 16)
    given = tokens(x, np.dtype(np.uint32))
    assert given.array.flags.aligned
    np.testing.assert_array_equal(given.array.view(np.uint16), x.view(np.uint16).ravel())


class OnlyDLPack:
    """A tensor of a library that speaks DLPack alone."""

    def __init__(self, x):
        self._x = x

    def __dlpack__(self, **options):
        return self._x.__dlpack__(**options)

    def __dlpack_device__(self):
        return self._x.__dlpack_device__()


N = 16384
WHOLE = {"cache": (N + 500, 4, 64), "caches": (2, N // 2 + 500, 4, 64), "torch": (4, N, 64)}
VIEWS = {"cache": lambda x: x[:N], "caches": lambda x: x[:, :N // 2], "torch": lambda x: x.swapaxes(0, 1)}


@pytest.mark.parametrize("kind", VIEWS)
@pytest.mark.parametrize(("source", "dtype"), [
    *(("numpy", dtype) for dtype in DTYPES), ("torch tensors", "float32"), ("torch tensors", "bfloat16"),
    ("dlpack", "float32")])                                           # which has no bfloat16 for NumPy
@pytest.mark.parametrize("backend", HOST_NAMES)
def test_no_copy_is_made_in_a_call(alone, backend, source, dtype, kind):
    rng = np.random.default_rng(0)
    whole = [rng.standard_normal(WHOLE[kind], np.float32) for _ in "kv"]
    if source == "numpy":
        k, v = (VIEWS[kind](x.astype(DTYPES[dtype])) for x in whole)
        assert k.flags.c_contiguous == (kind == "cache")
        q = k[..., :3, :, :]
    else:
        torch = pytest.importorskip("torch")
        k, v = (VIEWS[kind](torch.from_numpy(x).to(getattr(torch, dtype))) for x in whole)
        assert k.is_contiguous() == (kind == "cache")
        q, k, v = (OnlyDLPack(x) if source == "dlpack" else x for x in (k[..., :3, :, :], k, v))

    def peak(work):
        """Most bytes at a time that Python and NumPy took for it; the second time, with the buffers there."""
        work()
        tracemalloc.start()
        result = work()
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most, result

    # What is taken besides the gradients of k and v, in the accumulator's dtype and in their own, is small.
    numbers, stored = 2 * 2**22, np.dtype(DTYPES[dtype])
    summed = accumulator(stored)
    gradients = numbers * (summed.itemsize + (stored.itemsize if stored != summed else 0))
    with RingAttention(alone, backend=backend, threads=1) as attention:
        forward, out = peak(lambda: attention(q, k, v))
        backward, _ = peak(lambda: attention.backward(np.asarray(out)))
    most = numbers // 2 * stored.itemsize * 3 // 4                    # less than k alone has
    assert forward < most
    assert backward - gradients < most


def test_a_block_with_gaps_is_packed_once_and_only_to_be_sent():
    link, sent = HostLink(), []
    peer = Peer(1, lambda message: sent.append(message) or Done(), "")
    x = np.arange(2 * 7 * 3 * 4, dtype="f4").reshape(2, 7, 3, 4)
    gaps, whole = x[:, :5], x[..., :2].copy()
    for bits in (gaps, gaps.astype(BFLOAT16)[:, ::2]):
        own = link.put_own_block([bits, whole])
        assert own[0] is bits
        assert link._packing.nbytes in (0, gaps.nbytes)               # nothing before it is sent
        for _ in range(2):
            link.send_own(peer)
        first, second, *again = sent
        assert first.tobytes() == np.ascontiguousarray(bits).tobytes()
        assert np.shares_memory(first, link._packing)
        assert np.shares_memory(second, whole)                        # what has no gaps is sent from where it is
        assert [m.ctypes.data for m in again] == [first.ctypes.data, second.ctypes.data]
        sent.clear()
        link.end_step()
    assert link._packing.nbytes == gaps.nbytes                        # the buffer of the first pass served the second


class Done:
    """A request that is done."""

    def Get_status(self):
        return True
