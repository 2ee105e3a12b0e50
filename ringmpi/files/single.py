"""Results that are one plain file: datasets `out` and `lse`, and what their bytes must be.

The sealed text `rows` has the SHA-256 digests of ranges of rows, as they were in memory, and how the result was made.
`ringmpi merge` writes such files, and a job whose ranks write one file together.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from ..dtypes import DTYPES
from ..errors import ShardError
from .axes import Axes, axes_of_results, axes_said
from .hdf5 import open_dataset
from .opening import open_file, reading
from .rows import row_ranges
from .sealed import read_sealed
from .tokens import Tokens

NAME = "rows"                  # of the sealed text
MOST_BYTES = 2**26             # of it: 300,000 ranges
AT_A_TIME = 2**24              # bytes of rows that are read and digested
COUNT = 2**62                  # a larger number is no row

Array = NDArray[Any]


@dataclass(frozen=True)
class Range:
    """Rows start..stop, and the digests of `out` and `lse` there."""

    start: int
    stop: int
    out: str
    lse: str


@dataclass(frozen=True)
class SingleFile:
    """A result in one file; it answers as `Manifest` does.

    Attributes
    ----------
    path : path
    ranges : tuple of Range
        In order, without gaps.
    shapes, dtypes : dict
        Of `out` and `lse`, in memory.
    record : dict
        How it was made.
    axes : Axes
        Of `out` in the file.
    """

    path: Path
    ranges: tuple[Range, ...]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    record: dict[str, Any]
    axes: Axes

    def rows(self, name: str, start: int, stop: int) -> Array:
        """Read rows start..stop of `out` or `lse`. Local.

        Raises
        ------
        ShardError
            If they can't be read.
        """
        with open_file(self.path) as file:
            return _results(file, self.axes)[name].read(start, stop)


def seal(ranges: Sequence[Range], axes: Axes, record: Mapping[str, Any]) -> bytes:
    """Give the text of a file: the digests of its rows, its axes, and how it was made. Local."""
    content = {"ranges": [asdict(each) for each in ranges], "axes": axes.names, "record": dict(record)}
    return json.dumps(content).encode()


def digest_rows(parts: Iterable[Array]) -> str:
    """Give the SHA-256 digest of rows that come in parts, by their bytes in memory. Local."""
    sha256 = hashlib.sha256()
    for rows in parts:
        sha256.update(np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data)
    return sha256.hexdigest()


def is_single(path: str | os.PathLike[str]) -> bool:
    """Say whether a file says of itself that it is a whole result. Local.

    Raises
    ------
    ShardError
        If it can't be read.
    """
    with open_file(path) as file, reading(path):
        return f"{NAME}_sha256" in file.attrs


def verify_single(path: str | os.PathLike[str]) -> SingleFile:
    """Open a result in one file, and check every byte of its rows. Local.

    Raises
    ------
    ShardError
        If it is missing, damaged or unfinished, or its rows are not what was written.
    """
    real = Path(os.path.realpath(path))
    text = read_sealed(real, NAME, MOST_BYTES, "a result of `ringmpi merge`, or of ranks that wrote one file")
    with open_file(real) as file:
        try:
            content = json.loads(text)
            axes = axes_said(content)
            found = _results(file, axes)
            single = SingleFile(real, tuple(Range(**each) for each in content["ranges"]),
                                {name: tokens.shape for name, tokens in found.items()},
                                {name: str(tokens.dtype) for name, tokens in found.items()},
                                dict(content["record"]), axes)
            _check(single)
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise ShardError(f"{path}: its {NAME} make no sense: {error}") from None
        for each in single.ranges:
            for name, tokens in found.items():
                if _digest_in_file(tokens, each.start, each.stop) != getattr(each, name):
                    raise ShardError(f"{path}: dataset {name!r}, rows {each.start}..{each.stop}: damaged: they are not "
                                     "what was written")
    return single


def _check(single: SingleFile) -> None:
    """Raise ValueError unless the ranges are those of the datasets."""
    at = 0
    for each in single.ranges:
        if type(each.start) is not int or type(each.stop) is not int or not at == each.start <= each.stop < COUNT:
            raise ValueError(f"a range does not begin at row {at}")
        at = each.stop
    out, lse = single.shapes["out"], single.shapes["lse"]
    if lse != out[:-1] or out[0] != at:
        raise ValueError(f"out and lse have no {at} rows of heads")
    if single.dtypes["out"] not in DTYPES or single.dtypes["lse"] not in ("float32", "float64"):
        raise ValueError("out is of no known dtype, or lse of no accumulator's")
    if not isinstance(single.record.get("options", {}), dict):
        raise ValueError("the options are no table")


def _results(file: h5py.File, axes: Axes) -> dict[str, Tokens]:
    """Take `out` and `lse` of a file, whose axes are those of results with these for `out`."""
    found = {name: open_dataset(file, name) for name in ("out", "lse")}
    if any(dataset.is_virtual for dataset in found.values()):
        raise ShardError(f"{file.filename}: expected plain datasets out and lse, got views of others")
    of = axes_of_results(axes)
    lse = Tokens.of(found["lse"], of["lse"])
    return {"out": Tokens.of(found["out"], of["out"], heads=lse.shape[-1]), "lse": lse}


def _digest_in_file(tokens: Tokens, start: int, stop: int) -> str:
    ranges = row_ranges((stop - start, *tokens.shape[1:]), tokens.dtype, AT_A_TIME)
    return digest_rows(tokens.read(start + first, start + last) for first, last in ranges)
