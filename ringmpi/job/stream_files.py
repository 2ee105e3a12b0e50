"""What a job that streams reads and writes: blocks of keys one ahead, the queries of a piece, and its results."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from contextvars import copy_context
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InternalError
from ..files.manifest import Shard
from ..files.shards import NewShard, Output
from ..files.tokens import Tokens
from ..layout import Contiguous
from ..schedules.redistribution import redistribute
from .inputs import check_key_bias_rows
from .outputs import Rows, gather_shards
from .pieces import Block, Groups
from .run import Run

Array = NDArray[Any]


class BlockReader:
    """Reads this rank's share of one block of keys and values after the other, in a thread, into two buffers. Local.

    Parameters
    ----------
    datasets : sequence of Tokens
        See `Input.keys`. Nothing else is opened or closed in the thread than what reading them takes; h5py lets one
        thread at a time into HDF5.
    blocks : sequence of Block
    rank : int
    """

    def __init__(self, datasets: Sequence[Tokens], blocks: Sequence[Block], rank: int) -> None:
        self._datasets = datasets
        self._blocks = blocks
        self._rank = rank
        most = max((block.counts[rank] for block in blocks), default=0)
        self._buffers = [[np.empty((most, *x.shape[1:]), x.dtype) for x in datasets]
                         for _ in range(2)]
        self._turn = 0
        self._pool = ThreadPoolExecutor(1, "reading ahead")
        self._coming: tuple[int, Future[list[Array]]] | None = None

    def begin(self, number: int) -> None:
        """Begin to read a block; the one that was taken last stays as it is."""
        self._turn = 1 - self._turn
        self._coming = number, self._pool.submit(copy_context().run, self._read, number, self._buffers[self._turn])

    def take(self, number: int) -> list[Array]:
        """Wait for a block that `begin` was called for; give what there is of its keys.

        Raises
        ------
        ShardError
            If they can't be read, or a bias is NaN or +inf.
        """
        if self._coming is None or self._coming[0] != number:
            raise InternalError(f"block {number} was not begun to be read")
        coming = self._coming[1]
        self._coming = None
        return coming.result()

    def _read(self, number: int, buffers: list[Array]) -> list[Array]:
        block = self._blocks[number]
        rows = [x[:block.counts[self._rank]] for x in buffers]
        for dataset, x in zip(self._datasets, rows, strict=True):
            dataset.read_into(block.starts[self._rank], x)
            if x.ndim < 3:                    # no keys or values
                check_key_bias_rows(dataset, block.starts[self._rank], x)
        return rows

    def close(self) -> None:
        """End the thread, when it has read what it is at. Local."""
        self._pool.shutdown(cancel_futures=True)
        self._buffers = []


def read_piece(run: Run, tokens: Tokens, piece: Groups) -> Array:
    """Read this rank's queries of a piece, group by group. Collective over *comm*."""
    rank, size = run.comm.rank, run.comm.size
    rows = np.empty((piece.counts[rank], *tokens.shape[1:]), tokens.dtype)
    at = 0
    with run.timer.phase("read", f"reading {tokens.filename}"):
        for start, layout in piece.groups():
            part = Contiguous.even(layout.length, size)
            with run.raise_on_all():
                mine = start + part.starts[rank]
                shard = tokens.read(mine, mine + part.counts[rank])
            shard = redistribute(shard, comm=run.world, source=part, target=layout, timeout=run.timeout)
            rows[at:at + len(shard)].view(_bits(rows))[...] = shard.view(_bits(shard))
            at += len(shard)
    return rows


def write_piece(run: Run, output: Output, piece: Groups, finish: Callable[[slice], tuple[Array, Array]],
                like: Mapping[str, Rows]) -> list[Shard]:
    """Write the results of a piece: a shard of each rank, of groups that follow each other. Collective over *comm*.

    Parameters
    ----------
    run, output
    piece : Groups
    finish : callable
        Gives `out` and `lse` of some of this rank's rows, once.
    like : mapping
        See `rows_of_results`.

    Returns
    -------
    list of Shard
        Of all ranks, in the order of their rows.

    Raises
    ------
    OutputError
        If a rank can't write; the same on every rank.
    """
    rank, size = run.comm.rank, run.comm.size
    groups = piece.groups()
    owners = [len(groups) * owner // size for owner in range(size + 1)]
    edges = [*(start for start, _ in groups), piece.stop]
    first, last = edges[owners[rank]], edges[owners[rank + 1]]
    failures: list[Exception] = []        # of this rank, which takes part in the exchanges to the end
    mine: list[NewShard] = []
    at = 0
    with run.timer.phase("write", f"writing {output.path}"), run.raise_on_all(), ExitStack() as open_shard:
        if first < last:
            with run.comm.noting() as failures:
                mine = [open_shard.enter_context(output.new_shard(first, first, last, like))]
        for index, (start, layout) in enumerate(groups):
            owner = bisect_right(owners, index) - 1
            rows = slice(at, at + layout.counts[rank])
            at = rows.stop
            target = Contiguous([layout.length * (other == owner) for other in range(size)])
            whole = [redistribute(x, comm=run.world, source=layout, target=target, timeout=run.timeout)
                     for x in finish(rows)]
            if rank == owner and not failures:
                with run.comm.noting() as failures:
                    mine[0].write(start - first, whole[0], whole[1])
        if failures:
            raise failures[0]
    return gather_shards(run, [shard.made for shard in mine])


def _bits(x: Array) -> str:
    return f"u{x.dtype.itemsize}"
