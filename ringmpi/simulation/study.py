"""What a simulation is for: who holds the others up, and up to how many ranks more of them help."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import NamedTuple

from ..errors import OptionError
from .case import Case
from .events import MOST_RANKS, simulate_events
from .outcome import Outcome
from .rounds import BUDGET, simulate
from .trouble import Trouble

WORTH_SAYING = 0.01          # share of the time that a straggler costs at least
HALF = 0.5                   # efficiency below which a schedule is said to scale no more


class Straggler(NamedTuple):
    """What holds the others up.

    Attributes
    ----------
    what : str
        "rank 3", "the link between ranks 3 and 4" or "jitter".
    seconds : float
        By which the call would be shorter without that.
    """

    what: str
    seconds: float


@dataclass(frozen=True)
class Size:
    """A number of ranks that was tried."""

    ranks: int
    seconds: float
    efficiency: float


def run(case: Case, budget: int = BUDGET) -> Outcome:
    """Simulate a forward pass: event by event if some ranks share cores, else all ranks at once. Local.

    Parameters
    ----------
    case : Case
    budget : int
        See `simulate`.
    """
    return simulate_events(case) if case.machine.crowd > 1 and case.ranks.size <= MOST_RANKS else simulate(case, budget)


def find_straggler(outcome: Outcome, budget: int = BUDGET) -> Straggler | None:
    """Say which rank or link costs most time: without it, its share of the jitter or of the mask's work. Local.

    The rank that computes longest is looked at, and the links that are said to be slow. For each it is simulated what
    the call would take if it were like the others.

    Parameters
    ----------
    outcome : Outcome
    budget : int
        See `simulate`; better the one that `outcome` is from.
    """
    case, trouble = outcome.case, outcome.case.trouble
    cures: dict[str, Trouble] = {}
    most, mean = float(outcome.compute.max()), float(outcome.compute.mean())
    if most > mean:
        rank = outcome.busiest
        factor = trouble.slow_ranks.get(rank, 1.0) * mean / most
        cures[f"rank {rank}"] = replace(trouble, slow_ranks={**trouble.slow_ranks, rank: factor})
    for one, other in trouble.slow_links:
        cures[f"the link between ranks {one} and {other}"] = trouble.without_link((one, other))
    if trouble.jitter:
        cures["jitter"] = replace(trouble, jitter=0.0)
    gains = [Straggler(what, outcome.seconds - run(replace(case, trouble=cure), budget).seconds)
             for what, cure in cures.items()]
    worst = max(gains, key=lambda straggler: straggler.seconds, default=None)
    return worst if worst and worst.seconds > WORTH_SAYING * outcome.seconds else None


def scaling(make: Callable[[int], Case], ranks: int, budget: int) -> list[Size]:
    """Simulate more and more ranks: 1, 2, 4, and so on up to `ranks`; not those on which it can't be done. Local.

    Parameters
    ----------
    make : callable
        Gives the case for a number of ranks.
    ranks : int
    budget : int
        See `simulate`.

    Returns
    -------
    list of Size
        Efficient is what takes a rank's share of the time of one.
    """
    seconds: dict[int, float] = {}
    for number in [*(2**power for power in range((ranks - 1).bit_length())), ranks]:
        with suppress(OptionError):              # heads that so many can't share, a window that is on several nodes
            seconds[number] = run(make(number), budget).seconds
    return [Size(number, taken, seconds[1] / taken / number) for number, taken in seconds.items()]


def stops_scaling(sizes: list[Size]) -> int | None:
    """Give the number of ranks from which on they are less than half as efficient as one; None if all are. Local."""
    below = None
    for size in reversed(sizes):
        if size.efficiency >= HALF:
            break
        below = size.ranks
    return below
