"""Exact attention over a sequence that is sharded over the ranks of a communicator."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal, NoReturn, overload

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from . import device
from .arrays import as_array
from .backends import check_name
from .backends.base import Backend
from .backends.products import wish
from .checks import (
    CALL,
    RECORD,
    check_arrays,
    check_like,
    check_records,
    check_seed,
    check_sinks,
    check_threads,
    check_timeout,
    column,
    warn_of_order,
)
from .dtypes import DTYPES, accumulator
from .engine import NO_FACTS, ON_HOST, Engine
from .errors import BackendError, InternalError, OptionError, RingError
from .keywords import explained
from .layout import Integers, Layout
from .mask import Mask
from .mpi.comm import TIMEOUT, digest_of, private_comm
from .mpi.threads import check_thread
from .plan import Plan, Problem
from .schedules.gpu_transport import Transport, check_transport
from .schedules.gradient_ring import first_hops
from .schedules.ring import Block, travel
from .score import Score, dropout_keys
from .softmax import Gradient, State
from .trace import Trace

Array = Any                       # of NumPy, or of CuPy on a GPU
Progress = Callable[[int, int], object]


Work = Callable[[int, Block, Integers, Integers, Score], Iterator[int]]


@dataclass
class Call:
    """What one call works on: arrays with a batch axis where the backend computes, and where they came from."""

    record: NDArray[np.int64]
    q: Array
    k: Array
    v: Array
    batched: bool
    on_gpu: bool
    dropout_keys: NDArray[np.uint32]
    sinks: NDArray[Any] | None
    out: Array = None
    lse: Array = None
    number: int = 0               # of the calls on the communicator, from 1 on, once all ranks have made it
    states: list[State] = field(default_factory=list)
    plan: Plan = field(init=False)

    def given(self, x: Array) -> Array:
        """View an array as the caller's are: with the batch axis, or without."""
        return x if self.batched else x[0]

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
    softcap : float, optional
        Scaled scores x become ``softcap tanh(x / softcap)``, as in Gemma 2.
    alibi : array of shape (heads,), optional
        Slopes: ``alibi[h] |i - j|`` is subtracted from the score of query position i and key position j of head h,
        after `softcap` (Press, Smith & Lewis 2022, *Train Short, Test Long*). Positions are global, so it is right in
        any layout; queries are aligned with the keys as the mask aligns them.
    dropout : float
        Probability with which a weight is left out, ``0 <= dropout < 1``; the others are divided by ``1 - dropout``.
        Which are is a matter of the seed of the call, the head (and element of the batch) and the two positions alone:
        the same on any number of ranks, in any layout, with any backend.
    backend : {"auto", "numba", "numpy", "cuda"}
        Where to compute; ``"auto"`` follows the arrays: on the GPU that they are on, else with Numba, else with NumPy.
        With ``"cuda"`` host arrays are copied to the GPU of this rank's place on its node, and results back.
    threads : int, optional
        CPU threads of this rank; by default its fair share of the node's cores. May differ between ranks. Last bits go
        by their number in the backward pass, and in the forward pass where a rank's queries times the heads that share
        a key head are few, 192 at most, or NumPy computes.
    timeout : float
        Seconds after which waiting for another rank is an error.
    accumulator : dtype, optional
        float32 by default (float64 for float64 input); ``"float64"`` on request.
    gpu_transport : {"auto", "direct", "staged"}
        How K and V get from GPU to GPU: MPI is given GPU memory, or they go through page-locked host memory. ``"auto"``
        is what the variable RINGMPI_GPU_TRANSPORT says, else direct if the MPI library proves that it can.
    allow_gpu_sharing : bool
        Let ranks share a GPU; by default that is an error, as it mostly is a mistake.
    bfloat16_products : {"auto", "widen", "pairs"}
        How CPUs multiply bfloat16 in the forward pass: widened to float32, or in pairs as they are (AVX512_BF16), which
        rounds the weights too. ``"auto"`` is what the variable RINGMPI_BFLOAT16_PRODUCTS says, else widened.
        ``attention.backend.products`` says what was agreed.

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

    @explained()
    def __init__(self, comm: Any, *, mask: Mask | None = None, layout: str | Layout = "contiguous",
                 kv_layout: str | Layout | None = None, scale: float | None = None, softcap: float | None = None,
                 alibi: ArrayLike | None = None, dropout: float = 0.0, backend: str = "auto",
                 threads: int | None = None, timeout: float = TIMEOUT, accumulator: DTypeLike | None = None,
                 gpu_transport: str = "auto", allow_gpu_sharing: bool = False,
                 bfloat16_products: str = "auto") -> None:
        check_thread()
        self.timeout, wrong = check_timeout(timeout)
        self._comm = private_comm(comm, self.timeout)
        self._options: dict[str, Any] = {}
        engine: Engine | None = None
        with self._comm.noting() as failures:
            if wrong:
                raise OptionError(wrong)
            self._problem = Problem.check(mask, layout, kv_layout, scale, softcap, alibi, dropout, accumulator)
            check_name(backend)
            check_transport(gpu_transport)
            bfloat16_products = wish(bfloat16_products)
            self._options = {**self._problem.describe(), "backend": backend, "gpu_transport": gpu_transport,
                             "allow_gpu_sharing": bool(allow_gpu_sharing), "bfloat16_products": bfloat16_products}
            engine = Engine(self._comm, self.timeout, backend, check_threads(threads) or self._comm.threads,
                            gpu_transport, bool(allow_gpu_sharing), bfloat16_products)
        self._engine = self._connect(engine, failures)
        # What each call brings along, so that none is taken for another's.
        self._options["RingAttention (by the order in which they were made)"] = self._comm.next_object()
        self._digest = digest_of(self._options)
        self._plan: Plan | None = None
        self._number = 0                  # of the last forward call
        self._last: Call | None = None
        self._close = weakref.finalize(self, self._engine.close)        # an object that is dropped shares no more
        self._close.atexit = False
        self.trace = Trace()

    def _connect(self, engine: Engine | None, failures: list[Exception]) -> Engine:
        """Agree on the options, and what computes. Collective over *comm*."""
        facts = NO_FACTS if engine is None else engine.facts()
        try:
            rows = self._comm.exchange("RingAttention", self.timeout, facts, error=failures[0] if failures else None,
                                       options=self._options)
            if engine is None:
                raise InternalError("a RingAttention without an engine")
            engine.connect(rows)
        except BaseException:
            if engine is not None:
                engine.close()
            raise
        return engine

    @property
    def layout(self) -> str | Layout:
        """How the shards of q and of the result are laid out."""
        return self._problem.layout

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

    @overload
    def __call__(self, q: ArrayLike, k: ArrayLike, v: ArrayLike, *, sinks: ArrayLike | None = None, seed: int = 0,
                 return_lse: Literal[False] = False, keep: bool = True, progress: Progress | None = None) -> Array: ...

    @overload
    def __call__(self, q: ArrayLike, k: ArrayLike, v: ArrayLike, *, sinks: ArrayLike | None = None, seed: int = 0,
                 return_lse: Literal[True], keep: bool = True,
                 progress: Progress | None = None) -> tuple[Array, Array]: ...

    @explained()
    def __call__(self, q: ArrayLike, k: ArrayLike, v: ArrayLike, *, sinks: ArrayLike | None = None, seed: int = 0,
                 return_lse: bool = False, keep: bool = True,
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
            This rank's values. Weights times values are summed before they are divided, so the largest value times the
            keys that a query sees (over ``1 - dropout``) must be within the accumulator's dtype, 3.4e38 in float32;
            beyond it a result may be infinite or NaN, never a wrong number. ``accumulator="float64"`` has the room.
        sinks : array of shape (heads,), optional
            A score of each head, finite and on the host, that joins the softmax of every query, with no value (learned
            attention sinks). A query that sees no key has out 0 and lse ``sinks[head]`` then.
        seed : int
            Of dropout, ``0 <= seed < 2**64``; take another one at every call that shall drop other weights.
        return_lse : bool
            Return the log-sum-exp of the scores too.
        keep : bool
            Keep hold of q, k, v and the results until the next call, for `backward`; without, their memory is free as
            soon as the caller lets go of it.
        progress : callable, optional
            Called on this rank with the visible pairs done since the last time, and with all there are.

        Returns
        -------
        out : array of shape ([batch,] n_q, heads, dim_v), dtype of `q`
            A query that sees no key has 0. NumPy for host arrays; for GPU arrays CuPy on the same GPU, complete when
            the call returns.
        lse : array of shape ([batch,] n_q, heads), accumulator dtype
            With `return_lse`. A query that sees no key has -inf. The sink counts.

        Raises
        ------
        ShapeError, DtypeError, MaskError, OptionError, BackendError
            The same on every rank, before any block is sent.
        RingTimeout, RankLost
            If another rank does not keep up within the timeout, or is gone. The communicator is lost then: further
            calls on it raise `CommError`.
        """
        with self._comm.one_call():
            return self._call(q, k, v, sinks, seed, return_lse, keep, progress)

    def _call(self, q: Any, k: Any, v: Any, sinks: Any, seed: int, return_lse: bool, keep: bool,
              progress: Progress | None) -> Array | tuple[Array, Array]:
        self._last = None                 # what the last call worked on goes before this call's memory comes
        call = self._take(q, k, v, sinks, seed)
        self._get_ready(call, "forward")
        self.trace.agree_seconds = self.trace.now() - self.trace.compile_seconds
        self.trace.flop_per_pair = 2 * call.plan.dims[0] * sum(call.plan.dims[1:])
        with self.backend.current():
            self._forward(call, progress)
            with self._agreed_on_gpu(), self.backend.current():
                out, lse = self._finish(call)
        self._last = call if keep else None
        return (call.given(out), call.given(lse)) if return_lse else call.given(out)

    def backward(self, dout: ArrayLike, dlse: ArrayLike | None = None, *,
                 progress: Progress | None = None) -> tuple[Array, ...]:
        """Give the gradients of the last call's inputs. Collective over *comm*.

        What went into the last call and came out of it, lse too, must be as it was: it is not copied. `backward_of`
        makes the object forget the last call.

        Parameters
        ----------
        dout : array of the shape and dtype of the last call's `out`
            Gradient of `out`, where `out` is.
        dlse : array of the shape of the last call's `lse`, optional
            Gradient of `lse`, for callers that use it, to merge results say.
        progress : callable, optional
            See `__call__`.

        Returns
        -------
        dq, dk, dv : arrays of the shapes and dtype of q, k and v
            Of this rank's shards, with what all ranks make of its k and v. A query that sees no key, and a key that no
            query sees, has exactly 0.
        dsinks : array of shape (heads,), accumulator dtype
            If the call had sinks: this rank's queries' share, to be summed over the ranks as the gradient of every
            parameter that all of them have.

        Raises
        ------
        RingError
            If there was no call, or it failed.
        ShapeError, DtypeError, BackendError
            If `dout` or `dlse` do not go with it; the same on every rank.
        RingTimeout, RankLost
            See `__call__`.
        """
        with self._comm.one_call():
            return self._backward_of_last(dout, dlse, progress)

    def _backward_of_last(self, dout: Any, dlse: Any, progress: Progress | None) -> tuple[Array, ...]:
        self._start()
        call = self._last
        with self._comm.noting() as failures:
            self._check_open()
            dout, dlse = self._check_cotangents(call, dout, dlse)
        if call is not None:
            call.record[0] = call.number
        call, _ = self._agree(call, failures, "backward")
        return self._differentiate(call, dout, dlse, progress)

    def backward_of(self, dout: ArrayLike, q: ArrayLike, k: ArrayLike, v: ArrayLike, out: ArrayLike, lse: ArrayLike, *,
                    dlse: ArrayLike | None = None, sinks: ArrayLike | None = None, seed: int = 0,
                    progress: Progress | None = None) -> tuple[Array, ...]:
        """Give the gradients of any call with these options, by what went in and came out. Collective over *comm*.

        Parameters
        ----------
        dout
            See `backward`.
        q, k, v, sinks, seed
            As they were given to the call.
        out, lse
            As it returned them.
        dlse, progress
            See `backward`.

        Returns
        -------
        dq, dk, dv[, dsinks]
            See `backward`.

        Raises
        ------
        RingError
            See `backward` and `__call__`.
        """
        return self._backward_of(0, dout, q, k, v, out, lse, dlse, sinks, seed, progress)

    def _backward_of(self, number: int, dout: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, dlse: Any, sinks: Any,
                     seed: Any, progress: Progress | None = None) -> tuple[Array, ...]:
        """Differentiate the call of a number, by which ranks see that they mean the same one; 0 if it is not known."""
        with self._comm.one_call():
            self._last = None
            call = self._take(q, k, v, sinks, seed, out, lse, number)
            with self._comm.raise_on_all(self.timeout):
                dout, dlse = self._check_cotangents(call, dout, dlse)
            return self._differentiate(call, dout, dlse, progress)

    def _check_open(self) -> None:
        if not self._close.alive:
            raise RingError("this RingAttention is closed; make a new one")

    def _start(self) -> None:
        """Begin a call."""
        check_thread()
        self.trace = Trace()

    def _forward(self, call: Call, progress: Progress | None) -> None:
        """Fold every block that comes by."""
        plan, backend, engine = call.plan, self.backend, self._engine
        ring = engine.ring                # kept: a callback may close this object, and the others must hear of it

        def fold(number: int, block: Block, begin: Integers, end: Integers, score: Score) -> Iterator[int]:
            k, v = (x[number] for x in block.arrays)
            return backend.accumulate(call.states[number], call.q[number], k, v, begin, end, score)

        try:
            call.make_results(backend)
            call.states = engine.states(plan.batch, len(plan.bounds[0][0]), plan.dims[0], plan.dims[2],
                                        plan.accumulator)
            for state in call.states:
                backend.reset(state, call.sinks)
            for block in ring.circulate((call.k, call.v), plan.shapes, plan.hops, self.trace):
                self._compute(call, block, fold, progress)
        except BaseException as error:
            ring.abandon(error)
            raise

    def _finish(self, call: Call) -> tuple[Array, Array]:
        """Normalise, and bring the results to where the arrays came from."""
        for state, out, lse in zip(call.states, call.out, call.lse, strict=True):
            self.backend.finish(state, call.plan.seen, out, lse)
        call.states = []                  # the next call's, of whichever object
        self.backend.synchronize()
        return self._bring(call, call.out), self._bring(call, call.lse)

    def _differentiate(self, call: Call, dout: Array, dlse: Array | None,
                       progress: Progress | None) -> tuple[Array, ...]:
        """Do the backward pass of a call."""
        plan, kind = call.plan, call.plan.accumulator
        self._get_ready(call, "backward")
        self.trace.agree_seconds = self.trace.now() - self.trace.compile_seconds
        self.trace.flop_per_pair = plan.dims[0] * (6 * plan.dims[1] + 4 * plan.dims[2])
        backend = self.backend
        with self._comm.raise_on_all(self.timeout), backend.current():
            dout, dlse = backend.to_device(dout), None if dlse is None else backend.to_device(dlse)
            dq, dk, dv = (backend.empty(x.shape, kind) for x in (call.q, call.k, call.v))
            gradients = [backend.new_gradient(dout[i], call.out[i], call.lse[i], dlse if dlse is None else dlse[i],
                                              dq[i]) for i in range(plan.batch)]
            for x in (dk, dv):
                backend.clear(x)
        with backend.current():
            self._backward(call, gradients, (dk, dv), progress)
        with self._agreed_on_gpu(), backend.current():
            results = [call.given(self._bring(call, backend.astype(x, call.q.dtype))) for x in (dq, dk, dv)]
            if call.sinks is not None:
                results.append(self._gradient_of_sinks(call.sinks, gradients))
            backend.synchronize()
        return tuple(results)

    def _backward(self, call: Call, gradients: list[Gradient], shares: tuple[Array, ...],
                  progress: Progress | None) -> None:
        """Differentiate with every block that comes by, and bring the gradients of k and v home."""
        plan, backend, engine = call.plan, self.backend, self._engine
        ring = engine.ring                # kept: a callback may close this object, and the others must hear of it

        def differentiate(number: int, block: Block, begin: Integers, end: Integers, score: Score) -> Iterator[int]:
            k, v, dk, dv = (x[number] for x in (*block.arrays, *block.gradients))
            return backend.backward(gradients[number], call.q[number], k, v, dk, dv, begin, end, score)

        try:
            engine.homeward.take(shares, plan.shapes, plan.hops, plan.firsts)
            for block in ring.circulate((call.k, call.v), plan.shapes, plan.hops, self.trace, engine.homeward):
                self._compute(call, block, differentiate, progress)
        except BaseException as error:
            ring.abandon(error)
            raise

    def _compute(self, call: Call, block: Block, work: Work, progress: Progress | None) -> None:
        """Do all work on a block, of every interval and element of the batch, and let messages move meanwhile."""
        plan, start = call.plan, time.perf_counter()
        score = plan.score_of(block.source)
        for begin, end in plan.columns(block.source):
            for number in range(plan.batch):
                for pairs in work(number, block, begin, end, score.of_dropout_keys(call.dropout_keys[number])):
                    plan.look_ahead(block)
                    self._engine.ring.progress()
                    block.step.pairs += pairs
                    if progress and pairs:
                        progress(pairs, plan.pairs)
        block.step.compute_seconds = time.perf_counter() - start

    def _gradient_of_sinks(self, sinks: NDArray[Any], gradients: list[Gradient]) -> NDArray[Any]:
        """Give ``-sum(exp(sink - lse) delta)`` over this rank's queries."""
        total = np.zeros(len(sinks))
        for gradient in gradients:
            lse, delta = (self.backend.to_numpy(x).astype(np.float64) for x in (gradient.lse, gradient.delta))
            with np.errstate(all="ignore"):
                total -= (np.exp(sinks - lse) * delta).sum(axis=0)
        return total.astype(sinks.dtype)

    def _bring(self, call: Call, x: Array) -> Array:
        """Bring a result to where the arrays came from."""
        return x if call.on_gpu else self.backend.to_numpy(x)

    def _agreed_on_gpu(self) -> AbstractContextManager[None]:
        """Let all ranks fail if one does: a GPU's memory runs out sooner than the host's, and its errors come late."""
        return self._comm.raise_on_all(self.timeout) if self.backend.device else nullcontext()

    def _check_cotangents(self, call: Call | None, dout: Any, dlse: Any) -> tuple[Array, Array | None]:
        """Check what the backward pass starts from, here; give it with a batch axis."""
        if call is None:
            raise RingError("backward: expected a call before it on this object, and there is none, it failed, or did "
                            "not keep its arrays, or backward_of came after it; call the object first, or use "
                            "backward_of or ring_attention_backward")
        given = {"dout": (as_array(dout, "dout"), call.out)}
        if dlse is not None:
            given["dlse"] = as_array(dlse, "dlse"), call.lse
        for name, (x, like) in given.items():
            check_like(name, x, call.given(like).shape, like.dtype)
            if isinstance(x, np.ndarray) == call.on_gpu:
                raise BackendError(f"{name}: expected it where the call's arrays are, on "
                                   f"{'a GPU' if call.on_gpu else 'the host'}; copy it")
        arrays = [x if call.batched else x[None] for x, _ in given.values()]
        if not call.on_gpu:
            arrays = [np.ascontiguousarray(x) for x in arrays]
        return arrays[0], arrays[1] if len(arrays) > 1 else None

    def _take(self, q: Any, k: Any, v: Any, sinks: Any, seed: Any, out: Any = None, lse: Any = None,
              number: int = 0) -> Call:
        """Check the shards here, then everywhere; plan unless the last call's plan fits. Collective over *comm*."""
        self._start()
        call: Call | None = None
        with self._comm.noting() as failures:
            self._check_open()
            call = self._check_call(q, k, v, sinks, seed, out, lse)
            call.record[0] = number
        call, records = self._agree(call, failures, "forward" if out is None else "backward")
        key = records[:, len(CALL):].tobytes()
        if self._plan is None or self._plan.key != key:
            self._plan = None             # the old plan's memory goes before the new one's comes
            self._plan = self._make_plan(key, records)
        call.plan = self._plan
        if self.backend.device:
            with self._agreed_on_gpu(), self.backend.current():
                call.q, call.k, call.v = (self.backend.to_device(x) for x in (call.q, call.k, call.v))
                if out is None:
                    call.make_results(self.backend)
                else:
                    call.out, call.lse = self.backend.to_device(call.out), self.backend.to_device(call.lse)
        return call

    def _check_call(self, q: Any, k: Any, v: Any, sinks: Any, seed: Any, out: Any, lse: Any) -> Call:
        """Check what a call is given, on this rank."""
        named = {"q": q, "k": k, "v": v} | ({} if out is None else {"out": out, "lse": lse})
        arrays = [as_array(x, name) for name, x in named.items()]
        q, k, v = arrays[:3]
        batched, place = check_arrays(q, k, v), _place(dict(zip(named, arrays, strict=True)))
        kind = accumulator(q.dtype, self._problem.accumulator)
        if out is not None:
            check_like("out", arrays[3], (*q.shape[:-1], v.shape[-1]), q.dtype)
            check_like("lse", arrays[4], q.shape[:-1], kind)
        sinks = check_sinks(sinks, q.shape[-2], kind)
        arrays = [x if batched else x[None] for x in arrays]
        if place == ON_HOST:
            arrays = [np.ascontiguousarray(x) for x in arrays]
        (batch, n_q, heads, dim), (n_k, kv_heads, dim_v) = arrays[0].shape, arrays[2].shape[1:]
        keys = np.empty((batch, 0), np.uint32)
        if self._problem.dropout:
            seed = check_seed(seed)
            keys = dropout_keys(seed, batch, heads)
        else:
            seed = 0
        record = np.array([0, seed - 2**64 * (seed >= 2**63), batched, batch, heads, kv_heads, dim, dim_v,
                           list(DTYPES.values()).index(q.dtype), place != ON_HOST, sinks is not None, n_q, n_k, place],
                          np.int64)
        call = Call(record, arrays[0], arrays[1], arrays[2], batched, place != ON_HOST, keys, sinks)
        if out is not None:
            call.out, call.lse = arrays[3:]
        return call

    def _agree(self, call: Call | None, failures: list[Exception], way: str) -> tuple[Call, NDArray[np.int64]]:
        """Raise on all ranks what failed on any, or if their calls do not go together; give the records of all."""
        record = np.zeros(len(RECORD), np.int64) if call is None else call.record
        rows = self._comm.exchange(way, self.timeout, record.view(np.uint8), error=failures[0] if failures else None,
                                   options=self._options, digest=self._digest)
        if call is None:
            raise InternalError("a call without arrays")
        records = np.concatenate(rows).view(np.int64).reshape(len(rows), -1)
        check_records(records)
        if way == "forward":
            call.number = self._number = self._comm.calls
        return call, records

    def _make_plan(self, key: bytes, records: NDArray[np.int64]) -> Plan:
        """Plan for these shards. Collective over *comm*."""
        self._engine.move_to(column(records, "GPU"))
        layouts = self._problem.resolve(records)
        size = self._comm.size
        plan: Plan | None = None
        needed = np.zeros(size, bool)
        with self._comm.noting() as failures:
            if self._comm.rank == 0:
                warn_of_order(records)
            plan = self._problem.plan(key, records, layouts, self._comm.rank)
            needed[:] = [any((end > begin).any() for begin, end in plan.columns(source)) for source in range(size)]
        bits = self._comm.exchange("", self.timeout, np.packbits(needed), error=failures[0] if failures else None)
        if plan is None:
            raise InternalError("a plan is missing")
        by_rank = np.unpackbits(np.stack(bits), axis=1, count=size).astype(bool)
        plan.hops = travel(by_rank)
        plan.firsts = first_hops(by_rank)
        return plan

    def _get_ready(self, call: Call, way: str) -> None:
        """Compile what such a pass needs, and make its buffers, the first time. Collective over *comm*."""
        plan = call.plan
        if way in plan.ready:
            return
        heads, dim, dim_v = plan.dims
        self.trace.compile_seconds += self._engine.prepare(plan.dtype, plan.accumulator, dim, dim_v,
                                                           plain=plan.score.plain, backward=way == "backward")
        with self._comm.raise_on_all(self.timeout), self.backend.current():
            self._engine.ring.reserve(plan.block_bytes(plan.dtype))
            if way == "backward":
                self._engine.homeward.reserve(plan.block_bytes(plan.accumulator))
            else:
                seen = plan.sees | (call.sinks is not None)       # a sink is seen by all
                plan.seen = self.backend.to_device(seen)
                self._engine.states(plan.batch, len(seen), heads, dim_v, plan.accumulator)
        plan.ready.add(way)

    def close(self) -> None:
        """Give this object's share of the buffers back; the last one's go. Local.

        Threads stay with the caller's communicator, which is left as it is.
        """
        self._plan = self._last = None
        self._close()

    def __copy__(self) -> RingAttention:
        """Give the object itself: its communicator and its threads are not to be had twice. Local."""
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> RingAttention:
        """Give the object itself, so that a module which holds one can be copied. Local."""
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError("a RingAttention can't be pickled: it holds a communicator, threads and buffers of this "
                        "process; save what is around it (of a torch module its state_dict()), and make a new one")

    def __enter__(self) -> RingAttention:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        self.close()


def _place(arrays: dict[str, Array]) -> int:
    """Index of the GPU that the arrays are on; ON_HOST for host arrays."""
    places = [ON_HOST if isinstance(x, np.ndarray) else device.index_of(x) for x in arrays.values()]
    if len(set(places)) > 1:
        named = ", ".join(f"{name} on {'the host' if place == ON_HOST else f'GPU {place}'}"
                          for name, place in zip(arrays, places, strict=True))
        *others, last = arrays
        raise BackendError(f"{', '.join(others)} and {last}: expected all on the host or all on one GPU, got {named}; "
                           "copy them")
    return places[0]
