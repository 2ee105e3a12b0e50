"""Queries that all ranks have, a step of a decoder: new tokens first, then the ranks' results are put together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..call import Array, checksum
from ..errors import InternalError
from ..mpi.agreement import hash_of
from ..mpi.exchange import NOTHING
from .contents import Undone
from .core import Core
from .decoder import Query


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
    payload = NOTHING
    agreed = contents.alike
    with Undone(contents):
        with comm.noting() as failures, backend.current():
            check_open()
            arrays = None if k is None and v is None else sizes.check_tokens(k, v, backend)
            query = sizes.check_query(q, sinks, backend, core.problem.alibi, contents.length, core.accumulator)
            agreed |= {"shape of q": query.q.shape, "q (checksum)": checksum(query.q),
                       "sinks": None if query.sinks is None else query.sinks.tolist()}
            if arrays is not None:
                new = arrays[0].shape[1]
                agreed |= {"tokens": new, "k (checksum)": checksum(arrays[0]), "v (checksum)": checksum(arrays[1])}
                contents.check_capacity(new)
                contents.take(*arrays, new, None)
            contents.check_window(query.q.shape[1])
            payload = core.decoder.accumulate(query, contents.store, contents.length)
        rows = comm.exchange("KVCache.attend", core.timeout, payload, failures=failures,
                             options={**core.agreed, **agreed}, digest=hash_of(f"{core.digest} {agreed}"))
    if query is None:
        raise InternalError("a query is missing")
    with backend.current():
        out, lse = core.decoder.combine(query, rows)
        out, lse = (x if query.on_gpu else backend.to_numpy(x) for x in (out, lse))
        backend.synchronize()
    return out, lse
