"""The CPU fast path: register-blocked Numba kernels that release the interpreter lock, on a team of threads.

The loops over a block are in `forward` and `backward`. The result never depends on which thread was faster. With many
rows it does not depend on the number of threads either: it has the same bits on any number. With few rows the forward
pass splits the keys, and the backward pass splits the rows, into as many parts as the threads need; the order of sums,
and so the last bits, then depend on the number of threads. In canonical order they never do; see `Backend`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...device import Device
from ...dtypes import BFLOAT16
from ...errors import BackendError
from ...layout import Integers
from ...score import Score
from ...softmax import Gradient, State
from ..base import Backend, Bound, Shape
from ..products import PRODUCTS, bits
from ..team import Team
from .amx import missing
from .arguments import KernelArguments, tokens, writable
from .backward import Backward
from .bound import BoundBlock
from .compiled import (
    add_sums,
    backward_keys,
    backward_on_tiles,
    combine_rows,
    compile_for,
    finish_rows,
    forward_keys,
    forward_units,
    merge_states,
    pack_backward,
    pack_forward,
    pack_tiles_backward,
    pack_units,
    pack_weight_keys,
    reduce_keys,
    survey_values,
)
from .forward import Forward
from .forward_units import ForwardUnits
from .pieces import MOST_SCALE, pieces_in
from .product import ROWS
from .reduction import Reduction, WeightMemory
from .seen import Seen, SeenBefore
from .steps import Limits
from .sum_tile import ColumnTarget, RowTarget, TopTarget, WeightTarget
from .tile_gradient_load import LEAST_SCALE
from .tile_workspace import PackedTiles, TileBackwardBuffers, TileScratch
from .tuples import (
    ColumnRange,
    GradientArrays,
    KeySums,
    RowRange,
    Sizes,
    StateArrays,
    TileScore,
    forward_numbers,
    ranges_of,
)
from .vector import machine
from .workspace import BackwardBuffers, ForwardScratch, PackedKV

Array = NDArray[Any]
PACKED_BYTES = 2**25        # of packed K and V at a time
STEP_FLOP = 6e8             # between two yields: a few milliseconds of a core, in float32 with AVX-512
STEP_BYTES = 2**24          # the same where memory is the limit
PIECE_USES = 640            # of a row or key, from which on to split it into pieces takes less than tiles save
CANONICAL_TILE = 32 * ROWS  # a multiple of ROWS and, on every CPU, of the widest panel; of no cache's size


class NumbaBackend(Backend):
    """Attention in Numba on `threads` threads, the caller's among them."""

    name = "numba"
    compiles = True
    biased = True
    relative = True
    sums_tables = True
    library_bytes = 46 * 2**20        # measured with Numba 0.68
    lane_flop = 4 * 0.75              # the second factor is the share reached: docs/performance.rst
    canonical_tile = CANONICAL_TILE
    rows_apart = True
    gives_weights = True
    separable = True

    def __init__(self, threads: int, device: Device | None = None) -> None:
        super().__init__(threads)
        has = {"widen": True, "tiles": not missing(), "pairs": machine().pairs}
        self.ways = bits(name for name in PRODUCTS if has[name])
        self._team = Team(threads)
        self._seen = SeenBefore()
        self._busy = False
        self._forward_key: Any = None
        self._scratch: list[ForwardScratch] = []
        self._packed: PackedKV | None = None
        self._units_key: Any = None
        self._tile_scratch: list[TileScratch] = []
        self._units: PackedTiles | None = None
        self._weights_key: Any = None
        self._weights: WeightMemory | None = None
        self._backward_key: Any = None
        self._buffers: BackwardBuffers | TileBackwardBuffers | None = None

    @classmethod
    def scratch_bytes(cls, q: Shape, k: Shape, v: Shape, dtype: np.dtype[Any], acc_dtype: np.dtype[Any]
                      ) -> dict[str, int]:
        """Predict the scores of a thread, and packed K and V at a time, or one tile of each key head. Local."""
        n_k, kv_heads, dim = k
        packed = n_k * kv_heads * (dim + v[2]) * acc_dtype.itemsize
        return {"scores": 2**23, "packed K and V": min(PACKED_BYTES, packed)}

    @classmethod
    def describe(cls) -> str:
        """Describe Numba and this machine's vectors; see `Backend.describe`. Local."""
        pairs = ", bfloat16 pairs" if machine().pairs else ""
        tiles = f", no tiles: {missing()}" if missing() else ", bfloat16 tiles, float32 in pieces on them"
        return f"{super().describe()}; vectors of {8 * machine().vector_bytes} bits{pairs}{tiles}"

    def prepare(self, dtype: np.dtype[Any], accumulator: np.dtype[Any], dim: int, dim_v: int, *,
                plain: bool = True, biased: bool = False, relative: bool = False, several: bool = False,
                backward: bool = False, weights: bool = False) -> None:
        """Compile the kernels, or load them; see `Backend.prepare`. Local."""
        plain = plain and not biased and not relative
        score = Score(1.0) if plain else Score(1.0, softcap=1.0)
        seen = Seen(np.zeros(1, np.int64), np.ones(1, np.int64))
        if weights:
            x = np.zeros((1, 1, 1), dtype)
            _prepare_weights(KernelArguments(accumulator, x, x, x, seen, score))
            return
        for some in (1,) if backward or not plain else (1, 2):                # an odd dim has no pairs
            x = np.zeros((1, 1, some), dtype)
            on_tiles = self._on_tiles(np.dtype(dtype), np.dtype(accumulator), score, backward)
            if backward and on_tiles:
                _prepare_tiles_backward(KernelArguments(accumulator, x, x, x, seen, score))
            if backward and not (on_tiles and plain and dtype == BFLOAT16):   # neither other scores nor few pairs
                _prepare_backward(KernelArguments(accumulator, x, x, x, seen, score))
            elif not backward:
                _prepare_forward(self._arguments(accumulator, x, x, x, seen, score))
                if on_tiles:
                    _prepare_units(self._arguments(accumulator, x, x, x, seen, score))

    def accumulate(self, state: State, q: NDArray[Any], k: NDArray[Any], v: NDArray[Any],
                   begin: Integers, end: Integers, score: Score) -> Iterator[int]:
        """Fold one block of K and V into the running softmax; see `Backend.accumulate`. Local."""
        on_tiles = self._on_tiles(q.dtype, state.acc.dtype, score)

        def steps(seen: Seen) -> Generator[int, None, None]:
            block = self._arguments(state.acc.dtype, q, k, v, seen, score)
            rest = block, _limits(), state, self.canonical, seen.cuts
            if on_tiles and (self.canonical or _is_for_tiles(block, q.dtype)):
                units = self._reserve_units(q.shape[2], v.shape[2], pieces_in(q.dtype))
                return ForwardUnits(self._team, units, self._tile_scratch, *rest).run()
            packed = self._reserve_forward(block)
            return Forward(self._team, packed, self._scratch, *rest).run()

        return self._run(steps, self._seen.find(begin, end), q.shape[1], on_tiles)

    def bind(self, state: State, k: Any, v: Any, n_q: int, heads: int, score: Score) -> Bound:
        """Give what `accumulate` does with arrays that stay where they are; see `Backend.bind`. Local."""
        if self.canonical or score.positional or score.scale < 0 or n_q == 0:
            return super().bind(state, k, v, n_q, heads, score)
        q = np.zeros((n_q, heads, k.shape[2]), k.dtype)
        seen = Seen(np.zeros(n_q, np.int64), np.ones(n_q, np.int64))
        block = self._arguments(state.acc.dtype, q, k, v, seen, score)
        packed = self._reserve_forward(block)
        return BoundBlock(block, q, state, packed, self._scratch[0], self.threads, _limits(), score.key_bias,
                          super().bind(state, k, v, n_q, heads, score), self._check_free)

    def combine(self, state: State, parts: State) -> None:
        """Fold states of the same queries into one; see `Backend.combine`. Local."""
        combine_rows(state.acc, state.row_max, state.row_sum, parts.acc, parts.row_max, parts.row_sum)

    def finish(self, state: State, seen: Any, out: Any, lse: Any) -> None:
        """Normalise a state into `out` and `lse`; see `Backend.finish`. Local."""
        wide = out if out.dtype == state.acc.dtype else state.acc
        by_heads = seen.ndim == 2
        finish_rows(state.acc, state.row_max, state.row_sum, np.ones(len(seen), bool) if by_heads else seen, wide, lse)
        if by_heads:
            wide[~seen] = 0
            lse[~seen] = -np.inf
        if wide is not out:
            with np.errstate(over="ignore"):
                out[...] = wide

    def merge(self, states: NDArray[Any], sinks: NDArray[Any] | None, seen: NDArray[np.uint8], out: Any, lse: Any
              ) -> None:
        """Combine states and finish them; see `Backend.merge`. Local."""
        wide = out if out.dtype == states.dtype else np.empty(out.shape, states.dtype)
        merge_states(states, states[0, :0] if sinks is None else sinks, sinks is not None, seen, wide, lse)
        if wide is not out:
            with np.errstate(over="ignore"):
                out[...] = wide

    def backward(self, gradient: Gradient, q: NDArray[Any], k: NDArray[Any], v: NDArray[Any], dk: Any, dv: Any,
                 begin: Integers, end: Integers, score: Score, dkey_bias: Any = None,
                 drelative: Sequence[NDArray[np.float64]] | None = None) -> Iterator[int]:
        """Add to the gradients what one block of K and V gives; see `Backend.backward`. Local."""
        wanted = self.wanted_gradients(gradient, dk, dv, drelative)
        acc_dtype = gradient.lse.dtype
        has_tiles = self._on_tiles(q.dtype, acc_dtype, score, True)

        def steps(seen: Seen) -> Generator[int, None, None]:
            block = KernelArguments(acc_dtype, q, k, v, seen, score)
            on_tiles = None
            if has_tiles and (self.canonical or _is_worth_pieces(block, q.dtype)):
                on_tiles = TileScore(*block.capping)
            buffers = self._reserve_backward(q.shape[2], v.shape[2], acc_dtype,
                                             0 if on_tiles is None else pieces_in(q.dtype))
            none = np.zeros((1, 1, 1), acc_dtype)
            arrays = GradientArrays(tokens(gradient.dout), writable(gradient.lse), writable(gradient.delta),
                                    none if gradient.dq is None else gradient.dq, acc_dtype.type(score.scale),
                                    *wanted)
            return Backward(self._team, buffers, block, _limits(), arrays, dk, dv, self.canonical, on_tiles,
                            dkey_bias, drelative).run()

        return self._run(steps, self._seen.find(begin, end), q.shape[1], has_tiles)

    def column_sums(self, sums: NDArray[np.float64], q: NDArray[Any], k: NDArray[Any], lse: NDArray[Any],
                    begin: Integers, end: Integers, score: Score) -> Iterator[int]:
        """Add up what each key weighs for all queries; see `Backend.column_sums`. Local."""
        whole = sums if sums.flags.c_contiguous else np.zeros(sums.shape)
        yield from self._reduce(ColumnTarget(whole), q, k, lse, begin, end, score)
        if whole is not sums:
            sums += whole

    def row_sums(self, sums: NDArray[np.float64], q: NDArray[Any], k: NDArray[Any], lse: NDArray[Any],
                 values: NDArray[np.float64], begin: Integers, end: Integers, score: Score) -> Iterator[int]:
        """Add up sums over the keys for each query; see `Backend.row_sums`. Local."""
        base = float(values[0]) if len(values) else 0.0
        return self._reduce(RowTarget(sums, (values - base).astype(lse.dtype), base), q, k, lse, begin, end, score)

    def row_tops(self, scores: NDArray[Any], positions: Integers, q: NDArray[Any], k: NDArray[Any], keys: Integers,
                 begin: Integers, end: Integers, score: Score) -> Iterator[int]:
        """Keep the keys that score most for each query; see `Backend.row_tops`. Local."""
        none = np.zeros(scores.shape[:2], scores.dtype)
        return self._reduce(TopTarget(scores, positions, writable(keys)), q, k, none, begin, end, score)

    def row_weights(self, weights: NDArray[Any], q: NDArray[Any], k: NDArray[Any], lse: NDArray[Any],
                    begin: Integers, end: Integers, score: Score) -> Iterator[int]:
        """Write the weights of some queries; see `Backend.row_weights`. Local."""
        return self._reduce(WeightTarget(weights), q, k, lse, begin, end, score)

    def _reduce(self, target: Any, q: NDArray[Any], k: NDArray[Any], lse: NDArray[Any], begin: Integers,
                end: Integers, score: Score) -> Iterator[int]:
        """Go through the weights of a block, and do with them what the target wants."""
        def steps(seen: Seen) -> Generator[int, None, None]:
            block = KernelArguments(lse.dtype, q, k, k, seen, score)
            memory = self._reserve_weights(k.shape[2], lse.dtype)
            return Reduction(self._team, memory, block, _limits(), writable(lse), target).run()

        return self._run(steps, self._seen.find(begin, end), q.shape[1])

    def _run(self, begin_loop: Callable[[Seen], Generator[int, None, None]], seen: Seen, heads: int,
             apart: bool = False) -> Iterator[int]:
        """Do the steps of a loop, one loop at a time; from rows × keys of all heads to pairs.

        With `apart` there is a loop for each interval: the kernels on the CPU's tiles take one.
        """
        if seen.first == seen.last:
            return
        self._check_free()
        self._busy = True
        try:
            area = counted = 0
            for some in seen.intervals() if apart else (seen,):
                with closing(begin_loop(some)) as steps:
                    for done in steps:
                        area += done
                        yield area // heads - counted
                        counted = area // heads
        finally:
            self._busy = False

    def _check_free(self) -> None:
        if self._busy:
            raise BackendError("backend numba: the loop over an earlier block has not ended; finish or close it first")
        self._team.check()

    def _arguments(self, acc_dtype: np.dtype[Any], q: Array, k: Array, v: Array, seen: Seen, score: Score
                   ) -> KernelArguments:
        """Give the arguments of the forward pass: its scale is positive, for maxima of products; the sign goes to q."""
        if score.scale < 0:
            q = -q
            score = replace(score, scale=-score.scale)
        pairs = self.products == "pairs" and score.plain and q.dtype == BFLOAT16 and acc_dtype == np.float32
        return KernelArguments(acc_dtype, q, k, v, seen, score, pairs and q.shape[2] % 2 == 0)

    def _on_tiles(self, dtype: np.dtype[Any], acc_dtype: np.dtype[Any], score: Score, backward: bool = False) -> bool:
        """Whether the CPU's tiles multiply: for scores that are plain or capped, a matter that all ranks agree on.

        Not those of scale 0, with which an infinite product is NaN. For the scales of float32 see `pieces`, and
        backward `tile_gradient_load`.
        """
        if score.positional or score.key_bias is not None or score.scale == 0 or acc_dtype != np.float32:
            return False
        if dtype == np.float32:
            least = LEAST_SCALE if backward else 0.0
            return self.float32_products == "pieces" and least <= abs(score.scale) <= MOST_SCALE
        return bool(self.products == "tiles" and dtype == BFLOAT16)

    @property
    def _tile(self) -> int:
        """Size of tiles that does not depend on the cache; 0: it may."""
        return self.canonical_tile if self.canonical else 0

    def _reserve_forward(self, block: KernelArguments) -> PackedKV:
        """Make the work space for blocks like this one, unless the last one was."""
        key = *_forward_key(block), self._tile
        if self._packed is None or self._forward_key != key:
            self._scratch = []       # the old memory goes before the new comes
            self._packed = None
            self._scratch = [ForwardScratch(*key) for _ in range(self.threads)]
            self._packed = PackedKV(*key)
            self._forward_key = key
        return self._packed

    def _reserve_units(self, *key: int) -> PackedTiles:
        """Make the work space of the tile unit for blocks with this dim, dim_v and pieces, unless the last one was."""
        if self._units is None or self._units_key != key:
            self._tile_scratch = []      # the old memory goes before the new comes
            self._units = None
            self._tile_scratch = [TileScratch(*key) for _ in range(self.threads)]
            self._units = PackedTiles(*key)
            self._units_key = key
        return self._units

    def _reserve_backward(self, dim: int, dim_v: int, acc_dtype: np.dtype[Any], pieces: int
                          ) -> BackwardBuffers | TileBackwardBuffers:
        """Make the work space for blocks like this one, unless the last one was."""
        key = dim, dim_v, acc_dtype, pieces, self._tile
        if self._buffers is None or self._backward_key != key:
            self._buffers = None                         # the old memory goes before the new comes
            self._buffers = (TileBackwardBuffers(dim, dim_v, self.threads, self._tile, pieces) if pieces else
                             BackwardBuffers(dim, dim_v, acc_dtype, self.threads, self._tile))
            self._backward_key = key
        return self._buffers

    def _reserve_weights(self, dim: int, acc_dtype: np.dtype[Any]) -> WeightMemory:
        """Make the work space for sums of weights of such blocks, unless the last one was."""
        key = dim, acc_dtype
        if self._weights is None or self._weights_key != key:
            self._weights = None                         # the old memory goes before the new comes
            self._weights = WeightMemory(dim, acc_dtype, self.threads)
            self._weights_key = key
        return self._weights

    def release(self) -> None:
        """Give the work space back. Local."""
        self._weights_key = self._weights = None
        self._scratch = []
        self._forward_key = self._packed = None
        self._tile_scratch = []
        self._units_key = self._units = None
        self._backward_key = self._buffers = None
        self._seen.clear()

    def close(self) -> None:
        """End the threads, and give the work space back. Local."""
        self.release()
        self._team.close()


def _limits() -> Limits:
    return Limits(PACKED_BYTES, STEP_FLOP, STEP_BYTES)


def _is_for_tiles(block: KernelArguments, dtype: np.dtype[Any]) -> bool:
    """Whether tiles take less time forward: not for so few rows of bfloat16 that they read keys where they are."""
    if dtype == np.float32:
        return _is_worth_pieces(block, dtype)
    most = PackedKV(*_forward_key(block), 0).rows
    return bool(block.rows > most)


def _is_worth_pieces(block: KernelArguments, dtype: np.dtype[Any]) -> bool:
    """Whether each row and key meets enough of the others for what splitting it takes; bfloat16 is not split."""
    return dtype == BFLOAT16 or bool(block.pairs >= PIECE_USES * (block.rows + block.last - block.first))


def _forward_key(block: KernelArguments) -> tuple[int, int, np.dtype[Any], bool]:
    """Give what the work space depends on: numbers or pairs of a key, of a value, their dtype, whether pairs."""
    k, v = block.arrays.k, block.arrays.v
    return k.shape[2], v.shape[2], block.acc_dtype, k.array.dtype == np.uint32


def _prepare_weights(block: KernelArguments) -> None:
    """Compile what sums weights up, in all ways, for a block of one key and one query."""
    memory = WeightMemory(block.arrays.k.shape[2], block.acc_dtype, 1)
    scratch, tiles = memory.scratch[0], memory.reserve(1, 1)
    compile_for(pack_weight_keys, block.arrays.k, 0, 1, 0, 1, tiles)
    one, positions = np.zeros((1, 1, 1), block.acc_dtype), np.zeros((1, 1, 1), np.int64)
    for target in (ColumnTarget(np.zeros((1, 1))), RowTarget(np.zeros((1, 1, 3)), one[0, 0], 0.0),
                   TopTarget(one, positions, positions[0, 0]), WeightTarget(one)):
        compile_for(reduce_keys, block.arrays, block.score_arguments(scratch.row_score), one[0], target,
                    RowRange(0, 1, 0, 1), ColumnRange(0, 0, 1), tiles, scratch.work)


def _prepare_forward(block: KernelArguments) -> None:
    """Compile the forward pass for a block of one key and one query."""
    key = *_forward_key(block), 0
    scratch = ForwardScratch(*key)
    tiles = PackedKV(*key).reserve(1, 1)
    compile_for(pack_forward, block.arrays.k, block.arrays.v, 0, 1, 0, 1, tiles)
    state = State.empty(1, 1, block.arrays.v.shape[2], block.acc_dtype)
    numbers = forward_numbers(StateArrays(state.acc, state.row_max, state.row_sum), block.arrays, tiles, scratch.work)
    compile_for(forward_keys, numbers, block.score_arguments(scratch.row_score),
                ranges_of([(RowRange(0, 1, 0, 1), ColumnRange(0, 0, 1))]))
    states = np.zeros((1, block.arrays.v.shape[2] + 2), block.acc_dtype)
    compile_for(merge_states, states, states[0, :0], False, np.ones((1, 1), np.uint8), state.acc[None],
                state.row_max[None])
    parts = state.acc[None], state.row_max[None], state.row_sum[None]
    compile_for(combine_rows, state.acc, state.row_max, state.row_sum, *parts)
    compile_for(finish_rows, state.acc, state.row_max, state.row_sum, np.ones(1, bool), state.acc, state.row_max)


def _prepare_tiles_backward(block: KernelArguments) -> None:
    """Compile the backward pass on tiles for a block of one key and one query."""
    q = block.arrays.q
    buffers = TileBackwardBuffers(q.shape[2], q.shape[2], 1, pieces=pieces_in(q.array.dtype))
    tiles = buffers.reserve(1, 1)
    sums = buffers.reserve_sums(1, buffers.tile)
    one = np.zeros((1, 1), np.float32)
    many = np.zeros(q.shape, np.float32)
    columns = ColumnRange(0, 0, 1)
    compile_for(pack_tiles_backward, block.arrays.k, block.arrays.v, 0, 1, 0, 1, tiles)
    compile_for(backward_on_tiles, GradientArrays(q, one, one, many, np.float32(1), True, True), block.arrays,
                TileScore(*block.capping), RowRange(0, 1, 0, 1), columns, tiles, KeySums(sums.dk[0], sums.dv[0]),
                buffers.scratch[0], buffers.spare(0, block))
    compile_for(add_sums, many, many, sums, 0, columns, np.zeros((1, 2), np.int64))


def _prepare_units(block: KernelArguments) -> None:
    """Compile the forward pass on the tile unit for a block of one key and one query."""
    arrays = block.arrays
    key = arrays.k.shape[2], arrays.v.shape[2], pieces_in(arrays.k.array.dtype)
    scratch = TileScratch(*key)
    tiles = PackedTiles(*key).reserve(1, 1)
    sizes = Sizes(np.float32(1), False)
    compile_for(pack_units, arrays.k, arrays.v, 0, 1, 0, 1, tiles, sizes)
    state = State.empty(1, 1, arrays.v.shape[2], block.acc_dtype)
    numbers = forward_numbers(StateArrays(state.acc, state.row_max, state.row_sum), arrays, tiles, scratch.work)
    if key[2] > 1:
        compile_for(survey_values, arrays.v, 0, 1, state.acc)
    compile_for(forward_units, numbers, block.capping, ranges_of([(RowRange(0, 1, 0, 1), ColumnRange(0, 0, 1))]), sizes)


def _prepare_backward(block: KernelArguments) -> None:
    """Compile the backward pass for a block of one key and one query."""
    acc_dtype = block.acc_dtype
    q = block.arrays.q
    buffers = BackwardBuffers(q.shape[2], q.shape[2], acc_dtype, 1)
    tiles = buffers.reserve(1, 1)
    sums = buffers.reserve_sums(1, buffers.tile + ROWS)
    one = np.zeros((1, 1), acc_dtype)
    many = np.zeros(q.shape, acc_dtype)
    scale = acc_dtype.type(1)
    rows = RowRange(0, 1, 0, 1)
    columns = ColumnRange(0, 0, 1)
    compile_for(pack_backward, block.arrays.k, block.arrays.v, 0, 1, 0, 1, tiles)
    compile_for(backward_keys, GradientArrays(q, one, one, many, scale, True, True), block.arrays,
                block.score_arguments(buffers.scratch[0].row_score), rows, columns, tiles,
                KeySums(sums.dk[0], sums.dv[0]), buffers.scratch[0].work)
    compile_for(add_sums, many, many, sums, 0, columns, np.zeros((1, 2), np.int64))
