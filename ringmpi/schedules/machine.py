"""What computes, and how long bytes are on their way on it: ranks, nodes, cores, and the links between them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .rates import CPU, Rates
from .spec import Schedule
from .traffic import Shape, Traffic, axes

SUMS = 0.5          # times that gradients of a block are cleared and added, as an exchange packs and unpacks; measured


@dataclass(frozen=True)
class Machine:
    """What computes.

    Attributes
    ----------
    ranks : int
    ranks_per_node : int
    threads : int
        CPU threads of a rank.
    cores : int
        Of a node; where its ranks have more threads than that, these share them.
    on_gpu : bool
        Whether each rank computes on a GPU of its own.
    links : int
        Of a node to other nodes; its ranks share them.
    rates : Rates
    """

    ranks: int
    ranks_per_node: int
    threads: int = 1
    cores: int = 1
    on_gpu: bool = False
    links: int = 1
    rates: Rates = CPU

    @property
    def nodes(self) -> int:
        """How many nodes."""
        return -(-self.ranks // self.ranks_per_node)

    @property
    def crowd(self) -> float:
        """How many threads share a core; 1 at least."""
        return 1.0 if self.on_gpu else max(1.0, min(self.ranks, self.ranks_per_node) * self.threads / self.cores)

    @property
    def hides_inside(self) -> bool:
        """Whether a rank computes while bytes move inside its node: GPUs do."""
        return self.on_gpu


def exchange_seconds(shape: Shape, schedule: Schedule, machine: Machine, moved: Traffic) -> float:
    """Say how long the exchanges before and after the steps take. Local."""
    seconds, rates = 0.0, machine.rates
    for axis, sizes in (("heads", (moved.heads, moved.tokens)), ("queries", (moved.queries, moved.states))):
        members = getattr(schedule, axis)
        if members == 1:
            continue
        inside = _members_inside(shape, schedule, machine, axis)
        for nbytes in sizes:
            near = nbytes * (inside - 1) / (members - 1)
            seconds += machine.crowd * (rates.exchange.seconds(nbytes) + rates.message * (members - 1)
                                        + rates.inside.seconds(near, inside - 1))
            if inside < members:
                sharing = min(machine.ranks, machine.ranks_per_node) / machine.links
                seconds += rates.between.seconds((nbytes - near) * sharing, members - inside)
    return seconds


def carry_seconds(shape: Shape, schedule: Schedule, machine: Machine, moved: Traffic) -> tuple[float, float]:
    """Say how long a block, and its gradients, are on their way in a step: beside computing, and by its cores. Local.

    The sum of both is what it takes; the second is not hidden.
    """
    members = schedule.keys
    if members == 1:
        return 0.0, 0.0
    rates = machine.rates
    if schedule.carrier == "window":                     # its own once there, and its gradients there and back
        copied = (moved.block + 2 * moved.gradients) / (members - 1)
        return 0.0, machine.crowd * (rates.inside.seconds(copied, 2) + rates.message * 2)
    messages = 2 if schedule.carrier == "two-way" else 1
    messages *= 2 if moved.gradients else 1
    nbytes = moved.block + moved.gradients
    inside = _members_inside(shape, schedule, machine, "keys")
    near, far = _shares(schedule, machine, inside)
    copying = machine.crowd * (SUMS * moved.gradients / rates.exchange.bandwidth + rates.message * messages
                               + (rates.inside.seconds(near * nbytes, messages) if inside > 1 else 0.0))
    moving = rates.between.seconds(far * nbytes, messages) if inside < members else 0.0
    return (max(moving, copying), 0.0) if machine.hides_inside else (moving, copying)


def _shares(schedule: Schedule, machine: Machine, inside: int) -> tuple[float, float]:
    """Say how many blocks a rank moves inside its node in a step, and a link of the node to others."""
    members = schedule.keys
    here = min(machine.ranks, machine.ranks_per_node)
    if schedule.carrier in ("ring", "two-way"):          # one of the members on a node sends to another node
        return float(inside > 1), max(1.0, here / inside / machine.links) if inside < members else 0.0
    away = (members - inside) / (members - 1)
    if schedule.carrier == "broadcast":                  # one member's block at a time, down a tree
        return (1 - away) * math.log2(members), away * math.ceil(math.log2(members)) * max(1.0, here / inside)
    return 1 - away, away * max(1.0, here / machine.links)


def _members_inside(shape: Shape, schedule: Schedule, machine: Machine, axis: str) -> int:
    """Count the members of a group along an axis that are on one node."""
    order = axes(shape, schedule)
    stride = math.prod(getattr(schedule, name) for name in order[:order.index(axis)])
    members: int = getattr(schedule, axis)
    return max(1, min(members, machine.ranks_per_node // int(stride)))
