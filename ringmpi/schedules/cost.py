"""What a schedule costs: seconds, bytes that travel, and memory; and the one that costs least.

time = exchange of heads + gather of queries + sum over steps of max(compute, communication) + combine

Bytes are exact (tests hold them against `Carrier.steps` and against traces), seconds a model:

- a message takes ``latency + bytes / bandwidth`` (Hockney 1994); all ranks send at once, and a node's ranks share its
  link between nodes and, on CPUs, its cores, which copy what is sent inside the node;
- keys or queries: Yang et al. 2024, *Context Parallelism for Scalable Million-Token Inference*, arXiv 2411.01783;
- a x b ranks: *Mesh-Attention*, arXiv 2512.20968: a rank is sent a - 1 shards of queries and b - 1 of keys, and
  returns a - 1 shards of states: O(N / sqrt(P)) bytes in place of O(N);
- heads: Jacobs et al. 2023, *DeepSpeed Ulysses*, arXiv 2309.14509.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .rates import CPU, Rates
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
    most_q, most_k : int
        Tokens of the rank that has most; even shares by default.
    replicated : bool
        Whether all ranks have the same queries; `n_q` is their number then.
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
    most_q: int = 0
    most_k: int = 0
    replicated: bool = False


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
    rates : Rates
    """

    ranks: int
    ranks_per_node: int
    threads: int = 1
    cores: int = 1
    on_gpu: bool = False
    rates: Rates = CPU

    @property
    def nodes(self) -> int:
        """How many nodes."""
        return -(-self.ranks // self.ranks_per_node)

    @property
    def crowd(self) -> float:
        """How many threads share a core; 1 at least."""
        return 1.0 if self.on_gpu else max(1.0, min(self.ranks, self.ranks_per_node) * self.threads / self.cores)


@dataclass(frozen=True)
class Estimate:
    """What a call costs by a schedule.

    Attributes
    ----------
    schedule : Schedule
    seconds : float
        Of the call, on the slowest rank.
    compute_seconds : float
        Of them the kernel's.
    exchange_seconds : float
        For what nothing hides: heads, queries and states that nobody computes beside, and the call's own.
    exposed : float
        Seconds in which a rank waits for blocks that come too late to be hidden by computing.
    carried : float
        Seconds that the blocks are on their way, hidden or not.
    bytes_sent : int
        Of a rank, on average.
    memory : int
        Bytes of arrays and buffers of the rank that has most.
    """

    schedule: Schedule
    seconds: float
    compute_seconds: float
    exchange_seconds: float
    exposed: float
    carried: float
    bytes_sent: int
    memory: int

    @property
    def hidden(self) -> float:
        """Share of the time that blocks are on their way in which ranks compute; 1 if none travels."""
        return 1.0 - self.exposed / self.carried if self.carried else 1.0


def candidates(machine: Machine, heads: int, replicated: bool = False) -> list[Schedule]:
    """Give the schedules that are worth a thought on such a machine: grids and carriers. Local."""
    raise NotImplementedError


def kernel_seconds(shape: Shape, machine: Machine, rows: float, columns: float, seen: float, *, share: float = 1.0,
                   backward: bool = False) -> float:
    """Say how long a rank computes on one item of work: rows x columns tokens, one element of the batch. Local.

    Parameters
    ----------
    shape : Shape
    machine : Machine
    rows, columns : float
        Queries and keys.
    seen : float
        Share of their pairs that is visible.
    share : float
        Of the heads.
    backward : bool
        Whether it is the backward pass.
    """
    raise NotImplementedError


def estimate(shape: Shape, schedule: Schedule, machine: Machine, *, backward: bool = False) -> Estimate:
    """Say what a call costs by a schedule: a forward pass, or a backward pass. Local."""
    raise NotImplementedError


def choose(shape: Shape, machine: Machine, memory_limit: int | None = None, *, backward: bool = False,
           among: Iterable[Schedule] | None = None) -> Schedule:
    """Give the schedule of which a call takes least, by `estimate`; the ring where the gain is within the error. Local.

    Parameters
    ----------
    shape : Shape
    machine : Machine
    memory_limit : int, optional
        Bytes that the arrays and buffers of a rank may take, at most.
    backward : bool
        Count a backward pass too.
    among : iterable of Schedule, optional
        `candidates` by default.

    Raises
    ------
    OptionError
        If none is within the limit; it says what the smallest needs.
    """
    raise NotImplementedError


def fewest_bytes(size: int, queries: int, keys: int) -> Schedule:
    """Give the schedule in which fewer bytes travel: pass-KV or pass-Q. Local.

    The rule of Yang et al. 2024, *Context Parallelism for Scalable Million-Token Inference*, where nothing hides what
    travels: keys go round if they are fewer bytes than queries and their states.

    Parameters
    ----------
    size : int
        Ranks.
    queries, keys : int
        Bytes of all queries and their states; of all keys and values.
    """
    return Schedule(queries=size) if queries < keys else Schedule(keys=size)
