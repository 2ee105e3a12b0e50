"""The table of `ringmpi plan`: what each schedule would cost, and whether the ring is too slow."""

from __future__ import annotations

import argparse
from typing import Any

from ..job.question import Question
from ..schedules.cost import Estimate, candidates, choose, estimate
from ..schedules.machine import Machine
from ..schedules.spec import Schedule
from .units import size_text, time_text

SHOWN = 12                  # candidates
WORTH_SAYING = 0.1          # share of a step


def tabulate(arguments: argparse.Namespace, question: Question) -> tuple[list[str], dict[str, Any]]:
    """Give the table of the candidates, and a sentence on the ring; and all of it for a record. Local.

    Raises
    ------
    OptionError
        If no schedule is within the memory limit.
    """
    machine, shape = question.machine, question.shape(question.machine.ranks)
    ways = (False, True) if arguments.backward else (False,)
    costs = [[estimate(shape, candidate, machine, backward=way) for way in ways]
             for candidate in candidates(machine, shape.heads)]
    costs.sort(key=_seconds)
    chosen = choose(shape, machine, arguments.memory_limit, backward=arguments.backward)
    ring = next(cost for cost in costs if cost[0].schedule == Schedule(keys=machine.ranks))
    best = next(cost for cost in costs if cost[0].schedule == chosen)

    shown = costs if arguments.all else [cost for number, cost in enumerate(costs) if number < SHOWN or cost in
                                         (ring, best)]
    rows = [_row(cost, chosen, arguments.memory_limit) for cost in shown]
    lines = [*_table(rows), ""]
    if len(shown) < len(costs):
        lines[-1] = f"(and {len(costs) - len(shown)} more: --all)"
    lines.append(_verdict(ring, best, machine, arguments.memory_limit))
    record = {"sizes": vars(question.sizes), "options": vars(question.options),
              "machine": {**vars(machine), "rates": vars(machine.rates)}, "chosen": str(chosen), "says": lines[-1],
              "candidates": [{"schedule": str(cost[0].schedule), "seconds": _seconds(cost), "memory": cost[0].memory,
                              "bytes_sent": sum(way.bytes_sent for way in cost), "hidden": _hidden(cost)}
                             for cost in costs]}
    return lines, record


def _seconds(cost: list[Estimate]) -> float:
    """Give the seconds of all passes."""
    return sum(way.seconds for way in cost)


def _hidden(cost: list[Estimate]) -> float:
    """Give the share of the time that blocks are on their way in which ranks compute."""
    carried = sum(way.carried for way in cost)
    return 1 - sum(way.exposed for way in cost) / carried if carried else 1.0


def _row(cost: list[Estimate], chosen: Schedule, limit: int | None) -> dict[str, str]:
    """Make a row of the table."""
    first = cost[0]
    mark = "auto" if first.schedule == chosen else "too large" if limit and first.memory > limit else ""
    return {"schedule": str(first.schedule), "time": time_text(_seconds(cost)),
            "sent by a rank": size_text(sum(way.bytes_sent for way in cost)),
            "memory of a rank": size_text(first.memory),
            "hidden": f"{_hidden(cost):.0%}" if sum(way.carried for way in cost) else "-", "": mark}


def _table(rows: list[dict[str, str]]) -> list[str]:
    """Set a table: the first and the last column to the left."""
    names = list(rows[0])
    widths = [max(len(name), *(len(row[name]) for row in rows)) for name in names]
    lines = [dict(zip(names, names, strict=True)), *rows]
    return ["  ".join(line[name].ljust(width) if name in (names[0], names[-1]) else line[name].rjust(width)
                      for name, width in zip(names, widths, strict=True)).rstrip() for line in lines]


def _verdict(ring: list[Estimate], best: list[Estimate], machine: Machine, limit: int | None) -> str:
    """Say in a sentence whether the ring is too slow, and what would do."""
    ranks, passes = machine.ranks, len(ring)
    compute = sum(way.compute_seconds for way in ring) / ranks
    send = sum(way.carried for way in ring) / max(1, ranks - 1)
    each = f"each hop has {time_text(compute)} to compute and {time_text(send)} to send"
    step = machine.rates.step * machine.crowd * passes
    if step > WORTH_SAYING * (compute + send):
        each += f", and a step takes {time_text(step)} besides"
    other = best[0].schedule
    if ranks == 1:
        return "One rank alone sends nothing: any schedule will do."
    if other == ring[0].schedule:
        return f"The ring will do: {each}."
    if limit and ring[0].memory > limit:
        return (f"The ring needs {size_text(ring[0].memory)} a rank, more than the limit of {size_text(limit)}: "
                f"{other} would do with {size_text(best[0].memory)}.")
    ratio = _seconds(ring) / _seconds(best)
    times = f"{ratio - 1:.0%} longer than" if ratio < 1.5 else f"{ratio:.2g} times as long as"
    return f"The ring takes {times} {other}: {each}."
