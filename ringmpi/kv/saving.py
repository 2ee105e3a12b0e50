"""Saving a cache: rank 0 writes the file block by block, in the order of the positions, as the others send their part.

Nobody holds more than a block besides the cache.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..files.hdf5 import OutputDataset, OutputFile, create_dataset, write_array, write_file, write_rows
from ..files.paths import as_path
from ..files.sealed import write_sealed
from ..mpi.comm import Comm
from ..schedules.links import assign
from .core import Core
from .file import DIGEST_BYTES, block_digest, encode_description

Array = NDArray[Any]
Read = Callable[[int, int], tuple[Array, ...]]
BLOCK_BYTES = 2**22            # of keys and values that have one digest, at most, and are moved at a time


def save(core: Core, check_open: Callable[[], None], path: Any, force: bool) -> None:
    """Write a cache to a file. Collective over *comm*.

    Parameters
    ----------
    core : Core
    check_open : callable
        Raises an error if the cache is closed.
    path, force
        See `KVCache.save`.
    """
    comm, sizes, contents, backend = core.comm, core.sizes, core.contents, core.backend
    with comm.noting() as failures:
        check_open()
        as_path(path)
    rows = comm.exchange("KVCache.save", core.timeout, contents.store.positions.view(np.uint8), failures=failures,
                         options={**core.options, "path": str(path), "force": force})

    def read(first: int, last: int) -> tuple[Array, ...]:
        with backend.current():
            parts = [[backend.to_numpy(backend.to_device(x) if backend.device else x) for x in both]
                     for both in contents.store.views(first, last)]
        columns = [[np.moveaxis(x, 1, 0) if sizes.batch is not None else x[0] for x in theirs]
                   for theirs in zip(*parts, strict=True)]
        bits = f"u{sizes.dtype.itemsize}"            # copied as such: NumPy copies bfloat16 one by one
        biases = [np.concatenate(columns.pop(), dtype=np.float64)] if sizes.key_bias else []
        return *(np.concatenate([x.view(bits) for x in theirs]).view(sizes.dtype) for theirs in columns), *biases

    description = {"length": contents.length, "dropped": contents.dropped, "kv_heads": sizes.kv_heads,
                   "dim": sizes.dim, "dim_v": sizes.dim_v, "dtype": sizes.dtype.name, "batch": sizes.batch,
                   "key_bias": sizes.key_bias, "values_in_keys": sizes.in_keys}
    Saving(comm, core.timeout, [row.view(np.int64) for row in rows], sizes.in_file).write(
        as_path(path), force, description, read)


class Saving:
    """A cache that is being saved: what each rank has of each block.

    Parameters
    ----------
    comm : Comm
    timeout : float
        Seconds to wait for another rank.
    held : for each rank, int64 array
        Positions of its tokens, increasing.
    arrays : mapping
        See `Sizes.in_file`.
    """

    def __init__(self, comm: Comm, timeout: float, held: Sequence[NDArray[np.int64]],
                 arrays: Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]]) -> None:
        self._comm = comm
        self._timeout = timeout
        self._arrays = arrays
        self._positions = np.sort(np.concatenate(held))
        self._rows = [np.searchsorted(self._positions, theirs) for theirs in held]        # in the file
        self._token_bytes = sum(math.prod(shape) * dtype.itemsize for shape, dtype in arrays.values())
        self.block = max(1, BLOCK_BYTES // self._token_bytes)
        self._failures: list[Exception] = []

    def write(self, path: Path, force: bool, description: Mapping[str, Any], read: Read) -> None:
        """Write the file. Collective over *comm*.

        Parameters
        ----------
        path : path
        force : bool
            Replace a file of that name.
        description : mapping
            What `read_description` gives, but for what is known here; plain values.
        read : callable
            Gives k and v, and a bias, of some of this rank's tokens, from one to another, on the host, tokens first.

        Raises
        ------
        OutputError
            If the file exists and not `force`, or can't be written; the same on every rank, as is whatever else fails.
        """
        comm = self._comm
        with ExitStack() as opened:           # what an error leaves there vanishes
            with comm.raise_on_all(self._timeout):
                file = opened.enter_context(write_file(path, force)) if comm.rank == 0 else None
                message = np.empty(min(self.block, len(self._positions)) * self._token_bytes, np.uint8)
            with comm.raise_on_all(self._timeout):
                if file is None:
                    self._send(read, message)
                else:
                    self._write_blocks(file, description, read, message)
                for failure in self._failures[:1]:
                    raise failure
            with comm.raise_on_all(self._timeout):
                opened.close()

    def _send(self, read: Read, message: NDArray[np.uint8]) -> None:
        """Send rank 0 this rank's part of each block; after a failure anything, for it waits for all of them."""
        comm = self._comm
        send = comm.message_starter("Isend", 0, 0)
        for _, _, parts in self._blocks():
            first, last = parts[comm.rank]
            part = message[:(last - first) * self._token_bytes]
            if last == first:
                continue
            self._try(lambda part=part, first=first, last=last: self._fill(part, read(first, last)))  # type: ignore[misc]
            comm.wait([send(part)], self._timeout, lambda: f"{comm.name()} waited for rank 0 to write a cache",
                      peers=lambda: [0])

    def _write_blocks(self, file: OutputFile, description: Mapping[str, Any], read: Read, message: NDArray[np.uint8]
                      ) -> None:
        """Write what comes of each block, then what the file says of it; after a failure, take what comes."""
        tokens = len(self._positions)
        digests = np.zeros((-(-tokens // self.block), DIGEST_BYTES), np.uint8)
        datasets: list[OutputDataset] = []
        arrays = [np.empty((min(self.block, tokens), *shape), dtype) for shape, dtype in self._arrays.values()]
        self._try(lambda: datasets.extend(create_dataset(file, name, (tokens, *shape), dtype)
                                          for name, (shape, dtype) in self._arrays.items()))
        for start, stop, parts in self._blocks():
            for rank, (first, last) in enumerate(parts):
                if last > first:
                    self._take(rank, first, last, start, arrays, read, message)
            self._try(lambda start=start, stop=stop: self._put(datasets, digests, start, stop, arrays))  # type: ignore[misc]
        self._try(lambda: self._conclude(file, description, digests))

    def _take(self, rank: int, first: int, last: int, start: int, arrays: Sequence[Array], read: Read,
              message: NDArray[np.uint8]) -> None:
        """Take a rank's part of a block to its place."""
        comm = self._comm
        rows = self._rows[rank][first:last] - start
        if rank == 0:
            self._try(lambda: _place(arrays, rows, read(first, last)))
            return
        part = message[:(last - first) * self._token_bytes]
        request = comm.message_starter("Irecv", rank, 0)(part)
        comm.wait([request], self._timeout, lambda: f"{comm.name()} waited for the cache of rank {rank}",
                  peers=lambda: [rank])
        self._try(lambda: _place(arrays, rows, self._split(part, last - first)))

    def _put(self, datasets: Sequence[OutputDataset], digests: NDArray[np.uint8], start: int, stop: int,
             arrays: Sequence[Array]) -> None:
        """Write a block, and note its digest."""
        block = [x[:stop - start] for x in arrays]
        for dataset, x in zip(datasets, block, strict=True):
            write_rows(dataset, start, x)
        digests[start // self.block] = np.frombuffer(block_digest(self._positions[start:stop], block), np.uint8)

    def _conclude(self, file: OutputFile, description: Mapping[str, Any], digests: NDArray[np.uint8]) -> None:
        """Write what is not keys and values."""
        write_array(file, "positions", self._positions)
        write_array(file, "digests", digests)
        write_sealed(file, "cache", encode_description({
            **description, "tokens": len(self._positions), "rows": self.block,
            "digests": hashlib.sha256(digests.tobytes()).hexdigest()}))

    def _blocks(self) -> Iterator[tuple[int, int, list[tuple[int, int]]]]:
        """Yield each block: its rows in the file, and for each rank, which of its tokens are in it."""
        for start in range(0, len(self._positions), self.block):
            stop = min(start + self.block, len(self._positions))
            yield start, stop, [(int(first), int(last)) for first, last in
                                (np.searchsorted(rows, [start, stop]) for rows in self._rows)]

    def _fill(self, part: NDArray[np.uint8], arrays: Sequence[Array]) -> None:
        """Write keys and values into a message, one after the other."""
        for target, x in zip(self._split(part, len(arrays[0])), arrays, strict=True):
            assign(target, x)

    def _split(self, part: NDArray[np.uint8], tokens: int) -> list[Array]:
        """View a message as keys and values."""
        arrays, at = [], 0
        for shape, dtype in self._arrays.values():
            nbytes = tokens * math.prod(shape) * dtype.itemsize
            arrays.append(part[at:at + nbytes].view(dtype).reshape(tokens, *shape))
            at += nbytes
        return arrays

    def _try(self, work: Callable[[], object]) -> None:
        """Do something unless something has failed before; note what fails: other ranks are not to wait for ever."""
        if not self._failures:
            try:
                work()
            except Exception as failure:      # noqa: BLE001 (whatever it is, all ranks hear of it)
                self._failures.append(failure)


def _place(targets: Sequence[Array], rows: NDArray[np.int64], arrays: Sequence[Array]) -> None:
    for target, x in zip(targets, arrays, strict=True):
        bits = f"u{target.itemsize}"             # copied as such: NumPy copies bfloat16 one by one
        target.view(bits)[rows] = x.view(bits)
