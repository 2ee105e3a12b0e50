"""The sizes of a cache, and whether arrays go with them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..arrays import as_array
from ..backends.base import Backend
from ..call import Array, without_left_out
from ..checks import check_integer, check_key_bias, check_relative, check_sinks
from ..dtypes import check_dtype
from ..errors import BackendError, DtypeError, OptionError, ShapeError
from ..problem import Problem
from ..score import MOST_POSITION
from .query import Query

DTYPE = "float32"              # of a cache, unless another is asked for


@dataclass(frozen=True)
class Sizes:
    """What a cache is made for; the same on all ranks. Local.

    Attributes
    ----------
    kv_heads, dim, dim_v : int
    dtype : dtype
    batch : int or None
        Elements of the batch; None if arrays have no such axis.
    capacity : int or None
        The most tokens in all.
    rollback : int
        Tokens that may be cropped though a window drops keys.
    key_bias : int
        Numbers of each key's bias: 0 without, 1, or one for each query head.
    in_keys : bool
        Whether values are the first numbers of keys.
    """

    kv_heads: int
    dim: int
    dim_v: int
    dtype: np.dtype[Any]
    batch: int | None
    capacity: int | None
    rollback: int
    key_bias: int = 0
    in_keys: bool = False

    @classmethod
    def check(cls, kv_heads: Any, dim: Any, dim_v: Any, dtype: Any, batch: Any, capacity: Any,
              rollback: Any, key_bias: Any = None, values_in_keys: Any = False) -> Sizes:
        """Take a caller's options, or raise `OptionError` or `DtypeError`. Local."""
        def count(name: str, value: Any, least: int = 1) -> int:
            return check_integer(f"KVCache: {name}", value, least)

        dim, kv_heads = count("dim", dim), count("kv_heads", kv_heads)
        if values_in_keys and (dim_v is None or count("dim_v", dim_v) > dim):
            raise OptionError(f"KVCache: values_in_keys: expected dim_v too, up to dim, {dim}, got {dim_v}")
        given = int(key_bias or 0) if isinstance(key_bias, (bool, type(None))) else key_bias
        numbers = count("key_bias", given, 0)
        if numbers > 1 and numbers % kv_heads:
            raise OptionError("KVCache: key_bias: expected True, a number for each key, or so many, one for each query "
                              f"head, a multiple of {kv_heads} kv_heads, got {numbers}")
        return cls(kv_heads, dim, dim if dim_v is None else count("dim_v", dim_v),
                   check_dtype(DTYPE if dtype is None else dtype, "dtype"),
                   None if batch is None else count("batch", batch),
                   None if capacity is None else count("capacity", capacity), count("rollback", rollback, 0),
                   numbers, bool(values_in_keys))

    def describe(self) -> dict[str, Any]:
        """Give the options as plain values. Local."""
        return asdict(self)

    @property
    def shapes(self) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        """(batch, kv_heads, dim) and (batch, kv_heads, dim_v), with a batch axis in any case."""
        batch = self.batch or 1
        return (batch, self.kv_heads, self.dim), (batch, self.kv_heads, self.dim_v)

    @property
    def in_file(self) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
        """Shape and dtype of what a file has of a token, by name: a key, a value if it is apart, a bias if any."""
        k, v = self.shapes
        whole = {"k": (k, self.dtype), **({} if self.in_keys else {"v": (v, self.dtype)})}
        bias = {"key_bias": ((k[0], self.key_bias), np.dtype(np.float64))} if self.key_bias else {}
        return {name: (shape if self.batch is not None else shape[1:], dtype)
                for name, (shape, dtype) in {**whole, **bias}.items()}

    def given(self, x: Array) -> Array:
        """View an array as the caller's are: with the batch axis, or without. Local."""
        return x if self.batch is not None else x[0]

    def check_tokens(self, k: Any, v: Any, key_bias: Any, backend: Backend, acc_dtype: np.dtype[Any]
                     ) -> list[Array]:
        """Take keys and values, and a bias in its dtype, where they are computed with; or raise what is wrong. Local.

        They get a batch axis.
        """
        if self.in_keys and v is not None:
            raise OptionError("KVCache: expected no v, as the cache was made with values_in_keys=True")
        if k is None or (v is None and not self.in_keys):
            raise OptionError("KVCache: expected k and v, got only one of them")
        taken: list[Array] = []
        for name, x, dim in (("k", k, self.dim), ("v", v, self.dim_v))[:1 if self.in_keys else 2]:
            array = self.check_array(name, x, backend)
            if array.shape[2:] != (self.kv_heads, dim):
                raise ShapeError(f"{name}: expected shape ([batch,] n, {self.kv_heads}, {dim}), got {np.shape(x)}")
            taken.append(array)
        if taken[0].shape[1] != taken[-1].shape[1]:
            raise ShapeError(f"v: expected as many tokens as k has, {taken[0].shape[1]}, got {taken[-1].shape[1]}")
        return taken + self._check_bias(key_bias, taken, acc_dtype)

    def _check_bias(self, key_bias: Any, taken: list[Array], acc_dtype: np.dtype[Any]) -> list[Array]:
        """Take the bias of keys; clear keys and values of those that it leaves out, if they are not finite."""
        if not self.key_bias:
            if key_bias is not None:
                raise OptionError("KVCache: expected no key_bias; make the cache with key_bias=True, or key_bias=heads")
            return []
        if key_bias is None:
            raise OptionError("KVCache: expected key_bias with k and v, as the cache was made with it; zeros change "
                              "nothing")
        k = self.given(taken[0]).shape
        numbers = check_key_bias(key_bias, k, self.key_bias, acc_dtype)
        wanted = k[:-2] + ((self.key_bias,) if self.key_bias > 1 else ())
        if numbers is None or numbers.shape != wanted:
            raise ShapeError(f"key_bias: expected shape {wanted}, got {np.shape(key_bias)}")
        bias = numbers.reshape(*taken[0].shape[:2], self.key_bias)
        taken[:] = (without_left_out(x, bias) for x in taken)
        return [bias]

    def check_query(self, q: Any, sinks: Any, relative: Any, backend: Backend, problem: Problem, length: int,
                    acc_dtype: np.dtype[Any]) -> Query:
        """Take queries, where they are computed with, with a batch axis; or raise what is wrong. Local."""
        given = as_array(q, "q")
        array = self.check_array("q", given, backend)
        _, n_q, heads, dim = array.shape
        if dim != self.dim or heads == 0 or heads % self.kv_heads:
            raise ShapeError(f"q: expected shape ([batch,] n_q, heads, {self.dim}), heads a multiple of "
                             f"{self.kv_heads}, got {given.shape}")
        if self.key_bias > 1 and heads != self.key_bias:
            raise ShapeError(f"q: expected {self.key_bias} heads, for each of which the cache has a bias of the keys, "
                             f"got {heads}")
        slopes = problem.alibi
        if slopes is not None and (len(slopes) != heads or length + n_q >= MOST_POSITION):
            raise ShapeError(f"alibi: expected a slope for each of {heads} heads, and positions below 2^31, got "
                             f"{len(slopes)} slopes and {length} tokens")
        query = Query(array, not isinstance(given, np.ndarray), check_sinks(sinks, heads, acc_dtype), 0, n_q)
        if relative is None:
            return query
        if not backend.relative or backend.device:
            raise BackendError(f"relative: a cache with backend {backend.name} has none yet; expected backend numba or "
                               "numpy, and arrays on the host")
        if length + n_q >= MOST_POSITION:
            raise OptionError(f"relative: expected positions below 2^31, got {length} tokens")
        tables = check_relative(relative, problem.mask.axes, heads, acc_dtype)
        return query._replace(relative=tables, tables=tables.checksum())

    def check_array(self, name: str, x: Any, backend: Backend) -> Array:
        """Take an array where it is computed with, with a batch axis; or raise what is wrong. Local."""
        array = as_array(x, name)
        on_gpu = not isinstance(array, np.ndarray)
        if on_gpu and not backend.device:
            raise BackendError(f"{name}: expected an array on the host, got one on a GPU; take backend='cuda'")
        if array.dtype != self.dtype:
            check_dtype(array.dtype, name)
            raise DtypeError(f"{name}: expected the cache's dtype, {self.dtype}, got {array.dtype}; convert it first")
        if array.ndim != 3 + (self.batch is not None) or (self.batch is not None and len(array) != self.batch):
            batch = f"{self.batch}, " if self.batch is not None else ""
            raise ShapeError(f"{name}: expected shape ({batch}tokens, heads, dim), got {array.shape}")
        return backend.to_device(array if self.batch is not None else array[None])
