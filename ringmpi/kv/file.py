"""A cache of keys and values as an HDF5 file: written by rank 0 in the order of the positions, read by all."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from ..dtypes import DTYPES
from ..errors import OptionError, ShardError
from ..files.hdf5 import create_dataset, open_dataset, read_integers, read_rows, write_array, write_file, write_rows
from ..files.opening import open_file, reading
from ..layout import Contiguous
from ..mpi.comm import Comm

Array = NDArray[Any]
FORMAT = 1
PIECE_BYTES = 2**25            # of what a rank sends at a time to the one that writes
LARGEST = 2**40                # tokens


def write_cache(comm: Comm, timeout: float, path: Path, force: bool, description: Mapping[str, Any],
                positions: NDArray[np.int64], arrays: Mapping[str, Array]) -> None:
    """Write a cache. Collective over *comm*; what fails on rank 0 is raised there.

    Parameters
    ----------
    comm : Comm
    timeout : float
    path : path
    force : bool
        Replace a file of that name.
    description : mapping
        What `read_description` gives; plain values.
    positions : int64 array of shape (tokens,)
        Of all tokens, increasing.
    arrays : mapping of str to array of shape (n, ...)
        `k` and `v` of this rank's tokens, laid out evenly.

    Raises
    ------
    OutputError
        If the file exists and not `force`, or can't be written.
    """
    if comm.rank:
        _send(comm, timeout, arrays)
        return
    pieces = _incoming(comm, timeout, Contiguous.even(len(positions), comm.size), arrays)
    try:
        with write_file(path, force) as file:
            datasets = {name: create_dataset(file, name, (len(positions), *x.shape[1:]), x.dtype)
                        for name, x in arrays.items()}
            for name, start, piece in pieces:
                write_rows(datasets[name], start, piece)
            write_array(file, "positions", positions)
            write_array(file, "cache", np.bytes_(_text(description)))
    finally:
        for _ in pieces:          # what the others send is taken, whatever has failed here
            pass


def _text(description: Mapping[str, Any]) -> bytes:
    """Write a description as text, with a checksum: that of a chunk is not to be had for a single item."""
    plain = {"format": FORMAT, **description}
    return json.dumps({**plain, "crc32": zlib.crc32(json.dumps(plain).encode())}).encode()


def _pieces(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Iterator[slice]:
    """Cut rows into pieces of a limited size."""
    row_bytes = int(np.prod(shape[1:])) * dtype.itemsize
    step = max(1, PIECE_BYTES // max(1, row_bytes))
    return (slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step))


def _send(comm: Comm, timeout: float, arrays: Mapping[str, Array]) -> None:
    for x in arrays.values():
        send = comm.message_starter("Isend", 0, 0)
        for piece in _pieces(x.shape, x.dtype):
            comm.wait([send(x[piece].reshape(-1).view(np.uint8))], timeout,
                      lambda: f"{comm.name()} waited for rank 0 to write a cache", peers=lambda: [0])


def _incoming(comm: Comm, timeout: float, layout: Contiguous, arrays: Mapping[str, Array]
              ) -> Iterator[tuple[str, int, Array]]:
    """Yield rank 0's own rows, and those of each other rank as they come: name, first row, rows."""
    for name, x in arrays.items():
        yield name, 0, x
        for rank in range(1, comm.size):
            for piece in _pieces((layout.counts[rank], *x.shape[1:]), x.dtype):
                rows = np.empty((piece.stop - piece.start, *x.shape[1:]), x.dtype)
                _receive(comm, timeout, rank, rows)
                yield name, layout.starts[rank] + piece.start, rows


def _receive(comm: Comm, timeout: float, rank: int, rows: Array) -> None:
    request = comm.message_starter("Irecv", rank, 0)(rows.reshape(-1).view(np.uint8))
    comm.wait([request], timeout, lambda: f"{comm.name()} waited for the cache of rank {rank}", peers=lambda: [rank])


def read_description(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what a file says of its cache: length, dropped, kv_heads, dim, dim_v, dtype, batch. Local.

    Raises
    ------
    ShardError
        If the file is missing, damaged or no cache.
    """
    with open_file(path) as file, reading(path):
        data = file.get("cache")
        if not isinstance(data, h5py.Dataset) or data.is_virtual or data.shape != () or data.dtype.kind != "S":
            raise ShardError(f"{path}: is no cache: expected what KVCache.save writes")
        if data.dtype.itemsize > 2**12 or file.attrs.get("complete") != True:         # noqa: E712 (may be anything)
            raise ShardError(f"{path}: is damaged or was never finished")
        text = bytes(data[()])
    try:
        found: dict[str, Any] = json.loads(text)
        right = found["format"] == FORMAT and found["dtype"] in DTYPES and all(
            type(found[name]) is int and least <= found[name] < LARGEST
            for name, least in (("length", 0), ("dropped", 0), ("kv_heads", 1), ("dim", 1), ("dim_v", 1)))
        batch = found["batch"]
        right = right and (batch is None or (type(batch) is int and 0 < batch < LARGEST))
        right = right and text == _text({name: x for name, x in found.items() if name not in ("format", "crc32")})
    except (KeyError, TypeError, ValueError, RecursionError):
        right = False
    if not right:
        raise ShardError(f"{path}: what it says of its cache is damaged, or of another version")
    return found


def read_tokens(path: str | os.PathLike[str], description: Mapping[str, Any], seen: int, rank: int, size: int
                ) -> tuple[NDArray[np.int64], Array, Array]:
    """Read a rank's share of the tokens of a cache. Local.

    Parameters
    ----------
    path : path
    description : mapping
        What `read_description` gave.
    seen : int
        Keys before it are needed, though a window may have dropped some.
    rank, size : int
        Tokens are dealt out evenly, in their order.

    Returns
    -------
    positions : int64 array of shape (n,)
    k, v : arrays of shape (n, [batch,] kv_heads, dim) and (n, [batch,] kv_heads, dim_v)

    Raises
    ------
    ShardError
        If the file is damaged, or not of the sizes that it says.
    OptionError
        If keys that are needed were dropped.
    """
    batch = () if description["batch"] is None else (description["batch"],)
    dtype = DTYPES[description["dtype"]]
    arrays = []
    with open_file(path) as file:
        positions = read_integers(file, "positions", LARGEST)
        if len(positions) and not (positions[0] >= 0 and positions[-1] < description["length"]
                                   and (np.diff(positions) > 0).all()):
            raise ShardError(f"{path}: expected positions that increase, below {description['length']}")
        kept = description["length"] - description["dropped"]
        if int((positions >= description["dropped"]).sum()) != kept:
            raise ShardError(f"{path}: expected all positions from {description['dropped']} to "
                             f"{description['length']}, got {len(positions)} positions in all")
        if int((positions < seen).sum()) < min(seen, description["dropped"]):
            raise OptionError(f"{path}: expected a mask with a window, and no more first keys than were kept: some "
                              f"before {description['dropped']} were dropped, and this mask shows them")
        shares = Contiguous.even(len(positions), size)
        rows = slice(shares.starts[rank], shares.starts[rank] + shares.counts[rank])
        for name, dim in (("k", description["dim"]), ("v", description["dim_v"])):
            dataset = open_dataset(file, name)
            shape = (len(positions), *batch, description["kv_heads"], dim)
            if dataset.shape != shape or dataset.is_virtual:
                raise ShardError(f"{path}: dataset {name!r}: expected shape {shape}, got {dataset.shape}")
            arrays.append(read_rows(dataset, rows.start, rows.stop))
            if arrays[-1].dtype != dtype:
                raise ShardError(f"{path}: dataset {name!r}: expected {dtype}, got {arrays[-1].dtype}")
    return positions[rows], arrays[0], arrays[1]
