"""float32 as pieces of bfloat16 for the CPU's tile unit: NumPy twins of splits, packing and products, on any CPU."""

import numba
import numpy as np
import oracle
import pytest
from numba import types
from numba.extending import intrinsic
from test_amx import interleaved_twin, needs_tiles, packed, rows_twin, transposed_twin

from ringmpi.backends import open_backend
from ringmpi.backends.numba_ import amx, pieces, tile_pack
from ringmpi.backends.numba_.arguments import tokens
from ringmpi.backends.numba_.tuples import Span
from ringmpi.backends.numba_.vector import at, data
from ringmpi.backends.numba_.workspace import aligned
from ringmpi.backends.products import bits
from ringmpi.score import Score
from ringmpi.softmax import State


def split_twin(x, span=pieces.ALL):
    """Bits of the three pieces of each number, (3, ...); odd numbers are 0."""
    rest, words = np.where(odd_twin(x, span), np.float32(0), x), []
    with np.errstate(invalid="ignore"):
        for _ in range(3):
            bits = rest.view(np.uint32) & np.uint32(0xFFFF0000)
            words.append((bits >> 16).astype(np.uint16))
            rest = rest - bits.view(np.float32)
    return np.stack(words)


def odd_twin(x, span):
    exponent = x.view(np.uint32) >> 23 & 255
    return ((exponent < span.low) | (exponent >= span.high)) & (x != 0)


def widened(words):
    return (words.astype(np.uint32) << 16).view(np.float32)


def singles(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def extremes():
    """Numbers of every exponent and sign, full, half full and powers of two."""
    bits = np.arange(255, dtype=np.uint32)[:, None] << 23 | np.array([0, 1, 0x7FFFFF, 0x555555, 0x8000, 0x7F8001], "u4")
    x = bits.view(np.float32).ravel()
    return np.concatenate([x, -x, [np.inf, -np.inf, np.nan]]).astype(np.float32)


def test_three_pieces_are_the_number():
    """From 2^-103 on, where the smallest piece is a normal number; below, what the tile unit takes for 0 is small."""
    x = extremes()[:-3]
    words = widened(split_twin(x)).astype(float)
    large = np.abs(x) >= 2.0**-103
    assert (words.sum(axis=0) == x)[large].all()
    some = np.abs(words[:, large])
    assert some[some > 0].min() == 2.0**-126
    words[np.abs(words) < 2.0**-126] = 0
    assert np.abs(words.sum(axis=0) - x).max() < 2.0**-125


def test_six_products_are_float32():
    """What three products leave out is below 2^-21, and on the average 2^-24, of each product."""
    assert pieces.products_of(3) == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (2, 0)]
    assert pieces.products_of(1) == [(0, 0)]
    x, y = singles(0, 2, 100_000)
    a, b = widened(split_twin(x)).astype(float), widened(split_twin(y)).astype(float)
    error = np.abs(sum(a[i] * b[j] for i, j in pieces.products_of(3)) / (x.astype(float) * y) - 1)
    assert error.max() < 2.0**-21
    assert error.mean() < 2.0**-24


@pytest.mark.parametrize("n", [1, 31, 32, 50])
@pytest.mark.parametrize("numbers", [1, 32, 40, 97])
def test_packing_is_that_of_numpy(n, numbers):
    """Each piece as bfloat16 is packed, the tiles of all pieces side by side; of tokens that are strided."""
    x = singles(1, n + 3, 4, numbers + 5)[:, ::2, 2:numbers + 2]
    x[-1, 1, -1], x[2, 1, 0] = np.nan, 1e30
    these = x[2:n + 2]
    none = pieces.ALL
    for twin, pack in ((transposed_twin, tile_pack.pack_transposed), (interleaved_twin, tile_pack.pack_interleaved)):
        want = np.stack([twin(words) for words in split_twin(these[:, 1])], axis=-4)
        out = packed(want.size)
        column = [want[0].size] if pack is tile_pack.pack_interleaved else []
        assert pack(tokens(x), 2, n, 1, none, out, 0, *column)
        np.testing.assert_array_equal(out, want.ravel())
    stacked = these.reshape(-1, numbers)
    want = np.stack([rows_twin(words) for words in split_twin(stacked)], axis=2)
    out = packed(want.size)
    assert tile_pack.pack_rows(tokens(x), 4, len(stacked), 0, 2, none, out, 0)
    np.testing.assert_array_equal(out, want.ravel())


@pytest.mark.parametrize("span", [pieces.FACTORS, pieces.FINITE, Span(100, 140)], ids=str)
def test_odd_numbers_are_zeros_and_are_said(span):
    """Each alone among others, in every way of packing, whole squares and not."""
    for number in extremes()[::5]:
        for n, numbers, token, column in ((32, 32, 17, 20), (20, 33, 19, 32)):
            x = np.ones((n, 1, numbers), np.float32)
            x[token, 0, column] = number
            odd = odd_twin(x[token, 0, column:column + 1], span)[0]
            for pack, twin, rest in ((tile_pack.pack_transposed, transposed_twin, ()),
                                     (tile_pack.pack_interleaved, interleaved_twin, (3 * 512,))):
                out = packed(2 * 2 * 3 * 512)
                assert pack(tokens(x), 0, n, 0, span, out, 0, *rest) == (not odd)
                want = np.stack([twin(words) for words in split_twin(x[:, 0], span)], axis=-4)
                np.testing.assert_array_equal(out[:want.size], want.ravel())
            out = packed(2 * 2 * 3 * 512)
            assert tile_pack.pack_rows(tokens(x), 0, n, 0, 1, span, out, 0) == (not odd)
            want = np.stack([rows_twin(words) for words in split_twin(x[:, 0], span)], axis=2)
            np.testing.assert_array_equal(out[:want.size], want.ravel())


def test_vectors_are_joined_in_turns():
    @intrinsic
    def join_both(context, x, out):
        def emit(context, builder, signature, values):
            x, out = (data(context, builder, kind, value) for kind, value in zip(signature.args, values, strict=True))
            both = [pieces.split(builder, builder.load(builder.bitcast(at(builder, x, i), amx.SINGLES.as_pointer())))
                    for i in (0, 16)]
            for i, join in enumerate((pieces.joined_row, pieces.joined_pairs)):
                for piece, pair in enumerate(zip(*both, strict=True)):
                    builder.store(join(builder, *pair), builder.bitcast(at(builder, out, 96 * i + 32 * piece),
                                                                        amx.WORDS.as_pointer()))
            return context.get_dummy_value()

        return types.void(x, out), emit

    @numba.njit
    def run(x, out):
        join_both(x, out)

    x, out = aligned(32, np.float32), aligned((2, 3, 32), np.uint16)
    x[:] = singles(2, 32)
    run(x, out)
    want = split_twin(x)
    np.testing.assert_array_equal(out[0], want)
    np.testing.assert_array_equal(out[1], want.reshape(3, 2, 16).transpose(0, 2, 1).reshape(3, 32))


def attend(arrays, begin, end, way="pieces", scale=0.2, cap=0.0):
    """Give out and lse of many rows, by pieces or by multiply-adds."""
    q, k, v = arrays
    backend = open_backend("numba", 2)
    backend.settle("auto", [bits(["tiles", "widen"] if way == "pieces" else ["widen"])])
    assert backend.float32_products == way
    state = backend.new_state(len(q), q.shape[1], v.shape[2], np.float32)
    sum(backend.accumulate(state, q, k, v, begin, end, Score(scale, cap)))
    out, lse = np.empty((*q.shape[:2], v.shape[2]), np.float32), np.empty(q.shape[:2], np.float32)
    backend.finish(state, end > begin, out, lse)
    backend.close()
    return out, lse


def problem(n_q=400, n_k=900, dim=40, dim_v=33):
    """Give arrays of two heads that share keys, and what causal queries see."""
    arrays = singles(3, n_q, 2, dim), singles(4, n_k, 1, dim), singles(5, n_k, 1, dim_v)
    end = np.arange(1, n_q + 1) + n_k - n_q
    return arrays, np.maximum(0, end - 600), end


def oracle_of(arrays, begin, end, scale=0.2):
    j = np.arange(len(arrays[1]))
    return oracle.attend(*arrays, (j >= begin[:, None]) & (j < end[:, None]), scale)


@needs_tiles
@pytest.mark.parametrize(("where", "size"), [
    *[(x, size) for x in ("v", "some v") for size in (1e-44, 1e-38, 1e-32, 1e-22, 1e18, 1e30, 1e38)],
    *[(x, size) for x in ("k", "q", "some k", "some q") for size in (1e-44, 1e-32, 1e18, 1e30)]])
def test_numbers_near_the_ends_of_the_range(where, size):
    """As near the exact result, beside the sum of weights times |v|, as multiply-adds are; or within the bound.

    Sums are multiples of 2^-149 of weights that are 2^8 smaller than usual: results near it know 2^-141.
    """
    arrays, begin, end = problem()
    x = arrays["qkv".index(where[-1])]
    some = slice(100, None, 97) if "some" in where else slice(None)
    x[some] = np.clip(x[some], -1, 1) * np.float32(size)
    (out, lse), (plain, plain_lse) = attend(arrays, begin, end), attend(arrays, begin, end, "fma")
    want, want_lse = oracle_of(arrays, begin, end)
    most, _ = oracle_of((*arrays[:2], np.abs(arrays[2])), begin, end)
    of_out, of_lse = (out, plain, want, most + 2.0**-122), (lse, plain_lse, want_lse, np.abs(want_lse))
    for mine, theirs, exact, unit in (of_out, of_lse):
        assert np.isfinite(mine).all()
        error, other = (np.abs(y - exact) / unit for y in (mine, theirs))
        assert error.max() <= max(2e-6, 2 * other[np.isfinite(other)].max())


@needs_tiles
def test_rows_that_see_small_values_alone_keep_their_digits():
    arrays, begin, end = problem()
    arrays[2][:300] *= np.float32(1e-35)
    end[:200] = 250
    begin[:200] = np.minimum(begin[:200], 100)
    out, _ = attend(arrays, begin, end)
    want, _ = oracle_of(arrays, begin, end)
    assert np.abs(out - want)[:200].max() < 2e-6 * 1e-35
    assert np.abs(out - want).max() < 2e-6


@needs_tiles
def test_odd_numbers_reach_those_alone_that_see_them():
    """Rows that see none of them have the bits that they have without them."""
    arrays, begin, end = problem()
    want = attend(arrays, begin, end)
    arrays[0][7], arrays[1][20:40], arrays[2][30:50] = 1e25, np.inf, np.nan
    got = attend(arrays, begin, end)
    blind = begin >= 50
    assert blind.any()
    for x, y in zip(want, got, strict=True):
        assert x[blind].tobytes() == y[blind].tobytes()
        assert not np.isfinite(y[8]).any()


@needs_tiles
@pytest.mark.parametrize("cap", [0.0, 2.0])
def test_scores_of_odd_numbers_are_those_of_multiply_adds(cap):
    """Infinite scores too, of either sign, plain and capped."""
    arrays, begin, end = problem()
    arrays[1][[100, 600]] = np.inf
    arrays[0][:, :, 1:] = np.abs(arrays[0][:, :, 1:])
    arrays[0][200:, :, 0] = -1e20
    got, want = attend(arrays, begin, end, cap=cap), attend(arrays, begin, end, "fma", cap=cap)
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-4, equal_nan=True)


@needs_tiles
def test_a_scale_too_large_for_pieces_goes_another_way():
    arrays, begin, end = problem()
    for x in arrays[:2]:
        x *= np.float32(1e-18)
    got, want = (attend(arrays, begin, end, way, scale=1e37) for way in ("pieces", "fma"))
    assert all((x == y).all() for x, y in zip(got, want, strict=True))


@needs_tiles
def test_largest_error_on_long_rows():
    """8192 keys, dim 128, of normal data."""
    arrays = singles(6, 256, 1, 128), singles(7, 8192, 1, 128), singles(8, 8192, 1, 128)
    whole = np.full(256, 8192)
    out, lse = attend(arrays, 0 * whole, whole, scale=128**-0.5)
    want, want_lse = oracle_of(arrays, 0 * whole, whole, 128**-0.5)
    assert np.abs(out - want).max() < 4e-7
    assert np.abs(lse - want_lse).max() < 4e-6


@needs_tiles
def test_all_is_compiled_beforehand():
    """What `prepare` compiles is what a call runs: types that differ would be compiled while it computes."""
    from numba.core import event

    class Compiled(event.Listener):
        def __init__(self):
            self.names = []

        def on_start(self, started):
            self.names.append(started.data["dispatcher"].__name__)

        def on_end(self, ended):
            pass

    backend = open_backend("numba", 1)
    backend.settle("auto", [backend.ways])
    assert backend.float32_products == "pieces"
    backend.prepare(np.dtype("f4"), np.dtype("f4"), 64, 64)
    q, k, v = (np.random.default_rng(i).standard_normal((300, 2, 64)).astype("f4") for i in range(3))
    state = State.empty(300, 2, 64, np.float32)
    state.reset(None)
    with event.install_listener("numba:compile", Compiled()) as compiled:
        for _ in backend.accumulate(state, q, k, v, np.zeros(300, np.int64), np.full(300, 300), Score(0.125)):
            pass
    backend.close()
    assert compiled.names == []
