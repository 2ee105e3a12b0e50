"""A cache of keys and values that is spread over the ranks, for decoding: it grows, and is attended to."""

from __future__ import annotations

import os
import weakref
from types import TracebackType
from typing import Any, Literal, NoReturn, overload

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from ..attention import Tables
from ..call import Array, checksum
from ..checks import check_integer, check_timeout
from ..errors import InternalError, OptionError, RingError, ShapeError
from ..files.paths import as_path
from ..keywords import explained
from ..layout import Layout, check_spec, resolve
from ..mask import Mask
from ..mpi.comm import TIMEOUT, private_comm
from ..mpi.threads import check_thread
from .contents import Undone
from .core import Core
from .file import check_sizes, read_description
from .prompt import attend_prompt
from .saving import save
from .sizes import DTYPE
from .steps import attend_step


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
        The most tokens in all, those that a window has dropped too. Memory for each rank's share is taken at once, with
        the first of them, unless the mask has a window; without, it grows as it fills.
    mask : Mask, optional
        Causal by default. Keys that no later query sees through a window are dropped.
    rollback : int
        With a mask that has a window: how many tokens `crop` may take back, so that steps go on as if they had never
        been there, as speculative decoding does with a draft. So many keys more are kept, in all.
    key_bias : bool or int
        Whether each key comes with a bias, a number that is added to its scores; or so many, one for each query head.
        See `RingAttention.__call__`. On CPUs.
    values_in_keys : bool
        Whether values are the first `dim_v` numbers of the keys, as in multi-head latent attention: kept once, and
        given as k alone. On CPUs.
    scale, softcap, alibi, accumulator, backend, threads, timeout, allow_gpu_sharing
        See `RingAttention`. ``"auto"`` computes on CPUs; with ``"cuda"`` the cache is in the memory of GPUs.

    Attributes
    ----------
    kv_heads, dim, dim_v, dtype, batch, capacity, rollback
        As they were given.
    key_bias : int
        Numbers of each key's bias, 0 without.
    values_in_keys : bool

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
    def __init__(self, comm: Any, *, kv_heads: int, dim: int, dim_v: int | None = None, dtype: DTypeLike = DTYPE,
                 batch: int | None = None, capacity: int | None = None, mask: Mask | None = None, rollback: int = 64,
                 key_bias: bool | int | None = None, values_in_keys: bool = False, scale: float | None = None,
                 softcap: float | None = None, alibi: ArrayLike | None = None, accumulator: DTypeLike | None = None,
                 backend: str = "auto", threads: int | None = None, timeout: float = TIMEOUT,
                 allow_gpu_sharing: bool = False) -> None:
        self._core = Core(comm, {"kv_heads": kv_heads, "dim": dim, "dim_v": dim_v, "dtype": dtype, "batch": batch,
                                 "capacity": capacity, "rollback": rollback, "key_bias": key_bias,
                                 "values_in_keys": values_in_keys},
                          {"mask": mask, "scale": scale, "softcap": softcap, "alibi": alibi, "accumulator": accumulator,
                           "backend": backend, "threads": threads, "timeout": timeout,
                           "allow_gpu_sharing": allow_gpu_sharing})
        sizes = self._core.sizes
        self.kv_heads = sizes.kv_heads
        self.dim = sizes.dim
        self.dim_v = sizes.dim_v
        self.dtype = sizes.dtype
        self.batch = sizes.batch
        self.capacity = sizes.capacity
        self.rollback = sizes.rollback
        self.key_bias = sizes.key_bias
        self.values_in_keys = sizes.in_keys
        self._close = weakref.finalize(self, self._core.engine.close)
        self._close.atexit = False

    @property
    def length(self) -> int:
        """Tokens that were appended."""
        return self._core.contents.length

    @property
    def tokens(self) -> int:
        """Tokens that this rank holds."""
        return self._core.contents.store.tokens

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values on this rank, with the room for more."""
        return self._core.contents.store.nbytes

    def append(self, k: ArrayLike, v: ArrayLike | None = None, *, key_bias: ArrayLike | None = None,
               layout: str | Layout = "contiguous", replicated: bool = False) -> None:
        """Append tokens. Collective over *comm*.

        Parameters
        ----------
        k, v : arrays of shape ([batch,] n, kv_heads, dim) and ([batch,] n, kv_heads, dim_v)
            This rank's new tokens, which it keeps; n may differ between ranks. They are copied. No v with
            `values_in_keys`.
        key_bias : array of shape ([batch,] n) or ([batch,] n, heads), float
            Of these, if the cache was made for a bias: the former with ``key_bias=True``, the latter with
            ``key_bias=heads``. -inf leaves a key out.
        layout : str or Layout
            Where the tokens of the ranks lie among the new ones; see `RingAttention`.
        replicated : bool
            The same tokens on all ranks: each keeps its share. Of tokens that differ, the first MiB is compared.

        Raises
        ------
        ShapeError, DtypeError, OptionError, ResourceError
            The same on every rank, and nothing is appended: arrays that do not fit, more tokens than the capacity, no
            memory.
        """
        core = self._core
        with core.comm.one_call():
            check_thread()
            arrays: list[Array] | None = None
            options = core.options
            with core.comm.noting() as failures:
                self._check_open()
                check_spec(layout)
                arrays = core.sizes.check_tokens(k, v, key_bias, core.backend, core.accumulator)
                options |= {"replicated": bool(replicated),
                            "layout": layout.describe() if isinstance(layout, Layout) else layout}
            count = 0 if arrays is None else arrays[0].shape[1]
            if replicated and arrays is not None:
                options |= {"tokens": count, **{f"{name} (checksum)": checksum(x) for name, x in
                                                zip(core.sizes.in_file, arrays, strict=True)}}
            rows = core.comm.exchange("KVCache.append", core.timeout, np.array([count]).view(np.uint8),
                                      failures=failures, options=options)
            counts = np.concatenate(rows).view(np.int64).tolist()
            total = counts[0] if replicated else sum(counts)
            core.contents.check_capacity(total)
            where = None if replicated else resolve(layout, counts, "k and v")
            with Undone(core.contents), core.comm.raise_on_all(core.timeout), core.backend.current():
                if arrays is None:
                    raise InternalError("tokens are missing")
                core.contents.take(arrays, total, where)

    @overload
    def attend(self, q: ArrayLike, k: ArrayLike | None = None, v: ArrayLike | None = None, *,
               key_bias: ArrayLike | None = None, sharded: bool = False, layout: str | Layout = "contiguous",
               sinks: ArrayLike | None = None, relative: Tables | None = None,
               return_lse: Literal[False] = False) -> Array: ...

    @overload
    def attend(self, q: ArrayLike, k: ArrayLike | None = None, v: ArrayLike | None = None, *,
               key_bias: ArrayLike | None = None, sharded: bool = False, layout: str | Layout = "contiguous",
               sinks: ArrayLike | None = None, relative: Tables | None = None,
               return_lse: Literal[True]) -> tuple[Array, Array]: ...

    def attend(self, q: ArrayLike, k: ArrayLike | None = None, v: ArrayLike | None = None, *,
               key_bias: ArrayLike | None = None, sharded: bool = False, layout: str | Layout = "contiguous",
               sinks: ArrayLike | None = None, relative: Tables | None = None, return_lse: bool = False
               ) -> Array | tuple[Array, Array]:
        """Attend to all tokens there are. Collective over *comm*.

        Parameters
        ----------
        q : array of shape ([batch,] n_q, heads, dim), dtype of the cache
            Queries, the same on all ranks. The last is aligned with the last token, as the mask says; `heads` is a
            multiple of `kv_heads`.
        k, v : arrays, optional
            New tokens, the same on all ranks, which are appended first, in the same exchange; see `append`.
        key_bias : array, optional
            Of the new tokens; see `append`.
        sharded : bool
            Each rank has queries of its own: a long prompt, say. Keys or queries travel, whichever are fewer bytes.
        layout : str or Layout
            Where the queries of the ranks lie among all, if they are sharded.
        sinks : array of shape (heads,), optional
            See `RingAttention.__call__`.
        relative : array of shape (heads, 2 reach + 1), float, optional
            A bias by distance, as for `RingAttention.__call__`, the same on all ranks: of these queries, and not kept.
            On CPUs.
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
            The same on every rank, and nothing is appended: arrays that do not fit, or differ in their first MiB,
            queries that would see keys that were dropped.
        RingTimeout, RankLost
            If another rank does not keep up within the timeout, or is gone.
        """
        core = self._core
        if sharded:
            out, lse = attend_prompt(core, self._check_open, q,
                                     any(x is not None for x in (k, v, key_bias)), layout, sinks, relative)
        else:
            with core.comm.one_call():
                check_thread()
                out, lse = map(core.sizes.given, attend_step(core, self._check_open, q, k, v, key_bias,
                                                              sinks, relative))
        return (out, lse) if return_lse else out

    def crop(self, length: int) -> None:
        """Forget the tokens from `length` on. Local; the same on every rank.

        With a mask that has a window, the keys before it are gone, but for `rollback` of them: so many tokens may be
        cropped. Farther, a query that would see what is gone is refused. ``crop(0)`` begins anew.
        """
        self._check_not_closed()
        kept = check_integer("KVCache.crop: length", length, 0)
        if kept:
            self._check_open()
        self._core.contents.crop(kept)

    def reorder(self, elements: ArrayLike) -> None:
        """Let each element of the batch go on from what another one had, as in beam search. Local; the same everywhere.

        A rank on which it fails is as it was: the next call raises an error on all ranks, unless it is repeated there.

        Parameters
        ----------
        elements : integer array of shape (batch,)
            For each element the one whose tokens it takes.
        """
        self._check_open()
        chosen = np.asarray(elements)
        batch = self.batch
        if batch is None:
            raise ShapeError("KVCache.reorder: expected a cache with a batch, got one without; make it with batch=")
        if chosen.shape != (batch,) or chosen.dtype.kind not in "iu":
            raise ShapeError(f"KVCache.reorder: expected integers of shape ({batch},), one for each element of the "
                             f"batch, got {chosen.dtype} of shape {chosen.shape}")
        if chosen.size and not 0 <= chosen.min() <= chosen.max() < batch:
            raise OptionError(f"KVCache.reorder: expected numbers within 0 .. {batch - 1}, got {chosen}")
        with self._core.backend.current():
            self._core.contents.reorder(chosen.astype(np.int64))

    def save(self, path: str | os.PathLike[str], force: bool = False) -> None:
        """Write the cache to an HDF5 file, in the order of the positions. Collective over *comm*.

        Datasets `k` (tokens, [batch,] kv_heads, dim), `v`, `positions`, and `key_bias` if there is one; it is there
        whole or not at all, with digests by which `open` finds damage, and parts that do not belong together.

        Parameters
        ----------
        path : path
            The same on all ranks; rank 0 writes.
        force : bool
            Replace a file of that name.

        Raises
        ------
        OptionError
            If `path` is no path.
        OutputError
            If the file exists and not `force`, or can't be written; the same on every rank.
        """
        with self._core.comm.one_call():
            check_thread()
            save(self._core, self._check_open, path, bool(force))

    @classmethod
    def open(cls, path: str | os.PathLike[str], comm: Any, **options: Any) -> KVCache:
        """Read a cache that was saved, on any number of ranks. Collective over *comm*.

        Parameters
        ----------
        path : path
        comm : MPI.Intracomm
        **options
            As for `KVCache`: the mask too, which is not in the file. kv_heads, dim, dim_v, dtype, batch,
            key_bias and values_in_keys are those of the file; if they are given, and not None, they must be the same.

        Raises
        ------
        ShardError
            If the file is missing, damaged or no cache.
        OptionError
            If it is of other sizes than those given, the mask shows keys that a window has dropped, or ranks open
            different files.
        """
        timeout, _ = check_timeout(options.get("timeout", TIMEOUT))
        private = private_comm(comm, timeout)
        found: dict[str, Any] = {}
        sizes: dict[str, Any] = {}
        with private.one_call():
            with private.noting() as failures:
                found = read_description(as_path(path))
                sizes = check_sizes(path, found, options)
            private.exchange("KVCache.open", timeout, failures=failures, options={"what the file says": found})
        cache = cls(comm, **{**options, **sizes})
        try:
            with private.one_call(), private.raise_on_all(timeout):
                cache._core.fill(as_path(path), found)
        except BaseException:
            cache.close()
            raise
        return cache

    def close(self) -> None:
        """Give memory and this object's share of the buffers back. Local."""
        self._core.contents.store.chunks = []
        self._core.decoder.close()
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
        self._check_not_closed()
        self._core.contents.check_whole()

    def _check_not_closed(self) -> None:
        if not self._close.alive:
            raise RingError("this KVCache is closed; make a new one")
