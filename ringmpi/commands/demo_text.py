"""Attention as exact retrieval: real text turned into q, k and v, without any training.

Each head looks for one length of context. The key of byte j is a hash of the bytes *before* it; the query of byte i is
a hash of the bytes up to and *including* it; both have the 64 bits of the hash as signs ±1. The value of byte j is a
code of byte j itself. So under a causal mask a query finds the places where the same bytes stood before, and gets back
the code of the byte that followed them. A match scores far above the noise of other hashes, and `lse` tells whether
there was one.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ShardError
from ..files.hdf5 import create_dataset, write_array, write_file, write_rows
from ..files.opening import reading
from ..files.rows import row_ranges

ORDERS = (5, 8, 16, 32)        # bytes of context, one for each head
DIM = 64                       # of queries and keys: one bit of a 64-bit hash each
DIM_V = 32                     # of values: signs of a byte's code
SHARPNESS = 6.0                # queries are ±6: a match scores 6·64/sqrt(64) = 48, noise has deviation 6
MATCH = SHARPNESS * DIM**0.5
Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Text:
    """Bytes of several files, one after the other.

    Attributes
    ----------
    data : uint8 array of shape (tokens,)
    names : list of str
        The files, in order.
    offsets : int64 array of shape (files + 1,)
        Where each file begins in `data`; the last is the number of tokens.
    """

    data: Bytes
    names: list[str]
    offsets: NDArray[np.int64]

    def place(self, position: int) -> str:
        """Name the file of a byte, and its position among the bytes of that file that were read. Local."""
        number = int(np.searchsorted(self.offsets, position, side="right")) - 1
        return f"{self.names[number]}, byte {position - self.offsets[number]:,}"


def standard_library() -> Path:
    """Give the folder of the running Python's standard library. Local."""
    return Path(sysconfig.get_paths()["stdlib"])


def read_text(paths: Sequence[Path], start: int, tokens: int) -> Text:
    """Read `tokens` bytes of the files under `paths`. Local.

    Files of a folder come in the order of their names' digests: always the same, but shuffled. In the order of their
    names neighbours are much alike, and a longer context would find little that a short one did not.

    Parameters
    ----------
    paths : sequence of path
        Files, or folders whose ``*.py`` files (all files if there are none) are taken.
    start : int
        Bytes to skip first.
    tokens : int
        Bytes to read.

    Raises
    ------
    ShardError
        If a path does not exist, or there are fewer bytes.
    """
    parts: list[Bytes] = []
    names: list[str] = []
    offsets = [0]
    at = 0                     # of all bytes, skipped ones included
    for name, file in _files(paths):
        with reading(file):
            size = file.stat().st_size
            first, last = max(start - at, 0), min(start + tokens - at, size)
            data = file.read_bytes()[first:last] if first < last else b""
        if len(data) < last - first:
            raise ShardError(f"{file}: became shorter while it was read")
        if first < last:
            parts.append(np.frombuffer(data, np.uint8))
            names.append(name)
            offsets.append(offsets[-1] + last - first)
        at += size
        if at >= start + tokens:
            break
    if offsets[-1] < tokens:
        raise ShardError(f"expected {start + tokens} bytes of text, got {at} in {', '.join(map(str, paths))}")
    return Text(np.concatenate([np.empty(0, np.uint8), *parts]), names, np.array(offsets))


def _files(paths: Sequence[Path]) -> Iterator[tuple[str, Path]]:
    """Give each file under `paths` with its name, in a fixed order."""
    for path in paths:
        if path.is_file():
            yield path.name, path
        elif path.is_dir():
            found = [f for f in path.rglob("*") if f.is_file() and "site-packages" not in f.parts]
            python = [f for f in found if f.suffix == ".py"]
            names = {str(file.relative_to(path)): file for file in python or found}
            for name in sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest()):
                yield name, names[name]
        else:
            raise ShardError(f"{path}: no such file or folder")


def hash_contexts(data: Bytes, order: int) -> NDArray[np.uint64]:
    """Hash the `order` bytes up to and including each byte. Local.

    Parameters
    ----------
    data : uint8 array of shape (tokens,)
    order : int

    Returns
    -------
    uint64 array of shape (tokens,)
        Before the first byte there is nothing.
    """
    # A polynomial of the bytes, then its bits mixed.
    value = np.zeros(len(data), np.uint64)
    for back in range(order):
        shifted = np.zeros(len(data), np.uint64)
        shifted[back:] = data[:max(len(data) - back, 0)].astype(np.uint64) + np.uint64(1)
        value = value * np.uint64(0x100000001B3) + shifted
    value += np.uint64(order)                               # Steele, Lea & Flood 2014, SplitMix64's finaliser
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def unpack_signs(hashes: NDArray[np.uint64], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Turn the bits of hashes of shape (...) into ±1 of shape (..., 64). Local."""
    bits = np.unpackbits(hashes[..., None].view(np.uint8), axis=-1).astype(np.int8)
    return (2 * bits - 1).astype(dtype)


def byte_codes() -> NDArray[np.int8]:
    """Give the code of each byte: ±1, shape (256, DIM_V), always the same. Local."""
    return np.random.default_rng(256).choice(np.array([-1, 1], np.int8), (256, DIM_V))


def write_text(path: Path, text: Text, queries: int, dtype: np.dtype[Any], force: bool = False) -> None:
    """Write q, k and v of a text, with the text, its files and their offsets beside them. Local.

    Parameters
    ----------
    path : path
    text : Text
    queries : int
        How many tokens at the end have queries; all have keys and values.
    dtype : dtype
        Any: ±1 and ±6 are exact in every one.

    Raises
    ------
    OutputError
        If the file exists and not `force`, or can't be written.
    """
    heads = len(ORDERS)
    tokens = len(text.data)
    first = tokens - queries
    codes = byte_codes()

    # A query knows its own byte; a key knows what was before its byte, which is what the query before it knows.
    including = np.stack([hash_contexts(text.data, order) for order in ORDERS], axis=1)
    before = np.concatenate([np.zeros((1, heads), np.uint64), including[:-1]]) if tokens else including
    with write_file(path, force) as file:
        q = create_dataset(file, "q", (queries, heads, DIM), dtype)
        k = create_dataset(file, "k", (tokens, heads, DIM), dtype)
        v = create_dataset(file, "v", (tokens, heads, DIM_V), dtype)
        for a, b in row_ranges(q.shape, dtype):
            write_rows(q, a, unpack_signs(including[first + a:first + b], dtype) * dtype.type(SHARPNESS))
        for a, b in row_ranges(k.shape, dtype):
            write_rows(k, a, unpack_signs(before[a:b], dtype))
            rows = codes[text.data[a:b]].astype(dtype)
            write_rows(v, a, np.repeat(rows[:, None], heads, axis=1))

        # What the numbers mean, for people and for `demo`.
        write_array(file, "documents", text.offsets)
        write_array(file, "text", text.data)
        file["files"] = [name.encode(errors="backslashreplace").decode() for name in text.names]
        file.attrs["orders"] = ORDERS


def predict_bytes(out: NDArray[Any], lse: NDArray[Any]) -> tuple[Bytes, NDArray[np.int64]]:
    """Read the next byte off a result: the longest context that was found decides. Local.

    Parameters
    ----------
    out : array of shape (tokens, heads, DIM_V)
    lse : array of shape (tokens, heads)

    Returns
    -------
    bytes : uint8 array of shape (tokens,)
    head : int64 array of shape (tokens,)
        The head that decided; -1 if no context was found (the byte is a space then).
    """
    found = lse > MATCH - 4
    head = np.where(found.any(axis=1), found.shape[1] - 1 - np.argmax(found[:, ::-1], axis=1), -1)
    chosen = np.take_along_axis(out.astype(np.float32), np.maximum(head, 0)[:, None, None], axis=1)[:, 0]
    byte = np.argmax(chosen @ byte_codes().T.astype(np.float32), axis=1).astype(np.uint8)
    return np.where(head < 0, np.uint8(32), byte), head
