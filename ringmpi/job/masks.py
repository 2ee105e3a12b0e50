"""The mask of a job, from its options and the arrays that its input brings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields

import numpy as np
from numpy.typing import NDArray

from ..errors import OptionError
from ..mask import ARRAYS, Mask
from ..mask_base import BaseMask
from ..neighbourhood import Grid
from .options import GRID_EDGES, Options

NOT_IN_A_GRID = ("window", "prefix", "first", "q_offset", "keys", *ARRAYS)


def make_mask(options: Options, arrays: Mapping[str, NDArray[np.int64]] | None = None) -> BaseMask:
    """Make the mask that the options and arrays of these names describe. Local.

    Raises
    ------
    MaskError, OptionError
        If they make none.
    """
    if options.grid is not None:
        return _make_grid(options)
    for name in ("grid_window", "grid_periodic", "grid_edges"):
        if getattr(options, name) not in (None, GRID_EDGES[0]):
            raise OptionError(f"{name}: belongs to a grid: expected its shape, --grid, got none")
    given = {part.name: getattr(options, part.name) for part in fields(Mask)} | dict.fromkeys(ARRAYS)
    return Mask(**given | dict(arrays or {}))


def _make_grid(options: Options) -> Grid:
    """Make the window over a grid."""
    usual = Options()
    said = [name for name in NOT_IN_A_GRID if getattr(options, name) != getattr(usual, name)]
    if said:
        raise OptionError(f"grid: does not go together with {', '.join(said)}")
    shape = [_number("grid", text) for text in str(options.grid).split("x")]
    sides = [_window(text) for text in (options.grid_window or "").split(",")]
    axes = [_number("grid_periodic", text) for text in (options.grid_periodic or "").split(",") if text]
    if not set(axes) <= set(range(len(shape))):
        raise OptionError(f"grid_periodic: expected axes from 0 to {len(shape) - 1}, got {options.grid_periodic}")
    return Grid(shape, sides * len(shape) if len(sides) == 1 else sides, [axis in axes for axis in range(len(shape))],
                options.grid_edges, options.causal)


def _window(text: str) -> tuple[int | None, ...] | int | None:
    """Read a window along an axis: ``3``, ``3:0``, and nothing for no limit."""
    sides = [_number("grid_window", side) if side else None for side in text.split(":")]
    if len(sides) > 2:
        raise OptionError(f"grid_window: expected a number, or before:after, got {text!r}")
    return sides[0] if len(sides) == 1 else tuple(sides)


def _number(name: str, text: str) -> int:
    """Read a number from 0 on."""
    if not (text.isdecimal() and len(text) < 19):
        raise OptionError(f"{name}: expected numbers from 0 on, got {text!r}")
    return int(text)
