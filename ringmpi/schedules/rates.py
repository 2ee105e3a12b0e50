"""How fast a machine is, in the few numbers that the cost of a schedule goes by; kept in a file by `bench network`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple


class LinkRate(NamedTuple):
    """What a message takes: ``latency + bytes / bandwidth`` (Hockney 1994; the alpha-beta model).

    Attributes
    ----------
    latency : float
        Seconds.
    bandwidth : float
        Bytes a second, one way, of one rank's messages while no other rank's are on their way.
    """

    latency: float
    bandwidth: float

    def seconds(self, nbytes: float, messages: float = 1.0) -> float:
        """Say how long some messages of so many bytes in all take, one after the other. Local."""
        return self.latency * messages + nbytes / self.bandwidth


@dataclass(frozen=True)
class Rates:
    """How fast a machine is.

    Attributes
    ----------
    inside, between : LinkRate
        Messages between two ranks of a node, and between nodes.
    forward, backward : float
        Floating-point operations a second in the kernel's passes, of one CPU thread or one GPU, in float32.
    read : float
        Bytes of K and V a second that one thread, or GPU, reads where queries are few.
    copy : float
        Bytes a second that one thread copies in memory, or a GPU in its own.
    call : float
        Seconds of a call that has nothing to compute and nobody to wait for: checks, agreement, plan.
    item : float
        Seconds of an item of work that has next to nothing to compute.
    step : float
        Seconds of a step of a carrier without work and bytes.
    where : str
        What was measured, for display.
    """

    inside: LinkRate
    between: LinkRate
    forward: float
    backward: float
    read: float
    copy: float
    call: float
    item: float
    step: float
    where: str = "defaults"

    def save(self, path: Path) -> None:
        """Write them to a file (JSON), or replace it. Local."""
        raise NotImplementedError

    @classmethod
    def load(cls, path: Path) -> Rates:
        """Read such a file. Local.

        Raises
        ------
        RatesError
            If it is none, or damaged.
        """
        raise NotImplementedError


# A core of a server of 2023 with AVX-512, shared memory, and links of 100 Gbit/s; GPUs as an H100 with NVLink.
CPU = Rates(LinkRate(2e-6, 6e9), LinkRate(3e-6, 10e9), 50e9, 35e9, 10e9, 6e9, 300e-6, 20e-6, 30e-6)
GPU = Rates(LinkRate(10e-6, 200e9), LinkRate(15e-6, 40e9), 30e12, 20e12, 2.5e12, 1.2e12, 400e-6, 30e-6, 40e-6)
