"""How long messages take that are on their way at the same time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..schedules.machine import Machine
from .trouble import Trouble

Numbers = NDArray[np.float64]
Integers = NDArray[np.int64]


class Wave(NamedTuple):
    """Messages that are on their way at the same time, in arrays of one shape.

    Attributes
    ----------
    moves : bool array
        Which of them there are.
    nbytes : array
    seconds : array of float
        That each takes.
    copying : array of float
        Seconds of a core that the rank which receives it is busy with it: where messages go through the memory of a
        node, it copies.
    """

    moves: NDArray[np.bool_]
    nbytes: Numbers
    seconds: Numbers
    copying: Numbers

    def map(self, change: Callable[[Any], Any]) -> Wave:
        """Give the same with each array changed in some way. Local."""
        return Wave(*(change(x) for x in self))


class Wires:
    """The links of a machine. Ranks are numbered node by node. Local.

    A message takes ``latency + bytes / bandwidth``. What leaves a node, or comes to it, in one wave shares its links to
    the others. Inside a node of CPUs, messages are copied by cores, which several threads may have to share.

    Parameters
    ----------
    machine : Machine
    trouble : Trouble
    """

    def __init__(self, machine: Machine, trouble: Trouble) -> None:
        self.machine = machine
        self._slow = dict(trouble.slow_links)

    def wave(self, sources: Integers, dests: Integers, nbytes: Numbers, moves: NDArray[np.bool_] | None = None,
             least: float = 0.0) -> Wave:
        """Say how long messages take that are on their way at the same time. Local.

        Parameters
        ----------
        sources, dests : integer arrays
            Ranks.
        nbytes : array
            Of each message.
        moves : bool array, optional
            Which of them there are; all by default.
        least : float
            Seconds that a host is busy with each, if it does not compute.
        """
        machine = self.machine
        inside, between = machine.rates.inside, machine.rates.between
        moves = np.ones(sources.shape, bool) if moves is None else moves
        nbytes = np.broadcast_to(nbytes, sources.shape) * moves
        here, there = sources // machine.ranks_per_node, dests // machine.ranks_per_node
        crosses = here != there

        # What crosses shares the links of both nodes; what does not is copied.
        leaving = (nbytes * crosses).ravel()
        out, into = (np.bincount(node.ravel(), leaving, machine.nodes) for node in (here, there))
        shared = np.maximum(nbytes, np.maximum(out[here], into[there]) / machine.links)
        copies = inside.latency + nbytes / inside.bandwidth
        across = np.maximum(least, between.latency + shared / between.bandwidth)
        seconds = np.where(crosses, across, least + copies * machine.crowd) * moves
        copying = (machine.rates.message + np.where(crosses, 0.0, copies)) * moves * (not machine.hides_inside)
        for (one, other), factor in self._slow.items():
            slow = ((sources == one) & (dests == other)) | ((sources == other) & (dests == one))
            alone = np.where(crosses, between.latency + nbytes / between.bandwidth, copies)
            seconds = np.where(slow & moves, np.maximum(seconds, factor * alone), seconds)
        return Wave(moves, nbytes, seconds, copying)
