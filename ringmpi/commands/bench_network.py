"""`bench network`: moving data beside bare MPI calls of the same bytes, and calls with nothing to compute.

Then the rates of this machine, by which schedules are chosen: they are kept in a file.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from ..attention import RingAttention
from ..engine import connected
from ..environment import rates_file
from ..errors import OutputError
from ..functional import ring_attention
from ..layout import Contiguous
from ..mask import Mask
from ..mpi import comm as mpi
from ..mpi.world import comm_world
from ..schedules.base import Blocks, Route
from ..schedules.grid import Grid
from ..schedules.redistribution import redistribute
from ..trace import Trace
from .bench_rates import measure_rates

Call = Callable[[], Any]      # gives the seconds of it that do not count, or None

HEADS, DIM = 2, 64
WINDOW = 16                  # keys that a query sees: next to nothing to compute, and every block is needed
SLEEPS = (1.0, 3.0)          # seconds that the last rank sleeps while the others wait, in two runs


def measure_network(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure each call beside a bare one; give the rows of the table on rank 0, none elsewhere.

    Collective over COMM_WORLD.
    """
    world = comm_world(arguments.timeout)
    comm = mpi.private_comm(world, arguments.timeout, exclusive=True)
    bench = _NetworkBench(arguments, world, comm)
    rows = []
    for name, ours, peer_name, peer in bench.runs():
        times = _in_turns(comm, [ours, peer], arguments.repeat, arguments.timeout)
        spread = max(times[0]) / min(times[0])
        mine, theirs = (statistics.median(runs) for runs in times)
        rows.append({"what": name, "seconds": f"{mine:.6f}", "beside": peer_name, "its seconds": f"{theirs:.6f}",
                     "ratio": mine / theirs, "spread": spread})
    share = bench.waiting()
    if comm.size > 1:
        rows.append({"what": "waiting for a stopped rank", "seconds": None, "beside": "one core", "its seconds": None,
                     "ratio": share, "spread": None})
    bench.close()
    if not arguments.no_save:
        _keep_rates(arguments, world, comm)
    return rows if comm.rank == 0 else []


def _keep_rates(arguments: argparse.Namespace, world: Any, comm: mpi.Comm) -> None:
    """Measure the rates of this machine; rank 0 prints them and writes their file. Collective over *comm*.

    Raises
    ------
    OutputError
        If it can't be written; the same on all ranks.
    """
    rates = measure_rates(arguments, world, comm)
    with comm.raise_on_all(arguments.timeout):
        if comm.rank == 0:
            path = arguments.save or rates_file()
            for line in rates.describe():
                print(line)
            if path is None:
                raise OutputError("no home folder to keep the rates in; say where with --save FILE or RINGMPI_RATES")
            try:
                rates.save(path)
            except OSError as error:
                raise OutputError(f"{path}: can't be written: {error}; take another with --save FILE") from error
            print(f"kept in {path}\n")


def _in_turns(comm: mpi.Comm, calls: list[Call], repeat: int, timeout: float) -> list[list[float]]:
    """Run the calls in turns, all ranks starting together; give the seconds of the slowest rank in each run.

    One run is as many calls as take some ten milliseconds. The first run warms up, and is left out.
    """
    counts = [max(1, int(0.01 / max(_time(comm, call, 1, timeout)[1] for _ in range(2)))) for call in calls]
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(repeat + 1):
        for call, count, runs in zip(calls, counts, times, strict=True):
            runs.append(_time(comm, call, count, timeout)[0])
    return [runs[1:] for runs in times]


def _time(comm: mpi.Comm, call: Call, count: int, timeout: float) -> tuple[float, float]:
    """Give the seconds of a call on the slowest rank: without those that it says do not count, and with them."""
    comm.exchange("", timeout)
    start = time.perf_counter()
    apart = sum(call() or 0.0 for _ in range(count))
    taken = time.perf_counter() - start
    net, gross = comm.allgather([(taken - apart) / count, taken / count], timeout).max(axis=0).tolist()
    return net, gross


class _NetworkBench:
    """The calls, and beside each a bare one that moves the same bytes."""

    def __init__(self, arguments: argparse.Namespace, world: Any, comm: mpi.Comm) -> None:
        self.arguments = arguments
        self.world = world
        self.comm = comm
        self.tokens = max(comm.size, (arguments.mib << 20) // (4 * HEADS * DIM) // comm.size * comm.size)
        self.x = np.ones((self.tokens, HEADS, DIM), np.float32)
        self.none = np.zeros((0, HEADS, DIM), np.float32)
        options: dict[str, Any] = {"backend": arguments.backend, "threads": 1, "timeout": arguments.timeout}
        self.options = options
        self.window = RingAttention(world, mask=Mask(window=WINDOW), layout="striped", **options)
        self.full = RingAttention(world, **options)
        self.engine = connected(comm, arguments.timeout, arguments.backend, 1, "auto", False)
        self._buffers: list[list[Any]] = []

    def runs(self) -> list[tuple[str, Call, str, Call]]:
        """Give the name and call of what is measured, and of what it is measured beside."""
        size = f"{self.arguments.mib} MiB a rank"
        return [
            (f"redistribute {size}", partial(self._redistribute, self.x),
             "Alltoallv and its copies", self._bare_exchange),
            (f"K and V round the ring, {size} each", self._circulate, "bare ring", self._bare_ring),
            (f"waiting in it, with a window of {WINDOW}", self._attend, "bare ring", self._bare_ring),
            ("forward, no tokens", self._forward, "Allgather", self._bare_gather),
            ("forward and backward, no tokens", self._backward, "Allgather", self._bare_gather),
            ("ring_attention(), no tokens", self._call_once, "Allgather", self._bare_gather),
            ("redistribute, a token a rank", partial(self._redistribute, self.x[:1]), "Allgather", self._bare_gather),
        ]

    def _redistribute(self, x: Any) -> None:
        redistribute(x, comm=self.world, timeout=self.arguments.timeout)

    def _forward(self) -> None:
        self.full(self.none, self.none, self.none)

    def _backward(self) -> None:
        self.full.backward(self.full(self.none, self.none, self.none))

    def _call_once(self) -> None:
        ring_attention(self.none, self.none, self.none, comm=self.world, **self.options)

    def _attend(self) -> float:
        """Attend; give the seconds that this rank did not wait: they say nothing of the network."""
        start = time.perf_counter()
        self.window(self.x, self.x, self.x)
        return time.perf_counter() - start - self.window.trace.wait_seconds

    def _circulate(self) -> None:
        """Pass K and V round the ring of the library, and compute nothing."""
        size, arrays = self.comm.size, (self.x[None], self.x[None])
        blocks = Blocks(arrays, [[x.shape for x in arrays]] * size)
        carrier = self.engine.movers(Grid(self.full.schedule, tuple(self.comm.nodes))).carrier
        for _ in carrier.forward(blocks, Route(np.ones((size, size), bool)), Trace()):
            pass

    def _bare_exchange(self) -> None:
        """Deal rows out as `redistribute` does, by a blocking Alltoallv and NumPy's copies before and after."""
        size, rank = self.comm.size, self.comm.rank
        byte = mpi.load().BYTE
        start = Contiguous.even(self.tokens * size, size).starts[rank]
        packed = np.concatenate([self.x[(dest - start) % size::size] for dest in range(size)])
        received = np.empty_like(packed)
        counts = [packed.nbytes // size] * size
        self.world.Alltoallv([packed.view(np.uint8), counts, byte], [received.view(np.uint8), counts, byte])
        received.copy()

    def _bare_ring(self) -> None:
        """Pass K and V round by Isend and Irecv, in buffers that are there."""
        comm = self.comm
        byte = mpi.load().BYTE
        wait_for_all = mpi.load().Request.Waitall
        here = [self.x, self.x]
        self._buffers = self._buffers or [[np.empty_like(x) for x in here] for _ in range(2)]
        for step in range(comm.size - 1):
            there = self._buffers[step % 2]
            requests = [self.world.Irecv([x.view(np.uint8), byte], (comm.rank - 1) % comm.size, 0) for x in there]
            requests += [self.world.Isend([x.view(np.uint8), byte], (comm.rank + 1) % comm.size, 0) for x in here]
            wait_for_all(requests)
            here = there

    def _bare_gather(self) -> None:
        byte = mpi.load().BYTE
        mine = np.zeros(256, np.uint8)
        self.world.Allgather([mine, byte], [np.empty((self.comm.size, 256), np.uint8), byte])

    def waiting(self) -> float:
        """Give the largest share of a core that a rank uses while it waits, from the second second on."""
        short, long = (self._wait_for_the_last(seconds) for seconds in SLEEPS)
        share = (long - short) / (SLEEPS[1] - SLEEPS[0])
        return float(self.comm.allgather([share], self.arguments.timeout)[:-1].max(initial=0.0))

    def _wait_for_the_last(self, seconds: float) -> float:
        """Wait for the last rank, which sleeps; give the processor time that waiting took."""
        self.comm.exchange("", self.arguments.timeout)
        if self.comm.rank == self.comm.size - 1:
            time.sleep(seconds)
        start = time.process_time()
        self.comm.exchange("", self.arguments.timeout)
        return time.process_time() - start

    def close(self) -> None:
        """Give everything back."""
        self.window.close()
        self.full.close()
        self.engine.close()
