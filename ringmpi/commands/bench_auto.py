"""`bench auto`: every schedule in turns, beside the one that a call chooses by itself, and what was predicted."""

from __future__ import annotations

import argparse
import itertools
import statistics
from typing import Any

from ..mpi import comm as mpi
from ..mpi.world import comm_world
from ..schedules.cost import candidates, estimate
from ..schedules.spec import Schedule
from .bench_calls import CallBench, CallCase

NEAR = 0.03, 0.1, 0.25       # the shares within which figures are counted


def measure_auto(arguments: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Measure every case that is asked for; give the rows of the table, and what else is worth keeping.

    On rank 0, nothing elsewhere. Collective over COMM_WORLD.
    """
    world = comm_world(arguments.timeout)
    comm = mpi.private_comm(world, arguments.timeout, exclusive=True)
    bench = CallBench(arguments, world, comm)
    rows = []
    for tokens, (heads, kv_heads), dim, mask in itertools.product(arguments.tokens, arguments.heads, arguments.dim,
                                                                  arguments.mask):
        rows += _rows(bench, CallCase(tokens, heads, kv_heads, dim, mask == "causal", arguments.dtype), arguments)
    more = {"rates": bench.machine.rates.where, "crowd": bench.machine.crowd, "summary": _summary(rows)}
    return (rows, more) if comm.rank == 0 else ([], {})


def _rows(bench: CallBench, case: CallCase, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure a case; give a row for its forward pass, and one for both passes."""
    machine = bench.machine
    schedules = candidates(machine, case.heads)
    both = "both" in arguments.passes
    measured = bench.measure(case, schedules, both)
    rows = []
    for way in arguments.passes:
        backward = way == "both"
        seconds = {schedule: statistics.median(map(sum, zip(*ways, strict=True)) if backward else ways[0])
                   for schedule, ways in measured.items()}
        predicted = {schedule: sum(estimate(case.shape(machine.ranks), schedule, machine, backward=each).seconds
                                   for each in ((False, True) if backward else (False,))) for schedule in schedules}
        rows.append(_row(case, way, bench.choice(case, backward), seconds, predicted, machine.crowd))
    return rows


def _row(case: CallCase, way: str, chosen: Schedule, seconds: dict[Schedule, float], predicted: dict[Schedule, float],
         crowd: float) -> dict[str, Any]:
    best = min(seconds, key=lambda schedule: seconds[schedule])
    ring = next(schedule for schedule in seconds if schedule.keys == schedule.ranks and schedule.carrier == "ring")
    return {"tokens a rank": case.tokens, "heads": f"{case.heads}/{case.kv_heads}", "dim": case.dim,
            "mask": "causal" if case.causal else "full", "pass": way, "threads a core": crowd,
            "auto": str(chosen), "seconds": f"{seconds[chosen]:.5f}", "best": str(best),
            "best seconds": f"{seconds[best]:.5f}", "over best": seconds[chosen] / seconds[best],
            "ring over best": seconds[ring] / seconds[best],
            "predicted over measured": predicted[chosen] / seconds[chosen],
            "all": {str(x): (seconds[x], predicted[x]) for x in seconds}}


def _summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Say in how many cases the choice, and the prediction, were near."""
    choices = [row["over best"] - 1 for row in rows]
    chosen = [abs(row["predicted over measured"] - 1) for row in rows]
    every = [abs(predicted / seconds - 1) for row in rows for seconds, predicted in row["all"].values()]
    figures = {"choice over best": choices, "prediction of the choice": chosen, "prediction of every schedule": every}
    return {name: {"cases": len(errors), "median": statistics.median(errors), "most": max(errors),
                   **{f"within {near:.0%}": sum(x <= near for x in errors) / len(errors) for near in NEAR}}
            for name, errors in figures.items()}
