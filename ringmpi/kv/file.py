"""A cache of keys and values as an HDF5 file: written by rank 0 in the order of the positions, read by all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
from numpy.typing import NDArray

from ..checks import check_timeout
from ..dtypes import DTYPES
from ..errors import InternalError, OptionError, ShardError
from ..files.hdf5 import create_dataset, open_dataset, read_integers, read_rows, write_array, write_file, write_rows
from ..files.opening import open_file, reading
from ..layout import Contiguous, Custom
from ..mpi.comm import TIMEOUT, Comm, private_comm
from ..schedules.redistribution import redistribute

if TYPE_CHECKING:
    from .cache import KVCache

Array = NDArray[Any]
FORMAT = 1
PIECE_BYTES = 2**25            # of what a rank sends at a time to the one that writes
SIZES = ("kv_heads", "dim", "dim_v", "dtype", "batch")
LARGEST = 2**40                # tokens


def save(cache: KVCache, path: str | os.PathLike[str], force: bool) -> None:
    """Write a cache; see `KVCache.save`. Collective over its *comm*."""
    comm = cache._comm
    timeout = cache._timeout
    with comm.one_call():
        rows = comm.exchange("KVCache.save", timeout, cache._store.positions.view(np.uint8),
                             options={**cache._options, "length": cache.length, "path": str(path)})
    held = [row.view(np.int64) for row in rows]
    positions = np.sort(np.concatenate(held))
    source = Custom([np.searchsorted(positions, theirs) for theirs in held])
    k, v = (np.moveaxis(cache._engine.backend.to_numpy(x), 1, 0) for x in cache._store.whole())
    arrays = {}
    for name, x in (("k", k), ("v", v)):
        x = np.ascontiguousarray(x if cache.batch is not None else x[:, 0])
        arrays[name] = redistribute(x, comm=cache._given, source=source, target="contiguous", timeout=timeout)
    with comm.one_call(), comm.raise_on_all(timeout):
        if comm.rank:
            _send(comm, timeout, arrays)
            return
        pieces = _incoming(comm, timeout, Contiguous.even(len(positions), comm.size), arrays)
        try:
            _write(cache, Path(path), force, positions, {name: x.shape[1:] for name, x in arrays.items()}, pieces)
        finally:
            for _ in pieces:          # what the others send is taken, whatever has failed here
                pass


def _write(cache: KVCache, path: Path, force: bool, positions: NDArray[np.int64], rows: dict[str, tuple[int, ...]],
           pieces: Iterator[tuple[str, int, Array]]) -> None:
    """Write the rows of all ranks as they come. Rank 0."""
    description = {"format": FORMAT, "length": cache.length, "dropped": cache._dropped,
                   **{name: getattr(cache, name) for name in SIZES}, "dtype": cache.dtype.name}
    with write_file(path, force) as file:
        datasets = {name: create_dataset(file, name, (len(positions), *shape), cache.dtype)
                    for name, shape in rows.items()}
        for name, start, piece in pieces:
            write_rows(datasets[name], start, piece)
        write_array(file, "positions", positions)
        write_array(file, "cache", np.bytes_(json.dumps(description).encode()))


def _pieces(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Iterator[slice]:
    """Cut rows into pieces of a limited size."""
    row_bytes = int(np.prod(shape[1:])) * dtype.itemsize
    step = max(1, PIECE_BYTES // max(1, row_bytes))
    return (slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step))


def _send(comm: Comm, timeout: float, arrays: dict[str, Array]) -> None:
    for x in arrays.values():
        send = comm.message_starter("Isend", 0, 0)
        for piece in _pieces(x.shape, x.dtype):
            comm.wait([send(x[piece].reshape(-1).view(np.uint8))], timeout,
                      lambda: f"{comm.name()} waited for rank 0 to write a cache", peers=lambda: [0])


def _incoming(comm: Comm, timeout: float, layout: Contiguous, arrays: dict[str, Array]
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


def read(kind: type[KVCache], path: str | os.PathLike[str], comm: Any, options: dict[str, Any]) -> KVCache:
    """Read a cache; see `KVCache.open`. Collective over *comm*."""
    timeout, _ = check_timeout(options.get("timeout", TIMEOUT))
    private = private_comm(comm, timeout)
    found: dict[str, Any] = {}
    given = {name: options.pop(name) for name in SIZES if name in options}
    with private.one_call(), private.raise_on_all(timeout), open_file(path) as file:
        found = _describe(file, path)
        for name, value in given.items():
            wanted = np.dtype(value).name if name == "dtype" else value
            if wanted != found[name]:
                raise OptionError(f"{path}: expected a cache with {name} {wanted}, got {found[name]}")
    cache = kind(comm, **{name: found[name] for name in SIZES}, **options)
    try:
        with private.one_call(), private.raise_on_all(timeout), cache._engine.backend.current(), \
                open_file(path) as file:
            positions = _positions(file, path, found)
            start = Contiguous.even(len(positions), private.size)
            stop = start.starts[private.rank] + start.counts[private.rank]
            k, v = (_rows(cache, file, path, name, len(positions), start.starts[private.rank], stop) for name in "kv")
            if cache.capacity is not None and found["length"] > cache.capacity:
                raise OptionError(f"{path}: expected at most {cache.capacity} tokens, the capacity, got "
                                  f"{found['length']}")
            cache._store.append(positions[start.starts[private.rank]:stop], k, v)
    except BaseException:
        cache.close()
        raise
    cache.length = found["length"]
    cache._dropped = found["dropped"]
    return cache


def _describe(file: h5py.File, path: Any) -> dict[str, Any]:
    """Read what a file says of its cache, value by value."""
    with reading(path):
        data = file.get("cache")
        if not isinstance(data, h5py.Dataset) or data.is_virtual or data.shape != () or data.dtype.kind != "S":
            raise ShardError(f"{path}: is no cache: expected what KVCache.save writes")
        if data.dtype.itemsize > 2**12 or file.attrs.get("complete") != True:         # noqa: E712 (may be anything)
            raise ShardError(f"{path}: is damaged or was never finished")
        try:
            found: dict[str, Any] = json.loads(bytes(data[()]))
            right = found["format"] == FORMAT and found["dtype"] in DTYPES and all(
                type(found[name]) is int and 0 <= found[name] < LARGEST
                for name in ("length", "dropped", "kv_heads", "dim", "dim_v"))
            batch = found["batch"]
            right = right and (batch is None or (type(batch) is int and 0 < batch < LARGEST))
        except (KeyError, TypeError, ValueError, RecursionError):
            right = False
    if not right:
        raise ShardError(f"{path}: what it says of its cache makes no sense, or is of another version")
    return found


def _positions(file: h5py.File, path: Any, found: dict[str, Any]) -> NDArray[np.int64]:
    """Read the positions, which must increase below the length."""
    positions = read_integers(file, "positions", LARGEST)
    if len(positions) and not (positions[0] >= 0 and positions[-1] < found["length"]
                               and (np.diff(positions) > 0).all()):
        raise ShardError(f"{path}: expected positions that increase, below {found['length']}")
    return positions


def _rows(cache: KVCache, file: h5py.File, path: Any, name: str, tokens: int, start: int, stop: int) -> Array:
    """Read some tokens of a dataset, with a batch axis, where they are computed with."""
    dataset = open_dataset(file, name)
    dim = cache.dim if name == "k" else cache.dim_v
    batch = () if cache.batch is None else (cache.batch,)
    if dataset.shape != (tokens, *batch, cache.kv_heads, dim) or dataset.is_virtual:
        raise ShardError(f"{path}: dataset {name!r}: expected shape {(tokens, *batch, cache.kv_heads, dim)}, got "
                         f"{dataset.shape}")
    rows = read_rows(dataset, start, stop)
    if rows.dtype != cache.dtype:
        raise InternalError(f"{path}: dataset {name!r}: read {rows.dtype} in place of {cache.dtype}")
    placed: Array = cache._engine.backend.to_device(np.moveaxis(rows, 0, 1) if batch else rows[None])
    return placed
