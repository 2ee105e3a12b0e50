"""float32 as pieces of bfloat16 for the CPU's tile unit: NumPy twins of splits, packing and products, on any CPU."""

import numba
import numpy as np
import pytest
from numba import types
from numba.extending import intrinsic
from test_amx import interleaved_twin, packed, rows_twin, transposed_twin

from ringmpi.backends.numba_ import amx, pieces, tile_pack
from ringmpi.backends.numba_.arguments import tokens
from ringmpi.backends.numba_.tuples import Span
from ringmpi.backends.numba_.vector import at, data
from ringmpi.backends.numba_.workspace import aligned


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


@pytest.mark.parametrize("span", [pieces.FACTORS, pieces.VALUES, pieces.FINITE, Span(100, 140)], ids=str)
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
