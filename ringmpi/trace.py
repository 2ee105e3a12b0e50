"""What a ring cost: seconds computing, seconds waiting, bytes and pairs, step by step."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Step:
    """One block on one rank. Times in seconds, sizes in bytes, of the block but where it says gradient.

    What begins, the work on a block and the wait for the next, begins so many seconds after the call did.
    """

    step: int
    source: int
    compute_start: float = 0.0
    wait_start: float = 0.0
    pairs: int = 0
    compute_seconds: float = 0.0
    wait_seconds: float = 0.0
    bytes_sent: int = 0
    bytes_received: int = 0
    gradient_bytes_sent: int = 0


@dataclass
class Exchange:
    """What some ranks have exchanged before the steps or after them. Times in seconds, sizes in bytes."""

    what: str
    start: float = 0.0
    wait_seconds: float = 0.0
    bytes_sent: int = 0
    bytes_received: int = 0


@dataclass
class Trace:
    """The steps of one call on this rank, and their sums.

    Attributes
    ----------
    started : float
        When the call began, by this rank's clock (`time.perf_counter`).
    steps : list of Step
        One for each position in the ring, idle ones included. In canonical order a backward pass has as many again, in
        which blocks of queries come by.
    exchanges : list of Exchange
        Of queries, heads and tokens, where the schedule has any; and a wait for the first block, if nothing is computed
        until it comes.
    setup_seconds : float
        Seconds that the agreement before the first message took, waiting for late ranks included.
    compile_seconds : float
        Seconds of the first call that went into compiling kernels, or loading them, and waiting for the rank of this
        node that compiles; not part of `setup_seconds`.
    flop_per_pair : int
        Floating-point operations for each visible query-key pair, all heads: ``2 heads (dim + dim_v)``.
    kernels : str
        Whose kernels the pass took where it could: ``"own"``, or in a backward pass on a GPU a library's name.
    """

    started: float = field(default_factory=time.perf_counter)
    steps: list[Step] = field(default_factory=list)
    exchanges: list[Exchange] = field(default_factory=list)
    setup_seconds: float = 0.0
    compile_seconds: float = 0.0
    flop_per_pair: int = 0
    kernels: str = "own"

    def now(self) -> float:
        """Seconds since the call began."""
        return time.perf_counter() - self.started

    @property
    def pairs(self) -> int:
        """Visible query-key pairs; in canonical order, backward, those of the queries and those of the keys."""
        return sum(s.pairs for s in self.steps)

    @property
    def flop(self) -> int:
        """Floating-point operations over visible pairs."""
        return self.pairs * self.flop_per_pair

    @property
    def compute_seconds(self) -> float:
        """Seconds in the backend, polling MPI included."""
        return sum(s.compute_seconds for s in self.steps)

    @property
    def wait_seconds(self) -> float:
        """Seconds waiting for other ranks with nothing to compute."""
        return sum(s.wait_seconds for s in self.steps) + sum(x.wait_seconds for x in self.exchanges)

    @property
    def bytes_sent(self) -> int:
        """Bytes of K and V sent on."""
        return sum(s.bytes_sent for s in self.steps)

    @property
    def gradient_bytes_sent(self) -> int:
        """Bytes of the gradients of K and V sent on, or home."""
        return sum(s.gradient_bytes_sent for s in self.steps)

    @property
    def exchanged_bytes_sent(self) -> int:
        """Bytes of queries, heads and results that were sent to other ranks."""
        return sum(x.bytes_sent for x in self.exchanges)

    @property
    def hops(self) -> int:
        """Steps in which blocks came in."""
        return sum(s.bytes_received > 0 for s in self.steps)

    def as_dict(self) -> dict[str, Any]:
        """Give sums and steps as plain numbers, for JSON."""
        names = ("started", "pairs", "flop", "compute_seconds", "wait_seconds", "setup_seconds", "compile_seconds",
                 "bytes_sent", "gradient_bytes_sent", "exchanged_bytes_sent", "hops")
        return {name: getattr(self, name) for name in names} | {
            "kernels": self.kernels,
            "steps": [asdict(s) for s in self.steps], "exchanges": [asdict(x) for x in self.exchanges]}
