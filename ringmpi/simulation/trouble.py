"""What makes real machines slower than their rates: jitter, a slow rank, a slow link."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Trouble:
    """How far ranks and links are from their rates. Local.

    Attributes
    ----------
    jitter : float
        Standard deviation of the time that an item of work takes, over its mean: log-normal, for each rank and step.
    seed : int
        Of the jitter.
    slow_ranks : mapping of int to float
        So many times as long a rank takes to compute.
    slow_links : mapping of (int, int) to float
        So many times as long messages between two ranks take, either way.
    """

    jitter: float = 0.0
    seed: int = 0
    slow_ranks: Mapping[int, float] = field(default_factory=dict)
    slow_links: Mapping[tuple[int, int], float] = field(default_factory=dict)

    def factors(self, step: int, ranks: int) -> NDArray[np.float64]:
        """Say by rank how many times as long the work of a step takes; the same however often it is asked. Local."""
        factors = np.ones(ranks)
        if self.jitter:
            sigma = math.sqrt(math.log1p(self.jitter**2))
            factors = np.random.default_rng([self.seed, step]).lognormal(-sigma**2 / 2, sigma, ranks)
        for rank, factor in self.slow_ranks.items():
            factors[rank] *= factor
        return factors

    def without_rank(self, rank: int) -> Trouble:
        """Give the same with one rank as fast as its rates. Local."""
        return replace(self, slow_ranks={other: factor for other, factor in self.slow_ranks.items() if other != rank})

    def without_link(self, link: tuple[int, int]) -> Trouble:
        """Give the same with one link as fast as its rates. Local."""
        return replace(self, slow_links={other: factor for other, factor in self.slow_links.items() if other != link})
