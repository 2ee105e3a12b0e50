"""What the compiled functions take: arrays and numbers by name, as Numba's named tuples.

Within a compiled function a named tuple costs nothing: it is its fields. `vector.unpack` gives them to an intrinsic.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


class Tokens(NamedTuple):
    """Numbers of each head of each token, where the caller has them.

    Attributes
    ----------
    array : array of one axis
        From the first number on: number d of head h of token i is element i · token + h · head + d.
    shape : (tokens, heads, numbers)
    token, head : int
        Elements from a token to the next, and from a head to the next; none is negative.
    """

    array: Any
    shape: Any
    token: Any
    head: Any


class BlockArrays(NamedTuple):
    """One block of K and V and the queries that it meets.

    Attributes
    ----------
    q, k, v : Tokens of shape (n_q, heads, dim), (n_k, kv_heads, dim), (n_k, kv_heads, dim_v)
        bfloat16 and float16 as bits, uint16 and int16; q and k may be uint32 pairs of bfloat16 along dim.
    begin, end : (intervals, n_q) int64
        The columns that a query sees in each interval.
    scale : number
        Of the products; 1 where the score is not plain, whose scale is in `ScoreArguments.ratio`.
    """

    q: Any
    k: Any
    v: Any
    begin: Any
    end: Any
    scale: Any


class StateArrays(NamedTuple):
    """The arrays of a `softmax.State`."""

    acc: Any
    row_max: Any
    row_sum: Any


def forward_numbers(state: StateArrays, block: BlockArrays, packed: ForwardTiles, work: ForwardWork | TileWork
                    ) -> tuple[Any, ...]:
    """Give what `forward_keys` takes as one plain tuple, which is handed over in a quarter of the time. Local."""
    return *state, *block.q, *block.k, *block.v, *block[3:], *packed, *work


class GradientArrays(NamedTuple):
    """The arrays of a `softmax.Gradient`, dout as `Tokens`, the scale of the products, and which gradients are wanted.

    Without `of_queries` there is no dQ, and dq is not touched; without `of_keys` there are no dK and dV.
    """

    dout: Any
    lse: Any
    delta: Any
    dq: Any
    scale: Any
    of_queries: Any
    of_keys: Any


class KeySums(NamedTuple):
    """Sums of dK and of dV: (keys, width), or (chunks, keys, width)."""

    dk: Any
    dv: Any


class RowRange(NamedTuple):
    """Rows first..first + n_rows of each of the key heads head..head + heads; the backward pass takes one head."""

    head: Any
    heads: Any
    first: Any
    n_rows: Any


class ColumnRange(NamedTuple):
    """Columns start..stop of a block, whose tiles begin at `origin`; for `fresh` and `final` see `fold_range`.

    Unless it is 0, the columns from the origin up to `packed` are packed first, for these rows and others of the head.
    """

    origin: Any
    start: Any
    stop: Any
    fresh: Any = True
    final: Any = True
    packed: Any = 0


def ranges_of(ranges: list[tuple[RowRange, ColumnRange]]) -> NDArray[np.int64]:
    """Give ranges of rows and columns as `forward_keys` takes them: the fields of one after the other. Local."""
    return np.array([(*rows, *columns) for rows, columns in ranges], np.int64)


class ForwardTiles(NamedTuple):
    """Packed tiles for the forward pass, head by head.

    Attributes
    ----------
    keys, values : arrays of one axis
        See `pack.pack_keys` and `pack.pack_values`.
    finite : (tiles of all heads,) bool
        Whether all values of a tile are finite.
    tile : int
        Keys of a tile.
    tiles : int
        Tiles of a head.
    private : bool
        Whether there is room for one tile alone, which the thread packs for itself where it uses it.
    """

    keys: Any
    values: Any
    finite: Any
    tile: Any
    tiles: Any
    private: Any


class BackwardTiles(NamedTuple):
    """Packed tiles for the backward pass, head by head: K and V as keys, and K as values; see `ForwardTiles`."""

    keys: Any
    values: Any
    k_as_values: Any
    tile: Any
    tiles: Any


class GradientTiles(NamedTuple):
    """Packed tiles for the backward pass on the CPU's tiles, head by head: bits of bfloat16; see `tile_pack`.

    Attributes
    ----------
    keys, values : arrays of one axis
        K and V as rows.
    k_turned : array of one axis
        Kᵀ as rows, cleaned: for 16 numbers all keys of a tile.
    odd : (keys of all tiles,)
        Whether a key is odd; see `tile_gradient_load`.
    tile, tiles : int
        As in `ForwardTiles`.
    pieces : tuple of int
        The numbers of the pieces that a number is in: 0 of bfloat16; 0, 1 and 2 of float32. How many there are is
        known when the kernels are compiled.
    """

    keys: Any
    values: Any
    k_turned: Any
    odd: Any
    tile: Any
    tiles: Any
    pieces: Any = (0,)


class ForwardWork(NamedTuple):
    """What a thread works on in the forward pass: arrays for a tile of rows, made by `workspace.ForwardScratch`.

    Attributes
    ----------
    queries : (rows, depth)
        Q, as the products take it.
    s, p : (rows, keys)
        Scores and weights: one array, but where bfloat16 is multiplied in pairs; then p is uint32 (rows, keys / 2).
    acc : (rows, width)
        Sum of weights times values; width is dim_v in whole vectors.
    row_max, row_sum, shrink, shift : (rows + a vector,)
        See `softmax_rows.raise_maxima`.
    low, high : (rows,) int64
        The columns that a row sees.
    groups : (rows, 4) int64
        See `forward_tile.find_groups`.
    sums : (rows · lanes,)
        See `weights.weigh_products`.
    eager : (rows,) bool
        Of a group: whether its scores become weights in registers.
    """

    queries: Any
    s: Any
    p: Any
    acc: Any
    row_max: Any
    row_sum: Any
    shrink: Any
    shift: Any
    low: Any
    high: Any
    groups: Any
    sums: Any
    eager: Any


class TileWork(NamedTuple):
    """What a thread works on in the forward pass on the tile unit, made by `tile_workspace.TileScratch`.

    Rows are in blocks of 32. All arrays have one axis; tiles are 1 KiB, see `amx`; float32 has three of Q and weights.

    Attributes
    ----------
    queries : uint16
        Tiles of A: for 16 rows all their depth.
    uneven : (blocks,) bool
        Whether there are odd numbers in a block's rows of Q.
    s : float32
        Scores of two units: for 16 rows all their keys, in tiles of 16 × 16.
    p : uint16
        Weights of two units, tiles of A.
    acc : float32
        Sum of weights times values: for 16 rows all their columns, in tiles of 16 × 16.
    part : float32
        Twice four tiles of such a sum, of one unit.
    tops, sums : float32
        Largest score and sum of weights of a block's rows, for 16 lanes each.
    row_max, row_sum : (rows,)
    shrink : (2 · 32,)
    shift : (rows,)
        Of the rows of two units; see `tile_rows.raise_block`. Of bfloat16, see `tile_strip_rows`.
    low, high : (rows,) int64
        The columns that a row sees.
    """

    queries: Any
    uneven: Any
    s: Any
    p: Any
    acc: Any
    part: Any
    tops: Any
    sums: Any
    row_max: Any
    row_sum: Any
    shrink: Any
    shift: Any
    low: Any
    high: Any


class TilePlaces(NamedTuple):
    """Addresses of the arrays of a `TileWork` and of `ForwardTiles`, int64.

    Numba counts references to the arrays that a function is given, which takes longer than a unit's products. `pieces`
    is a tuple of as many numbers as a tile has pieces: their count is part of its type, which kernels are compiled for.
    """

    queries: Any
    s: Any
    p: Any
    acc: Any
    part: Any
    tops: Any
    sums: Any
    row_max: Any
    row_sum: Any
    shrink: Any
    shift: Any
    low: Any
    high: Any
    keys: Any
    values: Any
    pieces: Any


class Factors(NamedTuple):
    """Where Q and K of a key head are: the addresses of their first numbers, and elements from a token to the next.

    Row r is query (first + r) // group of member (first + r) % group, whose numbers begin `q_head` elements after
    those of the member before; a query and a key have `dim`.
    """

    q: Any
    q_token: Any
    q_head: Any
    k: Any
    k_token: Any
    dim: Any
    first: Any
    group: Any


class Unit(NamedTuple):
    """What the tile unit does at a time: block `block` of the rows × strips first..last of a packed tile.

    Attributes
    ----------
    start, slot : int
        The tile's first column, and its number.
    first, last : int
        Strips of 32 keys that some row sees something of; first == last: there is no unit.
    partial : bool
        Whether some row does not see all of them.
    odd : bool
        Whether some of its scores are of numbers that are not in the tiles.
    fresh : bool
        Whether it is the first that some row sees anything of.
    """

    block: Any
    start: Any
    slot: Any
    first: Any
    last: Any
    partial: Any
    odd: Any
    fresh: Any


class BackwardWork(NamedTuple):
    """What a thread works on in the backward pass: arrays for a tile of rows, made by `workspace.BackwardScratch`.

    Attributes
    ----------
    queries, douts : (rows, dim), (rows, dim_v)
        Q and dO, as the products take them from the left.
    query_panels, dout_panels : (rows · width,), (rows · width_v,)
        The same from the right, as values are packed.
    s, dp : (rows, keys + some)
        S and P, dP and dS.
    dq : (rows, width)
    ones, lse, delta : (rows,)
    low, high : (rows,) int64
        The columns that a row sees.
    groups : (rows, 4) int64
        See `forward_tile.find_groups`.
    spans : (groups of keys, 2) int64
        See `backward_tile.find_spans`.
    """

    queries: Any
    douts: Any
    query_panels: Any
    dout_panels: Any
    s: Any
    dp: Any
    dq: Any
    ones: Any
    lse: Any
    delta: Any
    low: Any
    high: Any
    groups: Any
    spans: Any


class TileGradientWork(NamedTuple):
    """What a thread works on in the backward pass on tiles: for a tile of rows, made by `tile_workspace`.

    Attributes
    ----------
    lines : array of one axis
        A copy of rows of Q or dO, as they came; what follows, but for sums, is bits of bfloat16.
    queries, douts : arrays of one axis
        Q and dO transposed: for 16 rows all their numbers; see `tile_pack`.
    query_pairs, dout_pairs : arrays of one axis
        The same interleaved, cleaned: for 16 numbers all rows.
    s : (4096,)
        S of a square, then dP, of two squares; four tiles each, of keys × rows.
    p, ds : (keys · rows,)
        As rows: for 16 keys all rows.
    ds_pairs : (keys · rows,)
        dS in pairs of keys: for 16 rows all keys.
    dq : array of one axis
        Tiles of dQᵀ, in float32: for 16 numbers all rows.
    dq_lines : (rows, width) float32
        The same by rows; see `tile_gradient_rows.query_column` for their order.
    lse, delta : (rows,)
        In the order of `tile_gradient_rows.query_lane`.
    low, high : (rows,) int64
        The columns that a row sees.
    odd : (rows,) bool
        Whether a row is odd; see `tile_gradient_load`.
    low_here, high_here : (rows,) int32
        Those of the tile, in the order of lse.
    key_here : (keys,) int32
        Number of a key in the tile; -1 if it is odd.
    seen : (squares of rows, 4) int64
        See `tile_gradients.find_seen`.
    """

    lines: Any
    queries: Any
    douts: Any
    query_pairs: Any
    dout_pairs: Any
    s: Any
    p: Any
    ds: Any
    ds_pairs: Any
    dq: Any
    dq_lines: Any
    lse: Any
    delta: Any
    low: Any
    high: Any
    odd: Any
    low_here: Any
    high_here: Any
    key_here: Any
    seen: Any


class SpareWork(NamedTuple):
    """What a thread needs beside a `TileGradientWork` for odd rows and keys: what the other kernels work on."""

    packed: Any
    work: Any
    sums: Any
    score: Any


class TileScore(NamedTuple):
    """A score for the backward pass on tiles: scale / softcap and softcap; scale and 0 without."""

    ratio: Any
    cap: Any


class RelativeArguments(NamedTuple):
    """A bias by distance, as the kernels take it: tables along some axes; see `relative_rows`.

    Tables are in the order of key minus query, with a vector more at each end, of the number there.

    Attributes
    ----------
    axes : int
        0: there is none.
    tables : array of one axis
        Those of an axis after the other's, head after head.
    table_at, table_step : (axes,) int64
        Where the first head's table begins, and numbers from a head's to the next.
    middle, last : (axes,) int64
        Where in a table a difference of 0 is, and where at most a vector of it is read from.
    queries, keys : (axes · n_q,), (axes · (n_k + a vector),) int64
        Coordinates along each axis.
    keys_step : int
        Numbers from an axis to the next in the latter, and in what follows.
    low, high : (axes · (n_k + a vector),) int64
        The least and the largest coordinate of a vector of keys from this one on.
    in_a_row : (axes · (n_k + a vector),) uint8
        Whether the coordinates of such a vector follow each other.
    sums, totals : arrays of one axis
        In the backward pass, sums of the gradient of a task: of a tile, and in float64 of all of them. As tables.
    members : int
        Query heads of a key head, that these are of.
    sums_at : (axes,) int64
        Where the first of these heads' sums begin.
    shift, place, sums_place : (axes · rows of the work space,) int64
        Of a thread: for the rows that it works on, what a coordinate and it add up to is a place in a table; where the
        table of a row's head begins, and its sums.
    rows : int
        Numbers from an axis to the next in these.
    """

    axes: Any
    tables: Any
    table_at: Any
    table_step: Any
    middle: Any
    last: Any
    queries: Any
    keys: Any
    keys_step: Any
    low: Any
    high: Any
    in_a_row: Any
    sums: Any
    totals: Any
    members: Any
    sums_at: Any
    shift: Any
    place: Any
    sums_place: Any
    rows: Any


class ScoreArguments(NamedTuple):
    """A score that is not plain, as the kernels take it; integers are as wide as the accumulator's numbers.

    Attributes
    ----------
    ratio, cap : number
        scale / softcap and softcap; scale and 0 without.
    sloped, biased : bool
    only_biased : bool
        Whether there is a bias, and no softcap, slopes or dropout.
    threshold, gain : int64 and number
        Of dropout; gain is 0 without.
    slopes, dropout_keys : (heads,)
    queries, keys : (n_q,), (n_k + a vector,)
        Positions.
    bias : (heads · (n_k + a vector),) or (n_k + a vector,)
        Of the keys, head after head, or that of all heads.
    bias_step : int
        Numbers from a head's to the next; 0 if they have the same.
    bias_sums : array of one axis
        In the backward pass of a bias, sums of its gradient: those of a task's keys, for each query head of a key head
        or for all of them.
    sums_step : int
        Numbers from a head's to the next; 0 if they have the same.
    slope, dropout_key, position : (rows,)
        Of a thread: those of the rows that it works on.
    bias_at, sums_at : (rows,) int64
        Where the bias of a row's head begins, and its sums.
    relative : RelativeArguments
    """

    ratio: Any
    cap: Any
    sloped: Any
    biased: Any
    only_biased: Any
    threshold: Any
    gain: Any
    slopes: Any
    dropout_keys: Any
    queries: Any
    keys: Any
    bias: Any
    bias_step: Any
    bias_sums: Any
    sums_step: Any
    slope: Any
    dropout_key: Any
    position: Any
    bias_at: Any
    sums_at: Any
    relative: Any


class Tile(NamedTuple):
    """A tile of scores: `rows` rows of the work space (a multiple of ROWS), and columns start..start + n of a head."""

    rows: Any
    head: Any
    start: Any
    n: Any


class Columns(NamedTuple):
    """The columns of a tile that a group of rows works on; the first four are multiples of the lanes.

    Some row sees something of first..last only, and every row sees all of inner_first..inner_last. Column 0 is column
    `start` of the block.
    """

    first: Any
    inner_first: Any
    inner_last: Any
    last: Any
    start: Any


class Contiguous(NamedTuple):
    """Numbers side by side, from element `at` of an array on."""

    array: Any
    at: Any


class Span(NamedTuple):
    """Numbers that the tile unit takes: 0, and those whose exponent e, of 8 bits, is low <= e < high.

    float32 is multiplied by `factor`, a power of 2, before it is split.
    """

    low: Any
    high: Any
    factor: Any = np.float32(1)


class Sizes(NamedTuple):
    """How large values are: what they are multiplied by; whether sums become multiples of 2^-149 after each unit."""

    factor: Any
    small: Any


class Strided(NamedTuple):
    """Rows of numbers, `row` elements apart, from element `at` of an array on."""

    array: Any
    at: Any
    row: Any


class Square(NamedTuple):
    """32 × 32 float32 from element `at` of an array on.

    Rows are `row` elements apart, the halves of 16 rows `down`, those of 16 columns `right`.
    """

    array: Any
    at: Any
    row: Any
    down: Any
    right: Any


class SquarePlace(NamedTuple):
    """A square of 32 rows from `row` on and 32 keys from `key` on, and where it is in a `TileGradientWork`.

    Its first 16 keys are from element `at` of p and ds on, the others `down` after them; its first 16 rows from element
    `pairs_at` of ds_pairs on, the others `pairs_next` after them. Its S and dP are from element `s` of s on. `inner`:
    every row sees all of its keys.
    """

    row: Any
    key: Any
    at: Any
    down: Any
    pairs_at: Any
    pairs_next: Any
    s: Any
    inner: Any


class Prefetch(NamedTuple):
    """What a product asks for, for a later call: step i the address `address` + i · `stride`."""

    address: Any
    stride: Any
