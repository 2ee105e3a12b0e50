"""The contract of a backend: the arithmetic of one K/V block, nothing about ranks, files or masks."""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from ..device import Device
from ..dtypes import TOLERANCE
from ..errors import BackendError
from ..layout import Integers
from ..score import Score
from ..softmax import Gradient, State, combine, finish, row_delta
from .products import bits, choose, choose_float32

Shape = tuple[int, int, int]
GPU_KERNELS = ("auto", "own", "library")
NO_WEIGHTS = "backend {} sums up no weights yet; take backend='numba' or 'numpy', with arrays on the host"


class Bound:
    """What `Backend.bind` gives: a block of keys that stays where it is, and queries that come to it. Local."""

    def see(self, begin: Integers, end: Integers) -> None:
        """Take which columns the queries see, ``begin <= j < end``, from now on; some query sees some."""
        raise NotImplementedError

    def fold(self, q: Any) -> Iterable[int]:
        """Fold what they see into the state; the iterable is as that of `Backend.accumulate`, and is to be ended."""
        raise NotImplementedError


class Ended:
    """End a loop of a backend with a block, however that ends: else an error would keep it, and the backend, busy."""

    __slots__ = ("_loop",)

    def __init__(self, loop: Iterable[int]) -> None:
        self._loop = loop

    def __enter__(self) -> None:
        return None

    def __exit__(self, *error: object) -> None:
        if isinstance(self._loop, Generator):
            self._loop.close()


class BoundLoop(Bound):
    """The loop of `Backend.accumulate`, begun anew in each step."""

    def __init__(self, accumulate: Callable[..., Iterator[int]], k: Any, v: Any, score: Score) -> None:
        self._accumulate = accumulate
        self._block = k, v, score
        self._seen: tuple[Any, ...] = ()

    def see(self, begin: Integers, end: Integers) -> None:
        """Take what the queries see."""
        k, v, score = self._block
        last = int(end.max())
        self._seen = k[:last], v[:last], begin, end, score.of_columns(slice(last))

    def fold(self, q: Any) -> Iterable[int]:
        """Give the loop."""
        return self._accumulate(q, *self._seen)


class Backend:
    """What every backend does. Local; no backend imports MPI.

    Parameters
    ----------
    threads : int
        CPU threads to compute with, at least 1.
    device : Device, optional
        The GPU to compute on, for a backend that does.

    Raises
    ------
    BackendError
        If this machine cannot run the backend; the message says what is missing.

    Attributes
    ----------
    ways : int
        The ways in which it can multiply bfloat16 on this machine, as `products.bits` gives them; for `settle`.
    products : str
        The way that it takes: one of `products.PRODUCTS`.
    float32_products : str
        The way in which it multiplies float32: one of `products.FLOAT32_PRODUCTS`.
    canonical : bool
        Whether it computes in canonical order: see `accumulate` and `backward`.
    canonical_tile : int
        Keys, and queries, of a tile in canonical order; 0 if the backend has none.
    """

    name = "base"
    compiles = False                  # whether `prepare` may take long
    ways = bits(["widen"])
    products = "widen"
    float32_products = "fma"
    canonical = False
    canonical_tile = 0
    gpu_kernels = "own"               # whose kernels differentiate on a GPU: one of GPU_KERNELS
    differentiated_by = "own"         # whose kernels `backward` has taken last, where it could: a library's name
    biased = False                    # whether it takes a bias of the keys
    relative = False                  # whether it takes a bias by distance
    separable = False                 # whether `backward` gives dq alone in any order
    sums_tables = False               # whether it gives the gradient of one in canonical order
    rows_apart = False                # whether the bits of many rows are the same if `accumulate` gets some at a time
    gives_weights = False             # whether it has `column_sums`, `row_sums`, `row_tops` and `row_weights`
    device: Device | None = None      # the GPU whose memory all arrays below are in; None: the host's memory

    def __init__(self, threads: int, device: Device | None = None) -> None:
        self.threads = threads

    def settle(self, wished: str, ways: Sequence[int]) -> None:
        """Choose how to multiply bfloat16 and float32, before `prepare`. Local.

        With the same arguments on all ranks, all of them choose the same.

        Parameters
        ----------
        wished : str
            One of `products.NAMES`.
        ways : sequence of int
            The `ways` of every rank's backend.

        Raises
        ------
        BackendError
            If a rank's machine cannot do what is wished for.
        """
        self.products = choose(wished, ways)
        self.float32_products = choose_float32(ways)

    def current(self) -> AbstractContextManager[None]:
        """Make the backend's GPU the current one for a while; nothing on the host. Local."""
        return self.device.current() if self.device else nullcontext()

    # What the class answers for, opened or not.

    tolerance = TOLERANCE             # largest error of a result, by dtype: see softmax.py
    library_bytes = 0                 # of a process's memory, for machine code and libraries besides NumPy and MPI
    lane_flop = 0.0                   # that a lane of a vector unit does in a cycle, about; 0: nothing is known

    @classmethod
    def scratch_bytes(cls, q: Shape, k: Shape, v: Shape, dtype: np.dtype[Any], acc_dtype: np.dtype[Any]
                      ) -> dict[str, int]:
        """Predict what a call takes besides its arrays, where it computes: bytes by name. Local.

        Parameters
        ----------
        q, k, v : tuple of int
            Shapes of the inputs, as for `accumulate`.
        dtype, acc_dtype : dtype
            Of the inputs and of the accumulator.
        """
        return {}

    @classmethod
    def describe(cls) -> str:
        """Describe what computes, in a few words: the package, its version. Local."""
        return f"{cls.name} {importlib.metadata.version(cls.name)}"

    def prepare(self, dtype: np.dtype[Any], accumulator: np.dtype[Any], dim: int, dim_v: int, *,
                plain: bool = True, biased: bool = False, relative: bool = False, several: bool = False,
                backward: bool = False, weights: bool = False) -> None:
        """Compile what inputs of this dtype and accumulator need, or load what was compiled before. Local.

        Parameters
        ----------
        dtype, accumulator : dtype
        dim, dim_v : int
        plain : bool
            Whether scores will be plain, but for a bias of the keys or by distance; see `Score.plain`.
        biased, relative : bool
            Whether there will be the one, or the other.
        several : bool
            Whether queries may have several intervals.
        backward : bool
            Whether to prepare `backward`; else `accumulate`.
        weights : bool
            Whether to prepare what sums weights up instead: `column_sums` and the like.

        Raises
        ------
        BackendError
            If the backend can't compute with these.
        """

    def to_device(self, x: Any) -> Any:
        """Give `x`, a NumPy or GPU array, C-contiguous where the backend computes; `x` itself if it is there. Local."""
        return np.ascontiguousarray(x)

    def read_rows(self, shape: Sequence[int], dtype: np.dtype[Any], read: Callable[[int, NDArray[Any]], None]) -> Any:
        """Make an array where the backend computes, and have `read` fill it, in one piece or several. Local.

        Parameters
        ----------
        shape, dtype
        read : callable
            Given the number of a row and a NumPy array to put the rows from there on into.
        """
        x = np.empty(shape, dtype)
        read(0, x)
        return x

    def to_numpy(self, x: Any) -> NDArray[Any]:
        """Give a result as a NumPy array. Local."""
        return np.asarray(x)

    def empty(self, shape: Sequence[int], dtype: DTypeLike) -> Any:
        """Make an array where the backend computes, not initialised. Local."""
        return np.empty(shape, dtype)

    def new_state(self, n_q: int, heads: int, dim_v: int, dtype: DTypeLike) -> State:
        """Make the state of queries that have seen no key yet. Local."""
        state = State(*(self.empty(shape, dtype) for shape in ((n_q, heads, dim_v), (n_q, heads), (n_q, heads))))
        self.reset(state)
        return state

    def reset(self, state: State, sinks: NDArray[Any] | None = None) -> None:
        """Let a state forget every key; see `State.reset`. `sinks` are NumPy, whatever the backend. Local."""
        state.reset(sinks)

    def combine(self, state: State, parts: State) -> None:
        """Fold states of the same queries that saw other keys into one; see `softmax.combine`. Local."""
        combine(state, parts)

    def finish(self, state: State, seen: Any, out: Any, lse: Any) -> None:
        """Normalise a state into `out` and `lse`; see `softmax.finish`. Local."""
        finish(state, seen, out, lse)

    def lse_for_weights(self, lse: Any) -> Any:
        """Give lse with inf for -inf, which `backward` wants with a bias. Local.

        Of a row whose keys are all left out a weight is exp(-inf - inf) = 0 then.
        """
        return np.where(np.isneginf(lse), lse.dtype.type(np.inf), lse)

    def without_left_out(self, x: Any, left_out: NDArray[np.bool_]) -> Any:
        """Give k or v with 0 for keys that are left out, if what is there is not finite: 0 times NaN is NaN. Local.

        Of a backend with a device; on the host a call does so itself.

        Parameters
        ----------
        x : array of shape (batch, n_k, kv_heads, dim)
            Left as it is.
        left_out : bool array of shape (batch, n_k)
            NumPy.
        """
        raise NotImplementedError

    def accumulate(self, state: State, q: NDArray[Any], k: NDArray[Any], v: NDArray[Any],
                   begin: Integers, end: Integers, score: Score) -> Iterator[int]:
        """Fold one block of K and V into the running softmax of `q`. Local.

        Row i sees columns ``begin[i] <= j < end[i]``, or with several intervals ``begin[n, i] <= j < end[n, i]`` of
        each, and nothing else: not a NaN, not an infinity. A row that sees nothing is left as it was. No array of
        ``n_q × n_k`` is made.

        One loop at a time, be it of this or of `backward`: the iterator must end or be closed before the next call.
        The result depends on the arguments and the number of threads alone.

        In canonical order the state of a query has the same bits after it has met the same keys in ascending order,
        however they are cut into blocks that begin at multiples of `canonical_tile`, whatever other queries there are,
        and on any number of threads.

        Parameters
        ----------
        state : State
            Of the queries; C-contiguous arrays, updated in place. Its dtype is the accumulator's.
        q : array of shape (n_q, heads, dim)
            It, k and v may have gaps between tokens and heads on the host; see `strided.in_place`. Results have the
            bits that they have without.
        k : array of shape (n_k, kv_heads, dim), dtype of `q`
            `heads` is a multiple of `kv_heads`; query head h uses key head ``h // (heads // kv_heads)``.
        v : array of shape (n_k, kv_heads, dim_v), dtype of `q`
        begin, end : int64 arrays of shape (n_q,) or (intervals, n_q)
            ``0 <= begin <= end <= n_k``; NumPy, whatever the backend. Intervals of a query are disjoint and ascend;
            empty ones may lie anywhere.
        score : Score
            Its arrays are NumPy, whatever the backend, but for `key_bias`, which is where k is.

        Yields
        ------
        int
            Visible pairs done since the last yield; all of them together at the end. Between two yields lie a
            few milliseconds, so that the caller can keep messages moving.
        """
        raise NotImplementedError

    def bind(self, state: State, k: Any, v: Any, n_q: int, heads: int, score: Score) -> Bound:
        """Give what `accumulate` does with arrays that stay where they are, for many steps of as many queries. Local.

        Parameters
        ----------
        state, k, v, score
            As for `accumulate`.
        n_q, heads : int
            Of the queries.
        """
        return BoundLoop(partial(self.accumulate, state), k, v, score)

    def merge(self, states: NDArray[Any], sinks: NDArray[Any] | None, seen: NDArray[np.uint8], out: Any, lse: Any
              ) -> None:
        """Combine states of the same queries that saw other keys, in their order, and finish them. Local.

        Parameters
        ----------
        states : array of shape (parts, numbers), accumulator dtype
            NumPy, whatever the backend, as sinks and seen are. A row has acc, row_max and row_sum of each element of
            the batch, and may have more numbers after them.
        sinks : array of shape (heads,), accumulator dtype, optional
        seen : uint8 array of shape (parts, n_q)
            1 where a part has seen a key of the query.
        out : array of shape (batch, n_q, heads, dim_v), any dtype
            Written, as lse is, where the backend computes.
        lse : array of shape (batch, n_q, heads), accumulator dtype
        """
        batch, n_q, heads, dim_v = out.shape
        has_result = self.to_device(seen.any(axis=0) | (sinks is not None))
        state = self.new_state(n_q, heads, dim_v, states.dtype)
        shapes = (n_q, heads, dim_v), (n_q, heads), (n_q, heads)
        parts = iter(np.split(states, np.cumsum([math.prod(shape) for shape in shapes * batch]), axis=1))
        for i in range(batch):
            self.reset(state, sinks)
            self.combine(state, State(*(self.to_device(next(parts).reshape(len(states), *shape)) for shape in shapes)))
            self.finish(state, has_result, out[i], lse[i])

    def new_gradient(self, dout: Any, out: Any, lse: Any, dlse: Any, dq: Any) -> Gradient:
        """Begin the backward pass of queries: reckon delta, with `dlse` None for 0, and clear `dq`. Local."""
        gradient = Gradient(dout, lse, self.empty(lse.shape, lse.dtype), dq)
        row_delta(dout, out, dlse, gradient.delta)
        self.clear(gradient.dq)
        return gradient

    def backward(self, gradient: Gradient, q: NDArray[Any], k: NDArray[Any], v: NDArray[Any], dk: Any, dv: Any,
                 begin: Integers, end: Integers, score: Score, dkey_bias: Any = None,
                 drelative: Sequence[NDArray[np.float64]] | None = None) -> Iterator[int]:
        """Add to the gradients of `q`, `k` and `v` what one block of K and V gives. Local.

        As FlashAttention-2 does (Dao 2023, algorithm 2): the weights are made again from the scores and lse. With
        p the weights before dropout, m what dropout multiplies them by, and x' the derivative of the score::

            dv = (m p)ᵀ dout        ds = p (m (dout · v) - delta) x'        dq = ds k        dk = dsᵀ q

        The gradient of a key's bias is the sum of ``p (m (dout · v) - delta)`` over the queries, that of a number of a
        bias by distance over the pairs that have it.

        A pair that is not seen adds nothing to anything, be it NaN. Where a pair is seen NaN comes through; an infinity
        may not, where it makes a weight 0. A row whose delta is not finite makes NaN of dk and dv of all it sees.
        The result depends on the arguments and the number of threads alone.

        On the host dq alone may be asked for, with `dk` and `dv` None, and has the same bits as with them.

        In canonical order either dq alone is asked for, with `dk` and `dv` None, or dk and dv alone, with dq None. Then
        dq of a query has the same bits under the conditions of `accumulate`. dk and dv of a key have the same bits
        after it has met the same queries in ascending order, however they are cut into blocks that begin at multiples
        of `canonical_tile`, whatever other keys there are. Where some queries see a key in the first of several
        intervals and others in the second, calls are to go tile by tile of the queries, each with all its intervals.
        Or drelative alone is asked for, of a tile of the queries, if `sums_tables`: that has the same bits after it has
        met the same keys in ascending order, however they are cut into such blocks.

        Parameters
        ----------
        gradient : Gradient
            C-contiguous arrays; dq is updated in place.
        q, k, v, begin, end, score
            As for `accumulate`.
        dk : array of shape (n_k, kv_heads, dim), accumulator dtype
            C-contiguous, updated in place.
        dv : array of shape (n_k, kv_heads, dim_v), accumulator dtype
            The same.
        dkey_bias : array of shape (n_k, heads) or (n_k, 1), accumulator dtype, if ``score.key_bias`` is one
            The same; for each head, whether they have the same bias or not, or of all of them together, which is not
            asked for in canonical order.
        drelative : sequence of float64 arrays of shape (heads, 2 reach + 1), if ``score.relative`` is one
            The same, for each of its tables. In canonical order asked for alone.

        Yields
        ------
        int
            As `accumulate` does.
        """
        raise NotImplementedError

    def wanted_gradients(self, gradient: Gradient, dk: Any, dv: Any, drelative: Any = None) -> tuple[bool, bool]:
        """Say whether `backward` is asked for dq, and for dk and dv; neither, if for `drelative` alone. Local.

        Raises
        ------
        BackendError
            If it makes no such gradients together.
        """
        wanted = tuple(x is not None for x in (gradient.dq, dk, dv))
        alone, of_keys, both = (True, False, False), (False, True, True), (True, True, True)
        possible = [alone, both] if self.separable else [both]
        if self.canonical:
            possible = [(False, False, False)] if drelative is not None and self.sums_tables else [alone, of_keys]
        if wanted not in possible:
            names = ", ".join(name for name, given in zip(("dq", "dk", "dv"), wanted, strict=True) if given)
            raise BackendError(f"backend {self.name}: expected arrays for dq, dk and dv, or on the host for dq alone, "
                               f"or in canonical order for dq alone or for dk and dv alone, got {names or 'none'} with "
                               f"canonical order {'on' if self.canonical else 'off'}")
        return wanted[0], wanted[1]

    def column_sums(self, sums: NDArray[np.float64], q: NDArray[Any], k: NDArray[Any], lse: NDArray[Any],
                    begin: Integers, end: Integers, score: Score) -> Iterator[int]:
        """Add to each key of a block what it weighs for all queries: the sums of the columns of the weights. Local.

        A weight is ``exp(score - lse)``, before dropout. A key's sum does not depend on the number of threads.

        Parameters
        ----------
        sums : float64 array of shape (n_k, heads)
            Updated in place; the heads are those of the queries.
        q, k, begin, end, score
            As for `accumulate`.
        lse : array of shape (n_q, heads), accumulator dtype
            C-contiguous.

        Yields
        ------
        int
            As `accumulate` does. A pair that is not seen adds nothing, be it NaN.
        """
        raise BackendError(NO_WEIGHTS.format(self.name))

    def row_sums(self, sums: NDArray[np.float64], q: NDArray[Any], k: NDArray[Any], lse: NDArray[Any],
                 values: NDArray[np.float64], begin: Integers, end: Integers, score: Score) -> Iterator[int]:
        """Add to each query of each head sums over the keys of a block: of p, -p log p and p times a value. Local.

        Parameters
        ----------
        sums : float64 array of shape (n_q, heads, 3)
            C-contiguous, updated in place.
        q, k, lse, begin, end, score
            As for `column_sums`.
        values : float64 array of shape (n_k,)
            Finite. What they are more than the first is taken in the accumulator's dtype.

        Yields
        ------
        int
            As `accumulate` does.
        """
        raise BackendError(NO_WEIGHTS.format(self.name))

    def row_tops(self, scores: NDArray[Any], positions: Integers, q: NDArray[Any], k: NDArray[Any], keys: Integers,
                 begin: Integers, end: Integers, score: Score) -> Iterator[int]:
        """Put the keys of a block that score most among those that each query has met so far. Local.

        They are in the order of `heaviest.best`, so that it does not matter in which order blocks come.

        Parameters
        ----------
        scores : array of shape (n_q, heads, n), accumulator dtype
            C-contiguous, as positions are, and updated in place.
        positions : int64 array of shape (n_q, heads, n)
        q, k, begin, end, score
            As for `accumulate`.
        keys : int64 array of shape (n_k,)
            Positions of the keys.

        Yields
        ------
        int
            As `accumulate` does.
        """
        raise BackendError(NO_WEIGHTS.format(self.name))

    def row_weights(self, weights: NDArray[Any], q: NDArray[Any], k: NDArray[Any], lse: NDArray[Any],
                    begin: Integers, end: Integers, score: Score) -> Iterator[int]:
        """Write the weights of the keys that queries see, and leave the others as they are. Local.

        Parameters
        ----------
        weights : array of shape (n_q, heads, n_k), accumulator dtype
        q, k, lse, begin, end, score
            As for `column_sums`.

        Yields
        ------
        int
            As `accumulate` does.
        """
        raise BackendError(NO_WEIGHTS.format(self.name))

    def wants_out(self, dtype: np.dtype[Any], accumulator: np.dtype[Any], dim: int, dim_v: int, plain: bool) -> bool:
        """Say whether `backward` has use for `Gradient.out` with such arrays, once prepared. Local."""
        return False

    def clear(self, x: Any) -> None:
        """Fill an array with zeros. Local."""
        x.fill(0)

    def add(self, x: Any, y: Any) -> None:
        """Add `y` to `x`, of the same shape and dtype, in place; each may be some heads of an array. Local."""
        x += y

    def astype(self, x: Any, dtype: np.dtype[Any]) -> Any:
        """Give `x` in `dtype`; `x` itself if it has it. Local."""
        return x.astype(dtype, copy=False)

    def synchronize(self) -> None:
        """Wait until all work is done: on a GPU, the calls above return once it is queued. Local."""

    def release(self) -> None:
        """Give buffers back; they are made again when they are needed. Local."""

    def close(self) -> None:
        """Give threads and buffers back. Local."""
