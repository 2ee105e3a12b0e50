"""Which queries and which keys a job that streams computes at a time: planned from sizes and a limit of memory alone.

Queries come in pieces, as large as fit, so that there are few: each piece has all keys that it sees go round again.
Keys and values come in blocks, of which each rank has read its share when it is their turn.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..backends import GPU_NAMES
from ..backends.base import Backend
from ..dtypes import DTYPES, accumulator
from ..errors import OptionError
from ..layout import Contiguous, Integers, Layout, make
from ..mask import Interval, Mask
from ..schedules.movers import carrier_class
from ..schedules.spec import Schedule, check_schedule, resolve
from .inputs import Sizes
from .options import Options

GROUP_BYTES = 2**21            # of queries, or of results, of all ranks that are dealt out at a time
FILE_BYTES = 2**24             # that HDF5, digests and reading back take
BLOCKS_SHARE = 16              # of the limit, that blocks of keys and values may take: one part of so many
BLOCK_FLOP = 2**41             # that a rank does with a block at most: it stops between two of them
FEW_KEYS = 512                 # of a rank in a block, at least: computing with fewer takes longer than seeing which
SLACK_BYTES = 2**23            # for what is not counted: lists, messages, what malloc keeps


class Groups(Layout):
    """Tokens ``start ..`` of a longer sequence, dealt out group by group: full ones of one layout, and a last one.

    Parameters
    ----------
    start : int
    full : Layout
        How a full group is dealt out.
    number : int
        Of full groups.
    rest : Layout
        How the last one is.
    length : int
        Of the whole sequence.
    """

    name = "grouped"

    def __init__(self, start: int, full: Layout, number: int, rest: Layout, length: int) -> None:
        super().__init__([number * many + few for many, few in zip(full.counts, rest.counts, strict=True)])
        self.start, self.full, self.number, self.rest = start, full, number, rest
        self.stop = start + self.length
        self.length = length

    def positions(self, rank: int) -> Integers:
        """Give the positions in the whole sequence; see `Layout.positions`. Local."""
        starts = self.start + self.full.length * np.arange(self.number, dtype=np.int64)
        last = self.start + self.full.length * self.number + self.rest.positions(rank)
        return np.concatenate([(starts[:, None] + self.full.positions(rank)).reshape(-1), last])

    def count_below(self, x: ArrayLike, rank: int) -> Integers:
        """Count the tokens before positions in the whole sequence; see `Layout.count_below`. Local."""
        inside = np.clip(np.asarray(x, np.int64) - self.start, 0, self.stop - self.start)
        number = np.minimum(inside // max(1, self.full.length), self.number)
        inside = inside - number * self.full.length
        below = np.where(number < self.number, self.full.count_below(inside, rank), self.rest.count_below(inside, rank))
        return np.asarray(number * self.full.counts[rank] + below, np.int64)

    def describe(self) -> str:
        """Say what the layout is; see `Layout.describe`. Local."""
        return (f"tokens {self.start}..{self.stop} of {self.length}: {self.number} of {self.full.describe()}, "
                f"{self.rest.describe()}")

    def groups(self) -> list[tuple[int, Layout]]:
        """Give the first token and the layout of each group. Local."""
        some = [(self.start + number * self.full.length, self.full) for number in range(self.number)]
        last = self.start + self.number * self.full.length
        return [*some, (last, self.rest)] if last < self.stop else some


@dataclass(frozen=True)
class Pieces:
    """What is computed at a time; the same on all ranks.

    Attributes
    ----------
    start : int
        The first query; those before it have been computed.
    group, piece, block : int
        Tokens of all ranks: queries that are dealt out together, queries of a piece, keys of a block.
    tile : int
        Each rank's share of a block has a multiple of it, but for the last.
    """

    start: int
    group: int
    piece: int
    block: int
    tile: int = 1

    def of_queries(self, sizes: Sizes, ranks: int, layout: str) -> list[Groups]:
        """Give the pieces, in order. Local."""
        found = []
        for start in range(self.start, sizes.n_q, self.piece):
            number, rest = divmod(min(self.piece, sizes.n_q - start), self.group)
            found.append(Groups(start, make(layout, self.group, ranks), number, make(layout, rest, ranks), sizes.n_q))
        return found

    def of_keys(self, sizes: Sizes, ranks: int) -> list[Groups]:
        """Give the blocks, in order: each rank has some keys in a row. Local."""
        nothing = Contiguous([0] * ranks)
        return [Groups(start, self._shares(min(self.block, sizes.n_k - start), ranks), 1, nothing, sizes.n_k)
                for start in range(0, sizes.n_k, self.block)]

    def _shares(self, length: int, ranks: int) -> Contiguous:
        tiles = -(-length // self.tile)
        edges = [min(length, self.tile * (tiles * rank // ranks)) for rank in range(ranks + 1)]
        return Contiguous([stop - start for start, stop in itertools.pairwise(edges)])

    def as_dict(self) -> dict[str, int]:
        """Give them as plain numbers. Local."""
        return asdict(self)

    def seen(self, bounds: Sequence[Interval], n_k: int) -> NDArray[np.bool_]:
        """Say which blocks hold keys of some intervals. Local."""
        number = -(-n_k // self.block)
        edges = np.zeros(number + 1, np.int64)
        for low, high in bounds:
            some = high > low
            np.add.at(edges, low[some] // self.block, 1)
            np.add.at(edges, (high[some] - 1) // self.block + 1, -1)
        return np.asarray(np.cumsum(edges)[:-1] > 0)


@dataclass(frozen=True)
class Need:
    """What a rank needs, in bytes, by what it is for.

    Attributes
    ----------
    process : int
        This process and its libraries.
    work : int
        Of the backend, and of files.
    row : int
        For each query of a piece.
    key : int
        For each key of its share of a block.
    """

    process: int
    work: int
    row: int
    key: int

    @property
    def fixed(self) -> int:
        """What does not depend on pieces and blocks."""
        return self.process + self.work


def schedule_to_stream(options: Options, ranks: int) -> Schedule:
    """Give the schedule of a job that streams. Local.

    Raises
    ------
    OptionError
        If queries or heads would travel, blocks lie in shared memory, or the job computes on GPUs.
    """
    if options.backend in GPU_NAMES:
        raise OptionError(f"--stream: computes on CPUs so far, got --backend {options.backend}; numba would do")
    asked = check_schedule(options.schedule)
    schedule = resolve(asked, ranks, canonical=options.order == "canonical")
    other = Schedule(keys=ranks, carrier="ring" if schedule.carrier == "window" else schedule.carrier)
    if schedule != other:
        raise OptionError(f"--stream: expected a schedule in which keys alone travel, in messages, got {schedule}; "
                          f"{other} would do")
    return schedule


def need_of(sizes: Sizes, ranks: int, options: Options, backend: type[Backend], process: int) -> Need:
    """Say what a rank needs. Local.

    Parameters
    ----------
    sizes, ranks, options
    backend : type
        Its class.
    process : int
        Bytes of this process, and of the libraries that it has yet to load.
    """
    dtype = DTYPES[sizes.dtype]
    wide = accumulator(dtype, options.accumulator).itemsize
    intervals = 2 if options.window is not None and options.first else 1
    row = sizes.heads * (sizes.dim * dtype.itemsize + (sizes.dim_v + 2) * wide) + 64 * (1 + intervals)
    key = sizes.kv_heads * (sizes.dim + sizes.dim_v) * dtype.itemsize
    buffers = carrier_class(schedule_to_stream(options, ranks).carrier).buffer_blocks(ranks, False)
    many = 2**20, sizes.kv_heads
    scratch = backend.scratch_bytes((2**20, sizes.heads, sizes.dim), (*many, sizes.dim), (*many, sizes.dim_v), dtype,
                                    accumulator(dtype, options.accumulator))
    work = sum(scratch.values()) + FILE_BYTES + 4 * _group_bytes(sizes, ranks, wide) + SLACK_BYTES
    return Need(process, work, row, (2 + buffers) * key)


def plan_pieces(sizes: Sizes, ranks: int, options: Options, need: Need, tile: int = 0, start: int = 0) -> Pieces:
    """Plan the fewest pieces within the options' limit of memory. Local.

    Parameters
    ----------
    sizes, ranks, options
    need : Need
    tile : int
        In canonical order, the tokens of a tile; else 0.
    start : int
        The first query that is left to compute.

    Raises
    ------
    OptionError
        If the limit is too little; it says how much would do.
    """
    limit = options.memory_limit or 0
    group = _group(sizes, ranks, need)
    block = _block(sizes, ranks, need, tile, limit)
    room = limit - need.fixed - need.key * -(-block // ranks)
    rows = room // need.row * ranks
    if rows < min(group, sizes.n_q):
        raise OptionError(f"--stream: expected a --memory-limit of {_smallest(sizes, ranks, need, tile)}MiB at least, "
                          f"for the whole process of a rank, got {limit / 2**20:,.0f} MiB: process and libraries take "
                          f"{need.process / 2**20:,.0f} MiB, the backend and files {need.work / 2**20:,.0f} MiB")
    groups = -(-(sizes.n_q - start) // group)
    number = max(1, -(-groups // max(1, rows // group)))
    return Pieces(start, group, group * max(1, -(-groups // number)), block, max(1, tile))


def predict(sizes: Sizes, ranks: int, pieces: Pieces, need: Need) -> dict[str, int]:
    """Give the bytes of the rank that has most, by name, and `total`. Local."""
    rows = min(-(-pieces.piece // ranks), -(-sizes.n_q // ranks) + 1)
    parts = {"a piece of queries": rows * need.row, "K/V blocks": need.key * -(-pieces.block // ranks),
             "backend and files": need.work, "process and libraries": need.process}
    return {**parts, "total": sum(parts.values())}


def seen_by(mask: Mask, sizes: Sizes, pieces: Pieces, start: int, stop: int, most: int) -> NDArray[np.bool_]:
    """Say which blocks the queries of a piece see, by `most` of them. Local."""
    step = max(1, (stop - start) // most)
    queries = np.unique(np.concatenate([np.arange(start, stop, step), [stop - 1]]))
    return pieces.seen(mask.bounds(queries, sizes.n_q, sizes.n_k), sizes.n_k)


def _group_bytes(sizes: Sizes, ranks: int, wide: int) -> int:
    item = DTYPES[sizes.dtype].itemsize
    row = sizes.heads * (max(sizes.dim, sizes.dim_v) * item + wide)
    return max(GROUP_BYTES, ranks * row)


def _group(sizes: Sizes, ranks: int, need: Need) -> int:
    """Give the queries that are dealt out together: a multiple of the ranks."""
    return ranks * max(1, GROUP_BYTES // (need.row * ranks))


def _block(sizes: Sizes, ranks: int, need: Need, tile: int, limit: int) -> int:
    """Give the keys of a block: a power of two for each rank, or all."""
    most = min(limit // BLOCKS_SHARE // max(1, need.key), _keys_by_time(sizes, ranks, need, limit))
    each = 1 << int(math.log2(max(FEW_KEYS, most)))
    if tile:
        each = max(1, each // tile) * tile
    return min(ranks * each, max(1, sizes.n_k))


def _keys_by_time(sizes: Sizes, ranks: int, need: Need, limit: int) -> int:
    """Give the keys of a rank's share of a block that as many rows as the limit may hold meet in some seconds."""
    rows = min(max(1, limit // need.row), -(-sizes.n_q // ranks))
    flop = 2 * sizes.heads * (sizes.dim + sizes.dim_v) * max(1, rows) * ranks
    return BLOCK_FLOP // flop


def _smallest(sizes: Sizes, ranks: int, need: Need, tile: int) -> int:
    """Give the smallest limit that would do, in MiB."""
    rows = need.row * -(-min(_group(sizes, ranks, need), sizes.n_q) // ranks)

    def is_enough(mebibytes: int) -> bool:
        block = _block(sizes, ranks, need, tile, mebibytes * 2**20)
        return need.fixed + rows + need.row + need.key * -(-block // ranks) <= mebibytes * 2**20

    return next(limit for limit in itertools.count((need.fixed + rows) // 2**20) if is_enough(limit))


def describe_passes(mask: Mask, sizes: Sizes, ranks: int, pieces: Pieces, samples: int) -> dict[str, Any]:
    """Say how often keys and values are read and sent, by samples of the queries. Local."""
    number, blocks = 0, 0
    for start in range(pieces.start, sizes.n_q, pieces.piece):
        number += 1
        stop = min(start + pieces.piece, sizes.n_q)
        blocks += int(seen_by(mask, sizes, pieces, start, stop, samples).sum())
    key = sizes.kv_heads * (sizes.dim + sizes.dim_v) * DTYPES[sizes.dtype].itemsize
    each = blocks * min(pieces.block, sizes.n_k) * key // ranks
    return {"pieces": number, "blocks": blocks, "read": each, "sent": each * (ranks - 1)}
