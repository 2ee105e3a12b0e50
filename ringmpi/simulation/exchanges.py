"""What goes before the steps and after them: heads, queries and their results, from each rank of a group to the others."""

from __future__ import annotations

import numpy as np

from .case import Case
from .wires import Numbers

MOST_HOPS = 2**26            # ranks times hops that are looked at one by one; of more, some stand for all


def exchanged_bytes(case: Case) -> dict[str, float]:
    """Say how many bytes a rank sends to each of those that it shares heads or queries with. Local."""
    shape, schedule = case.shape, case.schedule
    tokens_q, tokens_k = shape.n_q / schedule.ranks, shape.n_k / schedule.ranks
    query, result = shape.heads * shape.dim, shape.heads * shape.dim_v
    kv = float(case.block_bytes.mean() / case.tokens.mean()) * tokens_k           # for the heads of one of them
    rows = tokens_q * shape.batch
    return {
        "heads": rows * query * shape.item / schedule.heads + kv,
        "queries": rows * query * shape.item,
        "states": rows * (result + 2 * shape.heads) * shape.wide,
        "results": rows * (result * shape.item + shape.heads * shape.wide) / schedule.heads,
    }


def exchange(case: Case, axis: str, nbytes: float, start: Numbers) -> Numbers:
    """Say when each rank has what all others of its group have sent it, each so many bytes. Local.

    Parameters
    ----------
    case : Case
    axis : {"heads", "queries"}
        That the groups are along.
    nbytes : float
    start : array of shape (groups, keys)
        When each rank begins.
    """
    heads, queries, keys = case.schedule.heads, case.schedule.queries, case.schedule.keys
    along = 0 if axis == "heads" else 1
    size = (heads, queries)[along]
    if size == 1:
        return start
    ranks, begun = (x.reshape(heads, queries, keys) for x in (case.ranks, start))
    hops = np.unique(np.linspace(1, size - 1, max(2, min(size - 1, MOST_HOPS // ranks.size))).astype(int))
    done = begun.copy()
    before = np.zeros(begun.shape)                # what comes to a rank before, one message after the other
    for hop in hops:
        wave = case.wires.wave(np.roll(ranks, hop, along), ranks, np.array(nbytes))
        done = np.maximum(done, np.maximum(begun, np.roll(begun, hop, along)) + before + wave.seconds)
        before += (wave.seconds - wave.latency) * (size - 1) / len(hops)
    copied = 2 * nbytes * size / case.machine.rates.copy * case.machine.crowd        # packed, and taken from where it is
    return (done + copied).reshape(start.shape)


def all_bytes(case: Case) -> float:
    """Say how many bytes a rank sends that are no blocks of keys. Local."""
    sizes, schedule = exchanged_bytes(case), case.schedule
    return (schedule.queries - 1) * (sizes["queries"] + sizes["states"]) \
        + (schedule.heads - 1) * (sizes["heads"] + sizes["results"])
