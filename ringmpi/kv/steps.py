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
from .decoder import Query

ASKED = ("q (checksum)", "tokens", "k (checksum)", "v (checksum)")
STATE_BYTES = 2**26            # of the states of all ranks that a rank has at a time


def attend_step(core: Core, check_open: Callable[[], None], q: Any, k: Any, v: Any, sinks: Any) -> tuple[Array, Array]:
    """Attend to this rank's tokens, then put the results of all ranks together. Collective over *comm*.

    Parameters
    ----------
    core : Core
    check_open : callable
        Raises an error if the cache is closed.
    q, k, v, sinks
        See `KVCache.attend`.

    Returns
    -------
    out, lse : arrays
        With a batch axis, where `q` is.
    """
    comm, sizes, backend, contents = core.comm, core.sizes, core.backend, core.contents
    query: Query | None = None
    parts: list[Query] = []
    payload = NOTHING
    numbers: tuple[int, ...] = ()                # what must be the same on every rank: as numbers, sooner hashed
    before = contents.alike
    with Undone(contents):
        with comm.noting() as failures, backend.current():
            check_open()
            arrays = None if k is None and v is None else sizes.check_tokens(k, v, backend)
            query = sizes.check_query(q, sinks, backend, core.problem.alibi, contents.length, core.accumulator)
            numbers = (*query.q.shape, query.sinks is not None, checksum(query.sinks), checksum(query.q))
            if arrays is not None:
                new = arrays[0].shape[1]
                numbers += (new, checksum(arrays[0]), checksum(arrays[1]))
                contents.check_capacity(new)
                contents.take(*arrays, new, None)
            contents.check_window(query.total)
            parts = list(query.parts(_rows(core, query)))
            payload = core.decoder.accumulate(parts[0], contents.store, contents.length)
        rows = comm.exchange("KVCache.attend", core.timeout, payload, failures=failures,
                             options=lambda: {**core.agreed, **before, "shape of q": numbers[:4],
                                              "sinks": None if query is None or query.sinks is None
                                              else query.sinks.tolist(),
                                              **dict(zip(ASKED, numbers[6:], strict=False))},
                             digest=digest_of_numbers(core.digest, *before.values(), *numbers))
        if not parts:
            raise InternalError("a query is missing")
        results = [_combined(core, parts[0], rows)]
        for part in parts[1:]:
            with comm.noting() as failures, backend.current():
                payload = core.decoder.accumulate(part, contents.store, contents.length)
            results.append(_combined(core, part, comm.exchange("", core.timeout, payload, failures=failures)))
    return _joined(core, parts[0], results)


def _rows(core: Core, query: Query) -> int:
    """Say with how many queries to compute at a time, so that the states of all ranks take little memory. Local."""
    batch, _, heads, _ = query.q.shape
    states = core.comm.size * batch * heads * (core.sizes.dim_v + 2) * core.accumulator.itemsize
    return max(1, STATE_BYTES // max(1, int(states)))


def _combined(core: Core, query: Query, rows: Sequence[NDArray[np.uint8]]) -> tuple[Array, Array]:
    """Put together what all ranks made of some queries: out and lse where the caller's arrays are. Local."""
    backend = core.backend
    with backend.current():
        out, lse = (x if query.on_gpu else backend.to_numpy(x) for x in core.decoder.combine(query, rows))
        backend.synchronize()
    return out, lse


def _joined(core: Core, query: Query, results: Sequence[tuple[Array, Array]]) -> tuple[Array, Array]:
    """Put the results of the parts one after the other. Local."""
    if len(results) == 1:
        return results[0]
    joined = []
    for theirs in zip(*results, strict=True):
        shape, dtype = (len(theirs[0]), query.total, *theirs[0].shape[2:]), theirs[0].dtype
        with core.backend.current():
            whole = core.backend.empty(shape, dtype) if query.on_gpu else np.empty(shape, dtype)
            start = 0
            for x in theirs:
                assign(whole[:, start:start + x.shape[1]], x)
                start += x.shape[1]
            core.backend.synchronize()
        joined.append(whole)
    return joined[0], joined[1]
