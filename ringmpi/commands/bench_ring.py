"""`bench ring`: the whole ring in each layout, and the same work on one rank with all the threads."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import layout
from ..attention import RingAttention
from ..backends.products import wish
from ..checks import check_threads
from ..dtypes import check_dtype
from ..engine import connected
from ..environment import affinity, set_affinity
from ..mask import Mask
from ..mpi import comm as mpi
from ..mpi.world import comm_world
from ..schedules.base import Blocks, Route, block_sizes
from ..schedules.grid import Grid
from ..schedules.spec import Schedule
from ..trace import Trace

ALONE = "one rank"
CANONICAL = "striped, canonical order"
TRANSFER = "transfer"


def measure_ring(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure the layouts in turns; give the rows of the table on rank 0, none elsewhere.

    Collective over COMM_WORLD.
    """
    world = comm_world(arguments.timeout)
    bench = _RingBench(arguments, world, mpi.private_comm(world, arguments.timeout, exclusive=True))
    runs = bench.runs()
    for _ in range(arguments.repeat + 1):
        for name, call in runs.items():
            bench.time(name, call)
    rows = bench.rows()
    bench.close()
    return rows


class _RingBench:
    """What is measured on this rank, and the figures of each run by name."""

    def __init__(self, arguments: argparse.Namespace, world: Any, comm: mpi.Comm) -> None:
        self.arguments = arguments
        self.comm = comm
        self.dtype = check_dtype(arguments.dtype, "--dtype")
        self.figures: dict[str, list[NDArray[np.float64]]] = {}
        with comm.raise_on_all(arguments.timeout):
            self.threads = check_threads(arguments.threads) or comm.threads
        records = comm.allgather([self.threads, comm.leader], arguments.timeout)
        self.one_node = len(set(records[:, 1])) == 1
        self.all_threads = int(records[:, 0].sum())
        everyone = comm.allgather_text(json.dumps(sorted(affinity())), arguments.timeout)
        self.all_cores = {core for text in everyone for core in json.loads(text)}
        self.engine = connected(comm, arguments.timeout, arguments.backend, self.threads, arguments.gpu_transport,
                                arguments.allow_gpu_sharing, wish(arguments.bfloat16_products))
        self.layouts = {name: self._attention(world, name, self.threads, arguments.schedule) for name in layout.NAMES}
        if arguments.order == "canonical":
            self.layouts[CANONICAL] = self._attention(world, "striped", self.threads, "auto", arguments.order)
        self.alone = world.Split(comm.rank)
        self.single = self._attention(self.alone, "contiguous", self.all_threads)

    def _attention(self, comm: Any, name: str, threads: int, schedule: str = "ring", order: str = "fastest"
                   ) -> RingAttention:
        return RingAttention(comm, mask=Mask(causal=self.arguments.causal, window=self.arguments.window), layout=name,
                             threads=threads, backend=self.arguments.backend, timeout=self.arguments.timeout,
                             gpu_transport=self.arguments.gpu_transport,
                             allow_gpu_sharing=self.arguments.allow_gpu_sharing, schedule=schedule, order=order,
                             memory_limit=self.arguments.memory_limit,
                             bfloat16_products=self.arguments.bfloat16_products,
                             gpu_kernels=self.arguments.gpu_kernels)

    def _arrays(self, n: int) -> list[Any]:
        rng = np.random.default_rng(self.comm.rank)
        shape = n, self.arguments.heads, self.arguments.dim
        arrays = [rng.standard_normal(shape, np.float32).astype(self.dtype) for _ in range(3)]
        with self.engine.backend.current():
            return [self.engine.backend.to_device(x) for x in arrays]

    def runs(self) -> dict[str, Callable[[], Trace]]:
        """Give calls by name: each layout, the blocks going round with no arithmetic, one rank with all threads."""
        tokens, ranks, rank = self.arguments.tokens, self.comm.size, self.comm.rank
        runs: dict[str, Callable[[], Trace]] = {}
        for name, attention in self.layouts.items():
            arrays = self._arrays(layout.make(attention.layout, tokens, ranks).counts[rank])
            runs[name] = self._pass(attention, arrays)
        schedule = self.layouts["contiguous"].schedule
        if 1 < ranks == schedule.keys and self.arguments.which == "forward":
            runs[TRANSFER] = self._transfer(schedule)
        if self.one_node and ranks > 1:
            alone = self._pass(self.single, self._arrays(tokens if rank == 0 else 1))

            def one_rank() -> Trace:
                before = affinity()
                set_affinity(self.all_cores)
                try:
                    return alone()
                finally:
                    set_affinity(before)
            runs[ALONE] = one_rank if rank == 0 else lambda: Trace()
        return runs

    def _pass(self, attention: RingAttention, arrays: list[Any]) -> Callable[[], Trace]:
        """Give a call that runs the forward pass; or the backward pass, after one forward pass."""
        def forward() -> Trace:
            attention(*arrays)
            return attention.trace

        def backward() -> Trace:
            attention.backward(arrays[0])
            return attention.trace

        if self.arguments.which == "forward":
            return forward
        attention(*arrays)
        return backward

    def _transfer(self, schedule: Schedule) -> Callable[[], Trace]:
        counts = layout.make("contiguous", self.arguments.tokens, self.comm.size).counts
        shapes = [[(1, n, self.arguments.heads, self.arguments.dim)] * 2 for n in counts]
        _, k, v = (x[None] for x in self._arrays(counts[self.comm.rank]))
        carrier, backend = self.engine.movers(Grid(schedule, tuple(self.comm.nodes))).carrier, self.engine.backend
        shapes = [shapes[rank] for rank in carrier.group.ranks]
        route = Route(np.ones((self.comm.size, self.comm.size), bool), [theirs[0][1] for theirs in shapes])
        with self.comm.raise_on_all(self.arguments.timeout), backend.current():
            carrier.reserve(route, block_sizes(shapes, [self.dtype] * 2))

        def transfer() -> Trace:
            trace = Trace()
            with backend.current():
                for _ in carrier.forward(Blocks((k, v), shapes), route, trace):
                    pass
            return trace
        return transfer

    def time(self, name: str, call: Callable[[], Trace]) -> None:
        """Run once, all ranks starting together."""
        self.comm.allgather([0], self.arguments.timeout)
        start = time.perf_counter()
        cpu_start = time.process_time()
        trace = call()
        taken = time.perf_counter() - start
        busy = time.process_time() - cpu_start
        self.figures.setdefault(name, []).append(np.array(
            [taken, trace.compute_seconds, trace.wait_seconds, trace.flop, trace.bytes_sent, busy]))
        self.comm.allgather([0], self.arguments.timeout)

    def rows(self) -> list[dict[str, Any]]:
        """Give a row of medians for each run, from all ranks; on rank 0, none elsewhere. The first run warmed up."""
        medians = {}
        for name, runs in self.figures.items():
            mine = [statistics.median(column) for column in zip(*(run.tolist() for run in runs[1:]), strict=True)]
            medians[name] = self.comm.allgather(np.array(mine), self.arguments.timeout)
        seconds = {name: float(figures[:, 0].max()) for name, figures in medians.items()}
        transfer = seconds.pop(TRANSFER, 0.0)
        all_moved = float(medians.get(TRANSFER, np.zeros((1, 6)))[:, 4].sum())
        rows = []
        for name, taken in seconds.items():
            alone = name == ALONE
            figures = medians[name]
            wait = float(figures[:, 2].max())
            moved = float(figures[:, 4].sum())
            rows.append({
                "layout": name, "ranks": 1 if alone else self.comm.size,
                "threads": self.all_threads if alone else self.threads, "seconds": taken,
                "GFLOP/s": float(figures[:, 3].sum()) / taken / 1e9, "CPU max": float(figures[:, 5].max()),
                "compute max": float(figures[:, 1].max()),
                "compute min": float(figures[:1 if alone else None, 1].min()), "wait max": wait, "wait": wait / taken,
                "hidden": max(0.0, 1 - wait / (transfer * moved / all_moved)) if moved and all_moved else None,
                "efficiency": seconds[ALONE] / taken / self._gpus(alone) if ALONE in seconds else None,
                "MiB moved": moved / 2**20})
        return rows if self.comm.rank == 0 else []

    def _gpus(self, alone: bool) -> int:
        """Count the GPUs that a run has for each that one rank alone has."""
        return 1 if alone or not self.engine.gpus else len(set(self.engine.gpus))

    def close(self) -> None:
        """Give everything back."""
        for attention in (*self.layouts.values(), self.single):
            attention.close()
        self.engine.close()
        self.alone.Free()
