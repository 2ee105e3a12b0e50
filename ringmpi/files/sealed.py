"""A text in an HDF5 file that says of the file what it is: sealed by its SHA-256 digest, and of a limited size."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from ..errors import ShardError
from .hdf5 import OutputFile, write_array
from .opening import open_file, reading
from .storage import check_storage

ATTRIBUTE_BYTES = 128


def write_sealed(file: OutputFile, name: str, text: bytes) -> None:
    """Write a text as a dataset of a file in the making, and its digest as an attribute of the file. Local."""
    write_array(file, name, np.bytes_(text))
    _seal(file, name, text)


def write_sealed_together(file: h5py.File, name: str, text: bytes) -> None:
    """Do the same in a file that several ranks have open. All ranks, the same text."""
    file[name] = np.bytes_(text)
    _seal(file, name, text)


def _seal(file: h5py.File, name: str, text: bytes) -> None:
    file.attrs[f"{name}_sha256"] = np.bytes_(hashlib.sha256(text).hexdigest())


def read_sealed(path: Path, name: str, most: int, expected: str) -> bytes:
    """Read a text that `write_sealed` wrote. Local.

    Parameters
    ----------
    path : path
    name : str
    most : int
        Bytes that it may have.
    expected : str
        What writes such files, for an error.

    Raises
    ------
    ShardError
        If the file is missing, was never finished, has no such text, or another one than its digest says.
    """
    with open_file(path) as file, reading(path):
        if not isinstance(file.get(name, getlink=True), h5py.HardLink) or f"{name}_sha256" not in file.attrs:
            raise ShardError(f"{path}: has no {name}: expected {expected}")
        text = _read_text(file, name, most, f"{path}: its {name}")
        digest = _attribute(file, f"{name}_sha256")
        complete = _attribute(file, "complete") if "complete" in file.attrs else False
    if complete is not True or hashlib.sha256(text).hexdigest() != digest:
        raise ShardError(f"{path}: its {name} is damaged")
    return text


def _read_text(file: h5py.File, name: str, most: int, where: str) -> bytes:
    """Read one string of bytes that is in this file."""
    dataset = file[name]
    if not isinstance(dataset, h5py.Dataset) or dataset.is_virtual or dataset.shape != () or dataset.dtype.kind != "S":
        raise ShardError(f"{where}: expected a plain string of bytes")
    size = dataset.dtype.itemsize
    if size > most:
        raise ShardError(f"{where}: expected at most {most:,} bytes, got {size:,}")
    check_storage(dataset, where)
    return bytes(dataset[()])


def _attribute(file: h5py.File, name: str) -> Any:
    """Read a single value; None if it has another type, or is large."""
    attribute = h5py.h5a.open(file.id, name.encode())
    if attribute.shape != () or attribute.get_storage_size() > ATTRIBUTE_BYTES:
        return None
    value = file.attrs[name]
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return value if isinstance(value, str) else bool(value) if isinstance(value, np.bool_) else None
