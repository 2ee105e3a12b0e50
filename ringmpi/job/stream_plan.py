"""How a job that streams is cut into pieces and blocks: from sizes and a limit of memory alone, the fewest pieces."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ..backends import GPU_NAMES
from ..backends.base import Backend
from ..bounds import PIECE_BYTES
from ..dtypes import DTYPES, accumulator
from ..environment import node_memory
from ..errors import OptionError
from ..mask_base import BaseMask
from ..schedules.movers import carrier_class
from ..schedules.spec import Schedule, check_schedule, resolve
from .inputs import Sizes
from .options import OUTPUT_DRIVERS, Options
from .pieces import Pieces

NODE_SHARE = 0.8               # of what a node lets a job have: files are cached in the rest
PROCESS_STEP = 2**24
GROUP_BYTES = 2**21            # of queries, or of results, of all ranks that are dealt out at a time
FILE_BYTES = 2**24             # that HDF5, digests and reading back take
SLACK_BYTES = 2**23            # for what is not counted: lists, messages, what malloc keeps
BLOCKS_SHARE = 16              # of the limit, that blocks of keys and values may take: one part of so many
BLOCK_FLOP = 2**42             # that a rank does with a block at most: it stops between two of them
FEW_KEYS = 512                 # of a rank in a block, at least: computing with fewer takes longer than seeing which
FEW_INTERVALS = 2              # whose bytes go with the query
BOUNDS_COPIES = 5              # of a piece's: while they are put in order, and turned into columns
ROW_BYTES = 64                 # of a query, for what it sees of each block, and again for each interval of the mask
COORDINATE_BYTES = 64          # of a query or a key along an axis of a bias by distance, as kernels take it
TABLE_COPIES = 4               # of such a bias: as a call has it, unrolled, and as kernels take it
READ_BYTES = 8                 # of a number of a bias as it is read, at most
SAMPLES = 2**12                # queries of a piece, by which a dry run says what it sees


def usual_limit(ranks: int) -> int:
    """Give the bytes of each of some ranks on this node where no limit is asked for. Local."""
    return int(NODE_SHARE * node_memory()[0]) // ranks


def schedule_to_stream(options: Options, ranks: int) -> Schedule:
    """Give the schedule of a job that streams. Local.

    Raises
    ------
    OptionError
        If queries or heads would travel, blocks lie in shared memory, the job computes on GPUs, or all ranks are to
        write one file.
    """
    if options.output_driver != OUTPUT_DRIVERS[0]:
        raise OptionError(f"--stream: writes shards as it goes, got --output-driver {options.output_driver}; leave "
                          "that out: `ringmpi merge` makes one file of them")
    if options.backend in GPU_NAMES:
        raise OptionError(f"--stream: computes on CPUs so far, got --backend {options.backend}; numba would do")
    schedule = resolve(check_schedule(options.schedule), ranks, canonical=options.order == "canonical")
    other = Schedule(keys=ranks, carrier="ring" if schedule.carrier == "window" else schedule.carrier)
    if schedule != other:
        raise OptionError(f"--stream: expected a schedule in which keys alone travel, in messages, got {schedule}; "
                          f"{other} would do")
    return schedule


@dataclass(frozen=True)
class Planner:
    """Plans pieces and blocks of a job within its options' limit of memory. Local.

    Parameters
    ----------
    sizes, ranks, options
    backend : type
        Of the backend.
    process : int
        Bytes of this process, with all libraries.
    intervals : int
        That a query sees at most.
    """

    sizes: Sizes
    ranks: int
    options: Options
    backend: type[Backend]
    process: int
    intervals: int = 1

    def plan(self, start: int = 0) -> Pieces:
        """Plan the fewest pieces of the queries from `start` on.

        Raises
        ------
        OptionError
            If the limit is too little; it says how much would do.
        """
        limit = self.limit
        rows = self._rows(limit) * self.ranks
        if rows < min(self.group, self.sizes.n_q):
            raise OptionError(f"--stream: expected a --memory-limit of {self._smallest()}MiB at least, for the whole "
                              f"process of a rank, got {limit / 2**20:,.0f} MiB: process and libraries take "
                              f"{self._process / 2**20:,.0f} MiB, backend and files {self._work(limit) / 2**20:,.0f} "
                              "MiB")
        groups = -(-(self.sizes.n_q - start) // self.group)
        pieces = max(1, -(-groups // max(1, rows // self.group)))
        return Pieces(start, self.group, self.group * max(1, -(-groups // pieces)), self._block(limit),
                      max(1, self._tile))

    def predict(self, pieces: Pieces) -> dict[str, int]:
        """Give the bytes of the rank that has most, by name, and `total`."""
        rows = min(pieces.piece, self.sizes.n_q + self.ranks) // self.ranks
        parts = {"a piece of queries": rows * self._row, "K/V blocks": self._key * -(-pieces.block // self.ranks),
                 "backend and files": self._work(self.limit), "process and libraries": self._process}
        return {**parts, "total": sum(parts.values())}

    def fits(self, pieces: Pieces, rows: int) -> bool:
        """Say whether a job can go on after so many rows with pieces of one whose process had about the same size."""
        own = replace(pieces, group=self.group, block=self._block(self.limit), tile=max(1, self._tile))
        return (pieces == own and 0 < pieces.piece == pieces.piece // self.group * self.group
                and pieces.start <= rows and (rows == self.sizes.n_q or (rows - pieces.start) % pieces.piece == 0)
                and self.predict(pieces)["total"] <= self.limit + PROCESS_STEP)

    def states_bytes(self, pieces: Pieces, rows: int, rank: int) -> int:
        """Give the bytes of the states of a rank's queries in the piece that begins after so many rows, if one does."""
        first = replace(pieces, start=rows).of_queries(self.sizes, self.ranks, self.options.layout)[:1]
        return sum(piece.counts[rank] for piece in first) * self._state

    def passes(self, mask: BaseMask, pieces: Pieces) -> list[int]:
        """Give the number of blocks that each piece sees, by samples of queries."""
        return [int(self._seen(mask, pieces, start).sum())
                for start in range(pieces.start, self.sizes.n_q, pieces.piece)]

    @cached_property
    def _process(self) -> int:
        """Bytes of the process, rounded up, so that each run is cut alike."""
        return -(-self.process // PROCESS_STEP) * PROCESS_STEP

    @property
    def limit(self) -> int:
        """Bytes of a rank."""
        return self.options.memory_limit or 0

    @property
    def block_bytes(self) -> int:
        """Bytes of a key and its value, all heads, and of their bias."""
        sizes = self.sizes
        width = sizes.dim if sizes.in_keys else sizes.dim + sizes.dim_v
        return sizes.kv_heads * width * DTYPES[sizes.dtype].itemsize + sizes.key_bias * self._wide

    @cached_property
    def group(self) -> int:
        """Queries that are dealt out together: a multiple of the ranks."""
        return self.ranks * max(1, GROUP_BYTES // (self._row * self.ranks))

    @cached_property
    def _wide(self) -> int:
        return accumulator(DTYPES[self.sizes.dtype], self.options.accumulator).itemsize

    @cached_property
    def _state(self) -> int:
        """Bytes of the state of a query, all heads, and of whether it has seen a key that a bias does not leave out."""
        return self.sizes.heads * (self.sizes.dim_v + 2) * self._wide + self.sizes.key_bias

    @cached_property
    def _row(self) -> int:
        """Bytes for each query of a piece: itself, its state, and what it sees."""
        sizes = self.sizes
        return (sizes.heads * sizes.dim * DTYPES[sizes.dtype].itemsize + self._state
                + ROW_BYTES * (1 + min(self.intervals, FEW_INTERVALS)) + COORDINATE_BYTES * len(sizes.tables))

    @cached_property
    def _key(self) -> int:
        """Bytes for each key of a rank's share of a block: two that are read, and what the carrier has.

        With a bias, that is read in float64 perhaps, and keys and values are copied if some that are left out are NaN.
        """
        carrier = carrier_class(schedule_to_stream(self.options, self.ranks).carrier)
        copies = 1 if self.sizes.key_bias else 0
        return ((2 + copies + carrier.buffer_blocks(self.ranks, False)) * self.block_bytes
                + 2 * READ_BYTES * self.sizes.key_bias + COORDINATE_BYTES * len(self.sizes.tables))

    @cached_property
    def _tile(self) -> int:
        return self.backend.canonical_tile if self.options.order == "canonical" else 0

    def _work(self, limit: int) -> int:
        """Bytes of the backend, and of files, that do not depend on the piece."""
        sizes = self.sizes
        keys = -(-self._block(limit) // self.ranks)
        k, v = ((keys, sizes.kv_heads, width) for width in (sizes.dim, sizes.dim_v))
        dtype = DTYPES[sizes.dtype]
        scratch = self.backend.scratch_bytes((self.group, sizes.heads, sizes.dim), k, v, dtype,
                                             accumulator(dtype, self.options.accumulator))
        return (sum(scratch.values()) + FILE_BYTES + SLACK_BYTES + 4 * max(GROUP_BYTES, self.group * self._row)
                + self._bounds + TABLE_COPIES * self._wide * sizes.heads * sum(sizes.tables))

    @property
    def _bounds(self) -> int:
        """Bytes of many intervals, which are made piece by piece."""
        if self.intervals <= FEW_INTERVALS:
            return 0
        return BOUNDS_COPIES * min(PIECE_BYTES, 16 * self.intervals * -(-self.sizes.n_q // self.ranks))

    def _rows(self, limit: int) -> int:
        """Give the queries of a rank for which there is room."""
        blocks = self._key * -(-self._block(limit) // self.ranks)
        return max(0, limit - self._process - self._work(limit) - blocks) // self._row

    def _block(self, limit: int) -> int:
        """Keys of a block: a power of two for each rank, or all."""
        sizes = self.sizes
        rows = max(1, min(limit // self._row, -(-sizes.n_q // self.ranks)))
        flop = 2 * sizes.heads * (sizes.dim + sizes.dim_v) * rows * self.ranks
        most = min(limit // BLOCKS_SHARE // max(1, self._key), BLOCK_FLOP // max(1, flop))
        each = 1 << int(math.log2(max(FEW_KEYS, most)))
        if self._tile:
            each = max(1, each // self._tile) * self._tile
        return max(1, min(self.ranks * each, sizes.n_k))

    def _smallest(self) -> int:
        """Give the smallest limit that would do, in MiB."""
        rows = -(-min(self.group, self.sizes.n_q) // self.ranks)
        return next(limit for limit in itertools.count(self._process // 2**20) if self._rows(limit * 2**20) >= rows)

    def _seen(self, mask: BaseMask, pieces: Pieces, start: int) -> NDArray[np.bool_]:
        sizes = self.sizes
        stop = min(start + pieces.piece, sizes.n_q)
        queries = np.append(np.arange(start, stop, max(1, (stop - start) // SAMPLES)), stop - 1)
        return pieces.seen(mask.bounds(queries, sizes.n_q, sizes.n_k), sizes.n_k)
