"""Arrays in files of NumPy (.npy, .npz) and safetensors: found by name, and read some rows at a time.

Such files are data, not code: nothing is unpickled, and what a header says is held against the bytes that there are.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..dtypes import BFLOAT16, DTYPES
from ..errors import DtypeError, OptionError, RingError, ShapeError, ShardError
from .item_types import RAW_DTYPE
from .opening import check_regular
from .rows import row_ranges

PIECE_BYTES = 2**24            # read at a time
SUFFIXES = (".npy", ".npz", ".safetensors")
# What zipfile, NumPy and safetensors raise for files that are damaged, or none of theirs.
DAMAGED = (OSError, ValueError, EOFError, KeyError, RuntimeError, OverflowError, zipfile.BadZipFile, zlib.error)
OF_SAFETENSORS = {"F64": "f8", "F32": "f4", "F16": "f2", "BOOL": "?", "I64": "i8", "I32": "i4", "I16": "i2", "I8": "i1",
                  "U64": "u8", "U32": "u4", "U16": "u2", "U8": "u1"}

Array = NDArray[Any]


class Stored(NamedTuple):
    """An array in a file.

    Attributes
    ----------
    where : str
        File and name, for errors.
    shape, dtype
        As stored.
    pieces : callable
        Gives its rows in their order, some at a time.
    """

    where: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    pieces: Callable[[], Iterator[Array]]

    def dtype_in_memory(self, raw: str | None = None) -> np.dtype[Any]:
        """Give the dtype of what `rows` gives: that of a float as it is, int64 for integers and booleans. Local.

        Parameters
        ----------
        raw : str, optional
            ``"bfloat16"``: plain 16-bit items are the bits of bfloat16.

        Raises
        ------
        DtypeError
            If they are anything else.
        """
        native: np.dtype[Any] = self.dtype.newbyteorder("=")
        if native in DTYPES.values():
            return native
        is_raw = native.itemsize == 2 and native.kind in "iuV" and native.names is None
        if is_raw and raw == RAW_DTYPE:
            return BFLOAT16
        if native.kind in "biu" and native != np.uint64:
            return np.dtype(np.int64)
        remedy = "; if these are the bits of bfloat16, say --raw-dtype bfloat16" if is_raw else ""
        raise DtypeError(f"{self.where}: expected items of {', '.join(DTYPES)}, or integers, got {self.dtype}{remedy}")

    def rows(self, raw: str | None = None) -> Iterator[Array]:
        """Give its rows in their order, some at a time, of the dtype in memory. Local.

        Raises
        ------
        ShardError, DtypeError
            If they can't be read.
        """
        dtype = self.dtype_in_memory(raw)
        with _reading(self.where):
            for piece in self.pieces():
                native = piece.astype(piece.dtype.newbyteorder("="), copy=False)
                yield np.ascontiguousarray(native).view(BFLOAT16) if dtype == BFLOAT16 else native.astype(dtype)


@contextmanager
def open_arrays(path: Path) -> Iterator[dict[str, Stored]]:
    """Open a file of arrays; give them by their names, that of a .npy by the file's. Local.

    Raises
    ------
    ShardError, OptionError, DtypeError
        If there is no such file, it is damaged, or of another kind.
    """
    check_regular(path)
    opener = {".npy": _open_npy, ".npz": _open_npz, ".safetensors": _open_safetensors}.get(path.suffix)
    if opener is None:
        raise OptionError(f"{path}: expected a file that ends in {', '.join(SUFFIXES)}")
    with ExitStack() as files:
        with _reading(str(path)):
            found = opener(path, files)
        yield found


@contextmanager
def _reading(where: str) -> Iterator[None]:
    """Turn the errors of a block that reads into `ShardError`."""
    try:
        yield
    except RingError:
        raise
    except DAMAGED as error:
        raise ShardError(f"{where}: can't be read, it is truncated, damaged or no such file: {error}") from error


def _open_npy(path: Path, files: ExitStack) -> dict[str, Stored]:
    x = np.load(path, mmap_mode="r", allow_pickle=False)
    return {path.stem: Stored(str(path), x.shape, x.dtype, lambda: _slices(x, x.shape, x.dtype))}


def _slices(x: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Iterator[Array]:
    """Give what can be sliced some rows at a time."""
    for start, stop in row_ranges(shape, dtype, PIECE_BYTES):
        yield x[start:stop]


def _open_npz(path: Path, files: ExitStack) -> dict[str, Stored]:
    archive = files.enter_context(zipfile.ZipFile(path))
    members = [info for info in archive.infolist() if info.filename.endswith(".npy")]
    if len({info.filename for info in members}) < len(members):
        raise ShardError(f"{path}: expected arrays of different names, got one twice")
    return {info.filename.removesuffix(".npy"): _member(path, archive, info) for info in members}


def _member(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Stored:
    """Read the header of an array in an archive."""
    where = f"{path}: array {info.filename.removesuffix('.npy')!r}"
    with _reading(where), archive.open(info) as stream:
        shape, dtype = _header(stream, where)
        begin = stream.tell()
    if begin + math.prod(shape) * dtype.itemsize != info.file_size:
        raise ShardError(f"{where}: expected {math.prod(shape) * dtype.itemsize:,} bytes for shape {shape} of {dtype}, "
                         f"got {info.file_size - begin:,}")

    def pieces() -> Iterator[Array]:
        with archive.open(info) as stream:
            stream.read(begin)
            for start, stop in row_ranges(shape, dtype, PIECE_BYTES):
                piece = np.empty((stop - start, *shape[1:]), dtype)
                piece.reshape(-1).view(np.uint8)[...] = np.frombuffer(stream.read(piece.nbytes), np.uint8)
                yield piece

    return Stored(where, shape, dtype, pieces)


def _header(stream: Any, where: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Read the header of a .npy file."""
    readers: dict[Any, Callable[[BinaryIO], Any]] = {(1, 0): np.lib.format.read_array_header_1_0,
                                                     (2, 0): np.lib.format.read_array_header_2_0}
    version = np.lib.format.read_magic(stream)
    if version not in readers:
        raise ShardError(f"{where}: expected version 1.0 or 2.0 of NumPy's format, got {version}")
    shape, fortran, dtype = readers[version](stream)
    if dtype.hasobject or not dtype.itemsize:
        raise DtypeError(f"{where}: expected items of fixed size, got dtype {dtype}")
    if any(length < 0 for length in shape):
        raise ShapeError(f"{where}: expected lengths of 0 or more, got shape {shape}")
    if fortran and len(shape) > 1:
        raise ShapeError(f"{where}: expected an array in C order, got one in Fortran's; save "
                         "numpy.ascontiguousarray of it, or a .npy file")
    return shape, dtype


def _open_safetensors(path: Path, files: ExitStack) -> dict[str, Stored]:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise OptionError(f"{path}: expected the package safetensors to read it, got none ({error}); pip install "
                          "safetensors") from error
    try:
        opened = files.enter_context(safe_open(path, framework="numpy"))
        return {name: _tensor(path, name, opened.get_slice(name)) for name in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ShardError(f"{path}: can't be read, it is truncated, damaged or none of safetensors: {error}") from None


def _tensor(path: Path, name: str, tensor: Any) -> Stored:
    kind = tensor.get_dtype()
    dtype = BFLOAT16 if kind == "BF16" else np.dtype(OF_SAFETENSORS.get(kind, "O"))
    where = f"{path}: tensor {name!r}" if not dtype.hasobject else f"{path}: tensor {name!r}, of {kind}"
    shape = tuple(tensor.get_shape())

    def pieces() -> Iterator[Array]:
        try:
            yield from _slices(tensor, shape, dtype)
        except (AttributeError, TypeError) as error:
            raise DtypeError(f"{where}: this version of safetensors gives NumPy no {kind}: {error}") from error

    return Stored(where, shape, dtype, pieces)
