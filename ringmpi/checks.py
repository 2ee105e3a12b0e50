"""Checks of what a caller brings: the arrays of one rank, of all ranks together, and the options."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .arrays import as_host_array
from .dtypes import check_dtype
from .environment import most_threads
from .errors import DtypeError, OptionError, ShapeError
from .mask import Mask
from .mask_base import BaseMask
from .mask_batch import BatchMask
from .mpi.comm import TIMEOUT
from .relative import Axis, Relative

Array = NDArray[Any]

def check_arrays(q: Array, k: Array, v: Array) -> bool:
    """Check that q, k and v go together; say whether they have a batch axis. Local.

    Raises
    ------
    ShapeError, DtypeError
        If they do not; the text says what was expected and what was got.
    """
    _check_kinds(q.dtype, k.dtype, v.dtype, q.shape, k.shape, v.shape)
    return q.ndim == 4


@functools.lru_cache(maxsize=64)              # of those that do go together: an error is never kept
def _check_kinds(q: np.dtype[Any], k: np.dtype[Any], v: np.dtype[Any], *shapes: tuple[int, ...]) -> None:
    """Check that arrays of these dtypes and shapes go together."""
    for name, dtype in (("q", q), ("k", k), ("v", v)):
        check_dtype(dtype, name)
        if dtype != q:
            raise DtypeError(f"{name}: expected the dtype of q, {q}, got {dtype}; convert it first")
    check_shapes(*shapes)


def check_shapes(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...]) -> None:
    """Check that arrays of these shapes go together. Local.

    Raises
    ------
    ShapeError
        If they do not; the text says what was expected and what was got.
    """
    for name, shape in (("q", q), ("k", k), ("v", v)):
        if len(shape) not in (3, 4) or len(shape) != len(q):
            raise ShapeError(f"{name}: expected shape ([batch,] tokens, heads, dim) as for q, got {shape}")
    *batch, n_k, kv_heads, dim = k
    heads = q[-2]
    if q[-1] != dim or dim == 0:
        raise ShapeError(f"q and k: expected the same dim, at least 1, got {q[-1]} and {dim}")
    if v[:-1] != k[:-1] or v[-1] == 0:
        raise ShapeError(f"v: expected shape {(*batch, n_k, kv_heads, 'dim_v')} to go with k, got {v}")
    if list(q[:-3]) != batch:
        raise ShapeError(f"q and k: expected the same batch, got {q[:-3]} and {tuple(batch)}")
    if kv_heads == 0 or heads == 0 or heads % kv_heads:
        raise ShapeError(f"heads: expected a multiple of kv_heads, got {heads} heads and {kv_heads} kv_heads")


def check_timeout(timeout: Any) -> tuple[float, str]:
    """Return a timeout to work with, and what is wrong with the one given (nothing: empty). Local.

    Even the error about a timeout must be agreed on within one.
    """
    if isinstance(timeout, (int, float, np.number)) and timeout > 0:
        return float(timeout), ""
    return TIMEOUT, f"timeout: expected seconds > 0, got {shown(timeout)}"


def check_mask(mask: Any) -> BaseMask:
    """Return the mask, which may be None or a list, one for each element of a batch, or raise `OptionError`. Local."""
    if mask is None:
        return Mask()
    if isinstance(mask, (list, tuple)):
        return BatchMask(mask)
    if not isinstance(mask, BaseMask):
        raise OptionError(f"mask: expected a ringmpi.Mask, or a list of them, got {shown(mask)}")
    return mask


def check_scale(scale: Any) -> float | None:
    """Return the scale as a finite number, or None for the default, or raise `OptionError`. Local."""
    if scale is None:
        return None
    value = _number(scale, "scale")
    if not math.isfinite(value):
        raise OptionError(f"scale: expected a finite number, got {shown(scale)}")
    return value


def check_like(name: str, x: Array, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    """Raise `ShapeError` or `DtypeError` unless `x` has this shape and dtype. Local."""
    if x.shape != shape:
        raise ShapeError(f"{name}: expected shape {shape}, as the call had it, got {x.shape}")
    if x.dtype != dtype:
        raise DtypeError(f"{name}: expected dtype {dtype}, as the call had it, got {x.dtype}; convert it first")


def check_softcap(softcap: Any) -> float | None:
    """Return the bound of the scores, or None for none, or raise `OptionError`. Local."""
    if softcap is None:
        return None
    value = _number(softcap, "softcap")
    if not 0 < value < math.inf:
        raise OptionError(f"softcap: expected a finite number > 0, or None, got {shown(softcap)}")
    return value


def check_slopes(slopes: Any) -> NDArray[np.float64] | None:
    """Return the slopes of ALiBi, or None for none, or raise `OptionError`. Local."""
    if slopes is None:
        return None
    for x in (slopes, *(slopes if issubclass(type(slopes), (list, tuple)) else ())):     # which asks nothing of it
        _check_constant(x, "alibi")
    try:
        values = np.array(np.asarray(slopes), np.float64)
    except Exception:      # noqa: BLE001 (a library may refuse by any)
        values = np.array(math.nan)
    if values.ndim != 1 or not np.isfinite(values).all():
        raise OptionError(f"alibi: expected a finite slope for each head, got {shown(slopes)}")
    return values


def check_dropout(dropout: Any) -> float:
    """Return the probability of dropout, or raise `OptionError`. Local."""
    value = _number(dropout, "dropout")
    if not 0 <= value < 1:
        raise OptionError(f"dropout: expected a probability, 0 <= dropout < 1, got {shown(dropout)}")
    return value


def check_integer(name: str, value: Any, least: int, below: int | None = None) -> int:
    """Return what Python takes for an index as an int, or raise `OptionError`. Local.

    Parameters
    ----------
    name : str
        What to call it in an error.
    value : int, or an integer of NumPy or any other library
    least, below : int
        The range: ``least <= value < below``.
    """
    try:
        number = operator.index(value)
    except Exception:      # noqa: BLE001 (a library may refuse by any)
        number = least - 1
    if isinstance(value, bool) or number < least or (below is not None and number >= below):
        most = "" if below is None else f" and < {f'2**{below.bit_length() - 1}' if below > 2**31 else below}"
        raise OptionError(f"{name}: expected an integer >= {least}{most}, got {shown(value)}")
    return number


def check_seed(seed: Any) -> int:
    """Return the seed of dropout, or raise `OptionError`. Local."""
    return check_integer("seed", seed, 0, 2**64)


def check_sinks(sinks: Any, heads: int, kind: np.dtype[Any]) -> NDArray[Any] | None:
    """Return the sinks in dtype `kind`, or None for none. Local.

    Raises
    ------
    ShapeError, DtypeError, OptionError, BackendError
        If they are no array of finite floats of shape (heads,) on the host.
    """
    if sinks is None:
        return None
    values = as_host_array(sinks, "sinks")
    check_dtype(values.dtype, "sinks")
    if values.shape != (heads,):
        raise ShapeError(f"sinks: expected shape ({heads},), one for each head, got {values.shape}")
    with np.errstate(over="ignore"):
        numbers: NDArray[Any] = values.astype(kind)
    if not np.isfinite(numbers).all():
        raise OptionError(f"sinks: expected finite numbers in {kind}, got {values}; for a head without a sink take one "
                          "far below its scores")
    return numbers


def check_key_bias(bias: Any, k: tuple[int, ...], heads: int, kind: np.dtype[Any]) -> NDArray[Any] | None:
    """Return a bias of the keys in dtype `kind`, or None for none. Local.

    Parameters
    ----------
    bias : array of shape ([batch,] n_k) or ([batch,] n_k, heads), optional
    k : tuple of int
        Shape of the keys: ([batch,] n_k, kv_heads, dim).
    heads : int
        Of the queries.
    kind : dtype

    Raises
    ------
    ShapeError, DtypeError, OptionError, BackendError
        If it is no array of floats of such a shape on the host, or one is NaN, infinite but for -inf, or no longer
        finite in `kind`.
    """
    if bias is None:
        return None
    values = as_host_array(bias, "key_bias")
    check_dtype(values.dtype, "key_bias")
    keys = k[:-2]
    if values.shape not in (keys, (*keys, heads)):
        raise ShapeError(f"key_bias: expected shape {keys} or {(*keys, heads)} to go with k, got {values.shape}")
    return check_bias_numbers(values, kind)


def check_bias_numbers(values: NDArray[Any], kind: np.dtype[Any]) -> NDArray[Any]:
    """Return the numbers of a bias in dtype `kind`; raise `OptionError` if one is not, and is not -inf. Local."""
    with np.errstate(over="ignore"):
        numbers: NDArray[Any] = np.array(values, kind, order="C")
    left_out = values == -np.inf
    if not (np.isfinite(numbers) | left_out).all():
        raise OptionError(f"key_bias: expected numbers that are finite in {kind}, or -inf for a key that is left out, "
                          "got NaN, inf or a number too large for it")
    return numbers


def check_relative(relative: Any, axes: Sequence[Axis], heads: int, kind: np.dtype[Any]) -> Relative:
    """Return a bias by distance in dtype `kind`. Local.

    Parameters
    ----------
    relative : array of shape (heads, 2 reach + 1), or a tuple or list of one for each axis
    axes : sequence of Axis
        Of the mask's grid; none if it has none.
    heads : int
        Of the queries.
    kind : dtype

    Raises
    ------
    ShapeError, DtypeError, OptionError, BackendError
        If it is no table of floats that are finite in `kind` on the host, or there are more or fewer than axes.
    """
    if not isinstance(relative, (tuple, list)):
        return Relative.of_positions(_check_table(relative, "relative", heads, kind))
    if len(relative) != len(axes) or not axes:
        expected = (f"a table for each of {len(axes)} axes of the mask's grid, or one alone by positions" if axes else
                    "one table, an array, as tables for each axis go with a mask that is a ringmpi.Grid")
        raise ShapeError(f"relative: expected {expected}, got a {type(relative).__name__} of {len(relative)}")
    return Relative.of_axes([_check_table(table, f"relative[{number}]", heads, kind)
                             for number, table in enumerate(relative)], axes)


def _check_table(table: Any, name: str, heads: int, kind: np.dtype[Any]) -> NDArray[Any]:
    """Return a table of a bias by distance."""
    values = as_host_array(table, name)
    check_dtype(values.dtype, name)
    if values.ndim != 2 or len(values) != heads or not values.shape[1] % 2:
        raise ShapeError(f"{name}: expected shape ({heads}, 2 reach + 1), an odd number for each head, got "
                         f"{values.shape}")
    with np.errstate(over="ignore"):
        numbers: NDArray[Any] = np.array(values, kind, order="C")
    if not np.isfinite(numbers).all():
        raise OptionError(f"{name}: expected numbers that are finite in {kind}, got NaN, an infinity or a number too "
                          "large for it; to leave keys out by distance, take a mask with a window")
    return numbers


def _check_constant(x: Any, name: str) -> None:
    """Raise `OptionError` for a tensor whose gradient somebody waits for."""
    wanted = False
    with suppress(Exception):                # what can't even be asked is refused as no number
        wanted = getattr(x, "requires_grad", False)
    if wanted:
        raise OptionError(f"{name}: expected a constant, got a tensor that requires a gradient, and there is none with "
                          f"respect to {name}; detach() it, or change q, k or v by it")


def _number(x: Any, name: str) -> float:
    """Give a number as a float; NaN for what is none."""
    _check_constant(x, name)
    try:
        return float(x)
    except Exception:      # noqa: BLE001 (a library may refuse by any)
        return math.nan


def shown(x: Any) -> str:
    """Give `x` as Python shows it, or by its type alone where it can't be shown, as an array that is deleted. Local."""
    try:
        return repr(x)
    except Exception:      # noqa: BLE001 (a library may refuse by any)
        return type(x).__name__


def check_order(order: Any, orders: Sequence[str]) -> str:
    """Return the order of sums, one of `orders`, or raise `OptionError`. Local."""
    if not isinstance(order, str) or order not in orders:
        raise OptionError(f"order: expected one of {', '.join(orders)}, got {shown(order)}")
    return order


def check_threads(threads: Any) -> int | None:
    """Return a number of threads, or None for the default, or raise `OptionError`. Local."""
    if threads is None:
        return None
    number = check_integer("threads", threads, 1)
    if number > most_threads():
        raise OptionError(f"threads: expected at most {most_threads()} CPU threads a rank on this machine, got "
                          f"{number}; leave it out for a fair share of the cores")
    return number
