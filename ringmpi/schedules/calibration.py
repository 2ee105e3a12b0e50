"""The rates of a machine from what calls have taken: those by which `cost.estimate` is nearest to all of them.

On one node the estimate is a sum of times, each so many bytes, numbers, steps or flops over a rate. So least squares of
relative errors, no time below 0, gives them all at once, as they are in a call: beside each other, with warm caches or
not, and with all ranks busy. What the calls do not tell apart is taken in the proportions of usual rates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .cost import estimate
from .machine import Machine
from .rates import CPU, KernelRate, LinkRate, Rates
from .spec import Schedule
from .traffic import Shape

UNKNOWN = 15                # rates that are fitted
ROUNDS = 5000               # of the solution, at most
TRUST = 0.3                 # in usual rates: one twice as slow weighs as a call that is missed by this share


class Measured(NamedTuple):
    """What a pass has taken."""

    shape: Shape
    schedule: Schedule
    backward: bool
    seconds: float


def fit(measured: Sequence[Measured], machine: Machine, inside: LinkRate, between: LinkRate, where: str) -> Rates:
    """Give the rates by which the estimates are nearest to what was measured. Local.

    Parameters
    ----------
    measured : sequence of Measured
        Of calls of several sizes, by several schedules.
    machine : Machine
        That they ran on.
    inside, between : LinkRate
        What MPI takes for messages, which is not fitted.
    where : str
        What was measured, for display.
    """
    def machine_of(times: NDArray[np.float64]) -> Machine:
        return replace(machine, rates=_rates(times, inside, between, where))

    table = np.array([[_seconds(x, unit) for unit in map(machine_of, np.eye(UNKNOWN))] for x in measured])
    base = np.array([_seconds(x, machine_of(np.zeros(UNKNOWN))) for x in measured])
    seconds = np.array([x.seconds for x in measured])
    table, wanted = (table - base[:, None]) / seconds[:, None], 1 - base / seconds
    usual = _times(CPU)
    alike = table @ usual
    usual *= (alike @ wanted) / (alike @ alike)               # as fast as this machine is
    times = _least_squares(np.concatenate([table, np.diag(TRUST / usual)]),
                           np.concatenate([wanted, np.full(UNKNOWN, TRUST)]))
    return _rates(times, inside, between, where)


def _seconds(x: Measured, machine: Machine) -> float:
    return estimate(x.shape, x.schedule, machine, backward=x.backward).seconds


def _rates(times: NDArray[np.float64], inside: LinkRate, between: LinkRate, where: str) -> Rates:
    """Make rates of what is not known: seconds each, or seconds a byte or a flop."""
    latency, per_byte, message, call, step, *kernels = times.tolist()
    forward, backward = (KernelRate(item, head, row, key, _over(flop))
                         for item, head, row, key, flop in (kernels[:5], kernels[5:]))
    return Rates(inside, between, forward, backward, LinkRate(latency, _over(per_byte)), message, call, step, where)


def _times(rates: Rates) -> NDArray[np.float64]:
    """Give what is fitted of some rates, as `_rates` takes it."""
    kernels = [x for kernel in (rates.forward, rates.backward) for x in (*kernel[:4], 1 / kernel.flops)]
    return np.array([rates.exchange.latency, 1 / rates.exchange.bandwidth, rates.message, rates.call, rates.step,
                     *kernels])


def _over(seconds: float) -> float:
    """Give the rate of a time; what takes none is fast, but a number that a file can hold."""
    return 1 / seconds if seconds > 1e-18 else 1e18


def _least_squares(table: NDArray[np.float64], wanted: NDArray[np.float64]) -> NDArray[np.float64]:
    """Solve ``table @ x = wanted`` as nearly as numbers >= 0 can, one after the other until they stand.

    As `scipy.optimize.nnls` does, with which the tests compare it where SciPy is installed: its 140 MiB are much for
    the fifteen numbers that a single command fits.
    """
    lengths = np.sqrt((table**2).sum(axis=0))
    lengths[lengths == 0] = 1.0
    products = (table / lengths).T @ (table / lengths)
    target = (table / lengths).T @ wanted
    x = np.zeros(len(lengths))
    for _ in range(ROUNDS):
        before = x.copy()
        for j in range(len(x)):
            if products[j, j]:
                x[j] = max(0.0, x[j] + (target[j] - products[j] @ x) / products[j, j])
        if np.abs(x - before).max() < 1e-9 * (x.max() or 1.0):
            break
    solution: NDArray[np.float64] = x / lengths
    return solution
