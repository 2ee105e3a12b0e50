"""The CPU's tile unit: packing and its NumPy twin on any CPU; tiles, permission and release where the CPU has them."""

import os
import subprocess
import sys
import time

import numba
import numpy as np
import pytest
from numba import types
from numba.extending import intrinsic

from ringmpi.backends import open_backend
from ringmpi.backends.numba_ import amx, pieces, tile_pack
from ringmpi.backends.numba_.arguments import tokens
from ringmpi.backends.numba_.steps import uncounted_task
from ringmpi.backends.numba_.vector import at, data, machine
from ringmpi.backends.numba_.workspace import aligned
from ringmpi.dtypes import BFLOAT16
from ringmpi.score import Score

needs_tiles = pytest.mark.skipif(bool(amx.missing()), reason=f"no tiles: {amx.missing()}")


def whole(x, rows, numbers):
    """Zeros after the last row and number, up to whole tiles."""
    return np.pad(x, [(0, -x.shape[0] % rows), (0, -x.shape[1] % numbers)])


def rows_twin(x):
    x = whole(x, 16, 32)
    return x.reshape(len(x) // 16, 16, -1, 32).transpose(0, 2, 1, 3)


def transposed_twin(x):
    x = whole(x, 32, 32)
    return x.reshape(len(x) // 16, 16, -1, 16, 2).transpose(0, 2, 3, 1, 4)


def interleaved_twin(x):
    x = whole(x, 32, 32)
    return x.reshape(len(x) // 32, 16, 2, -1, 16).transpose(3, 0, 1, 4, 2)


def packed(size):
    """Memory for so many numbers, with what must not stay in it."""
    out = aligned(size, np.uint16)
    out[:] = 0x7FC0
    return out


def bits(seed, n, heads, numbers):
    return np.random.default_rng(seed).standard_normal((n, heads, numbers)).astype(BFLOAT16)


@pytest.mark.parametrize("n", [1, 16, 31, 32, 33, 100])
@pytest.mark.parametrize("numbers", [1, 31, 32, 40, 64, 96, 129])
def test_packing_is_that_of_numpy(n, numbers):
    """Whole and part squares, of tokens that are strided."""
    x = bits(0, n + 3, 4, numbers + 5)[:, ::2, 2:numbers + 2]
    these = x[2:n + 2].view(np.uint16)
    for twin, pack in ((transposed_twin, tile_pack.pack_transposed), (interleaved_twin, tile_pack.pack_interleaved)):
        want = twin(these[:, 1])
        out = packed(want.size)
        column = [want[0].size] if pack is tile_pack.pack_interleaved else []
        assert pack(tokens(x), 2, n, 1, pieces.ALL, out, 0, *column)
        np.testing.assert_array_equal(out, want.ravel())
    stacked = these.reshape(-1, numbers)
    want = rows_twin(stacked)
    out = packed(want.size)
    tile_pack.pack_rows(tokens(x), 4, len(stacked), 0, 2, pieces.ALL, out, 0)
    np.testing.assert_array_equal(out, want.ravel())


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf, 3.3e38])
@pytest.mark.parametrize("place", [(0, 0), (40, 69), (31, 32), (50, 17)])
def test_values_that_are_not_finite_are_seen(number, place):
    x = bits(1, 51, 1, 70)
    x[place[0], 0, place[1]] = number
    out, finite = packed(64 * 96), pieces.FINITE
    assert tile_pack.pack_interleaved(tokens(x), 0, 51, 0, finite, out, 0, 64 * 16) == np.isfinite(float(number))
    np.testing.assert_array_equal(out, interleaved_twin(np.where(np.isfinite(x.astype("f4")), x, 0)[:, 0].astype(
        BFLOAT16).view(np.uint16)).ravel())
    assert tile_pack.pack_interleaved(tokens(x), place[0] + 1, 50 - place[0], 0, finite, out, 0, 64 * 16)


@intrinsic
def tile_config(context, out):
    """What this thread has configured: 64 bytes, zeros if nothing."""
    def emit(context, builder, signature, values):
        amx._emit(builder, "sttilecfg", [data(context, builder, signature.args[0], values[0])])
        return context.get_dummy_value()

    return types.void(out), emit


@intrinsic
def add_dot(context, a, b, c):
    """c += A·B of a tile each."""
    def emit(context, builder, signature, values):
        a, b, c = (data(context, builder, kind, value) for kind, value in zip(signature.args, values, strict=True))
        for tile, pointer in enumerate((c, a, b)):
            amx.load_tile(builder, tile, pointer)
        amx.dot_tile(builder, 0, 1, 2)
        amx.store_tile(builder, 0, c)
        amx.zero_tile(builder, 0)
        amx.store_tile(builder, 0, at(builder, c, 256))
        return context.get_dummy_value()

    return types.void(a, b, c), emit


@numba.njit(nogil=True)
def config(out):
    tile_config(out)


@numba.njit(nogil=True)
def product(a, b, c, during, after):
    amx.configure()
    add_dot(a, b, c)
    tile_config(during)
    amx.release()
    tile_config(after)


@needs_tiles
def test_a_product_of_tiles_and_the_tiles_left():
    x, y = bits(2, 16, 1, 32), bits(3, 16, 1, 32)
    a, b, c = packed(512), packed(1024), np.ones((32, 16), np.float32)
    tile_pack.pack_rows(tokens(x), 0, 16, 0, 1, pieces.ALL, a, 0)
    tile_pack.pack_transposed(tokens(y), 0, 16, 0, pieces.ALL, b, 0)
    during, after = np.ones((2, 64), np.uint8)
    product(a, b, c, during, after)
    np.testing.assert_allclose(c[:16], 1 + x[:, 0].astype("f8") @ y[:, 0].astype("f8").T, atol=1e-5)
    assert (c[16:] == 0).all()
    assert during[0] == 1
    assert (after == 0).all()


@needs_tiles
def test_rounding_of_pairs():
    @intrinsic
    def round_both(context, x, out):
        def emit(context, builder, signature, values):
            x, out = (data(context, builder, kind, value) for kind, value in zip(signature.args, values, strict=True))
            low, high = (builder.load(builder.bitcast(at(builder, x, i * 16), amx.SINGLES.as_pointer()))
                         for i in (0, 1))
            for i, make in enumerate((amx.to_row, amx.to_pairs)):
                builder.store(make(builder, low, high),
                              builder.bitcast(at(builder, out, i * 32), amx.WORDS.as_pointer()))
            return context.get_dummy_value()

        return types.void(x, out), emit

    @numba.njit
    def run(x, out):
        round_both(x, out)

    x, out = aligned(32, np.float32), aligned((2, 32), np.uint16)
    x[:] = np.random.default_rng(4).standard_normal(32) * np.float32(1.01) ** np.arange(32)
    run(x, out)
    want = x.astype(BFLOAT16).view(np.uint16)
    np.testing.assert_array_equal(out[0], want)
    np.testing.assert_array_equal(out[1], want.reshape(2, 16).T.ravel())


def attend(threads=1, seed=5):
    """Give the bytes of a state that 300 rows of two heads come to, on tiles."""
    backend = open_backend("numba", threads)
    backend.settle("tiles", [backend.ways])
    q, k, v = (bits(seed + i, 300, 2, 40) for i in range(3))
    state = backend.new_state(300, 2, 40, np.float32)
    for _ in backend.accumulate(state, q, k, v, np.zeros(300, int), np.arange(1, 301), Score(0.2)):
        pass
    return backend, state.acc.tobytes() + state.row_max.tobytes() + state.row_sum.tobytes()


@needs_tiles
def test_every_thread_leaves_the_tiles():
    backend, _ = attend(threads=3)
    seen = {}

    def look(thread):
        time.sleep(0.01)
        seen[thread] = np.ones(64, np.uint8)
        config(seen[thread])

    for _ in range(50):
        if len(seen) < 3:
            list(backend._team.run([uncounted_task(look) for _ in range(12)]))
    backend.close()
    assert len(seen) > 1
    assert all((x == 0).all() for x in seen.values())


@needs_tiles
def test_beside_torch():
    """torch's bfloat16 products use tiles too: neither disturbs the other, whoever comes first."""
    torch = pytest.importorskip("torch")
    x = torch.from_numpy(np.random.default_rng(6).standard_normal((200, 300), np.float32)).bfloat16()
    before = x @ x.T
    _, want = attend()
    between = x @ x.T
    _, again = attend()
    assert torch.equal(before, between)
    assert torch.equal(before, x @ x.T)
    assert want == again


FORK = """
import os, sys
sys.path.insert(0, sys.argv[1])
from test_amx import attend
want = attend()[1]
child = os.fork()
same = attend()[1] == want
if child == 0:
    os._exit(0 if same else 1)
print(same, os.waitpid(child, 0)[1])
"""


@needs_tiles
def test_a_fork_has_tiles_too():
    done = subprocess.run([sys.executable, "-c", FORK, os.path.dirname(__file__)], capture_output=True, text=True,
                          timeout=120, check=True)
    assert done.stdout == "True 0\n"


SMALL_STACK = """
import ctypes
class Stack(ctypes.Structure): _fields_ = [("sp", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]
memory = ctypes.create_string_buffer(8192)
assert not ctypes.CDLL(None).sigaltstack(ctypes.byref(Stack(ctypes.addressof(memory), 0, 8192)), None)
"""
SAYS = """
from ringmpi.backends import open_backend
from ringmpi.backends.products import PRODUCTS, bits
backend = open_backend("numba", 1)
print(backend.ways & bits(["tiles"]), backend.describe())
"""


@pytest.mark.parametrize(("before", "variables", "reason"), [
    ("", {"RINGMPI_CPU_TILES": "0"}, "no tiles: RINGMPI_CPU_TILES=0"),
    ("", {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": ""}, "no tiles: the CPU has no amx_bf16"),
    (SMALL_STACK, {}, "no tiles: Linux refuses the CPU's tiles to this process: No space left on device")])
def test_without_tiles_the_reason_is_said(before, variables, reason):
    """The last: a thread's stack for signals is too small for what tiles hold."""
    if "Linux refuses" in reason and not machine().tiles:
        pytest.skip("this CPU has no tiles")
    if "NUMBA_CPU_NAME" in variables and os.uname().machine != "x86_64":
        pytest.skip("names of x86 CPUs")
    done = subprocess.run([sys.executable, "-c", before + SAYS], env=os.environ | variables, capture_output=True,
                          text=True, timeout=60, check=True)
    assert done.stdout.startswith("0 ")
    assert done.stdout.rstrip().endswith(reason)


@needs_tiles
def test_tiles_are_named():
    backend = open_backend("numba", 1)
    assert backend.describe().endswith("bfloat16 tiles, float32 in pieces on them")
    backend.close()


@needs_tiles
def test_with_scale_0_an_infinite_product_is_nan():
    """As it is in the other ways; on tiles it would hide the key."""
    q, k, v = (np.ones((n, 1, 32), BFLOAT16) for n in (300, 4, 4))
    k[1] = -np.inf
    for products in ("widen", "tiles"):
        out, lse = fold_all(open_backend("numba", 1), products, q, k, v, 0, 0.0)
        assert np.isnan(out).all(), products
        assert np.isnan(lse).all(), products


@needs_tiles
def test_a_cut_for_one_order_is_not_taken_for_another():
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((n, 1, 32)).astype(BFLOAT16) for n in (600, 900, 900))
    backend = open_backend("numba", 1)
    got = []
    for backend.canonical in (True, False, True):
        backend.release()
        got.append(fold_all(backend, "tiles", q, k, v, 50, 0.2))
    for first, last in zip(got[0], got[2], strict=True):
        np.testing.assert_array_equal(first, last)


@needs_tiles
def test_a_row_does_not_depend_on_its_neighbours():
    """Rows whose weights become too large again and again, far beyond any exponent, among others that see the same."""
    rng = np.random.default_rng(1)
    q, k, v = (rng.standard_normal((n, 1, 40)) for n in (300, 1100, 1100))
    q[::3, 0, 0], k[:, 0, 0] = 30, np.linspace(0, 40, 1100)
    q[1::3, 0, 0] = 0
    q, k, v = (x.astype(BFLOAT16) for x in (q, k, v))
    order = rng.permutation(300)
    backend = open_backend("numba", 1)
    got, again = (fold_all(backend, "tiles", x, k, v, 50, 0.2) for x in (q, q[order]))
    plain = fold_all(backend, "widen", q, k, v, 50, 0.2)
    for x, y, z in zip(got, again, plain, strict=True):
        np.testing.assert_array_equal(x[order], y)
        np.testing.assert_allclose(x, z, atol=2e-2, rtol=1e-5)


@needs_tiles
def test_values_as_large_as_without_a_rise():
    """A key far above the first that a row sees, and values that any weight beyond 1 would take out of range."""
    q, k, v = np.ones((64, 1, 1)), np.zeros((192, 1, 1)), np.full((192, 1, 8), 1e38)
    k[100] = 10.5
    backend = open_backend("numba", 1)
    for x, y in zip(*(fold_all(backend, way, *(x.astype(BFLOAT16) for x in (q, k, v)), 0, 1.0)
                      for way in ("tiles", "widen")), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-2)


def fold_all(backend, products, q, k, v, begin, scale):
    """Every row sees all keys from `begin` on."""
    backend.settle(products, [backend.ways])
    state = backend.new_state(len(q), 1, v.shape[2], np.float32)
    low, high = np.full(len(q), begin), np.full(len(q), len(k))
    sum(backend.accumulate(state, q, k, v, low, high, Score(scale)))
    out, lse = np.empty((len(q), 1, v.shape[2]), np.float32), np.empty((len(q), 1), np.float32)
    backend.finish(state, high > low, out, lse)
    return out, lse
