"""The steps of all ranks at once, by arrays: a step takes time as there are ranks.

Where all have the same work, ranks that have the same links about them do the same at the same time, so one of them
stands for all; that is why 100,000 ranks take seconds. Where they differ (jitter, a slow rank) and there are many, the
first steps are simulated, and the others are taken to go on as the second half of those did.
"""

from __future__ import annotations

import numpy as np

from .carriers import BroadcastSteps, GatherSteps, RingSteps, Steps, WindowSteps
from .case import Case
from .clock import Clock
from .exchanges import all_bytes, exchange, exchanged_bytes
from .outcome import Outcome

BUDGET = 2**26               # ranks times steps that are simulated one by one
FEWEST_STEPS = 64            # that are simulated in any case
SAME = 1e-12                 # relative difference of times that are the same
_STEPS: dict[str, type[Steps]] = {"ring": RingSteps, "two-way": RingSteps, "gather": GatherSteps,
                                  "broadcast": BroadcastSteps, "window": WindowSteps}


def simulate(case: Case, budget: int = BUDGET) -> Outcome:
    """Simulate a forward pass. Local.

    Parameters
    ----------
    case : Case
    budget : int
        Ranks times steps that may be simulated one by one.
    """
    sizes = exchanged_bytes(case)
    begun, _ = exchange(case, "heads", sizes["heads"], np.full(case.ranks.shape, case.call_seconds))
    heard, start = exchange(case, "queries", sizes["queries"], begun)

    # The steps, of ranks that differ; the later ones, if there are too many, as those before.
    steps = _STEPS[case.schedule.carrier](case)
    alike = steps.alike(start, heard)
    clock = Clock.begin(alike.fold(start), alike.fold(heard))
    most = min(case.schedule.keys, max(FEWEST_STEPS, budget // clock.now.size))
    steps.begin(clock)
    simulated = _take(steps, clock, case.schedule.keys, most)

    # Each rank has what the one has that stands for it; then what comes after the steps.
    now, compute, copied, wait, carried, sent = (
        alike.unfold(getattr(clock, name)) for name in ("now", "compute", "copied", "wait", "carried", "sent"))
    home, _ = exchange(case, "queries", sizes["states"], now)
    ended, _ = exchange(case, "heads", sizes["results"], home)
    return Outcome(case, ended, compute, copied, wait, carried, sent + all_bytes(case), simulated)


def _take(steps: Steps, clock: Clock, keys: int, most: int) -> int:
    """Take all steps, or the first of them, and go on like them; say how many are known. Local."""
    half = before = clock.copy()
    number = 0
    while number < most:
        if number == most // 2:
            half = clock.copy()
        steps.step(number, clock)
        number += 1

        # Once a step has taken all ranks equally long, it will again: what they do depends on differences only.
        if steps.constant and 1 < number < keys - 1:
            taken = clock.now - before.now
            if np.ptp(taken) <= SAME * taken.max():
                clock.go_on(before, 1, keys - 1 - number)
                steps.step(keys - 1, clock)
                return keys
        if steps.constant:
            before = clock.copy()
    clock.go_on(half, most - most // 2, keys - most)
    return most
