"""A cache of keys and values that is spread over the ranks, for decoding: it grows, and is attended to."""

from __future__ import annotations

import os
import weakref
import zlib
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NoReturn, overload

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from ..arrays import as_array
from ..attention import RingAttention
from ..backends import check_name
from ..call import Array, checksum
from ..checks import check_sinks, check_threads, check_timeout
from ..dtypes import accumulator as accumulator_of
from ..dtypes import check_dtype
from ..engine import NO_FACTS, Engine
from ..errors import BackendError, DtypeError, InternalError, OptionError, RingError, ShapeError
from ..keywords import explained
from ..layout import Custom, Integers, Layout, check_spec, resolve
from ..mask import Mask
from ..mpi.agreement import digest_of_numbers
from ..mpi.comm import TIMEOUT, digest_of, private_comm
from ..mpi.exchange import NOTHING
from ..mpi.threads import check_thread
from ..problem import Problem
from ..schedules.cost import fewest_bytes
from ..schedules.redistribution import redistribute
from ..score import MOST_POSITION
from .decoder import Decoder, Query
from .file import read_description, read_tokens, write_cache
from .store import KVStore

SIZES = ("kv_heads", "dim", "dim_v", "dtype", "batch")
ORDER = "order of the batch (checksum)"
ASKED = ("q (checksum)", "tokens", "k (checksum)", "v (checksum)")
DEALT = 16                    # tokens in a row that a rank keeps of those that all ranks bring
ROOM = 256                    # tokens on a rank that a cache without a capacity begins with


class Held(Custom):
    """Positions that the ranks hold of a cache: there may be holes, where a window has dropped keys. Local."""

    name = "cache"

    def __init__(self, positions: Sequence[Integers], length: int) -> None:
        Layout.__init__(self, [len(held) for held in positions])
        self._positions = list(positions)
        self.length = length


class KVCache:
    """Keys and values of a growing sequence, spread over the ranks of *comm*. Collective over *comm*.

    Each rank holds some tokens, and they stay where they are. A step with queries that all ranks have takes one pass
    over a rank's own keys, and one small exchange (Shyam et al. 2024, *Tree Attention*; Yang et al. 2024, *Context
    Parallelism for Scalable Million-Token Inference*, pass-Q).

    Parameters
    ----------
    comm : MPI.Intracomm
        Any communicator of the caller; the library works on a private one that it caches on it.
    kv_heads, dim : int
        Of the keys.
    dim_v : int, optional
        Of the values; `dim` by default.
    dtype : dtype
        Of keys, values and queries: float64, float32, bfloat16 or float16.
    batch : int, optional
        Elements of the batch, all of one length; by default arrays have no batch axis.
    capacity : int, optional
        The most tokens in all. Memory for each rank's share is taken at once, with the first of them; without, it grows
        as it fills.
    mask : Mask, optional
        Causal by default. Keys that no later query sees through a window are dropped.
    scale, softcap, alibi, accumulator, backend, threads, timeout, allow_gpu_sharing
        See `RingAttention`. ``"auto"`` computes on CPUs; with ``"cuda"`` the cache is in the memory of GPUs.

    Attributes
    ----------
    length : int
        Tokens that were appended.

    Raises
    ------
    RingError
        One of its children, the same on every rank.

    Examples
    --------
    ``mpiexec -n 4 python example.py``::

        import numpy as np, ringmpi
        from mpi4py import MPI
        rng = np.random.default_rng(0)                          # the same numbers on all ranks
        with ringmpi.KVCache(MPI.COMM_WORLD, kv_heads=2, dim=64) as cache:
            cache.append(*rng.standard_normal((2, 1000, 2, 64), "f4"), replicated=True)
            k, v, q = (rng.standard_normal((1, heads, 64), "f4") for heads in (2, 2, 8))
            out = cache.attend(q, k, v)                         # one more token, and what it sees
    """

    @explained()
    def __init__(self, comm: Any, *, kv_heads: int, dim: int, dim_v: int | None = None, dtype: DTypeLike = "float32",
                 batch: int | None = None, capacity: int | None = None, mask: Mask | None = None,
                 scale: float | None = None, softcap: float | None = None, alibi: ArrayLike | None = None,
                 accumulator: DTypeLike | None = None, backend: str = "auto", threads: int | None = None,
                 timeout: float = TIMEOUT, allow_gpu_sharing: bool = False) -> None:
        check_thread()
        self._timeout, wrong = check_timeout(timeout)
        self._given = comm
        self._comm = private_comm(comm, self._timeout)
        options: dict[str, Any] = {}
        engine: Engine | None = None
        with self._comm.noting() as failures:
            if wrong:
                raise OptionError(wrong)
            self._mask = Mask(causal=True) if mask is None else mask
            self._problem = Problem.check(self._mask, "contiguous", None, scale, softcap, alibi, 0.0, accumulator)
            self.kv_heads = _count("kv_heads", kv_heads)
            self.dim = _count("dim", dim)
            self.dim_v = self.dim if dim_v is None else _count("dim_v", dim_v)
            self.batch = None if batch is None else _count("batch", batch)
            self.capacity = None if capacity is None else _count("capacity", capacity)
            self.dtype = check_dtype(dtype, "dtype")
            self._acc_dtype = accumulator_of(self.dtype, accumulator)
            self._problem.check_range(np.finfo(self._acc_dtype))
            check_name(backend)
            options = {**self._problem.describe(), "kv_heads": self.kv_heads, "dim": self.dim, "dim_v": self.dim_v,
                       "dtype": self.dtype, "batch": self.batch, "capacity": self.capacity, "backend": backend}
            engine = Engine(self._comm, self._timeout, backend, check_threads(threads) or self._comm.threads, "auto",
                            bool(allow_gpu_sharing))
        self._engine = self._connect(engine, failures, options)
        self._passed_on: dict[str, Any] = {"mask": self._mask, "scale": scale, "softcap": softcap, "alibi": alibi,
                           "accumulator": accumulator, "backend": backend, "threads": threads, "timeout": timeout,
                           "allow_gpu_sharing": allow_gpu_sharing}
        options["KVCache (by the order in which they were made)"] = self._comm.next_object()
        self._options = options
        self._digest = digest_of(options)
        self.length = 0
        self._dropped = 0             # keys before that may be gone
        self._reordered = 0           # a checksum of what `reorder` was told
        self._store = self._new_store()
        self._decoder = Decoder(self._comm, self._engine, self._problem, self._acc_dtype, self.dim_v)
        self._close = weakref.finalize(self, self._engine.close)
        self._close.atexit = False

    def _connect(self, engine: Engine | None, failures: list[Exception], options: dict[str, Any]) -> Engine:
        """Agree on the options and what computes, and compile. Collective over *comm*."""
        try:
            rows = self._comm.exchange("KVCache", self._timeout, NO_FACTS if engine is None else engine.facts(),
                                       failures=failures, options=options)
            if engine is None:
                raise InternalError("a KVCache without an engine")
            engine.connect(rows)
            plain = self._problem.softcap is None and self._problem.alibi is None
            engine.prepare(self.dtype, self._acc_dtype, self.dim, self.dim_v, plain=plain, backward=False)
        except BaseException:
            if engine is not None:
                engine.close()
            raise
        return engine

    def _new_store(self) -> KVStore:
        """Make an empty store. Local."""
        size = self._comm.size
        batch = self.batch or 1
        shapes = (batch, self.kv_heads, self.dim), (batch, self.kv_heads, self.dim_v)
        left = self._window_left()
        most = None if left is None else max(4 * DEALT, -(-left // (4 * size)))
        room = ROOM if self.capacity is None else -(-self.capacity // (size * DEALT)) * DEALT
        return KVStore(shapes, self.dtype, self._engine.backend.empty, room, most)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values on this rank, with the room for more."""
        return self._store.nbytes

    @property
    def _alike(self) -> dict[str, Any]:
        """What local calls have made of the cache, and must be the same on every rank."""
        return {"length": self.length, ORDER: self._reordered}

    @property
    def tokens(self) -> int:
        """Tokens that this rank holds."""
        return self._store.tokens

    def append(self, k: ArrayLike, v: ArrayLike, *, layout: str | Layout = "contiguous", replicated: bool = False
               ) -> None:
        """Append tokens. Collective over *comm*.

        Parameters
        ----------
        k, v : arrays of shape ([batch,] n, kv_heads, dim) and ([batch,] n, kv_heads, dim_v)
            This rank's new tokens, which it keeps; n may differ between ranks. They are copied.
        layout : str or Layout
            Where the tokens of the ranks lie among the new ones; see `RingAttention`.
        replicated : bool
            The same tokens on all ranks: each keeps its share.

        Raises
        ------
        ShapeError, DtypeError, OptionError, ResourceError
            The same on every rank, and nothing is appended: arrays that do not fit, more tokens than the capacity, no
            memory.
        """
        with self._comm.one_call():
            check_thread()
            arrays: tuple[Array, Array] | None = None
            options: dict[str, Any] = {**self._options, **self._alike}
            with self._comm.noting() as failures:
                self._check_open()
                check_spec(layout)
                arrays = self._check_tokens(k, v)
                options |= {"replicated": bool(replicated),
                            "layout": layout.describe() if isinstance(layout, Layout) else layout}
            count = 0 if arrays is None else arrays[0].shape[1]
            if replicated and arrays is not None:
                options |= {"tokens": count, "k (checksum)": checksum(arrays[0]), "v (checksum)": checksum(arrays[1])}
            rows = self._comm.exchange("KVCache.append", self._timeout, np.array([count]).view(np.uint8),
                                       failures=failures, options=options)
            counts = np.concatenate(rows).view(np.int64).tolist()
            total = counts[0] if replicated else sum(counts)
            self._check_capacity(total)
            where = None if replicated else resolve(layout, counts, "k and v")
            with _Undone(self), self._comm.raise_on_all(self._timeout), self._engine.backend.current():
                if arrays is None:
                    raise InternalError("tokens are missing")
                self._take(*arrays, total, where)

    def _take(self, k: Array, v: Array, total: int, layout: Layout | None) -> None:
        """Keep this rank's share of new tokens, by their layout, or of those that all ranks have. Local."""
        start = self.length
        if layout is None:
            positions = np.arange(start, start + total, dtype=np.int64)
            mine = (positions // DEALT) % self._comm.size == self._comm.rank
            for first, last in _runs(mine):
                self._store.append(positions[first:last], k[:, first:last], v[:, first:last])
        else:
            self._store.append(start + layout.positions(self._comm.rank), k, v)
        self.length = start + total
        left = self._window_left()
        if left is not None and start - left > self._dropped:
            self._dropped = start - left
            self._store.drop(self._mask.first, self._dropped)

    @overload
    def attend(self, q: ArrayLike, k: ArrayLike | None = None, v: ArrayLike | None = None, *, sharded: bool = False,
               layout: str | Layout = "contiguous", sinks: ArrayLike | None = None,
               return_lse: Literal[False] = False) -> Array: ...

    @overload
    def attend(self, q: ArrayLike, k: ArrayLike | None = None, v: ArrayLike | None = None, *, sharded: bool = False,
               layout: str | Layout = "contiguous", sinks: ArrayLike | None = None,
               return_lse: Literal[True]) -> tuple[Array, Array]: ...

    def attend(self, q: ArrayLike, k: ArrayLike | None = None, v: ArrayLike | None = None, *, sharded: bool = False,
               layout: str | Layout = "contiguous", sinks: ArrayLike | None = None, return_lse: bool = False
               ) -> Array | tuple[Array, Array]:
        """Attend to all tokens there are. Collective over *comm*.

        Parameters
        ----------
        q : array of shape ([batch,] n_q, heads, dim), dtype of the cache
            Queries, the same on all ranks. The last is aligned with the last token, as the mask says; `heads` is a
            multiple of `kv_heads`.
        k, v : arrays, optional
            New tokens, the same on all ranks, which are appended first, in the same exchange; see `append`.
        sharded : bool
            Each rank has queries of its own: a long prompt, say. Keys or queries travel, whichever are fewer bytes.
        layout : str or Layout
            Where the queries of the ranks lie among all, if they are sharded.
        sinks : array of shape (heads,), optional
            See `RingAttention.__call__`.
        return_lse : bool
            Return the log-sum-exp of the scores too.

        Returns
        -------
        out : array of shape ([batch,] n_q, heads, dim_v), dtype of `q`
            On all ranks alike, bit for bit; of sharded queries this rank's.
        lse : array of shape ([batch,] n_q, heads), accumulator dtype
            With `return_lse`.

        Raises
        ------
        ShapeError, DtypeError, OptionError, BackendError
            The same on every rank, and nothing is appended: arrays that do not fit or differ, queries that would see
            keys that were dropped.
        RingTimeout, RankLost
            If another rank does not keep up within the timeout, or is gone.
        """
        if not sharded:
            with self._comm.one_call():
                return self._attend(q, k, v, sinks, return_lse)
        return self._attend_sharded(q, k is not None or v is not None, layout, sinks, return_lse)

    def _attend(self, q: Any, k: Any, v: Any, sinks: Any, return_lse: bool) -> Array | tuple[Array, Array]:
        """Attend to this rank's tokens, then put the results of all ranks together. Collective over *comm*."""
        check_thread()
        query: Query | None = None
        payload = NOTHING
        numbers: tuple[int, ...] = ()                # what must be the same on every rank: as numbers, sooner hashed
        length, reordered = self.length, self._reordered
        with _Undone(self):
            with self._comm.noting() as failures, self._engine.backend.current():
                self._check_open()
                arrays = None if k is None and v is None else self._check_tokens(k, v)
                query = self._check_query(q, sinks)
                numbers = (*query.q.shape, query.sinks is not None, checksum(query.sinks), checksum(query.q))
                if arrays is not None:
                    numbers += (arrays[0].shape[1], checksum(arrays[0]), checksum(arrays[1]))
                    self._check_capacity(arrays[0].shape[1])
                    self._take(*arrays, arrays[0].shape[1], None)
                self._check_window(query.q.shape[1])
                payload = self._decoder.accumulate(query, self._store, self.length)
            rows = self._comm.exchange(
                "KVCache.attend", self._timeout, payload, failures=failures,
                options=lambda: {**self._options, "length": length, ORDER: reordered, "shape of q": numbers[:4],
                                 "sinks": None if query is None or query.sinks is None else query.sinks.tolist(),
                                 **dict(zip(ASKED, numbers[6:], strict=False))},
                digest=digest_of_numbers(self._digest, length, reordered, *numbers))
        if query is None:
            raise InternalError("a query is missing")
        backend = self._engine.backend
        with backend.current():
            out, lse = self._decoder.combine(query, rows)
            out, lse = (x if query.on_gpu else backend.to_numpy(x) for x in (out, lse))
            backend.synchronize()
        out, lse = (out, lse) if self.batch is not None else (out[0], lse[0])
        return (out, lse) if return_lse else out

    def _attend_sharded(self, q: Any, brings_tokens: bool, layout: str | Layout, sinks: Any, return_lse: bool
                        ) -> Array | tuple[Array, Array]:
        """Attend by a `RingAttention` over the positions that the ranks hold. Collective over *comm*."""
        heads, n_q = 0, 0
        with self._comm.one_call():
            check_thread()
            with self._comm.noting() as failures:
                self._check_open()
                if brings_tokens:
                    raise OptionError("KVCache.attend: expected k and v with queries that all ranks have; append "
                                      "sharded tokens by append() first")
                shape = np.shape(as_array(q, "q"))
                if len(shape) != 3 + (self.batch is not None):
                    raise ShapeError(f"q: expected shape ([batch,] n_q, heads, {self.dim}), got {shape}")
                n_q, heads = int(shape[-3]), int(shape[-2])
            positions = self._store.positions
            payload = np.concatenate([np.array([n_q, heads], np.int64), positions]).view(np.uint8)
            rows = self._comm.exchange("KVCache.attend (sharded)", self._timeout, payload, failures=failures,
                                       options={**self._options, **self._alike})
            numbers = [row.view(np.int64) for row in rows]
            asked = sum(int(row[0]) for row in numbers)
            heads = int(numbers[0][1])                # the same schedule on all ranks, even if they differ
            self._check_window(asked)
            held = Held([row[2:] for row in numbers], self.length)
            with self._comm.raise_on_all(self._timeout), self._engine.backend.current():
                given = as_array(q, "q")
                arrays = self._check_array("q", given), *self._store.whole()
        item, wide = self.dtype.itemsize, self._acc_dtype.itemsize
        schedule = fewest_bytes(self._comm.size, queries=asked * heads * (self.dim * item + (self.dim_v + 2) * wide),
                                keys=sum(held.counts) * self.kv_heads * (self.dim + self.dim_v) * item)
        arrays = arrays if self.batch is not None else tuple(x[0] for x in arrays)
        with RingAttention(self._given, layout=layout, kv_layout=held, schedule=schedule,
                           **self._passed_on) as attention:
            out, lse = attention(*arrays, sinks=sinks, return_lse=True, keep=False)
        if isinstance(given, np.ndarray):
            with self._engine.backend.current():
                out, lse = (self._engine.backend.to_numpy(x) for x in (out, lse))
        return (out, lse) if return_lse else out

    def crop(self, length: int) -> None:
        """Forget the tokens from `length` on. Local; the same on every rank."""
        if not 0 <= _count("length", length, least=0) <= self.length:
            raise OptionError(f"KVCache.crop: expected a length up to {self.length}, got {length}")
        if length < self._dropped:
            raise OptionError(f"KVCache.crop: expected a length from {self._dropped} on, got {length}: a window has "
                              "dropped the keys before")
        self._store.truncate(length)
        self.length = length

    def reorder(self, elements: ArrayLike) -> None:
        """Let each element of the batch go on from what another one had, as in beam search. Local; the same everywhere.

        Parameters
        ----------
        elements : integer array of shape (batch,)
            For each element the one whose tokens it takes.
        """
        chosen = np.asarray(elements)
        if self.batch is None or chosen.shape != (self.batch,) or chosen.dtype.kind not in "iu":
            raise ShapeError(f"KVCache.reorder: expected integers of shape ({self.batch},), one for each element of "
                             f"the batch, got {chosen.dtype} of shape {chosen.shape}")
        if chosen.size and not 0 <= chosen.min() <= chosen.max() < self.batch:
            raise OptionError(f"KVCache.reorder: expected numbers within 0 .. {self.batch - 1}, got {chosen}")
        with self._engine.backend.current():
            self._store.reorder(chosen.astype(np.int64))
        self._reordered = zlib.crc32(chosen.astype(np.int64).tobytes(), self._reordered)

    def save(self, path: str | os.PathLike[str], force: bool = False) -> None:
        """Write the cache to an HDF5 file, in the order of the positions. Collective over *comm*.

        Datasets `k` (tokens, [batch,] kv_heads, dim), `v` and `positions`; it is there whole or not at all, with a
        checksum for each chunk.

        Raises
        ------
        OutputError
            If the file exists and not `force`, or can't be written; the same on every rank.
        """
        with self._comm.one_call():
            with self._comm.noting() as failures:
                self._check_open()
            rows = self._comm.exchange("KVCache.save", self._timeout, self._store.positions.view(np.uint8),
                                       failures=failures,
                                       options={**self._options, **self._alike, "path": str(path)})
            shards = {}
            with self._comm.raise_on_all(self._timeout), self._engine.backend.current():
                for name, x in zip("kv", self._store.whole(), strict=True):
                    shards[name] = np.moveaxis(self._engine.backend.to_numpy(x), 1, 0)
        held = [row.view(np.int64) for row in rows]
        positions = np.sort(np.concatenate(held))
        layout = Custom([np.searchsorted(positions, theirs) for theirs in held])
        arrays = {name: redistribute(x if self.batch is not None else x[:, 0], comm=self._given, source=layout,
                                     target="contiguous", timeout=self._timeout) for name, x in shards.items()}
        description = {"length": self.length, "dropped": self._dropped, "dtype": self.dtype.name,
                       **{name: getattr(self, name) for name in ("kv_heads", "dim", "dim_v", "batch")}}
        with self._comm.one_call(), self._comm.raise_on_all(self._timeout):
            write_cache(self._comm, self._timeout, Path(path), force, description, positions, arrays)

    @classmethod
    def open(cls, path: str | os.PathLike[str], comm: Any, **options: Any) -> KVCache:
        """Read a cache that was saved, on any number of ranks. Collective over *comm*.

        Parameters
        ----------
        path : path
        comm : MPI.Intracomm
        **options
            As for `KVCache`: the mask too, which is not in the file. kv_heads, dim, dim_v, dtype and batch are those
            of the file; if they are given, they must be the same.

        Raises
        ------
        ShardError
            If the file is missing, damaged or no cache.
        OptionError
            If it is of other sizes than those given, or the mask shows keys that a window has dropped.
        """
        timeout, _ = check_timeout(options.get("timeout", TIMEOUT))
        private = private_comm(comm, timeout)
        found: dict[str, Any] = {}
        with private.one_call(), private.raise_on_all(timeout):
            found = read_description(path)
            for name in SIZES:
                given = options.pop(name, found[name])
                if (check_dtype(given, name).name if name == "dtype" else given) != found[name]:
                    raise OptionError(f"{path}: expected a cache with {name} {given}, got {found[name]}")
        cache = cls(comm, **{name: found[name] for name in SIZES}, **options)
        try:
            with private.one_call(), private.raise_on_all(timeout):
                cache._read(path, found)
        except BaseException:
            cache.close()
            raise
        return cache

    def _read(self, path: str | os.PathLike[str], found: dict[str, Any]) -> None:
        """Take this rank's share of a cache that was saved. Local."""
        self._check_capacity(found["length"])
        seen = found["length"] if self._window_left() is None else self._mask.first
        positions, *arrays = read_tokens(path, found, seen, self._comm.rank, self._comm.size)
        with self._engine.backend.current():
            k, v = (self._engine.backend.to_device(x[None] if self.batch is None else np.moveaxis(x, 0, 1))
                    for x in arrays)
            self._store.append(positions, k, v)
        self.length = found["length"]
        self._dropped = found["dropped"]

    def close(self) -> None:
        """Give memory and this object's share of the buffers back. Local."""
        self._store.chunks = []
        self._close()

    def __copy__(self) -> NoReturn:
        raise TypeError("a KVCache can't be copied: it holds a communicator, and memory that grows in place; save() it "
                        "and open it twice, or give it a batch= and reorder()")

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        self.__copy__()

    def __reduce__(self) -> NoReturn:
        raise TypeError("a KVCache can't be pickled: it holds a communicator and buffers of this process; save() it")

    def __enter__(self) -> KVCache:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        self.close()

    def _check_open(self) -> None:
        if not self._close.alive:
            raise RingError("this KVCache is closed; make a new one")

    def _check_tokens(self, k: Any, v: Any) -> tuple[Array, Array]:
        """Take keys and values, where they are computed with, with a batch axis; or raise what is wrong. Local."""
        if k is None or v is None:
            raise OptionError("KVCache: expected k and v, got only one of them")
        taken = []
        for name, x, dim in (("k", k, self.dim), ("v", v, self.dim_v)):
            array = self._check_array(name, x)
            if array.shape[2:] != (self.kv_heads, dim):
                raise ShapeError(f"{name}: expected shape ([batch,] n, {self.kv_heads}, {dim}), got {np.shape(x)}")
            taken.append(array)
        if taken[0].shape[1] != taken[1].shape[1]:
            raise ShapeError(f"v: expected as many tokens as k has, {taken[0].shape[1]}, got {taken[1].shape[1]}")
        return taken[0], taken[1]

    def _check_query(self, q: Any, sinks: Any) -> Query:
        """Take queries, where they are computed with, with a batch axis; or raise what is wrong. Local."""
        given = as_array(q, "q")
        array = self._check_array("q", given)
        _, n_q, heads, dim = array.shape
        if dim != self.dim or heads == 0 or heads % self.kv_heads:
            raise ShapeError(f"q: expected shape ([batch,] n_q, heads, {self.dim}), heads a multiple of "
                             f"{self.kv_heads}, got {given.shape}")
        slopes = self._problem.alibi
        if slopes is not None and (len(slopes) != heads or self.length + n_q >= MOST_POSITION):
            raise ShapeError(f"alibi: expected a slope for each of {heads} heads, and positions below 2^31, got "
                             f"{len(slopes)} slopes and {self.length} tokens")
        return Query(array, not isinstance(given, np.ndarray), check_sinks(sinks, heads, self._acc_dtype))

    def _check_array(self, name: str, x: Any) -> Array:
        """Take an array where it is computed with, with a batch axis. Local."""
        array = as_array(x, name)
        on_gpu = not isinstance(array, np.ndarray)
        if on_gpu and not self._engine.backend.device:
            raise BackendError(f"{name}: expected an array on the host, got one on a GPU; take backend='cuda'")
        if array.dtype != self.dtype:
            check_dtype(array.dtype, name)
            raise DtypeError(f"{name}: expected the cache's dtype, {self.dtype}, got {array.dtype}; convert it first")
        if array.ndim != 3 + (self.batch is not None) or (self.batch is not None and len(array) != self.batch):
            batch = f"{self.batch}, " if self.batch is not None else ""
            raise ShapeError(f"{name}: expected shape ({batch}tokens, heads, dim), got {array.shape}")
        return self._engine.backend.to_device(array if self.batch is not None else array[None])

    def _check_capacity(self, count: int) -> None:
        if self.capacity is not None and self.length + count > self.capacity:
            raise OptionError(f"KVCache: expected at most {self.capacity} tokens, its capacity, got {self.length} and "
                              f"{count} more; make a larger one, or crop it")

    def _check_window(self, n_q: int) -> None:
        """Raise `OptionError` if queries would see keys that were dropped. Local."""
        left = self._window_left()
        if left is not None and self._dropped and self.length - n_q - left < self._dropped:
            raise OptionError(f"KVCache.attend: expected at most {self.length - left - self._dropped} queries, got "
                              f"{n_q}: the first would see keys before {self._dropped}, which the window has dropped")

    def _window_left(self) -> int | None:
        """How many keys before a query are visible, if the window drops keys; None if they all stay. Local."""
        window = self._mask.window
        return None if window is None or self._mask.q_offset is not None else window[0]


class _Undone:
    """Takes back what was appended within a block that ends with an error. Local."""

    def __init__(self, cache: KVCache) -> None:
        self._cache = cache
        self._before = cache.length, cache._dropped, cache._store.chunks

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        if error is not None:
            length, dropped, chunks = self._before
            cache = self._cache
            cache._store.chunks = chunks
            cache._store.truncate(length)
            cache.length, cache._dropped = length, dropped


def _count(name: str, value: Any, least: int = 1) -> int:
    """Return a whole number, or raise `OptionError`."""
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < least:
        raise OptionError(f"KVCache: {name} expects an integer >= {least}, got {value!r}")
    return int(value)


def _runs(mine: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Give where runs of True begin and end."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mine.astype(np.int8), [0]])))
    return [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]
