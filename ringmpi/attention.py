"""Exact attention over a sequence that is sharded over the ranks of a communicator."""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Literal, NoReturn, overload

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from .backends import GPU_NAMES, check_gpu_kernels, check_name
from .backends.base import Backend
from .backends.products import wish
from .call import NO_RECORD, Array, Call, Direction, Inputs, Records, checksum, no_call
from .canonical import CanonicalPass
from .checkpoint.calls import Kept, Left, ResumableCall, save_left
from .checkpoint.search import Keeping, Search, find
from .checkpoint.watch import Stop
from .checks import check_threads, check_timeout
from .engine import Engine, agreed
from .errors import BackendError, InternalError, OptionError, RingError
from .forward import Progress
from .gradients import AnyGradients
from .keywords import explained
from .layout import Layout
from .mask_base import BaseMask
from .mpi.comm import TIMEOUT, digest_of, private_comm
from .mpi.threads import check_thread
from .passes import Pass
from .plan import Plan
from .problem import Problem, masked
from .schedules.cost import candidates, choose
from .schedules.gpu_transport import Transport, check_transport
from .schedules.grid import Grid
from .schedules.spec import Schedule, check_memory_limit, check_schedule, resolve
from .tangents import TangentPass
from .trace import Trace

Tables = ArrayLike | Sequence[ArrayLike]
CHOICES = 64                   # of schedules that an object keeps, for as many shapes of its calls
RESUMABLE = "forward, with stop= or from a checkpoint"
NEW_CALLS = "forward", RESUMABLE, "jvp"       # others are about one of these
ALONG = "jvp of an earlier call"
TWICE = "second derivative"


class RingAttention:
    """Exact softmax attention on a ring of MPI ranks: plan once, run many times. Collective over *comm*.

    Every rank keeps its queries; the K/V blocks travel, round a ring say, while every rank computes on the block it has
    (Liu, Zaharia & Abbeel 2023, *Ring Attention with Blockwise Transformers*). Other schedules are on offer, and by
    default the one is taken that costs least.

    Parameters
    ----------
    comm : MPI.Intracomm
        Any communicator of the caller. The library works on a private one that it caches on it.
    mask : Mask, Grid, or a list of these, optional
        Which keys a query sees; all by default.
    layout, kv_layout : str or Layout
        How the shards of q (and of the result), and of k and v, are laid out: ``"contiguous"`` (in the order of
        the ranks, any counts), ``"striped"``, ``"zigzag"`` or a `Custom`. `kv_layout` is `layout` by default. With
        ``layout="replicated"`` all ranks have the same queries, and get the same result: each computes with its own
        keys, and one exchange puts the results together.
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
    gpu_kernels : {"auto", "own", "library"}
        Whose kernels make the gradients of bfloat16 and float16 on a GPU. ``"library"``: torch's, cuDNN's or
        FlashAttention's, for what they can do of a block (plain scores; a rectangle that is wholly visible, or the
        causal half of a square), ours for the rest; that they are not installed, or not right on this GPU, is an error.
        They are faster, round what each block gives to 16 bits, and their sums need not have the same bits in each
        run; NaN of a key may reach gradients of queries just before those that see it. ``"own"``: ours alone.
        ``"auto"``: torch's where they are found right, and torch need not be deterministic, else ours. What a rank took
        is ``attention.trace.kernels``.
    schedule : {"auto", "ring", "gather", "queries", "mesh", "heads"} or Schedule or str
        Who computes what, and what travels. ``"auto"`` takes what costs least, by the rates of this machine that
        ``ringmpi bench network`` has measured, else by usual ones. It chooses for each shape of the shards, the same on
        all ranks, and for a backward pass too unless the call says ``keep=False``. ``"ring"``: queries stay, blocks of
        keys go round, with two buffers however many ranks there are. ``"gather"``: all blocks come at once, with a
        buffer for each, which suits small blocks; results are those of the ring, bit for bit. ``"queries"``: keys stay,
        queries and their results travel, which suits few queries. ``"mesh"``: ranks in a square share queries along one
        side and keys along the other. ``"heads"``: tokens are exchanged for heads, whose number the ranks must divide.
        A `Schedule`, or text like ``"2x4x8:ring"`` (heads x queries x keys : carrier), says any combination; it has
        carriers that have no name here: `broadcast`, `two-way`, `window`. Results are equal to rounding.
    memory_limit : int or str, optional
        Bytes, or text like ``"2GiB"``, that the arrays and buffers of a rank may take in a forward pass, at most; the
        kernels' own work space comes on top. ``"auto"`` chooses among the schedules that keep within it; if none does,
        or the one asked for does not, that is an `OptionError` that says what the smallest needs.
    order : {"fastest", "canonical"}
        In which order sums are made. ``"canonical"``: in one that depends on positions alone, so that out, lse and all
        gradients have the same bits on any number of ranks and threads, in any layout, on processors of one kind; with
        Numba or cuda, and the carrier `broadcast`: ``schedule="auto"`` is that. The ranks may also share heads, if
        their number divides the heads of the keys. The backward pass has 7 products in place of 5. See
        docs/schedules.rst for what it costs. ``"fastest"``: results on other numbers of ranks are equal to rounding.
    bfloat16_products : {"auto", "tiles", "widen", "pairs"}
        How CPUs multiply bfloat16: on their tile units (AMX), widened to float32, or in pairs (AVX512_BF16; forward
        alone). Tiles and pairs multiply numbers as they are, and round the weights too. On tiles what is below the
        smallest normal number, 2^-126, counts as 0, products of weights and values too: values should be above 1e-33
        times the keys that a query sees. Calls of few rows, slopes, dropout, scale 0 and a float64 accumulator are
        widened where there are tiles. ``"auto"`` is what the variable RINGMPI_BFLOAT16_PRODUCTS says, else tiles where
        all ranks have them, else widened; RINGMPI_CPU_TILES=0 takes a rank's tiles away. ``attention.backend.products``
        says what was agreed. float32 goes there in three pieces of bfloat16, where all ranks have tiles, with
        float32's accuracy: ``attention.backend.float32_products`` is ``"pieces"`` then, else ``"fma"``.

    Attributes
    ----------
    schedule : Schedule
        What `schedule` means on these ranks; with ``"auto"`` what was chosen for the last shapes, the ring before any.
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
    def __init__(self, comm: Any, *, mask: BaseMask | Sequence[BaseMask] | None = None,
                 layout: str | Layout = "contiguous", kv_layout: str | Layout | None = None,
                 scale: float | None = None, softcap: float | None = None,
                 alibi: ArrayLike | None = None, dropout: float = 0.0, backend: str = "auto",
                 threads: int | None = None, timeout: float = TIMEOUT, accumulator: DTypeLike | None = None,
                 gpu_transport: str = "auto", allow_gpu_sharing: bool = False, gpu_kernels: str = "auto",
                 bfloat16_products: str = "auto", schedule: str | Schedule = "auto",
                 memory_limit: int | str | None = None, order: str = "fastest") -> None:
        check_thread()
        self.timeout, wrong = check_timeout(timeout)
        self._comm = private_comm(comm, self.timeout)
        self._options: dict[str, Any] = {}
        engine: Engine | None = None
        with self._comm.noting() as failures:
            if wrong:
                raise OptionError(wrong)
            self._problem = Problem.check(mask, layout, kv_layout, scale, softcap, alibi, dropout, accumulator,
                                          order)
            check_name(backend)
            check_transport(gpu_transport)
            check_gpu_kernels(gpu_kernels)
            bfloat16_products = wish(bfloat16_products)
            self._memory_limit = check_memory_limit(memory_limit)
            self.schedule = resolve(check_schedule(schedule), self._comm.size, self._problem.replicated,
                                    self._problem.canonical)
            self._chooses = schedule == "auto" and self._comm.size > 1 and not (
                self._problem.replicated or self._problem.canonical)
            self._options = {**self._problem.describe(), "backend": backend, "gpu_transport": gpu_transport,
                             "allow_gpu_sharing": bool(allow_gpu_sharing), "gpu_kernels": gpu_kernels,
                             "bfloat16_products": bfloat16_products,
                             "schedule": "auto" if self._chooses else str(self.schedule),
                             "memory_limit": self._memory_limit}
            engine = Engine(self._comm, self.timeout, backend, check_threads(threads) or self._comm.threads,
                            gpu_transport, bool(allow_gpu_sharing), bfloat16_products, self._problem.canonical,
                            gpu_kernels)
        self._engine = agreed(engine, self._comm, "RingAttention", self.timeout, failures, self._options)
        # What each call brings along, so that none is taken for another's.
        self._options["RingAttention (by the order in which they were made)"] = self._comm.next_object()
        self._digest = digest_of(self._options)
        self._records: Records | None = None         # those of the last call
        self._plan: Plan | None = None
        self._chosen: dict[tuple[bytes, bool], Schedule] = {}       # by the shapes of all ranks, for `schedule="auto"`
        self._last_number = 0
        self._last: tuple[Call, Plan] | None = None
        self._left: Left | None = None
        self._keeping: Keeping | None = None         # what the next call goes on from
        self._kept: Kept | None = None               # the checkpoints of the last call
        self._close = weakref.finalize(self, self._engine.close)        # an object that is dropped shares no more
        self._close.atexit = False
        self.trace = Trace()

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
    def __call__(self, q: ArrayLike, k: ArrayLike, v: ArrayLike | None = None, *, dim_v: int | None = None,
                 sinks: ArrayLike | None = None, key_bias: ArrayLike | None = None, relative: Tables | None = None,
                 seed: int = 0, return_lse: Literal[False] = False, keep: bool = True,
                 progress: Progress | None = None) -> Array: ...

    @overload
    def __call__(self, q: ArrayLike, k: ArrayLike, v: ArrayLike | None = None, *, dim_v: int | None = None,
                 sinks: ArrayLike | None = None, key_bias: ArrayLike | None = None, relative: Tables | None = None,
                 seed: int = 0, return_lse: Literal[True], keep: bool = True,
                 progress: Progress | None = None) -> tuple[Array, Array]: ...

    @overload
    def __call__(self, q: ArrayLike, k: ArrayLike, v: ArrayLike | None = None, *, dim_v: int | None = None,
                 sinks: ArrayLike | None = None, key_bias: ArrayLike | None = None, relative: Tables | None = None,
                 seed: int = 0, return_lse: bool = False, keep: bool = True,
                 progress: Progress | None = None, stop: Stop) -> Any: ...

    @explained()
    def __call__(self, q: ArrayLike, k: ArrayLike, v: ArrayLike | None = None, *, dim_v: int | None = None,
                 sinks: ArrayLike | None = None, key_bias: ArrayLike | None = None, relative: Tables | None = None,
                 seed: int = 0, return_lse: bool = False, keep: bool = True,
                 progress: Progress | None = None, stop: Stop | None = None) -> Any:
        """Attend: this rank's shards in, this rank's shard of the result out. Collective over *comm*.

        Parameters
        ----------
        q : array of shape ([batch,] n_q, heads, dim), float64, float32, bfloat16 or float16
            This rank's queries; n_q may differ between ranks and may be 0. q, k and v are all on the host, or all on
            one GPU: of NumPy, CuPy, torch, JAX, or anything with the buffer protocol, DLPack or
            ``__cuda_array_interface__``. CPUs read them where they are, whatever lies between tokens, heads and
            elements of the batch: what is filled of a longer cache, or (heads, tokens, dim) with two axes swapped.
            Packed are k and v that another rank needs, and copied what goes backwards, is not aligned or has gaps in
            its last axis.
        k : array of shape ([batch,] n_k, kv_heads, dim), dtype of `q`
            This rank's keys; `heads` is a multiple of `kv_heads`.
        v : array of shape ([batch,] n_k, kv_heads, dim_v), dtype of `q`
            This rank's values. Weights times values are summed before they are divided, so 16 times the largest value
            times the keys that a query sees (over ``1 - dropout``) must be within the accumulator's dtype, 3.4e38 in
            float32; beyond it a result may be infinite or NaN, never a wrong number. ``accumulator="float64"`` has the
            room.
        dim_v : int, optional
            In place of `v`: values are the first `dim_v` numbers of each key, as in multi-head latent attention
            (DeepSeek-AI 2024, *DeepSeek-V2*), and travel with it, once; their gradient is part of dk. On the host.
        sinks : array of shape (heads,), optional
            A score of each head, finite and on the host, that joins the softmax of every query, with no value (learned
            attention sinks). A query that sees no key has out 0 and lse ``sinks[head]`` then.
        key_bias : array of shape ([batch,] n_k) or ([batch,] n_k, heads), float, optional
            Added to the scores of this rank's keys, after `softcap` and beside `alibi`, for each query head if it has
            their axis: the log of a quadrature weight makes a sum over keys an integral. In the accumulator's dtype,
            which it must be finite in; or -inf, which leaves a key out: a query that sees no other has out 0 and lse
            -inf, and what k and v have there, NaN too, is of no account if all heads leave the key out. With a batch
            it has that axis too; ``np.broadcast_to(bias, (batch, n_k))`` is the same for all elements. On the host,
            where it is looked at, or where `k` is.
        relative : array of shape (heads, 2 reach + 1), or a tuple or list of such, float, optional
            A bias by distance: ``relative[h, i - j + reach]`` is added to the score of query position i and key
            position j of head h, after `softcap` and beside `alibi` and `key_bias`, and the first or last number where
            j is farther from i than `reach` (as T5, Raffel et al. 2020, which counts j - i). Positions are global, in
            any layout; queries are aligned with the keys as the mask aligns them. With a mask that is a `Grid` it may
            be a table for each axis, each with a reach of its own: what is added is their sum, by the differences of
            the coordinates, on a periodic axis the shortest way round. Half way round n points, n even, it is n / 2,
            not -n / 2. Finite in the accumulator's dtype, the same on all ranks, on the host, and with the backends
            that compute there.
        seed : int
            Of dropout, ``0 <= seed < 2**64``; take another one at every call that shall drop other weights.
        return_lse : bool
            Return the log-sum-exp of the scores too.
        keep : bool
            Keep hold of q, k, v and the results until the next call, for `backward`; without, their memory is free as
            soon as the caller lets go of it.
        progress : callable, optional
            Called on this rank with the visible pairs done since the last time, and with all there are.
        stop : callable, optional
            On all ranks or on none. Asked on this rank again and again while it computes; once it is true on any rank,
            all leave the call after the step they are at, a rank that has asked itself at once. The call gives None
            then, for there is no result yet; `save` writes what has been computed, and `restore` goes on. With a
            schedule in which no queries travel.

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
        inputs = Inputs(q, k, v, sinks, seed, dim_v=dim_v, key_bias=key_bias, relative=relative)
        if stop is not None or self._keeping is not None:
            return self._call_resumable(inputs, return_lse, keep, progress, stop, self._keeping)
        return self._call(inputs, return_lse, keep, progress, keep)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write what has been computed of the last call, which was left by its `stop`. Collective over *comm*.

        Parameters
        ----------
        path : path
            A folder, the same on all ranks, which may be there; its parent must. It gets a generation: a file of each
            rank and, last, a manifest. Earlier ones of the same call are removed when this one is complete.

        Raises
        ------
        RingError
            If the last call was not left.
        OutputError
            If it can't be written; the same on every rank. What was there before is as it was.
        """
        check_thread()
        save_left(self._comm, self.timeout, self._left, path)

    @classmethod
    def restore(cls, path: str | os.PathLike[str], comm: Any, **options: Any) -> RingAttention:
        """Give an object whose next call goes on where one was left that `save` wrote. Collective over *comm*.

        That call is to have the same inputs. With the same tokens on the same ranks it gives, bit for bit, what the one
        that was left would have given; on other ranks, or in another layout, the same to rounding. Calls after it are
        as any others.

        Parameters
        ----------
        path : path
            As it was given to `save`.
        comm : MPI.Intracomm
        **options
            As for `RingAttention`, and as they were there: they are not in the files. ``schedule="auto"`` takes the
            schedule of the files.

        Raises
        ------
        ShardError
            If there is no complete checkpoint, or it is damaged or of another version; the same on every rank. The call
            raises it if the states are damaged.
        OptionError
            From the call, if it is not the one that was left; or if ranks hold other tokens than then, in canonical
            order, on GPUs, with shared heads or from a `Custom` layout.
        """
        attention = cls(comm, **options)
        try:
            attention._keeping = find(attention._comm, attention.timeout, path)
        except BaseException:
            attention.close()
            raise
        return attention

    def _call_resumable(self, inputs: Inputs, return_lse: bool, keep: bool, progress: Progress | None,
                        stop: Stop | None, keeping: Keeping | None) -> Array | tuple[Array, Array] | None:
        """Attend in a call that may be left, or goes on; see `__call__`. Collective over *comm*."""
        with self._comm.one_call():
            self._last = self._left = self._kept = None
            chooses = self._chooses
            try:
                call, plan, one = self._admit_resumable(inputs, keep, keeping)
                one.go_on()
                outcome, self._left = one.attend(self.trace, progress, stop)
                self._kept = one.kept
            finally:
                if self._chooses is not chooses:
                    self._chooses = chooses
                    self._plan = None
            self._keeping = None
            if outcome is None:
                return None
            self._last = (call, plan) if keep and self._close.alive else None
            out, lse = map(call.given, outcome)
            return (out, lse) if return_lse else out

    def _admit_resumable(self, inputs: Inputs, trains: bool, keeping: Keeping | None
                         ) -> tuple[Call, Plan, ResumableCall]:
        """Admit a call that may be left; with a schedule that is chosen, take that of the checkpoint if it will do."""
        search = Search(self._comm, self.timeout, keeping)

        def admit() -> tuple[Call, Plan, ResumableCall]:
            call, plan, _ = self._admit(inputs, trains=trains, resumable=True)
            return call, plan, ResumableCall(self._comm, self.timeout, self._problem, call, plan, self._engine, keeping,
                                             search)

        call, plan, one = admit()
        schedule = one.schedule() if self._chooses else None
        if schedule is None or schedule == plan.grid.schedule:
            return call, plan, one
        self._chooses = False
        for other in dict.fromkeys([schedule, Schedule(keys=self._comm.size)]):      # a ring can go on from most
            if self._can_place(other):
                self.schedule = other
                self._plan = None
                return admit()
        self._chooses = True
        return call, plan, one

    def _can_place(self, schedule: Schedule) -> bool:
        """Say whether these ranks, and their memory, allow a schedule for the call at hand. Collective over *comm*."""
        if self._records is None:
            raise InternalError("a call without records")
        try:
            self._place(schedule, self._records)
        except OptionError:
            return False
        return True

    def _call(self, inputs: Inputs, return_lse: bool, keep: bool, progress: Progress | None, trains: bool,
              recorded: bool = False) -> Array | tuple[Array, Array]:
        """Attend; see `__call__`. Collective over *comm*.

        Parameters
        ----------
        inputs, return_lse, keep, progress
            See `__call__`.
        trains : bool
            Whether a schedule is to be chosen for a backward pass too.
        recorded : bool
            Whether autograd notes the call, which it must do on all ranks or on none.
        """
        with self._comm.one_call():
            return self._forward(inputs, return_lse, keep, progress, trains, recorded)

    def _forward(self, inputs: Inputs, return_lse: bool, keep: bool, progress: Progress | None, trains: bool,
                 recorded: bool) -> Array | tuple[Array, Array]:
        self._last = self._left = None    # what the last call worked on goes before this call's memory comes
        call, plan, _ = self._admit(inputs, trains=trains, recorded=recorded)
        out, lse = self._pass(call, plan, progress).forward()
        self._last = (call, plan) if keep and self._close.alive else None      # closed meanwhile, by a callback
        return (call.given(out), call.given(lse)) if return_lse else call.given(out)

    def backward(self, dout: ArrayLike, dlse: ArrayLike | None = None, *,
                 progress: Progress | None = None) -> AnyGradients:
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
            query sees, has exactly 0. With `dim_v` dv is None: it is in the first numbers of dk.
        dsinks : array of shape (heads,), accumulator dtype
            If the call had sinks: this rank's queries' share, to be summed over the ranks as the gradient of every
            parameter that all of them have. In canonical order rank 0 has all of it, and the others 0.
        dkey_bias : array of the shape of key_bias, accumulator dtype
            If the call had one: of this rank's keys, with what all ranks make of them; after dsinks, or after dv
            without these, and where dv is. A key that is left out has 0.
        drelative : array of the shape of relative, or a tuple of such arrays, accumulator dtype
            If the call had it, and last: what the pairs give that this rank has computed, to be summed over the ranks
            as dsinks are, and in canonical order on rank 0 as those. Summed up in float64.

        The gradients are a named tuple, with these names.

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

    def _backward_of_last(self, dout: Any, dlse: Any, progress: Progress | None) -> AnyGradients:
        self._start()
        call, plan = self._last or (None, None)
        with self._comm.noting() as failures:
            self._check_open()
            if call is None:
                raise no_call()
            dout, dlse = self._check_cotangents(call, dout, dlse)
        call, _ = self._agree(call, failures, "backward")
        if plan is None:
            raise InternalError("a call without a plan")
        return self._pass(call, plan, progress).backward(dout, dlse)

    def backward_of(self, dout: ArrayLike, q: ArrayLike, k: ArrayLike, v: ArrayLike | None, out: ArrayLike,
                    lse: ArrayLike, *, dlse: ArrayLike | None = None, dim_v: int | None = None,
                    sinks: ArrayLike | None = None, key_bias: ArrayLike | None = None,
                    relative: Tables | None = None, seed: int = 0,
                    progress: Progress | None = None) -> AnyGradients:
        """Give the gradients of any call with these options, by what went in and came out. Collective over *comm*.

        Parameters
        ----------
        dout
            See `backward`.
        q, k, v, dim_v, sinks, key_bias, relative, seed
            As they were given to the call.
        out, lse
            As it returned them.
        dlse, progress
            See `backward`.

        Returns
        -------
        dq, dk, dv[, dsinks][, dkey_bias][, drelative]
            See `backward`.

        Raises
        ------
        RingError
            See `backward` and `__call__`.
        """
        inputs = Inputs(q, k, v, sinks, seed, out, lse, dim_v, key_bias, relative)
        return self._differentiate_call(0, dout, dlse, inputs, progress)

    def _differentiate_call(self, number: int, dout: Any, dlse: Any, inputs: Inputs,
                            progress: Progress | None = None, frozen: bool = False) -> AnyGradients:
        """Differentiate the call of a number, by which ranks see that they mean the same one. Collective over *comm*.

        Parameters
        ----------
        number : int
            Of the call, as `_last_number` said; 0 if it is not known.
        dout, dlse, inputs, progress
            See `backward_of`.
        frozen : bool
            This rank wants no gradients of keys, values and their bias. Where no rank does they are None, and cost
            nothing: on the host, and not in canonical order.
        """
        with self._comm.one_call():
            self._last = None
            call, plan, cotangents = self._admit(inputs, number, (dout, dlse), frozen=frozen)
            return self._pass(call, plan, progress).backward(*cotangents)

    @explained()
    def jvp(self, q: ArrayLike, k: ArrayLike, v: ArrayLike | None, q_dot: ArrayLike | None, k_dot: ArrayLike | None,
            v_dot: ArrayLike | None, *, dim_v: int | None = None, sinks: ArrayLike | None = None,
            sinks_dot: ArrayLike | None = None, key_bias: ArrayLike | None = None,
            key_bias_dot: ArrayLike | None = None, relative: Tables | None = None,
            relative_dot: Tables | None = None, seed: int = 0) -> tuple[Array, Array, Array, Array]:
        """Attend, and differentiate the results in a direction (forward mode). Collective over *comm*.

        Where inputs are ``q + e q_dot``, ``k + e k_dot`` and so on, the derivatives of out and lse by e at 0: the
        product of the Jacobian with a vector. It takes a forward pass and one more round of the keys, which travel with
        their tangents, in NumPy; no array of n_q x n_k is made. On the host; any mask, layout, schedule and score
        function, but not with ``order="canonical"``. The object forgets the last call.

        Parameters
        ----------
        q, k, v, dim_v, sinks, key_bias, relative, seed
            See `__call__`.
        q_dot, k_dot, v_dot : arrays of the shapes and dtype of q, k and v, or None
            Of this rank's shards; None for zeros. With `dim_v` v_dot is None: it is in k_dot.
        sinks_dot : array of shape (heads,), optional
            The same on all ranks.
        key_bias_dot : array of the shape of `key_bias`, float, optional
            Of this rank's keys.
        relative_dot : array of the shape of `relative`, or a tuple or list of such, float, optional
            The same on all ranks.

        Returns
        -------
        out, lse
            See `__call__`.
        out_dot, lse_dot : arrays of the shapes and dtypes of out and lse
            A query that sees no key has 0.

        Raises
        ------
        OptionError, BackendError
            In canonical order and on GPUs; the same on every rank, before any block is sent.
        RingError
            See `__call__`.
        """
        with self._comm.one_call():
            self._last = self._left = None
            call, plan, _ = self._admit(
                Inputs(q, k, v, sinks, seed, dim_v=dim_v, key_bias=key_bias, relative=relative),
                direction=Direction(q_dot, k_dot, v_dot, sinks_dot, key_bias_dot, relative_dot))
            return TangentPass(call, plan, self._engine, self.trace, None).attend()

    def _differentiate_along(self, number: int, direction: Direction, inputs: Inputs) -> tuple[Array, Array]:
        """Give out_dot and lse_dot of a call in a direction; see `_differentiate_call`. Collective over *comm*."""
        with self._comm.one_call():
            self._last = None
            call, plan, _ = self._admit(inputs, number, direction=direction)
            return TangentPass(call, plan, self._engine, self.trace, None).jvp()

    def _differentiate_twice(self, number: int, dout: Any, dlse: Any, direction: Direction, inputs: Inputs
                             ) -> tuple[Any, ...]:
        """Give the gradients of a product of gradients with their cotangents. Collective over *comm*.

        That is ``dq·q_dot + dk·k_dot + dv·v_dot + dsinks·sinks_dot + dkey_bias·key_bias_dot +
        drelative·relative_dot``.

        Parameters
        ----------
        number, dout, dlse, inputs
            Of the backward pass that gave dq, dk, dv, dsinks, dkey_bias and drelative; see `_differentiate_call`.
        direction : Direction
            The cotangents of these.

        Returns
        -------
        tuple of arrays
            By dout, dlse, q, k, v, sinks, key_bias and relative, which may be a tuple; None for what the call did not
            have.
        """
        with self._comm.one_call():
            self._last = None
            call, plan, cotangents = self._admit(inputs, number, (dout, dlse), direction=direction)
            return TangentPass(call, plan, self._engine, self.trace, None).differentiate_twice(*cotangents)

    def _check_values_in_keys(self, call: Call) -> None:
        """Refuse what has no values that are in the keys. Local."""
        if call.on_gpu or self._options["backend"] in GPU_NAMES:
            raise BackendError("dim_v: expected arrays on the host and a backend that computes there, got a GPU; take "
                               "v=k[..., :dim_v]")

    def _take_direction(self, call: Call, direction: Direction, of_shares: bool) -> None:
        """Take the direction of a derivative; refuse what has none; note what all ranks must have alike. Local.

        If it is `of_shares` of gradients, each rank has its own for its share of those of tables.
        """
        if self._problem.canonical:
            raise OptionError('order "canonical": expected a forward or backward pass; the jvp and second derivatives '
                              'have no canonical order: take order="fastest"')
        if call.on_gpu or self._options["backend"] in GPU_NAMES:
            raise BackendError("the jvp and second derivatives: expected arrays on the host and a backend that "
                               "computes there, got a GPU; copy the arrays to the host")
        call.take_direction(direction)
        if self._problem.replicated and call.direction is not None:
            call.cotangents ^= checksum(call.out, call.lse, call.direction.q, call.direction.sinks)
        if call.direction is None or of_shares:
            return
        if call.direction.sinks is not None:
            call.cotangents ^= checksum(call.direction.sinks)
        if call.direction.relative is not None:
            call.cotangents ^= call.direction.relative.checksum()

    def _pass(self, call: Call, plan: Plan, progress: Progress | None) -> Pass:
        kind = CanonicalPass if self._problem.canonical else Pass
        return kind(call, plan, self._engine, self.trace, progress)

    def _check_open(self) -> None:
        if not self._close.alive:
            raise RingError("this RingAttention is closed; make a new one")

    def _start(self) -> None:
        """Begin a call."""
        check_thread()
        self.trace = Trace()

    def _check_cotangents(self, call: Call, dout: Any, dlse: Any) -> tuple[Array, Array | None]:
        """Take what a backward pass starts from; note what all ranks must have alike. Local."""
        dout, dlse = call.check_cotangents(dout, dlse)
        call.cotangents = checksum(dout, dlse, call.out, call.lse) if self._problem.replicated else 0
        return dout, dlse

    def _admit(self, inputs: Inputs, number: int = 0, cotangents: tuple[Any, Any] = (None, None), trains: bool = True,
               resumable: bool = False, direction: Direction | None = None, recorded: bool = False,
               frozen: bool = False) -> tuple[Call, Plan, tuple[Array, Array | None]]:
        """Check the shards here, then everywhere; plan unless the last call's plan fits. Collective over *comm*.

        Parameters
        ----------
        inputs : Inputs
        number
            See `_differentiate_call`.
        cotangents : (dout, dlse)
            If `inputs` have results, which are to be differentiated.
        trains
            See `_call`.
        resumable : bool
            Whether the call may be left.
        direction : Direction, optional
            To differentiate in: the results, or their gradients if there are cotangents.
        recorded
            See `_call`.
        frozen
            See `_differentiate_call`.

        Returns
        -------
        Call, Plan, (dout, dlse)
        """
        self._start()
        way = "forward" if inputs.out is None else "backward"
        if direction is not None:
            way = "jvp" if inputs.out is None else ALONG if cotangents[0] is None else TWICE
        call: Call | None = None
        with self._comm.noting() as failures:
            self._check_open()
            call = Call.check(inputs, self._problem.dropout, self._problem.accumulator, self._problem.mask)
            if call.in_keys:
                self._check_values_in_keys(call)
            call.number = number
            call.trains = self._chooses and trains
            call.recorded, call.frozen = recorded, frozen
            call.print = checksum(call.q, call.sinks) if self._problem.replicated else 0
            if way in ("backward", TWICE):
                cotangents = self._check_cotangents(call, *cotangents)
            if direction is not None:
                self._take_direction(call, direction, way == TWICE)
        call, records = self._agree(call, failures, RESUMABLE if resumable else way)
        if self._plan is None or self._plan.key != records.key or (
                self._plan.whole not in (None, resumable)) or (
                resumable and self._chooses and self._plan.grid.schedule.queries > 1):
            self._plan = None             # the old plan's memory goes before the new one's comes
            self._plan = self._make_plan(records, resumable)
        if self.backend.device:           # its memory runs out sooner than the host's: all ranks fail if one does
            with self._comm.raise_on_all(self.timeout), self.backend.current():
                call.to_device(self.backend, self._plan.accumulator)
        call.frozen = frozen and records.frozen and self.backend.separable and not self._problem.canonical
        return call, self._plan, cotangents

    def _agree(self, call: Call | None, failures: list[Exception], way: str) -> tuple[Call, Records]:
        """Raise on all ranks what failed on any, or if their calls do not go together; give the records of all."""
        rows = self._comm.exchange(way, self.timeout, NO_RECORD if call is None else call.record(),
                                   failures=failures, options=self._options, digest=self._digest)
        if call is None:
            raise InternalError("a call without arrays")
        if self._records is None or not self._records.say(rows):
            self._records = Records(rows)
        records = self._records
        if way in NEW_CALLS:
            call.number = self._last_number = self._comm.calls
        return call, records

    def _make_plan(self, records: Records, resumable: bool = False) -> Plan:
        """Plan for these shards, and a call that may be left if it is to be `resumable`. Collective over *comm*."""
        self._engine.move_to(records.gpus)
        if records.common("key_bias") and not self.backend.biased:
            raise BackendError(f"key_bias: backend {self.backend.name} has none yet; expected backend numba, numpy or "
                               "cuda")
        if records.common("relative") and not self.backend.relative:
            raise BackendError(f"relative: backend {self.backend.name} has none yet; expected backend numba, numpy or "
                               "cuda")
        layouts = self._problem.resolve(records)
        grid = self._choose(records, layouts, resumable) if self._chooses else self._place(self.schedule, records)
        plan: Plan | None = None
        needs = np.zeros(0, bool)
        with self._comm.noting() as failures:
            if self._comm.rank == 0:
                records.warn_of_order()
                self._problem.warn_of_intervals()
            tile = self.backend.canonical_tile if self._problem.canonical else 0
            plan = self._problem.plan(records, layouts, grid, self._comm.rank, tile, resumable)
            needs = plan.needs
        bits = self._comm.exchange("", self.timeout, np.packbits(needs), failures=failures)
        if plan is None:
            raise InternalError("a plan is missing")
        of_members = np.stack([bits[rank] for rank in grid.group("keys", self._comm.rank).ranks])
        plan.take_needs(np.unpackbits(of_members, axis=1, count=len(needs)).view(np.bool_))
        return plan

    def _choose(self, records: Records, layouts: tuple[Layout, Layout], resumable: bool) -> Grid:
        """Take the schedule that costs least, and that the ranks can be placed in. Collective over *comm*.

        That takes milliseconds: what was chosen for a few shapes is kept, for programs that go back and forth.
        """
        key = records.key, resumable
        if key in self._chosen:
            self.schedule = self._chosen[key]
            return self._place(self.schedule, records)
        machine = self._engine.machine()
        shape = masked(self._problem.shape(records), self._problem.mask, *layouts)
        among = [one for one in candidates(machine, shape.heads) if one.queries == 1 or not resumable]
        while True:
            schedule = choose(shape, machine, self._memory_limit, backward=records.trains, among=among)
            said = self._comm.allgather_text(str(schedule), self.timeout)      # one for all, however they round
            schedule = resolve(check_schedule(said[0]), self._comm.size)
            try:
                grid = self._place(schedule, records)
            except OptionError:
                among = [other for other in among if other.carrier != schedule.carrier]
                if schedule.carrier != "window":          # which nodes, or the system, may not allow
                    raise
            else:
                if len(self._chosen) == CHOICES:
                    del self._chosen[next(iter(self._chosen))]
                self.schedule = self._chosen[key] = schedule
                return grid

    def _place(self, schedule: Schedule, records: Records) -> Grid:
        """Place a schedule on the ranks, and make sure that they can reach each other. Collective over *comm*."""
        if self._memory_limit is not None and not self._chooses:
            choose(self._problem.shape(records), self._engine.machine(), self._memory_limit, among=[schedule])
        grid = self._problem.grid(schedule, self._comm.nodes, records)
        carrier = self._engine.movers(grid).carrier
        carrier.check(grid, self.transport is not None)
        carrier.connect()
        return grid

    def close(self) -> None:
        """Give this object's share of the buffers back; the last one's go. Local.

        Threads stay with the caller's communicator, which is left as it is.
        """
        self._plan = self._last = self._left = None
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

