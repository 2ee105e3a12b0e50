"""What a checkpoint is of: the same call goes on from it, and no other."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import __version__
from ..backends.base import Backend
from ..call import Call
from ..engine import Engine
from ..layout import resolve
from ..mpi.comm import Comm
from ..plan import Plan
from ..problem import Problem
from ..relative import Relative
from .fingerprint import fingerprint

OF_THE_PLACEMENT = ("layout", "kv_layout")
OF_THE_INPUT = ("q", "k", "v", "key_bias")


def describe_problem(problem: Problem, call: Call, plan: Plan, engine: Engine, comm: Comm, timeout: float
                     ) -> dict[str, Any]:
    """Say what is computed, of which numbers, as plain values. Collective over *comm*.

    What the ranks hold is not part of it, so that other ranks can go on.
    """
    counts, prints = _sum_up(problem, call, engine, comm, timeout)
    batch, _, heads, dim = call.q.shape
    sizes = {"tokens of q": counts[0], "tokens of k and v": counts[1], "batch": batch, "heads": heads,
             "kv_heads": call.k.shape[2], "dim": dim, "dim_v": call.v.shape[3], "dtype": str(call.q.dtype),
             "accumulator": str(plan.accumulator), "seed": call.seed}
    return describe_input(problem, sizes, call.sinks, call.relative, prints, engine.backend, comm, timeout)


def describe_input(problem: Problem, sizes: Mapping[str, Any], sinks: NDArray[Any] | None,
                   relative: Relative | None, prints: Sequence[str], backend: Backend, comm: Comm, timeout: float
                   ) -> dict[str, Any]:
    """Say what is computed, of which numbers, as plain values. Collective over *comm*.

    Parameters
    ----------
    problem : Problem
    sizes : mapping
        Of the input, by name, and its dtypes.
    sinks : array or None
    relative : Relative or None
        The same on all ranks.
    prints : sequence of str
        Of q, k and v, and of a bias of the keys if there is one; see `add_up`.
    backend : Backend
    comm, timeout
    """
    digest = _digest_of_sinks(sinks, comm, timeout)
    backends = set(comm.allgather_text(backend.name, timeout))               # "auto" may find others elsewhere
    options = {name: str(value) for name, value in problem.describe().items() if name not in OF_THE_PLACEMENT}
    of_relative = {} if relative is None else {"relative (by its digest)": relative.digest()}
    return {"version of ringmpi": __version__, **options, **sizes, "sinks (by their digest)": digest, **of_relative,
            "backend": " and ".join(sorted(backends)), "bfloat16_products": backend.products,
            "float32_products": backend.float32_products,
            **{f"{name} (by its fingerprint)": value for name, value in zip(OF_THE_INPUT, prints, strict=False)}}


def describe_placement(problem: Problem, plan: Plan, call: Call, comm: Comm, timeout: float,
                       blocks: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Say which rank holds and computes what, as plain values. Collective over *comm*.

    `blocks` are those of other ranks, if they are not this call's own.
    """
    counts = comm.allgather(np.array([call.q.shape[1], call.k.shape[1]]), timeout)
    own = {"layout": problem.describe()["kv_layout"], "n_k": counts[:, 1].tolist()}
    return {"ranks": comm.size, "schedule": str(plan.grid.schedule),
            **{name: value for name, value in problem.describe().items() if name in OF_THE_PLACEMENT},
            "n_q": counts[:, 0].tolist(), "n_k": counts[:, 1].tolist(),
            "members (by their digest)": _digest([plan.grid.group("keys", rank).ranks for rank in range(comm.size)]),
            "blocks": blocks or own, "moved": blocks is not None}


def problem_name(problem: Mapping[str, Any]) -> str:
    """Give a name to a problem, by which its generations are told from those of others. Local."""
    return _digest(problem)[:16]


def difference(there: Any, here: Mapping[str, Any]) -> str:
    """Say what a checkpoint is of that is other here; empty if nothing is. Local."""
    if not isinstance(there, dict):
        return "it does not say what it is of"
    here = json.loads(json.dumps(here))
    for name in {**here, **there}:
        if there.get(name) != here.get(name):
            return f"{name} is {_short(there.get(name))} there and {_short(here.get(name))} here"
    return ""


def _digest(value: Any) -> str:
    """Give the digest of plain values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def _digest_of_sinks(sinks: NDArray[Any] | None, comm: Comm, timeout: float) -> str | None:
    """Give the digest of the sinks, of all that there are if ranks have others; the same on all."""
    if sinks is None:
        return None
    mine = hashlib.sha256(np.ascontiguousarray(sinks).data).hexdigest()
    texts = comm.allgather_text(mine, timeout)
    return mine if len(set(texts)) == 1 else hashlib.sha256(" ".join(texts).encode()).hexdigest()


def _sum_up(problem: Problem, call: Call, engine: Engine, comm: Comm, timeout: float
            ) -> tuple[list[int], list[str]]:
    """Give the tokens of q, and of k and v, of all ranks, and the fingerprints of all three, and of a bias of keys."""
    n_q, n_k = comm.allgather(np.array([call.q.shape[1], call.k.shape[1]]), timeout).T.tolist()
    arrays = [call.q, call.k, call.v]
    if call.key_bias is not None:
        arrays.append(call.key_bias[..., None])
    prints = np.zeros(len(arrays), np.uint64)
    with comm.noting() as failures, engine.backend.current():
        layouts = [resolve(problem.layout, n_q, "q"), *[resolve(problem.kv_layout, n_k, "k and v")] * (len(arrays) - 1)]
        prints = np.array([fingerprint(x, layout.positions(comm.rank), engine.backend)
                           for x, layout in zip(arrays, layouts, strict=True)], np.uint64)
    return [sum(n_q), sum(n_k)], add_up(prints, comm, timeout, failures)


def add_up(prints: NDArray[np.uint64], comm: Comm, timeout: float, failures: list[Exception]) -> list[str]:
    """Add up the parts of all ranks to fingerprints, unless a rank has failed. Collective over *comm*."""
    rows = comm.exchange("", timeout, prints.view(np.uint8), failures=failures)
    total = np.stack([row.view(np.uint64) for row in rows]).sum(axis=0, dtype=np.uint64)
    return [f"{int(x):016x}" for x in total]
