"""A cache of keys and values as an HDF5 file: what it says of itself, and its tokens, read by all ranks.

Datasets `k`, `v`, `positions` and, if there is a bias, `key_bias` have the tokens in the order of their positions. They
are cut into blocks of some rows; `digests` has the SHA-256 digest of each block, over its positions, keys, values and
bias in this order. So what does not belong together is found, by whichever ranks read it. The description, `cache`, has
the digest of `digests`, and is sealed itself.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from ..checks import check_integer
from ..dtypes import DTYPES, check_dtype
from ..errors import DtypeError, OptionError, ShapeError, ShardError
from ..files.hdf5 import open_dataset, read_integers, read_rows
from ..files.links import resolve_path
from ..files.opening import open_file, reading
from ..files.sealed import read_sealed
from ..files.storage import check_storage
from ..layout import Contiguous

Array = NDArray[Any]
FORMAT = 3
DESCRIPTION_BYTES = 2**12
LARGEST = 2**40                # tokens
DIGEST_BYTES = hashlib.sha256().digest_size
COUNTS = {"length": 0, "dropped": 0, "tokens": 0, "rows": 1, "kv_heads": 1, "dim": 1, "dim_v": 1,
          "key_bias": 0}       # at least


def block_digest(positions: NDArray[np.int64], arrays: Iterable[Array]) -> bytes:
    """Give the digest of a block of tokens: of their positions, keys and values. Local."""
    sha256 = hashlib.sha256(np.ascontiguousarray(positions).data)
    for x in arrays:
        sha256.update(np.ascontiguousarray(x).reshape(-1).view(np.uint8).data)
    return sha256.digest()


def encode_description(description: Mapping[str, Any]) -> bytes:
    """Write a description as text. Local."""
    return json.dumps({"format": FORMAT, **description}).encode()


def read_description(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what a file says of its cache: length, dropped, kv_heads, dim, dim_v, dtype, batch and more. Local.

    Raises
    ------
    ShardError
        If the file is missing, damaged or no cache.
    """
    text = read_sealed(Path(path), "cache", DESCRIPTION_BYTES, "what KVCache.save writes")
    try:
        found: dict[str, Any] = json.loads(text)
        batch = found["batch"]
        right = (found["format"] == FORMAT and found["dtype"] in DTYPES and isinstance(found["digests"], str)
                 and type(found["values_in_keys"]) is bool
                 and all(type(found[name]) is int and least <= found[name] < LARGEST for name, least in COUNTS.items())
                 and (batch is None or (type(batch) is int and 0 < batch < LARGEST)))
    except (KeyError, TypeError, ValueError, RecursionError):
        right = False
    if not right:
        raise ShardError(f"{path}: what it says of its cache is of another version; save it by this one")
    return found


def check_sizes(path: Any, found: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Give the sizes of a cache by its description, or raise `OptionError` if others are asked for. Local.

    None asks for nothing.
    """
    sizes = {name: found[name] for name in ("kv_heads", "dim", "dim_v", "dtype", "batch", "key_bias", "values_in_keys")}
    for name, size in sizes.items():
        given = options.get(name)
        if given is None:
            continue
        if name == "dtype":
            wanted: Any = check_dtype(given, name).name
        elif name == "values_in_keys":
            wanted = bool(given)
        elif name == "key_bias":
            wanted = check_integer(f"KVCache: {name}", int(given) if isinstance(given, bool) else given, 0)
        else:
            wanted = check_integer(f"KVCache: {name}", given, 1)
        if wanted != size:
            raise OptionError(f"{path}: expected a cache with {name} {wanted}, got {size}")
    return sizes


def read_blocks(path: str | os.PathLike[str], description: Mapping[str, Any], seen: int, rank: int, size: int
                ) -> Iterator[tuple[Array, ...]]:
    """Read a rank's share of the tokens of a cache, block by block. Local.

    Parameters
    ----------
    path : path
    description : mapping
        What `read_description` gave.
    seen : int
        Keys before it are needed, though a window may have dropped some.
    rank, size : int
        Tokens are dealt out evenly, in their order.

    Yields
    ------
    positions : int64 array of shape (n,)
    k, v : arrays of shape (n, [batch,] kv_heads, dim) and (n, [batch,] kv_heads, dim_v)
        No v if values are in keys.
    key_bias : float64 array of shape (n, [batch,] heads or 1), if there is one

    Raises
    ------
    ShardError
        If the file is damaged, not of the sizes that it says, or made up of parts of several.
    OptionError
        If keys that are needed were dropped.
    """
    with open_file(path) as file:
        try:
            digests = _read_digests(file, path, description)
            positions = _read_positions(file, path, description)
            datasets = _open_datasets(file, path, description)
        except (DtypeError, ShapeError) as error:
            raise ShardError(f"{path}: is not the cache that it says: {error}") from error
        if int((positions < seen).sum()) < min(seen, description["dropped"]):
            raise OptionError(f"{path}: expected a mask with a window, and no more first keys than were kept: some "
                              f"before {description['dropped']} were dropped, and this mask shows them")
        shares = Contiguous.even(len(positions), size)
        first, last = shares.starts[rank], shares.starts[rank] + shares.counts[rank]
        rows = description["rows"]
        for start in range(first - first % rows, last, rows):
            stop = min(start + rows, len(positions))
            arrays = [read_rows(dataset, start, stop) for dataset in datasets]
            if block_digest(positions[start:stop], arrays) != digests[start // rows]:
                raise ShardError(f"{path}: rows {start}..{stop} of its datasets do not belong together, or are "
                                 "damaged: they are not what was written")
            mine = slice(max(first, start) - start, min(last, stop) - start)
            yield positions[start:stop][mine], *(x[mine] for x in arrays)


def _read_digests(file: h5py.File, path: Any, description: Mapping[str, Any]) -> list[bytes]:
    """Read the digest of each block."""
    blocks = -(-description["tokens"] // description["rows"])
    where = f"{path}: dataset 'digests'"
    with reading(where):
        dataset = resolve_path(file, "digests")
        if not isinstance(dataset, h5py.Dataset) or dataset.is_virtual or dataset.dtype != np.uint8 or (
                dataset.shape != (blocks, DIGEST_BYTES)):
            raise ShardError(f"{where}: expected a plain dataset of {blocks} digests")
        check_storage(dataset, where)
        table: NDArray[np.uint8] = np.asarray(dataset[...])
    if hashlib.sha256(table.tobytes()).hexdigest() != description["digests"]:
        raise ShardError(f"{where}: is damaged, or of another cache")
    return [row.tobytes() for row in table]


def _read_positions(file: h5py.File, path: Any, description: Mapping[str, Any]) -> NDArray[np.int64]:
    """Read the positions of all tokens."""
    positions = read_integers(file, "positions", LARGEST)
    length, dropped = description["length"], description["dropped"]
    if len(positions) != description["tokens"]:
        raise ShardError(f"{path}: expected {description['tokens']} positions, got {len(positions)}")
    if len(positions) and not (positions[0] >= 0 and positions[-1] < length and (np.diff(positions) > 0).all()):
        raise ShardError(f"{path}: expected positions that increase, below {length}")
    if int((positions >= dropped).sum()) != length - dropped:
        raise ShardError(f"{path}: expected all positions from {dropped} to {length}, got {len(positions)} positions "
                         "in all")
    return positions


def _open_datasets(file: h5py.File, path: Any, description: Mapping[str, Any]) -> list[h5py.Dataset]:
    """Find keys and values, and a bias, of the shapes and dtypes that the description says."""
    batch = () if description["batch"] is None else (description["batch"],)
    datasets = []
    heads, dtype, biases = description["kv_heads"], DTYPES[description["dtype"]], description["key_bias"]
    expected: dict[str, tuple[tuple[int, ...], np.dtype[Any]]] = {
        "k": ((heads, description["dim"]), dtype)}
    if not description["values_in_keys"]:
        expected["v"] = (heads, description["dim_v"]), dtype
    if biases:
        expected["key_bias"] = (biases,), np.dtype(np.float64)
    for name, (rest, wanted) in expected.items():
        dataset = open_dataset(file, name)
        shape = (description["tokens"], *batch, *rest)
        if dataset.shape != shape or dataset.is_virtual:
            raise ShardError(f"{path}: dataset {name!r}: expected shape {shape}, got {dataset.shape}")
        got = read_rows(dataset, 0, 0).dtype
        if got != wanted:
            raise ShardError(f"{path}: dataset {name!r}: expected {wanted.name}, got {got}")
        datasets.append(dataset)
    return datasets
