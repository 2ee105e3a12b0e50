"""Exact attention over a sequence that is sharded over the ranks of a communicator."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal, overload

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from . import device
from .arrays import as_array
from .backends import check_name
from .backends.base import Backend
from .checks import RECORD, check_arrays, check_mask, check_records, check_scale, check_threads, check_timeout
from .engine import HOST, Engine
from .errors import BackendError, OptionError, RingError
from .layout import Layout, check_spec, resolve
from .mask import Interval, Mask
from .mpi import TIMEOUT, private
from .ring import Block, travel
from .score import Score
from .softmax import DTYPES, State, accumulator
from .trace import Trace
from .transport import Transport, check_transport

Array = Any                       # of NumPy, or of CuPy on a GPU
Progress = Callable[[int, int], object]


@dataclass
class Plan:
    """What a call needs to know and have; made once, used while the shapes stay the same."""

    key: bytes
    kv_layout: Layout
    bounds: list[Interval]
    seen: Array
    shapes: list[list[tuple[int, ...]]]
    block_bytes: int
    states: list[State]
    accumulator: np.dtype[Any]
    scale: float
    hops: list[int] = field(default_factory=list)
    _ahead: tuple[int, list[Interval]] = field(default_factory=lambda: (-1, []))

    def columns(self, source: int) -> list[Interval]:
        """Turn each interval of positions into columns of the block of rank `source`."""
        if self._ahead[0] == source:
            return self._ahead[1]
        return [(self.kv_layout.count_below(low, source), self.kv_layout.count_below(high, source))
                for low, high in self.bounds]

    def look_ahead(self, block: Block) -> None:
        """Have the columns of the block after this one ready: a GPU computes now, and would wait for them later."""
        source = (block.source - 1) % len(self.hops)
        if self._ahead[0] != source and self.hops[source] > block.step.step:
            self._ahead = source, self.columns(source)

    @property
    def pairs(self) -> int:
        """Visible query-key pairs of this rank, all batches."""
        return len(self.states) * int(sum((high - low).sum() for low, high in self.bounds))


@dataclass
class Call:
    """What one call works on: arrays with a batch axis where the backend computes, and where they came from."""

    q: Array
    k: Array
    v: Array
    batched: bool
    on_gpu: bool
    plan: Plan
    out: Array = None
    lse: Array = None

    def make_results(self, backend: Backend) -> None:
        """Make room for the results, unless it is there."""
        if self.out is None:
            self.out = backend.empty((*self.q.shape[:3], self.v.shape[3]), self.q.dtype)
            self.lse = backend.empty(self.q.shape[:3], self.plan.accumulator)


class RingAttention:
    """Exact softmax attention on a ring of MPI ranks: plan once, run many times. Collective over *comm*.

    Every rank keeps its queries; the K/V blocks travel round the ring while every rank computes on the block
    it has (Liu, Zaharia & Abbeel 2023, *Ring Attention with Blockwise Transformers*).

    Parameters
    ----------
    comm : MPI.Intracomm
        Any communicator of the caller. The library works on a private one that it caches on it.
    mask : Mask, optional
        Which keys a query sees; all by default.
    layout, kv_layout : str or Layout
        How the shards of q (and of the result), and of k and v, are laid out: ``"contiguous"`` (in the order of
        the ranks, any counts), ``"striped"``, ``"zigzag"`` or a `Custom`. `kv_layout` is `layout` by default.
    scale : float, optional
        Factor of the scores; ``1/sqrt(dim)`` by default.
    backend : {"auto", "numba", "numpy", "cuda"}
        Where to compute; ``"auto"`` follows the arrays: on the GPU that they are on, else with Numba, else with NumPy.
        With ``"cuda"`` host arrays are copied to the GPU of this rank's place on its node, and results back.
    threads : int, optional
        CPU threads of this rank; by default its fair share of the node's cores. May differ between ranks.
    timeout : float
        Seconds after which waiting for another rank is an error.
    accumulator : dtype, optional
        float32 by default (float64 for float64 input); ``"float64"`` on request.
    gpu_transport : {"auto", "direct", "staged"}
        How K and V get from GPU to GPU: MPI is given GPU memory, or they go through page-locked host memory. ``"auto"``
        is what the variable RINGMPI_GPU_TRANSPORT says, else direct if the MPI library proves that it can.
    allow_gpu_sharing : bool
        Let ranks share a GPU; by default that is an error, as it mostly is a mistake.

    Attributes
    ----------
    trace : Trace
        What the last call cost on this rank.

    Raises
    ------
    RingError
        One of its children, the same on every rank, before any block is sent.

    Examples
    --------
    ``mpiexec -n 4 python example.py``::

        import numpy as np, ringmpi
        from mpi4py import MPI
        q, k, v = (np.random.default_rng(r).standard_normal((1000, 8, 64), "f4") for r in range(3))
        with ringmpi.RingAttention(MPI.COMM_WORLD, mask=ringmpi.Mask(causal=True)) as attention:
            out = attention(q, k, v)         # this rank's 1000 of 4000 tokens
    """

    def __init__(self, comm: Any, *, mask: Mask | None = None, layout: str | Layout = "contiguous",
                 kv_layout: str | Layout | None = None, scale: float | None = None, backend: str = "auto",
                 threads: int | None = None, timeout: float = TIMEOUT, accumulator: DTypeLike | None = None,
                 gpu_transport: str = "auto", allow_gpu_sharing: bool = False) -> None:
        self.timeout, wrong = check_timeout(timeout)
        self._comm = private(comm, self.timeout)
        with self._comm.together(self.timeout):
            if wrong:
                raise OptionError(wrong)
            self.mask = check_mask(mask)
            self.layout, self.kv_layout = layout, layout if kv_layout is None else kv_layout
            check_spec(self.layout)
            check_spec(self.kv_layout)
            self.scale = check_scale(scale)
            self.accumulator = accumulator
            check_name(backend)
            check_transport(gpu_transport)
            threads = check_threads(threads) or self._comm.threads
        options = {"backend": backend, "gpu_transport": gpu_transport, "allow_gpu_sharing": bool(allow_gpu_sharing)}
        self._comm.agree_on({**self._options(), **options}, self.timeout)
        self._engine = Engine(self._comm, self.timeout, backend, threads or 1, gpu_transport, bool(allow_gpu_sharing))
        self._plan: Plan | None = None
        self._closed = False
        self.trace = Trace()

    @property
    def backend(self) -> Backend:
        """What computes; with ``backend="auto"`` another one after a call whose arrays are elsewhere."""
        return self._engine.backend

    @property
    def gpus(self) -> list[str]:
        """UUID of the GPU of each rank; empty on CPUs."""
        return self._engine.gpus

    @property
    def transport(self) -> Transport | None:
        """How K and V get from GPU to GPU, and why; None on CPUs."""
        return self._engine.transport

    def _options(self) -> dict[str, Any]:
        layouts = {"layout": self.layout, "kv_layout": self.kv_layout}
        return {**self.mask.describe(), "scale": self.scale, "accumulator": self.accumulator,
                **{name: x if isinstance(x, str) else x.describe() for name, x in layouts.items()}}

    @overload
    def __call__(self, q: ArrayLike, k: ArrayLike, v: ArrayLike, *, return_lse: Literal[False] = False,
                 progress: Progress | None = None) -> Array: ...

    @overload
    def __call__(self, q: ArrayLike, k: ArrayLike, v: ArrayLike, *, return_lse: Literal[True],
                 progress: Progress | None = None) -> tuple[Array, Array]: ...

    def __call__(self, q: ArrayLike, k: ArrayLike, v: ArrayLike, *, return_lse: bool = False,
                 progress: Progress | None = None) -> Array | tuple[Array, Array]:
        """Attend: this rank's shards in, this rank's shard of the result out. Collective over *comm*.

        Parameters
        ----------
        q : array of shape ([batch,] n_q, heads, dim), float64, float32, bfloat16 or float16
            This rank's queries; n_q may differ between ranks and may be 0. q, k and v are all on the host, or all on
            one GPU: of NumPy, CuPy, torch, JAX, or anything with the buffer protocol, DLPack or
            ``__cuda_array_interface__``.
        k : array of shape ([batch,] n_k, kv_heads, dim), dtype of `q`
            This rank's keys; `heads` is a multiple of `kv_heads`.
        v : array of shape ([batch,] n_k, kv_heads, dim_v), dtype of `q`
            This rank's values.
        return_lse : bool
            Return the log-sum-exp of the scores too.
        progress : callable, optional
            Called on this rank with the visible pairs done since the last time, and with all there are.

        Returns
        -------
        out : array of shape ([batch,] n_q, heads, dim_v), dtype of `q`
            A query that sees no key has 0. NumPy for host arrays; for GPU arrays CuPy on the same GPU, complete when
            the call returns.
        lse : array of shape ([batch,] n_q, heads), accumulator dtype
            With `return_lse`. A query that sees no key has -inf.

        Raises
        ------
        ShapeError, DtypeError, MaskError, BackendError
            The same on every rank, before any block is sent.
        RingTimeout, RankLost
            If another rank does not keep up within the timeout, or is gone. The communicator is lost then: further
            calls on it raise `CommError`.
        """
        if self._closed:
            raise RingError("this RingAttention is closed; make a new one")
        trace = self.trace = Trace()
        start = time.perf_counter()
        call = self._agree(q, k, v)
        trace.agree_seconds = time.perf_counter() - start - trace.compile_seconds
        trace.flop_per_pair = 2 * call.q.shape[2] * (call.q.shape[3] + call.v.shape[3])
        with self.backend.current():
            self._run(call, progress)
            with self._agreed_on_gpu(), self.backend.current():
                out, lse = self._finish(call)
        if not call.batched:
            out, lse = out[0], lse[0]
        return (out, lse) if return_lse else out

    def _run(self, call: Call, progress: Progress | None) -> None:
        """Fold every block that comes by."""
        plan, backend = call.plan, self.backend
        try:
            call.make_results(backend)
            for state in plan.states:
                backend.reset(state)
            for block in self._engine.ring.circulate((call.k, call.v), plan.shapes, plan.hops,
                                                     self.trace):
                start = time.perf_counter()
                block.step.pairs = self._fold(plan, call.q, block, progress)
                block.step.compute_seconds = time.perf_counter() - start
        except BaseException as error:
            self._engine.ring.abandon(error)
            raise

    def _finish(self, call: Call) -> tuple[Array, Array]:
        """Normalise, and bring the results to where the arrays came from."""
        for state, out, lse in zip(call.plan.states, call.out, call.lse, strict=True):
            self.backend.finish(state, call.plan.seen, out, lse)
        self.backend.complete()
        if call.on_gpu:
            return call.out, call.lse
        return self.backend.fetch(call.out), self.backend.fetch(call.lse)

    def _agreed_on_gpu(self) -> AbstractContextManager[None]:
        """Let all ranks fail if one does: a GPU's memory runs out sooner than the host's, and its errors come late."""
        return self._comm.together(self.timeout) if self.backend.device else nullcontext()

    def _fold(self, plan: Plan, q: Array, block: Block, progress: Progress | None) -> int:
        """Fold a block into the states; return the visible pairs."""
        k, v = block.arrays
        total = 0
        for begin, end in plan.columns(block.source):
            for state, q_, k_, v_ in zip(plan.states, q, k, v, strict=True):
                for pairs in self.backend.accumulate(state, q_, k_, v_, begin, end, Score(plan.scale)):
                    plan.look_ahead(block)
                    self._engine.ring.progress()
                    total += pairs
                    if progress and pairs:
                        progress(pairs, plan.pairs)
        return total

    def _agree(self, q: Any, k: Any, v: Any) -> Call:
        """Check the shards here, then everywhere; plan unless the last call's plan fits."""
        error: Exception | None = None
        record = np.zeros(len(RECORD) + 3, np.int64)
        batched, place = False, HOST
        try:
            q, k, v = (as_array(x, name) for x, name in ((q, "q"), (k, "k"), (v, "v")))
            batched, place = check_arrays(q, k, v), _place(q, k, v)
            q, k, v = (x if batched else x[None] for x in (q, k, v))
            record[1:] = (batched, len(q), q.shape[2], k.shape[2], q.shape[3], v.shape[3],
                          list(DTYPES.values()).index(q.dtype), place != HOST, q.shape[1], k.shape[1], place)
            accumulator(q.dtype, self.accumulator)
            if place == HOST:                 # a copy may fail
                q, k, v = (np.ascontiguousarray(x) for x in (q, k, v))
        except Exception as failure:      # noqa: BLE001 (the other ranks must hear of it)
            error = failure
        except BaseException as failure:  # an interrupt
            self._comm.fail(failure, [])
            raise
        record[0] = error is not None
        records = self._comm.share(record, self.timeout)
        if records[:, 0].any():
            self._comm.raise_agreed(error, self.timeout)
        if self._plan is None or self._plan.key != records.tobytes():
            self._plan = None             # the old plan's memory goes before the new one's comes
            self._plan = self._make_plan(records, q, v)
        call = Call(q, k, v, batched, place != HOST, self._plan)
        if self.backend.device:
            with self._agreed_on_gpu(), self.backend.current():
                call.q, call.k, call.v = (self.backend.place(x) for x in (q, k, v))
                call.make_results(self.backend)
        return call

    def _make_plan(self, records: NDArray[np.int64], q: Array, v: Array) -> Plan:
        """Plan for these shards, and compile for them. Collective over *comm*."""
        check_records(records)
        self._engine.follow(records[:, -1])
        layouts = self._resolve(records)
        kind = accumulator(q.dtype, self.accumulator)
        self.trace.compile_seconds = self._engine.prepare(q.dtype, kind, q.shape[3], v.shape[3])
        with self._comm.together(self.timeout), self.backend.current():
            plan = self._new_plan(records, *layouts, q.dtype)
            self._engine.ring.reserve(plan.block_bytes)
        plan.hops = self._agree_hops(plan)
        return plan

    def _resolve(self, records: NDArray[np.int64]) -> tuple[Layout, Layout]:
        q_layout = resolve(self.layout, records[:, -3].tolist(), "q")
        kv_layout = resolve(self.kv_layout, records[:, -2].tolist(), "k and v")
        self.mask.check(kv_layout.length)
        kind = accumulator(list(DTYPES.values())[records[0, 7]], self.accumulator)
        if self.scale is not None and abs(self.scale) > float(np.finfo(kind).max):
            raise OptionError(f"scale: {self.scale} is not finite in the accumulator's dtype, {kind}")
        return q_layout, kv_layout

    def _new_plan(self, records: NDArray[np.int64], q_layout: Layout, kv_layout: Layout,
                  dtype: np.dtype[Any]) -> Plan:
        batch, heads, kv_heads, dim, dim_v = (int(x) for x in records[0, 2:7])
        positions = q_layout.positions(self._comm.rank)
        bounds = self.mask.bounds(positions, q_layout.length, kv_layout.length)
        seen = np.zeros(len(positions), bool)
        for low, high in bounds:
            seen |= high > low
        kind = accumulator(dtype, self.accumulator)
        return Plan(
            records.tobytes(), kv_layout, bounds, self.backend.place(seen),
            [[(batch, n, kv_heads, dim), (batch, n, kv_heads, dim_v)] for n in kv_layout.counts],
            max(kv_layout.counts) * batch * kv_heads * (dim + dim_v) * dtype.itemsize,
            [self.backend.new_state(len(positions), heads, dim_v, kind) for _ in range(batch)], kind,
            1 / math.sqrt(dim) if self.scale is None else self.scale)

    def _agree_hops(self, plan: Plan) -> list[int]:
        """Agree on how far each block must travel: no farther than somebody needs it."""
        needed = np.array([any((end > begin).any() for begin, end in plan.columns(source))
                           for source in range(self._comm.size)])
        bits = self._comm.share(np.packbits(needed), self.timeout)
        return travel(np.unpackbits(bits, axis=1, count=self._comm.size).astype(bool))

    def close(self) -> None:
        """Give buffers and threads back; the caller's communicator is left as it is. Local."""
        if not self._closed:
            self._closed = True
            self._plan = None
            self._engine.close()

    def __enter__(self) -> RingAttention:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        self.close()


def _place(q: Array, k: Array, v: Array) -> int:
    """Index of the GPU that the arrays are on; HOST for host arrays."""
    places = [HOST if isinstance(x, np.ndarray) else device.index_of(x) for x in (q, k, v)]
    if len(set(places)) > 1:
        named = ", ".join(f"{name} on {'the host' if place == HOST else f'GPU {place}'}"
                          for name, place in zip("qkv", places, strict=True))
        raise BackendError(f"q, k and v: expected all on the host or all on one GPU, got {named}; copy them")
    return places[0]


@overload
def ring_attention(q: ArrayLike, k: ArrayLike, v: ArrayLike, *, comm: Any, return_lse: Literal[False] = False,
                   **options: Any) -> Array: ...


@overload
def ring_attention(q: ArrayLike, k: ArrayLike, v: ArrayLike, *, comm: Any, return_lse: Literal[True],
                   **options: Any) -> tuple[Array, Array]: ...


def ring_attention(q: ArrayLike, k: ArrayLike, v: ArrayLike, *, comm: Any, return_lse: bool = False,
                   **options: Any) -> Array | tuple[Array, Array]:
    """Attend once; for many calls make a `RingAttention`. Collective over *comm*.

    Parameters
    ----------
    q, k, v : arrays
        This rank's shards, of shapes ([batch,] n_q, heads, dim), ([batch,] n_k, kv_heads, dim) and
        ([batch,] n_k, kv_heads, dim_v); see `RingAttention.__call__`.
    comm : MPI.Intracomm
    return_lse : bool
        Return the log-sum-exp of the scores too.
    **options
        `mask`, `layout`, `kv_layout`, `scale`, `backend`, `threads`, `timeout`, `accumulator`, `gpu_transport`,
        `allow_gpu_sharing`: see `RingAttention`.

    Returns
    -------
    out : array of shape ([batch,] n_q, heads, dim_v), dtype of `q`
    lse : array of shape ([batch,] n_q, heads), accumulator dtype
        With `return_lse`.

    Raises
    ------
    RingError
        One of its children, the same on every rank.
    """
    with RingAttention(comm, **options) as attention:
        if return_lse:
            return attention(q, k, v, return_lse=True)
        return attention(q, k, v)
