"""The forward pass of a block on the CPU's tile unit, on a team of threads: the way of many rows.

Calls of few rows read keys where they are, and memory is the limit: they go the way of `forward`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .compiled import forward_units, pack_units
from .forward import Forward
from .steps import PIECES_SPEED, TILE_SPEED
from .tile_rows import BLOCK
from .tile_workspace import PackedTiles
from .tuples import ForwardTiles, StateArrays, forward_numbers


class ForwardUnits(Forward):
    """The loop of `Backend.accumulate` over one block of many rows, with `PackedTiles` and a `TileScratch` a thread."""

    packed: PackedTiles
    rows_together = BLOCK

    @property
    def speed(self) -> float:                           # type: ignore[override]
        return TILE_SPEED if self.packed.pieces == 1 else PIECES_SPEED

    def _is_few(self) -> bool:
        return False

    def _pack(self, start: int, stop: int, first: int, last: int, tiles: ForwardTiles, thread: int) -> None:
        pack_units(self.block.arrays.k, self.block.arrays.v, start, stop, first, last, tiles)

    def _fold(self, state: StateArrays, ranges: NDArray[np.int64], tiles: Any, thread: int) -> None:
        forward_units(forward_numbers(state, self.block.arrays, tiles, self.scratch[thread].work), self.block.capping,
                      ranges)
