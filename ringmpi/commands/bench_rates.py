"""`bench network`: the rates of this machine, by which schedules are chosen, from messages and from calls."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from ..mpi import comm as mpi
from ..schedules.calibration import Measured, fit
from ..schedules.cost import candidates
from ..schedules.machine import Machine
from ..schedules.rates import LinkRate, Rates
from ..schedules.spec import Schedule
from .bench_calls import CallBench, CallCase, undisturbed

TOKENS = 32, 128, 512        # of a rank, where there are four at most; else fewer
KINDS = (8, False), (8, True), (2, True)        # heads of the keys for 8 of the queries, causal
CARRIERS = "ring", "gather", "window"           # two-way and broadcast are known from these
MESSAGE = 2**22              # bytes, to measure bandwidth with
TURNS = 20                   # messages there and back


def measure_rates(arguments: argparse.Namespace, world: Any, comm: mpi.Comm) -> Rates:
    """Measure links, and calls of several sizes by several schedules; solve these for rates. Collective over *comm*."""
    bench = CallBench(arguments, world, comm)
    known = bench.machine.rates
    inside = _link(comm, _partner(comm, same_node=True), arguments.timeout) or known.inside
    between = _link(comm, _partner(comm, same_node=False), arguments.timeout) or known.between
    measured: list[Measured] = []
    for case in _cases(comm.size):
        shape = case.shape(comm.size)
        for schedule, ways in bench.measure(case, _schedules(bench.machine, case.heads)).items():
            measured += [Measured(shape, schedule, backward, undisturbed(ways[backward])) for backward in (False, True)]
    where = f"{comm.size} ranks x {bench.options['threads']} threads, {bench.machine.cores} cores a node"
    return fit(measured, bench.machine, inside, between, where)


def _cases(ranks: int) -> Iterator[CallCase]:
    """Give cases that together take half a minute or so."""
    for tokens in TOKENS:
        for kv_heads, causal in KINDS:
            yield CallCase(max(8, 4 * tokens // max(4, ranks)), 8, kv_heads, 64, causal)


def _schedules(machine: Machine, heads: int) -> list[Schedule]:
    """Give schedules in which each rate has a part: each axis alone, some carriers, and two grids."""
    everything = [x for x in candidates(machine, heads) if x.carrier in CARRIERS]
    pure = [x for x in everything if machine.ranks in (x.heads, x.queries, x.keys)]
    mixed = [x for x in everything if x not in pure and x.carrier == "gather"]
    return pure + mixed[:1] + mixed[-1:]


def _partner(comm: mpi.Comm, same_node: bool) -> int | None:
    """Give the lowest rank that is on rank 0's node, or on another; None if there is none."""
    return next((rank for rank in range(1, comm.size) if (comm.nodes[rank] == comm.nodes[0]) is same_node), None)


def _link(comm: mpi.Comm, partner: int | None, timeout: float) -> LinkRate | None:
    """Measure messages between rank 0 and another: the shorter of two sizes is all latency. Collective over *comm*."""
    if partner is None:
        return None
    latency, long = (_ping(comm, partner, nbytes, timeout) for nbytes in (1, MESSAGE))
    return LinkRate(latency, MESSAGE / max(long - latency, 1e-9))


def _ping(comm: mpi.Comm, partner: int, nbytes: int, timeout: float) -> float:
    """Give the seconds that a message takes one way, the same on all ranks: half of there and back."""
    buffer = np.zeros(nbytes, np.uint8)
    times = []
    comm.exchange("", timeout)
    if comm.rank in (0, partner):
        other = partner if comm.rank == 0 else 0
        send, receive = (comm.message_starter(call, other, 0) for call in ("Isend", "Irecv"))
        steps = (send, receive) if comm.rank == 0 else (receive, send)
        for _ in range(TURNS):
            start = time.perf_counter()
            for step in steps:
                comm.wait([step(buffer)], timeout, lambda: f"{comm.name()} waited for a message", peers=lambda: [other])
            times.append((time.perf_counter() - start) / 2)
    return float(comm.allgather([statistics.median(times) if times else 0.0], timeout)[0, 0])
