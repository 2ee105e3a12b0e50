"""The structs that kernels are given: kernels/arguments.cuh and PackedScore, field by field, as NumPy dtypes."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from ...device import Struct
from ...errors import InternalError
from ...relative import MOST_AXES
from ...score import Score
from ...softmax import State

Array = Any
POINTER = np.uint64


def problem_type(acc_dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Give the layout of ``Problem<A>``. Local."""
    return _struct({**dict.fromkeys(("begin", "end", "packed_score"), POINTER), "scale": acc_dtype, "factor": acc_dtype,
                    **dict.fromkeys(("n_q", "n_k", "kv_heads", "group", "dim", "dim_v"), np.int32),
                    "key_bias": POINTER, "bias_heads": np.int32, "intervals": np.int32,
                    "axes": np.int32, "widths": (np.int32, MOST_AXES), "tables": POINTER, "coordinates": POINTER})


def state_type() -> np.dtype[Any]:
    """Give the layout of ``StateArrays<A>``. Local."""
    return _struct({**dict.fromkeys(("acc", "row_max", "row_sum"), POINTER),
                    **dict.fromkeys(("stride_v", "width", "fresh"), np.int32)})


def gradient_type() -> np.dtype[Any]:
    """Give the layout of ``GradientInputs<T>``. Local."""
    return _struct(dict.fromkeys(("q", "k", "v", "dout", "lse", "delta"), POINTER))


def score_type(acc_dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Give the layout of ``PackedScore<A>``. Local."""
    return _struct({"softcap": acc_dtype, "gain": acc_dtype, "threshold": np.uint32, "sloped": np.int32})


class Placed(NamedTuple):
    """What a launch needs of a block besides its arrays: what queries see, and scores. On the GPU.

    Attributes
    ----------
    begin, end : int32 arrays of shape (intervals, n_q)
        Where the columns that each query sees begin and end.
    packed_score : array or 0
        A ``PackedScore`` and what follows it.
    tables, coordinates : array or 0
        Of a bias by distance; see ``Problem``.
    """

    begin: Array
    end: Array
    packed_score: Any
    tables: Any
    coordinates: Any


def problem(q: Array, v: Array, placed: Placed, score: Score, acc_dtype: np.dtype[Any], dim_v: int | None = None
            ) -> Struct:
    """Give the Problem of a block. Local.

    Parameters
    ----------
    q : array of shape (n_q, heads, dim)
    v : array of shape (n_k, kv_heads, dim_v)
    placed : Placed
    score : Score
        Its bias is of these keys.
    acc_dtype : dtype
        Of the accumulator.
    dim_v : int, optional
        Columns of v that the launch works on; by default all of them.
    """
    scale = score.scale if abs(score.scale) >= np.finfo(acc_dtype).tiny else 0.0     # as GPUs take it for float
    factor = (abs(scale) if score.plain and scale else 1.0) / math.log(2)
    (n_q, heads, dim), (n_k, kv_heads, _) = q.shape, v.shape
    bias = score.key_bias
    widths = [table.shape[1] for table in score.relative.tables] if score.relative else []
    return Struct(problem_type(acc_dtype), begin=placed.begin, end=placed.end, packed_score=placed.packed_score,
                  scale=scale, factor=factor, n_q=n_q, n_k=n_k, kv_heads=kv_heads, group=heads // kv_heads, dim=dim,
                  dim_v=v.shape[2] if dim_v is None else dim_v, key_bias=0 if bias is None else bias,
                  bias_heads=0 if bias is None else bias.shape[1], intervals=len(placed.begin), axes=len(widths),
                  widths=widths + [0] * (MOST_AXES - len(widths)), tables=placed.tables,
                  coordinates=placed.coordinates)


def state_arrays(state: State, dim_v: int, start: int = 0, width: int = 0, fresh: bool = False) -> Struct:
    """Give the StateArrays of a state. Local.

    Parameters
    ----------
    state : State
        With `dim_v` columns; its arrays may have any shape.
    dim_v : int
    start : int
        The column of acc that the launch begins at.
    width : int
        Columns of K and V that make a part.
    fresh : bool
        Whether parts are written one after the other, and nothing is read.
    """
    return Struct(state_type(), acc=from_number(state.acc, start), row_max=state.row_max, row_sum=state.row_sum,
                  stride_v=dim_v, width=width, fresh=fresh)


def gradient_inputs(q: Array, k: Array, v: Array, dout: Array, lse: Array, delta: Array) -> Struct:
    """Give the GradientInputs of a block. Local."""
    return Struct(gradient_type(), q=q, k=k, v=v, dout=dout, lse=lse, delta=delta)


def from_number(x: Array, start: int) -> Array:
    """View an array from number `start` on. Local."""
    return x.reshape(-1)[start:]


def _struct(fields: dict[str, Any]) -> np.dtype[Any]:
    """Lay fields out as C++ does: each aligned to its size, the struct to the largest."""
    return np.dtype(list(fields.items()), align=True)


def rows_of(x: Any) -> tuple[np.int64, np.int64]:
    """Say how many numbers of an array lie in a row without a gap, and how far apart such rows begin. Local.

    Raises
    ------
    InternalError
        If it has gaps of several sizes.
    """
    axes = [(size, stride // x.itemsize) for size, stride in zip(x.shape, x.strides, strict=True) if size != 1]
    width = 1
    while axes and axes[-1][1] == width:
        width *= axes.pop()[0]
    apart = axes[-1][1] if axes else width
    expected = apart
    for size, stride in reversed(axes):
        if stride != expected:
            raise InternalError(f"expected rows at equal distances, got shape {x.shape} with strides {x.strides}")
        expected *= size
    return np.int64(width), np.int64(apart)
