"""What a schedule costs: seconds, bytes that travel, and memory; and the one that costs least.

time = call + exchange of heads + gather of queries + sum over steps of max(compute, communication) + combine

Bytes are exact (`traffic`), seconds a model:

- a message takes ``latency + bytes / bandwidth`` (Hockney 1994). All ranks send at once. The ranks of a node share its
  links to others. On CPUs messages inside a node are copies by the cores that compute, so nothing hides them;
- an item of work takes what it has to read and write, and its flops (Williams et al. 2009, *Roofline*, but the sum: at
  the sizes where one does not dominate they do not overlap);
- keys or queries: Yang et al. 2024, *Context Parallelism for Scalable Million-Token Inference*, arXiv 2411.01783;
- a x b ranks: *Mesh-Attention*, arXiv 2512.20968: a rank is sent a - 1 shards of queries and b - 1 of keys, and
  returns a - 1 shards of states: O(N / sqrt(P)) bytes in place of O(N);
- heads: Jacobs et al. 2023, *DeepSpeed Ulysses*, arXiv 2309.14509.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ..errors import OptionError
from .machine import Machine, carry_seconds, exchange_seconds
from .memory import arrays
from .spec import Schedule, divisors
from .traffic import Shape, kv_heads_inside, tokens_of_a_rank, traffic

STEPS = {"ring": 1.0, "gather": 0.8, "broadcast": 0.9, "two-way": 2.0, "window": 0.9}    # of a ring's step, measured
MARGIN = 0.01               # that is not worth another schedule than the ring, or more memory
FEW_ROWS = 128              # for each head of the keys, from which on a rank begins with its own rows (see `forward`)
TILE = 64                   # columns that a kernel computes at once: the edge of what is visible costs half of them


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
        Seconds in which a rank waits for blocks, or moves them, and does not compute.
    carried : float
        Seconds that blocks are on their way, hidden or not.
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
    """Give the schedules that there are on such a machine: grids that the heads allow, and carriers. Local."""
    if replicated:
        return [Schedule(queries=machine.ranks)]
    return [Schedule(h, a, keys, carrier) for h in divisors(machine.ranks) if heads % h == 0
            for a, keys in ((a, machine.ranks // h // a) for a in divisors(machine.ranks // h))
            for carrier in _carriers(keys, machine)]


def _carriers(keys: int, machine: Machine) -> Iterator[str]:
    """Give the carriers that differ where so many ranks share keys."""
    yield "ring"
    if keys > 1:
        yield from ("gather", "broadcast")
        if not machine.on_gpu and keys <= machine.ranks_per_node:
            yield "window"
    if keys > 2:
        yield "two-way"


def choose(shape: Shape, machine: Machine, memory_limit: int | None = None, *, backward: bool = False,
           among: Iterable[Schedule] | None = None) -> Schedule:
    """Give the schedule of which a call takes least, by `estimate`. Local.

    Of those within `MARGIN` of it the ring, else the one that needs least memory.

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
    schedules = list(candidates(machine, shape.heads, shape.replicated) if among is None else among)
    seconds: dict[Schedule, float] = {}
    memory: dict[Schedule, int] = {}
    for schedule in schedules:
        each = [estimate(shape, schedule, machine, backward=way) for way in ((False, True) if backward else (False,))]
        memory[schedule] = each[0].memory
        if memory_limit is None or each[0].memory <= memory_limit:
            seconds[schedule] = sum(way.seconds for way in each)
    if not seconds:
        least = min(memory, key=lambda schedule: memory[schedule])
        raise OptionError(f"memory limit: expected {memory[least]} bytes a rank at least "
                          f"({memory[least] / 2**20:.1f} MiB, schedule {least}), got {memory_limit}; more ranks need "
                          "less each")
    enough = min(seconds.values()) * (1 + MARGIN)
    near = [schedule for schedule in seconds if seconds[schedule] <= enough]
    ring = Schedule(keys=machine.ranks)
    return ring if ring in near else min(near, key=lambda schedule: (memory[schedule], seconds[schedule]))


def kernel_seconds(shape: Shape, machine: Machine, rows: float, columns: float, seen: float, *, share: float = 1.0,
                   backward: bool = False) -> float:
    """Say how long a rank computes on one item of work, all elements of the batch. Local.

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
    rate = machine.rates.backward if backward else machine.rates.forward
    heads, kv_heads = shape.heads * share, kv_heads_inside(shape, round(1 / share)).most
    computed = seen if seen >= 1 else min(1.0, seen + TILE / (2 * max(columns, 1.0)))
    flop = 2 * heads * rows * columns * computed * (3 * shape.dim + 2 * shape.dim_v if backward else shape.width)
    slower = shape.item / 2 if machine.on_gpu else shape.wide / 4
    parallel = (rate.head * kv_heads + rate.row * rows * heads * shape.width
                + rate.key * columns * kv_heads * shape.width + slower * flop / rate.flops)
    return machine.crowd * shape.batch * (rate.item + parallel / max(1, machine.threads))


def estimate(shape: Shape, schedule: Schedule, machine: Machine, *, backward: bool = False) -> Estimate:
    """Say what a call costs by a schedule: a forward pass, or a backward pass. Local."""
    moved = traffic(shape, schedule, backward)
    rates, crowd = machine.rates, machine.crowd
    steps = 1 if shape.replicated else schedule.keys
    uneven = 1 + (shape.uneven - 1) * _of_groups(schedule)
    more = (steps - 1) * min(1.0, shape.reach * uneven)       # steps after the first in which the busiest rank computes
    seen = min(1.0, shape.seen * uneven * steps / (1 + more))
    work = [_work(shape, schedule, machine, step, seen, backward) for step in range(min(steps, 2))]
    compute = work[0] + work[-1] * more

    # What nothing hides: the call, its steps, heads, queries and what comes home.
    exchanges = exchange_seconds(shape, schedule, machine, moved)
    overhead = crowd * (rates.call + rates.step * steps * STEPS[schedule.carrier])

    # A block comes while a step computes, and is waited for as long as it takes longer; what cores move, always.
    moving, copying = carry_seconds(shape, schedule, machine, moved)
    exposed, carried = (max(0.0, moving - min(work)) + copying) * more, (moving + copying) * more
    return Estimate(schedule, overhead + exchanges + compute + exposed, compute, exchanges + overhead, exposed, carried,
                    round(moved.total), sum(arrays(shape, schedule, machine.on_gpu).values()))


def _work(shape: Shape, schedule: Schedule, machine: Machine, step: int, seen: float, backward: bool) -> float:
    """Say how long the rank that has most to do computes in a step, of the pairs of which it sees a share."""
    own_q, own_k = tokens_of_a_rank(shape, schedule.ranks)
    share = 1 / schedule.heads
    if shape.replicated:
        return kernel_seconds(shape, machine, own_q, own_k, seen, backward=backward)
    parts = schedule.heads if shape.scattered else 1
    rows, columns = schedule.heads * own_q, schedule.heads * own_k / parts
    if schedule.carrier == "two-way" and step:
        parts, columns = 2 * parts, columns / 2
    cuts = [rows * schedule.queries]
    many = rows * shape.heads >= FEW_ROWS * shape.kv_heads
    if schedule.queries > 1 and step == 0 and many:           # its own while those of others come
        cuts = [rows, rows * (schedule.queries - 1)]
    return parts * sum(kernel_seconds(shape, machine, n, columns, seen, share=share, backward=backward) for n in cuts)


def _of_groups(schedule: Schedule) -> float:
    """Say how much of the unevenness of ranks is left where some share heads, and with them their tokens."""
    groups = schedule.queries * schedule.keys
    return (1 - 1 / groups) / (1 - 1 / schedule.ranks) if schedule.ranks > 1 else 0.0


def fewest_bytes(size: int, queries: int, keys: int) -> Schedule:
    """Give the schedule in which fewer bytes travel: pass-KV or pass-Q. Local.

    The rule of Yang et al. 2024, where nothing hides what travels: keys go round if they are fewer bytes than queries
    and their states.

    Parameters
    ----------
    size : int
        Ranks.
    queries, keys : int
        Bytes of all queries and their states; of all keys and values.
    """
    return Schedule(queries=size) if queries < keys else Schedule(keys=size)
