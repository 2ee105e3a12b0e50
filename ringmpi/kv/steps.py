"""Queries that all ranks have, a step of a decoder: new tokens first, then the ranks' results are put together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..call import Array, checksum
from ..errors import InternalError
from ..mpi.agreement import digest_of_numbers
from ..mpi.exchange import NOTHING
from ..schedules.links import assign
from .contents import Undone
from .core import Core
from .query import Query

ASKED = ("relative (0 none, else a checksum)", "q (checksum)", "tokens")
STATE_BYTES = 2**26            # that a rank takes at a time, besides results, to put together the states of all ranks
SMALL_BYTES = 2**20            # of states that are put together without another message to agree that it went well


def attend_step(core: Core, check_open: Callable[[], None], q: Any, k: Any, v: Any, key_bias: Any,
                sinks: Any, relative: Any) -> tuple[Array, Array]:
    """Attend to this rank's tokens, then put the results of all ranks together. Collective over *comm*.

    Parameters
    ----------
    core : Core
    check_open : callable
        Raises an error if the cache is closed.
    q, k, v, key_bias, sinks, relative
        See `KVCache.attend`.

    Returns
    -------
    out, lse : arrays
        With a batch axis, where `q` is.
    """
    comm, sizes, backend, contents = core.comm, core.sizes, core.backend, core.contents
    query: Query | None = None
    parts: list[Query] = []
    whole: tuple[Array, Array] | None = None     # the results, if they come in parts
    payload = NOTHING
    numbers: tuple[int, ...] = ()                # what must be the same on every rank: as numbers, sooner hashed
    before = contents.alike
    if relative is not None:
        core.prepare(plain=False)
    with Undone(contents):
        with comm.noting() as failures, backend.current():
            check_open()
            arrays = None
            if any(x is not None for x in (k, v, key_bias)):
                arrays = sizes.check_tokens(k, v, key_bias, backend, core.accumulator)
            query = sizes.check_query(q, sinks, relative, backend, core.problem, contents.length, core.accumulator)
            numbers = (*query.q.shape, query.sinks is not None, checksum(query.sinks), query.tables, checksum(query.q))
            if arrays is not None:
                new = arrays[0].shape[1]
                numbers += (new, *map(checksum, arrays))
                contents.check_capacity(new)
                contents.take(arrays, new, None)
            contents.check_window(query.total)
            nbytes = _bytes_of_a_query(core, query)
            parts = list(query.parts(max(1, STATE_BYTES // max(1, nbytes))))
            if len(parts) > 1 or query.total * nbytes > SMALL_BYTES:
                whole = _room(core, query)
            payload = core.decoder.accumulate(parts[0], contents.store, contents.length)
        rows = comm.exchange("KVCache.attend", core.timeout, payload, failures=failures,
                             options=lambda: {**core.agreed, **before, "shape of q": numbers[:4],
                                              "sinks": None if query is None or query.sinks is None
                                              else query.sinks.tolist(),
                                              **dict(zip((*ASKED, *(f"{name} (checksum)" for name in sizes.in_file)),
                                                         numbers[6:], strict=False))},
                             digest=digest_of_numbers(core.digest, *before.values(), *numbers))
        if not parts:
            raise InternalError("a query is missing")
        return _combined(core, parts[0], rows) if whole is None else _in_parts(core, parts, rows, whole)


def _bytes_of_a_query(core: Core, query: Query) -> int:
    """Say how much memory a query takes: its states of all ranks, as they come and as they are merged, and some more.

    That is what is sent, of this part and the one before, a blank of it, and results where they are made and where they
    are given. Local.
    """
    batch, _, heads, _ = query.q.shape
    return int((2 * core.comm.size + 5) * batch * heads * (core.sizes.dim_v + 2) * core.accumulator.itemsize)


def _room(core: Core, query: Query) -> tuple[Array, Array]:
    """Make out and lse where the caller's arrays are. Local."""
    empty = core.backend.empty if query.on_gpu else np.empty
    rows = query.q.shape[:3]
    return empty((*rows, core.sizes.dim_v), query.q.dtype), empty(rows, core.accumulator)


def _in_parts(core: Core, parts: Sequence[Query], rows: list[NDArray[np.uint8]], whole: tuple[Array, Array]
              ) -> tuple[Array, Array]:
    """Attend with some queries at a time; all ranks fail if one does. Collective over *comm*.

    Parameters
    ----------
    core : Core
    parts : sequence of Query
    rows : list of uint8 array
        What all ranks made of the first part; emptied, for the next takes as much memory.
    whole : (out, lse)
        Takes the results.
    """
    contents, backend = core.contents, core.backend
    for number, part in enumerate(parts, 1):
        payload = NOTHING
        with core.comm.noting() as failures, backend.current():
            for target, x in zip(whole, _combined(core, part, rows), strict=True):
                assign(target[:, part.first:part.first + x.shape[1]], x)
            backend.synchronize()
            rows.clear()
            if number < len(parts):
                payload = core.decoder.accumulate(parts[number], contents.store, contents.length)
        rows = core.comm.exchange("", core.timeout, payload, failures=failures)
    return whole


def _combined(core: Core, query: Query, rows: Sequence[NDArray[np.uint8]]) -> tuple[Array, Array]:
    """Put together what all ranks made of some queries: out and lse where the caller's arrays are. Local."""
    backend = core.backend
    with backend.current():
        out, lse = (x if query.on_gpu else backend.to_numpy(x) for x in core.decoder.combine(query, rows))
        backend.synchronize()
    return out, lse
