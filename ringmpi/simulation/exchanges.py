"""What goes before the steps and after them: heads, queries and results, from each rank of a group to the others."""

from __future__ import annotations

import numpy as np

from ..schedules.traffic import traffic
from .case import Case
from .wires import Numbers

MOST_HOPS = 2**26            # ranks times hops that are looked at one by one; of more, some stand for all


def exchanged_bytes(case: Case) -> dict[str, float]:
    """Say how many bytes a rank sends to each of those that it shares heads or queries with. Local."""
    moved, schedule = traffic(case.shape, case.schedule), case.schedule
    heads, queries = max(1, schedule.heads - 1), max(1, schedule.queries - 1)
    return {"heads": moved.heads / heads, "queries": moved.queries / queries, "states": moved.states / queries,
            "results": moved.tokens / heads}


def all_bytes(case: Case) -> float:
    """Say how many bytes a rank sends that are no blocks of keys. Local."""
    moved = traffic(case.shape, case.schedule)
    return moved.heads + moved.tokens + moved.queries + moved.states


def exchange(case: Case, axis: str, nbytes: float, start: Numbers) -> tuple[Numbers, Numbers]:
    """Say when each rank has what all others of its group have sent it, each so many bytes. Local.

    Parameters
    ----------
    case : Case
    axis : {"heads", "queries"}
        That the groups are along.
    nbytes : float
    start : array of shape (groups, keys)
        When each rank begins.

    Returns
    -------
    (array, array) of shape (groups, keys)
        When it is there; and when the cores of each rank are free to compute, which pack it, and copy what comes from
        ranks of the same node.
    """
    heads, queries, keys = case.schedule.heads, case.schedule.queries, case.schedule.keys
    along = 0 if axis == "heads" else 1
    size = (heads, queries)[along]
    if size == 1:
        return start, start
    rates = case.machine.rates
    ranks, begun = case.ranks.reshape(heads, queries, keys), start.reshape(heads, queries, keys)
    hops = np.unique(np.linspace(1, size - 1, max(2, min(size - 1, MOST_HOPS // ranks.size))).astype(int))
    done = begun.copy()
    copied = np.zeros(begun.shape)
    before = np.zeros(begun.shape)                # what comes to a rank before, one message after the other
    for hop in hops:
        wave = case.wires.wave(np.roll(ranks, hop, along), ranks, np.array(nbytes))
        before += wave.seconds * (size - 1) / len(hops)
        copied += case.copying(wave.copying - rates.message * wave.moves) * (size - 1) / len(hops)
        done = np.maximum(done, np.maximum(begun, np.roll(begun, hop, along)) + before)
    packed = case.machine.crowd * (rates.exchange.seconds(nbytes * (size - 1)) + rates.message * (size - 1))
    there = np.asarray(done + packed).reshape(start.shape)
    return there, start + packed + copied.reshape(start.shape)
