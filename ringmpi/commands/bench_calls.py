"""Whole calls by several schedules in turns: what `bench network` takes the rates from, and `bench auto` compares."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..attention import RingAttention
from ..checks import check_threads
from ..dtypes import accumulator, check_dtype
from ..engine import connected
from ..mask import Mask
from ..mpi import comm as mpi
from ..schedules.machine import Machine
from ..schedules.spec import Schedule
from ..schedules.traffic import Shape


@dataclass(frozen=True)
class CallCase:
    """A call to measure: the same number of tokens on each rank, striped if causal."""

    tokens: int
    heads: int
    kv_heads: int
    dim: int
    causal: bool
    dtype: str = "float32"

    def shape(self, ranks: int) -> Shape:
        """Say what its cost goes by. Local."""
        items = check_dtype(self.dtype, "--dtype")
        return Shape(self.tokens * ranks, self.tokens * ranks, self.heads, self.kv_heads, self.dim, self.dim,
                     items.itemsize, accumulator(items).itemsize, seen=0.5 if self.causal else 1.0,
                     scattered=self.causal)

    def __str__(self) -> str:
        return f"{self.tokens} {self.heads}/{self.kv_heads} dim {self.dim} {'causal' if self.causal else 'full'}"


class CallBench:
    """Measures calls on all ranks. Collective over *comm*.

    Parameters
    ----------
    arguments : argparse.Namespace
        With `backend`, `threads`, `timeout` and `repeat`.
    world : MPI.Intracomm
    comm : Comm
    """

    def __init__(self, arguments: argparse.Namespace, world: Any, comm: mpi.Comm) -> None:
        self._world = world
        self._comm = comm
        self._arguments = arguments
        self.options: dict[str, Any] = {"backend": arguments.backend, "timeout": arguments.timeout,
                                        "threads": check_threads(arguments.threads) or comm.threads}
        engine = connected(comm, arguments.timeout, arguments.backend, self.options["threads"], "auto", False)
        self.machine: Machine = engine.machine()
        engine.close()

    def measure(self, case: CallCase, schedules: Sequence[Schedule], backward: bool = True
                ) -> dict[Schedule, tuple[list[float], list[float]]]:
        """Give the seconds of forward passes and of backward passes by each schedule, of the slowest rank."""
        rng = np.random.default_rng(self._comm.rank)
        items = check_dtype(case.dtype, "--dtype")
        q, k, v = (rng.standard_normal((case.tokens, heads, case.dim), np.float32).astype(items)
                   for heads in (case.heads, case.kv_heads, case.kv_heads))
        objects = {schedule: self.attention(case, schedule) for schedule in schedules}
        times: dict[Schedule, list[tuple[float, float]]] = {schedule: [] for schedule in schedules}
        for turn in range(self._arguments.repeat + 1):
            for schedule, attention in objects.items():
                seconds = self._time(lambda: attention(q, k, v, keep=backward)), 0.0    # noqa: B023 (called at once)
                if backward:
                    seconds = seconds[0], self._time(lambda: attention.backward(q))     # noqa: B023
                if turn:
                    times[schedule].append(seconds)
        for attention in objects.values():
            attention.close()
        return {schedule: ([x for x, _ in runs], [y for _, y in runs]) for schedule, runs in times.items()}

    def attention(self, case: CallCase, schedule: Schedule | str) -> RingAttention:
        """Make what computes a case. Collective over *comm*."""
        return RingAttention(self._world, mask=Mask(causal=case.causal), schedule=schedule,
                             layout="striped" if case.causal else "contiguous", **self.options)

    def choice(self, case: CallCase, backward: bool) -> Schedule:
        """Give what a call chooses by itself. Collective over *comm*."""
        items = check_dtype(case.dtype, "--dtype")
        q, k, v = (np.zeros((case.tokens, heads, case.dim), items)
                   for heads in (case.heads, case.kv_heads, case.kv_heads))
        with self.attention(case, "auto") as attention:
            attention(q, k, v, keep=backward)
            return attention.schedule

    def _time(self, call: Any) -> float:
        """Give the seconds of a call on the slowest rank; all start together."""
        self._comm.exchange("", self._arguments.timeout)
        start = time.perf_counter()
        call()
        taken = time.perf_counter() - start
        return float(self._comm.allgather([taken], self._arguments.timeout).max())


def undisturbed(seconds: Sequence[float]) -> float:
    """Give the lower quartile of some runs: what else a machine does makes them slower, never faster. Local."""
    return sorted(seconds)[len(seconds) // 4]
