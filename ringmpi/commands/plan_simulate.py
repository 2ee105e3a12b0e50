"""`plan --simulate`: follows the steps of a schedule, and says where it stops scaling and who holds the others up."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

from ..job.question import Question
from ..schedules.spec import Schedule, resolve
from ..simulation.case import UNEVEN_RANKS
from ..simulation.outcome import Outcome
from ..simulation.study import HALF, Size, Straggler, find_straggler, run, scaling, stops_scaling
from ..simulation.trouble import Trouble
from .units import time_text

SCALING_BUDGET = 2**22       # ranks times steps, of each number of ranks


def simulate(arguments: argparse.Namespace, question: Question) -> tuple[list[str], dict[str, Any]]:
    """Simulate a schedule; give what is to be said, and all of it for a record. Local.

    Raises
    ------
    OptionError
        If the schedule does not fit the ranks or the heads.
    """
    asked = arguments.schedule or "ring"
    schedule = question.schedule(asked)
    trouble = Trouble(arguments.jitter, arguments.seed, dict(arguments.slow_rank), dict(arguments.slow_link))
    outcome = run(question.case(schedule, trouble))
    straggler = find_straggler(outcome)
    usual = Trouble(arguments.jitter, arguments.seed)
    sizes = scaling(lambda ranks: question.case(_on_fewer(asked, schedule, ranks), usual), arguments.ranks,
                    SCALING_BUDGET) if schedule.ranks > 1 else []

    lines = [*_describe(outcome), _who(straggler, outcome), *_scaling(sizes, schedule, trouble != usual)]
    record = {"sizes": vars(question.sizes), "options": vars(question.options), "schedule": str(schedule),
              "seconds": outcome.seconds, "hidden": outcome.hidden, "bytes_sent": float(outcome.sent.mean()),
              "steps": schedule.keys, "steps_simulated": outcome.steps,
              "straggler": straggler and straggler._asdict(), "scaling": [vars(size) for size in sizes],
              "stops_scaling_at": stops_scaling(sizes), "says": lines}
    return lines, record


def _on_fewer(asked: str, schedule: Schedule, ranks: int) -> Schedule:
    """Give the same way round for fewer ranks: as many as may be share keys."""
    if ranks == schedule.ranks:
        return schedule
    if asked in ("heads", "queries", "mesh"):
        return resolve(asked, ranks)
    beside = schedule.heads * schedule.queries
    return replace(schedule, keys=ranks // beside) if ranks % beside == 0 else Schedule(keys=ranks)


def _describe(outcome: Outcome) -> list[str]:
    """Say what was simulated, how exactly, and what came out."""
    case = outcome.case
    keys, ranks = case.schedule.keys, case.machine.ranks
    spent = [f"{verb} {time_text(float(x.mean()))}" for verb, x in
             (("computes", outcome.compute), ("copies", outcome.copied), ("waits", outcome.wait)) if x.any()]
    hidden = f"; {outcome.hidden:.0%} of the time that blocks are on their way is hidden" if keys > 1 else ""
    lines = [f"{case.schedule}: {time_text(outcome.seconds)}{hidden}",
             f"on average a rank {', '.join(spent)}"]
    if outcome.steps < keys:
        lines.append(f"(the first {outcome.steps:,} of {keys:,} steps were simulated; the others are taken to go on as "
                     "the second half of those did)")
    if ranks > UNEVEN_RANKS and case.shape.seen < 1:
        lines.append(f"(beyond {UNEVEN_RANKS:,} ranks, all are taken to have the average work)")
    return lines


def _who(straggler: Straggler | None, outcome: Outcome) -> str:
    """Say who holds the others up."""
    if straggler is None:
        return "Nobody holds the others up."
    share = straggler.seconds / outcome.seconds
    return (f"{straggler.what[0].upper()}{straggler.what[1:]} holds the others up: like the others, it would save "
            f"{time_text(straggler.seconds)} ({share:.0%})." if straggler.what != "jitter" else
            f"Jitter costs {time_text(straggler.seconds)} ({share:.0%}), and no rank of its own more than that.")


def _scaling(sizes: list[Size], schedule: Schedule, slow: bool) -> list[str]:
    """Give a table of more and more ranks, and say from where on they do not help."""
    if not sizes:
        return []
    lines = [f"{'ranks':>9}  {'time':>8}  efficiency{', without what is slow' if slow else ''}"]
    lines += [f"{size.ranks:9,}  {time_text(size.seconds):>8}  {size.efficiency:10.1%}" for size in sizes]
    stop = stops_scaling(sizes)
    name = "The ring" if schedule.carrier == "ring" and schedule.keys == schedule.ranks else str(schedule)
    lines.append(f"{name} stops scaling at {stop:,} ranks: from there on they are less than {HALF:.0%} as efficient as "
                 "one." if stop else f"{name} scales: {sizes[-1].ranks:,} ranks are {sizes[-1].efficiency:.0%} as "
                                     "efficient as one.")
    return lines
