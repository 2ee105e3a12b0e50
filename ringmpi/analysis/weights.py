"""An object that says where the attention of calls went: admits a call with its lse, runs a pass over its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..arrays import as_host_array
from ..attention import RingAttention
from ..backends.base import NO_WEIGHTS
from ..backends.heaviest import NO_KEY
from ..bounds import bounds_of
from ..call import Array, Call, Inputs, Records, checksum
from ..checks import check_integer, check_like
from ..dtypes import accumulator
from ..errors import BackendError, InternalError, OptionError
from ..layout import Integers
from ..schedules.grid import share_heads
from .groups import MOST, Groups, check_groups
from .passes import ENTROPY, MASS, POSITION, WeightsPass
from .rows import ChosenRows, check_chosen, check_range, held, put_together

Result = TypeVar("Result")
NOT_NEEDED = object()             # in place of an lse
NO_GROUPS = Groups("", np.zeros(0, np.int64), 1)


class Top(NamedTuple):
    """The heaviest keys of each query, the heaviest first; see `ringmpi.analysis.top`.

    Attributes
    ----------
    weights : array of shape ([batch,] n_q, heads, n), accumulator dtype
        0 where a query sees fewer keys; those that a bias leaves out are not seen.
    positions : int64 array of shape ([batch,] n_q, heads, n)
        In the whole sequence; -1 where a query sees fewer keys.
    """

    weights: Array
    positions: Integers


class Weights(RingAttention):
    """The functions of `ringmpi.analysis` as methods, for many calls with the same options. Collective over *comm*.

    Parameters
    ----------
    comm, **options
        See `RingAttention`; dropout does not matter.

    Raises
    ------
    OptionError, BackendError
        In canonical order, or on GPUs; the same on every rank.
    """

    def __init__(self, comm: Any, **options: Any) -> None:
        super().__init__(comm, **options)
        try:                              # the same on all ranks, which have agreed on the options
            if self._problem.canonical:
                raise OptionError("order: expected 'fastest', got 'canonical': weights are summed up in no order yet")
            self._check_backend()
        except BaseException:
            self.close()
            raise
        self._problem = replace(self._problem, dropout=0.0)

    def __enter__(self) -> Weights:
        return self

    def key_mass(self, q: Any, k: Any, lse: Any, *, groups: Any = None, n_groups: Any = None, sinks: Any = None,
                 key_bias: Any = None, relative: Any = None) -> NDArray[np.float64]:
        """Do what `ringmpi.analysis.key_mass` does. Collective over *comm*."""
        def take(call: Call) -> Groups:
            n_q = call.q.shape[1]
            if groups is None:
                if n_groups is not None:
                    raise OptionError(f"n_groups: expected groups too, a number for each query, got {n_groups} alone")
                return Groups("queries", np.zeros(n_q, np.int64), 1)
            return check_groups("queries", groups, n_groups, n_q)

        what = "key_mass" if groups is None else f"key_mass of {n_groups} groups"
        sums, call = self._over(what, _keys_alone(q, k, sinks, key_bias, relative), lse, WeightsPass.key_mass, take)
        return _given(call, sums if groups is not None else sums[..., 0])

    def rows(self, q: Any, k: Any, lse: Any, chosen: Any, *, sinks: Any = None, key_bias: Any = None,
             relative: Any = None) -> Iterator[tuple[Integers, Array]]:
        """Do what `ringmpi.analysis.rows` does, but stay open after the last piece. Collective over *comm*."""
        inputs = _keys_alone(q, k, sinks, key_bias, relative)
        if lse is None:
            lse = self._lse(inputs)
        with self._comm.one_call():
            call, found = self._gather_chosen(inputs, lse, chosen)
        return ((positions, call.given(piece)) for positions, piece in found.pieces(self.backend))

    def top(self, q: Any, k: Any, n: Any, lse: Any = None, *, sinks: Any = None, key_bias: Any = None,
            relative: Any = None) -> Top:
        """Do what `ringmpi.analysis.top` does. Collective over *comm*."""
        def take(call: Call) -> Groups:
            return NO_GROUPS._replace(total=check_integer("n", n, 1, MOST))

        (scores, positions), call = self._over(f"top {n}", _keys_alone(q, k, sinks, key_bias, relative), lse,
                                               lambda one, taken: one.tops(taken.total), take)
        with np.errstate(invalid="ignore"):
            made = np.exp(np.minimum(scores.astype(np.float64) - call.lse[..., None], 0)).astype(scores.dtype)
        absent = positions == NO_KEY
        if call.key_bias is not None:
            absent |= np.isneginf(scores)          # left out
        made[absent] = 0
        positions[absent] = -1
        return Top(call.given(made), call.given(positions))

    def max_score(self, q: Any, k: Any, *, key_bias: Any = None, relative: Any = None) -> Array:
        """Do what `ringmpi.analysis.max_score` does. Collective over *comm*."""
        most, call = self._over("max_score", _keys_alone(q, k, None, key_bias, relative), NOT_NEEDED,
                                lambda one, _: one.max_score())
        return call.given(most)

    def entropy(self, q: Any, k: Any, lse: Any, *, sinks: Any = None, key_bias: Any = None,
                relative: Any = None) -> NDArray[np.float64]:
        """Do what `ringmpi.analysis.entropy` does. Collective over *comm*."""
        sums, call = self._over("entropy", _keys_alone(q, k, sinks, key_bias, relative), lse,
                                lambda one, _: one.row_sums())
        return _given(call, sums[..., ENTROPY] + 0.0)          # no -0

    def mean_position(self, q: Any, k: Any, lse: Any, *, sinks: Any = None, key_bias: Any = None,
                      relative: Any = None) -> NDArray[np.float64]:
        """Do what `ringmpi.analysis.mean_position` does. Collective over *comm*."""
        sums, call = self._over("mean_position", _keys_alone(q, k, sinks, key_bias, relative), lse,
                                lambda one, _: one.row_sums())
        with np.errstate(invalid="ignore"):
            return _given(call, sums[..., POSITION] / sums[..., MASS])

    def mass_by_group(self, q: Any, k: Any, lse: Any, groups: Any, n_groups: Any, *, sinks: Any = None,
                      key_bias: Any = None, relative: Any = None) -> NDArray[np.float64]:
        """Do what `ringmpi.analysis.mass_by_group` does. Collective over *comm*."""
        sums, call = self._over(f"mass_by_group of {n_groups} groups", _keys_alone(q, k, sinks, key_bias, relative),
                                lse, WeightsPass.mass_by_group,
                                lambda call: check_groups("keys", groups, n_groups, call.k.shape[1]))
        return _given(call, sums)

    def _over(self, what: str, inputs: Inputs, lse: Any, run: Callable[[WeightsPass, Groups], Result],
              groups: Callable[[Call], Groups] | None = None) -> tuple[Result, Call]:
        """Admit a call, and run a pass over its weights. Collective over *comm*.

        Parameters
        ----------
        what : str
            Is asked, the same on all ranks.
        inputs : Inputs
            See `_keys_alone`.
        lse : array, optional
            Of the call; it is reckoned if it is None.
        run : callable
            Given the pass, and the groups.
        groups : callable, optional
            Given the call, takes the groups of its tokens, or raises an error.
        """
        if lse is None:
            lse = self._lse(inputs)
        with self._comm.one_call():
            call, records, found = self._admit_weights(what, inputs, lse, groups)
            if self._plan is None or self._plan.key != records.key:
                self._plan = None         # the old plan's memory goes before the new one's comes
                self._plan = self._make_plan(records)
            self._check_backend()
            return run(WeightsPass(call, self._plan, self._engine, self.trace, None), found), call

    def _admit_weights(self, what: str, inputs: Inputs, lse: Any, groups: Callable[[Call], Groups] | None
                       ) -> tuple[Call, Records, Groups]:
        """Check the shards here, then everywhere; see `_over`."""
        self._start()
        self._last = None
        call: Call | None = None
        found = NO_GROUPS
        with self._comm.noting() as failures:
            self._check_open()
            call = Call.check(inputs._replace(sinks=None), 0.0, self._problem.accumulator, self._problem.mask)
            if call.on_gpu:
                raise BackendError(NO_WEIGHTS.format("cuda"))
            call.lse = _lse_of(call, lse, accumulator(call.q.dtype, self._problem.accumulator))
            if groups is not None:
                found = groups(call)
            if self._problem.replicated:
                call.print = checksum(call.q, call.lse, found.numbers if found.of == "queries" else None)
        call, records = self._agree(call, failures, what)
        return call, records, found

    def _gather_chosen(self, inputs: Inputs, lse: Any, chosen: Any) -> tuple[Call, ChosenRows]:
        """Admit a call, and gather the chosen queries on all ranks."""
        taken: list[Integers] = []

        def take(call: Call) -> Groups:
            taken.append(check_chosen(chosen))
            return NO_GROUPS

        call, records, _ = self._admit_weights("rows", inputs, lse, take)
        if not taken:
            raise InternalError("a call without chosen queries")
        positions = taken[0]
        self._comm.check_same_options({"chosen": positions.tolist()}, self.timeout)
        problem = self._problem
        q_layout, kv_layout = problem.resolve(records)
        check_range(positions, q_layout.length)
        lengths = q_layout.length, kv_layout.length

        # The rows, from the ranks that have them.
        which, places = held(q_layout.positions(self._comm.rank), positions)
        found = [x.view(np.int64) for x in self._engine.share(which.view(np.uint8))]
        q_rows, lse_rows = (
            put_together(self._engine.share(np.ascontiguousarray(x[:, places]).reshape(-1).view(np.uint8)), found, x,
                         len(positions)) for x in (call.q, call.lse))

        heads, dim = call.q.shape[2:]
        score = problem.score(dim, share_heads(heads, call.k.shape[2], 1)[0]).of_relative(call.relative)
        self._engine.prepare(call.q.dtype, call.lse.dtype, dim, dim, plain=score.plain and call.key_bias is None,
                             weights=True)
        bounds = bounds_of(problem.mask, positions, lengths, len(call.q))
        return call, ChosenRows(call, q_rows, lse_rows, bounds, kv_layout, self._comm.rank, score)

    def _lse(self, inputs: Inputs) -> Array:
        """Give the lse of a call, by a pass of its own."""
        return self(inputs.q, inputs.k, _first_number(inputs.k), sinks=inputs.sinks, key_bias=inputs.key_bias,
                    relative=inputs.relative,
                    return_lse=True, keep=False)[1]

    def _check_backend(self) -> None:
        if not self.backend.gives_weights:
            raise BackendError(NO_WEIGHTS.format(self.backend.name))


def _keys_alone(q: Any, k: Any, sinks: Any, key_bias: Any, relative: Any) -> Inputs:
    """Give what goes into scores, with keys as values, which nothing is made of."""
    return Inputs(q, k, k, sinks, key_bias=key_bias, relative=relative)


def _given(call: Call, x: NDArray[np.float64]) -> NDArray[np.float64]:
    """View sums as the caller's arrays are: with the batch axis, or without."""
    result: NDArray[np.float64] = call.given(x)
    return result


def _lse_of(call: Call, lse: Any, acc_dtype: np.dtype[Any]) -> Array:
    """Take the lse of a call, with a batch axis; zeros where none is needed.

    With inf for -inf of a row whose keys a bias leaves out: a weight is exp(-inf - inf) = 0 then.
    """
    shape = call.q.shape[:3]
    if lse is NOT_NEEDED:
        return np.zeros(shape, acc_dtype)
    rows = as_host_array(lse, "lse")
    check_like("lse", rows, call.given(call.q).shape[:-1], acc_dtype)
    rows = np.ascontiguousarray(rows).reshape(shape)
    return rows if call.key_bias is None else np.where(np.isneginf(rows), acc_dtype.type(np.inf), rows)


def _first_number(k: Any) -> Any:
    """Give values of one number, to attend with where the log-sum-exp alone is wanted; `k` if it has no last axis."""
    try:
        return k[..., :1]
    except Exception:      # noqa: BLE001 (the call says what is wrong with it)
        return k
