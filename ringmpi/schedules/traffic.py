"""What travels by a schedule, in bytes: exact, where every rank needs every block and all have equally many tokens."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

from .grid import share_heads
from .spec import Schedule


@dataclass(frozen=True)
class Shape:
    """What is to be computed, as far as its cost goes by it.

    Attributes
    ----------
    n_q, n_k : int
        Tokens of queries, and of keys, of all ranks.
    heads, kv_heads, dim, dim_v, batch : int
    item, wide : int
        Bytes of a number of q, k and v, and of the accumulator.
    seen : float
        Share of the query-key pairs that are visible: 1 without a mask, 0.5 for causal.
    uneven : float
        Visible pairs of the rank that has most over the average: 1 if striped, near 2 if causal and contiguous.
    reach : float
        Share of the other ranks' blocks of which a rank sees any key: 1 if striped, 0.5 if causal and contiguous.
    scattered : bool
        Whether the tokens of ranks next to each other interleave (striped, zigzag), so that those of each are an item
        of work of their own where ranks share heads.
    most_q, most_k : int
        Tokens of the rank that has most; an even share if 0.
    replicated : bool
        Whether all ranks have the same queries; `n_q` is their number then.
    canonical : bool
        Whether sums are made in canonical order, for which keys are dealt out anew. That counts in memory alone: there
        is little else to choose from.
    bias : int
        Numbers of a key's bias: 0 without one, 1, or one for each head.
    in_keys : bool
        Whether values are the first numbers of keys, and travel with them.
    """

    n_q: int
    n_k: int
    heads: int
    kv_heads: int
    dim: int
    dim_v: int
    item: int = 4
    wide: int = 4
    batch: int = 1
    seen: float = 1.0
    uneven: float = 1.0
    reach: float = 1.0
    scattered: bool = False
    most_q: int = 0
    most_k: int = 0
    replicated: bool = False
    canonical: bool = False
    bias: int = 0
    in_keys: bool = False

    @property
    def key_width(self) -> int:
        """Numbers of a key and its value in one head, as they are held and sent."""
        return self.dim if self.in_keys else self.dim + self.dim_v

    @property
    def width(self) -> int:
        """Numbers of a key and its value in one head, as they are computed with; of a query and its result too."""
        return self.dim + self.dim_v


class Traffic(NamedTuple):
    """Bytes that a rank sends in a pass, on average.

    Attributes
    ----------
    heads, tokens : float
        Tokens for heads on the way in, and results or gradients for tokens on the way out.
    queries, states : float
        To the ranks that share queries, and what these make of them, home.
    block, gradients : float
        A block of K and V, and its gradients.
    hops : float
        Times that each of these is sent.
    """

    heads: float
    tokens: float
    queries: float
    states: float
    block: float
    gradients: float
    hops: float

    @property
    def carried(self) -> float:
        """Bytes of blocks, and of their gradients."""
        return self.hops * (self.block + self.gradients)

    @property
    def total(self) -> float:
        """All bytes."""
        return self.heads + self.tokens + self.queries + self.states + self.carried


def traffic(shape: Shape, schedule: Schedule, backward: bool = False) -> Traffic:
    """Count the bytes that a rank sends in a forward pass, or in a backward pass. Local.

    A block is sent to all that need it, however it gets there: along a ring, straight from its owner or down a tree it
    makes as many hops. Its gradients make as many on their way home. In shared memory none is sent.

    With c tokens a rank, and e and ea bytes of an item and of the accumulator: ring ``(P - 1) c 2 Hkv d e``; heads
    ``(2 H + 2 Hkv) d e c (P - 1) / P``; queries ``(P - 1) c H (d e + (d + 2) ea)``; and what their lse takes.
    """
    own_q, own_k = tokens_of_a_rank(shape, schedule.ranks)
    h, others = schedule.heads, schedule.queries - 1
    row, wide, item = shape.batch * shape.heads * own_q, shape.wide, shape.item
    repeated = kv_heads_inside(shape, h)
    key = shape.batch * own_k
    away = (h - 1) / h

    # Forward: q, k and v in, results out. Backward: lse, delta, q and dout in, gradients out.
    asked = row * (shape.dim * item + (shape.dim_v * item + 2 * wide if backward else 0))
    returned = row * (shape.dim * wide if backward else shape.dim_v * item + wide)
    brought = row * wide * (shape.dim if backward else shape.dim_v + 2)
    biases = key * wide * (shape.bias * h if shape.bias == 1 else shape.bias)
    block = key * repeated.all * shape.key_width * item + biases
    gradients = key * repeated.all * shape.key_width * wide + biases if backward else 0
    if shape.replicated:
        return Traffic(0, 0, 0, brought * others, block, gradients, 0)
    heads = away * (asked + block)
    tokens = away * (returned + gradients)
    hops = 0.0 if schedule.carrier == "window" else shape.reach * (schedule.keys - 1)
    return Traffic(heads, tokens, asked * others, brought * others, block, gradients, hops)


def axes(shape: Shape, schedule: Schedule) -> tuple[str, str, str]:
    """Order the axes of a grid, the one first along which a rank sends most bytes. Local.

    Heads, which nothing hides, then queries and their results, or keys.
    """
    queries = shape.n_q * shape.heads * (shape.dim * shape.item + (shape.dim_v + 2) * shape.wide)
    keys = shape.n_k * (shape.kv_heads * shape.key_width * shape.item + shape.bias * shape.wide)
    more_queries = queries * (schedule.queries - 1) > keys * (schedule.keys - 1)
    return ("heads", "queries", "keys") if more_queries else ("heads", "keys", "queries")


class Inside(NamedTuple):
    """Heads of the keys where ranks share heads: of all of them, and of the one that has most."""

    all: int
    most: int


def kv_heads_inside(shape: Shape, ranks: int) -> Inside:
    """Count the heads of the keys where so many ranks share heads; some may have one together. Local."""
    return _kv_heads_inside(shape.heads, shape.kv_heads, ranks)


@functools.lru_cache(maxsize=1024)
def _kv_heads_inside(heads: int, kv_heads: int, ranks: int) -> Inside:
    shares = [share.kv_heads for share in share_heads(heads, kv_heads, ranks)]
    return Inside(sum(shares), max(shares))


def tokens_of_a_rank(shape: Shape, ranks: int) -> tuple[float, float]:
    """Give the queries and the keys of a rank, on average. Local."""
    return shape.n_q if shape.replicated else shape.n_q / ranks, shape.n_k / ranks
