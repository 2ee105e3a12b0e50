"""What is simulated: which rank computes how long with which block, and how many bytes each block has."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ..layout import Layout, make
from ..mask import Mask
from ..mask_base import BaseMask
from ..schedules.cargo import halves
from ..schedules.cost import FEW_ROWS, STEPS, kernel_seconds
from ..schedules.grid import Grid, share_heads
from ..schedules.machine import Machine
from ..schedules.movers import carrier_class
from ..schedules.spec import Schedule, check_heads, resolve
from ..schedules.traffic import Shape, axes
from .trouble import Trouble
from .wires import Integers, Numbers, Wires

EXACT_RANKS = 256            # up to so many, pairs and tokens are counted for each rank ...
UNEVEN_RANKS = 2048          # ... and up to so many pairs, where a mask gives ranks unequal work; beyond, the average
SAMPLES = 2**24              # queries that are looked at to count pairs, for each block of keys


@dataclass(frozen=True, eq=False)
class Case:
    """A pass of a call, as far as its time goes by it. Local.

    Groups of ranks that share keys are numbered by their places in the grid's other two axes, heads first; a rank is
    ``[group, place]``.

    Attributes
    ----------
    shape : Shape
    schedule : Schedule
    machine : Machine
    trouble : Trouble
    ranks : integer array of shape (groups, keys)
    tokens : array of shape (groups, keys)
        Of each rank's block.
    block_bytes : array of shape (groups, keys)
    seconds : array of shape (queries, keys, keys), optional
        ``[., place, source]``: of a rank alone on its cores, for its work with a block; by its place among those that
        share queries. None: they all take `even` seconds.
    even : float
    """

    shape: Shape
    schedule: Schedule
    machine: Machine
    trouble: Trouble
    ranks: Integers
    tokens: Numbers
    block_bytes: Numbers
    seconds: Numbers | None
    even: float

    @cached_property
    def wires(self) -> Wires:
        """How long messages take."""
        return Wires(self.machine, self.trouble)

    @property
    def is_even(self) -> bool:
        """Whether all ranks have the same work at each step, and all blocks are of one size."""
        return self.seconds is None

    def work(self, sources: Integers) -> Numbers:
        """Give the seconds of each rank's work with a block, whose owner's place is given for each place. Local."""
        groups, keys = self.ranks.shape
        if self.seconds is None:
            return np.full((groups, keys), self.even)
        mine = self.seconds[:, np.arange(keys), sources]
        return np.tile(mine, (groups // len(mine), 1))

    def seconds_alone(self, step: int) -> Numbers:
        """Say how long ranks are at their work in a step, alone on their cores. Local."""
        factors: Numbers = self.trouble.factors(step, self.machine.ranks)[self.ranks]
        rates = self.machine.rates
        halves_apart = step > 0 and self.schedule.carrier == "two-way"
        return (self._work_of(step) + rates.forward.item * halves_apart) * factors

    def seconds_of(self, step: int) -> Numbers:
        """Say how long ranks are at their work in a step, where all share the cores all the time. Local."""
        return self.seconds_alone(step) * self.machine.crowd

    @property
    def step_seconds(self) -> float:
        """What a step takes besides, before anything is sent."""
        return self.step_alone * self.machine.crowd

    @property
    def step_alone(self) -> float:
        """The same on cores that nobody else uses."""
        return self.machine.rates.step * STEPS[self.schedule.carrier]

    def _work_of(self, step: int) -> Numbers:
        """Give the work of a step, which depends on the order in which blocks come by."""
        keys = self.schedule.keys
        places = np.arange(keys)
        if self.schedule.carrier == "broadcast":
            return self.work(np.full(keys, step))
        if self.schedule.carrier != "two-way" or step == 0:
            return self.work((places - step) % keys)
        seconds = np.zeros(self.ranks.shape)
        for sources, share in ((places - step) % keys, self.first_half), ((places + step) % keys, 1 - self.first_half):
            seconds += self.work(sources) * share[:, sources]
        return seconds

    @cached_property
    def first_half(self) -> Numbers:
        """Share of each block that goes the first way, if halves go both ways."""
        firsts = [[part.stop for part in halves(row)[0]] for row in self.tokens.tolist()]
        return np.array(firsts) / np.maximum(self.tokens, 1)

    def copying(self, seconds: Numbers | float) -> Numbers:
        """Say how long ranks are kept from their work by copies that take a core so long. Local."""
        return np.asarray(seconds * self.machine.crowd / max(1, self.machine.threads))

    @property
    def least(self) -> float:
        """Seconds that the host of a GPU, which computes meanwhile, is busy with a block."""
        return self.machine.rates.message if self.machine.hides_inside else 0.0

    @property
    def put_seconds(self) -> Numbers:
        """What a core takes to put a block where others can read it."""
        return np.asarray(self.block_bytes / self.machine.rates.inside.bandwidth)

    @property
    def notice_seconds(self) -> float:
        """What a core takes in a step to hear of a block that is read in place, and to say so of another."""
        rates = self.machine.rates
        return 2 * (rates.inside.latency + rates.message)

    @property
    def call_seconds(self) -> float:
        """What a call takes that has nothing to do."""
        return self.machine.rates.call * self.machine.crowd

    def needed(self, group: int) -> NDArray[np.bool_]:
        """Say for a group which place computes with which block; see `Route`. Local."""
        keys = self.ranks.shape[1]
        if self.seconds is None:
            return np.ones((keys, keys), bool)
        needed: NDArray[np.bool_] = self.seconds[group % len(self.seconds)] > 0
        return needed

    @property
    def own_share(self) -> float:
        """Share of the work of the first step that is this rank's own queries, done while others' are on their way."""
        rows = self.shape.n_q / self.schedule.queries / self.schedule.keys
        return 1 / self.schedule.queries if rows * self.shape.heads >= FEW_ROWS * self.shape.kv_heads else 0.0


def prepare(shape: Shape, schedule: Schedule, machine: Machine, mask: BaseMask | None = None,
            layout: str = "contiguous", trouble: Trouble | None = None) -> Case:
    """Say what a forward pass has to do. Local.

    Parameters
    ----------
    shape : Shape
    schedule : Schedule
    machine : Machine
    mask : BaseMask, optional
        Everything is seen by default.
    layout : str
        Of queries and keys.
    trouble : Trouble, optional

    Raises
    ------
    OptionError
        If the schedule is one of another number of ranks, its ranks can't share heads, or blocks can't go like that.
    """
    resolve(schedule, machine.ranks)
    check_heads(schedule, shape.heads)
    nodes = tuple(rank // machine.ranks_per_node for rank in range(machine.ranks))
    grid = Grid(schedule, nodes, axes(shape, schedule))
    carrier_class(schedule.carrier).check(grid, machine.on_gpu)
    places = grid.ranks()
    mask = mask or Mask()

    # With many ranks, or where all have the same, the average is as good as the truth.
    uneven = layout == "contiguous" and mask != Mask()
    if machine.ranks > (UNEVEN_RANKS if uneven else EXACT_RANKS):
        blocks = np.full(places.shape[1:], shape.n_k / schedule.keys / schedule.queries)
        average = _seconds(shape, machine, shape.n_q / schedule.keys, blocks[0, 0], np.array(shape.seen),
                           schedule.heads)
        seconds, even = None, float(average)
    else:
        layouts = make(layout, shape.n_q, machine.ranks), make(layout, shape.n_k, machine.ranks)
        blocks = np.array(layouts[1].counts, np.float64)[places].sum(axis=0)
        seconds, even = _unequal(shape, machine, places, layouts, mask)
    tokens = np.tile(blocks, (schedule.heads, 1))
    shares = share_heads(shape.heads, shape.kv_heads, schedule.heads)
    a_key = [share.kv_heads * shape.key_width * shape.item
             + (share.heads if shape.bias > 1 else shape.bias) * shape.wide for share in shares]
    a_token = np.repeat(a_key, schedule.queries)[:, None] * shape.batch
    return Case(shape, schedule, machine, trouble or Trouble(), places.reshape(-1, schedule.keys), tokens,
                tokens * a_token, seconds, even)


def _unequal(shape: Shape, machine: Machine, places: Integers, layouts: tuple[Layout, Layout], mask: BaseMask
             ) -> tuple[Numbers | None, float]:
    """Give `Case.seconds` and `Case.even`."""
    heads, _, keys = places.shape
    q_layout, k_layout = layouts
    rows = np.array(q_layout.counts, np.float64)[places].sum(axis=(0, 1))
    columns = np.array(k_layout.counts, np.float64)[places].sum(axis=0)       # of blocks: [queries, keys]
    even_blocks = bool((columns == columns.flat[0]).all())
    if machine.ranks > EXACT_RANKS:                       # else there are as many different items as pairs of ranks
        rows, columns = (np.full(x.shape, x.mean()) for x in (rows, columns))

    # Pairs by the rank that has queries and the one that has keys; then by places, of all that share heads or queries.
    pairs = _pairs(mask, q_layout, k_layout)[places.reshape(-1, keys)].sum(axis=0)
    pairs = pairs[:, places].sum(axis=1).transpose(1, 0, 2)                   # [queries, place, source]
    areas = rows[None, :, None] * columns[:, None, :]
    seconds = np.stack([_seconds(shape, machine, rows[:, None], some, seen, heads)
                        for some, seen in zip(columns, pairs / np.maximum(1, areas), strict=True)])
    even = float(seconds.flat[0])
    return (None if even_blocks and even > 0 and (seconds == even).all() else seconds), even


def _pairs(mask: BaseMask, q_layout: Layout, k_layout: Layout) -> Numbers:
    """Count visible pairs, ``[rank that has queries, rank that has keys]``; by a sample where there are many."""
    ranks, n_q, n_k = q_layout.size, q_layout.length, k_layout.length
    if mask == Mask():
        return np.outer(q_layout.counts, k_layout.counts).astype(np.float64)
    most = max(2, SAMPLES // ranks**2)
    queries, owners, weights = [], [], []
    for rank in range(ranks):
        held = q_layout.positions(rank)
        some = held if len(held) <= most else held[np.linspace(0, len(held) - 1, most).astype(int)]
        queries.append(some)
        owners.append(np.full(len(some), rank))
        weights.append(np.full(len(some), len(held) / max(1, len(some))))
    owner, weight = np.concatenate(owners), np.concatenate(weights)
    intervals = mask.bounds(np.concatenate(queries), n_q, n_k)
    pairs = np.zeros((ranks, ranks))
    for source in range(ranks):
        seen = sum(k_layout.count_below(high, source) - k_layout.count_below(low, source) for low, high in intervals)
        pairs[:, source] = np.bincount(owner, weight * seen, ranks)
    return pairs


def _seconds(shape: Shape, machine: Machine, rows: Numbers | float, columns: Numbers | float, seen: Numbers,
             heads: int) -> Numbers:
    """Give the seconds of items of work on cores that nobody else uses; 0 where nothing is seen."""
    parts = heads if shape.scattered else 1             # of a block, whose tokens interleave
    alone = replace(machine, cores=max(machine.cores, machine.ranks_per_node * machine.threads))
    kinds = np.array(np.broadcast_arrays(rows, columns, seen), np.float64).reshape(3, -1)
    index = np.zeros(kinds.shape[1], np.int64)                # of items that differ
    for kind in kinds:
        _, number = np.unique(kind, return_inverse=True)
        _, index = np.unique(index * (number.max(initial=0) + 1) + number.ravel(), return_inverse=True)
    _, firsts = np.unique(index, return_index=True)
    seconds = [parts * kernel_seconds(shape, alone, row, column / parts, share, share=1 / heads) if share else 0.0
               for row, column, share in kinds[:, firsts].T.tolist()]
    return np.array(seconds)[index.ravel()].reshape(np.broadcast(rows, columns, seen).shape)
