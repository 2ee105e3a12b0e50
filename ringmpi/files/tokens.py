"""Datasets as rows, one for each token, whatever the order of their axes: what a rank reads of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from ..errors import ShapeError
from .axes import Axes
from .boxes import read_box, read_box_as_shown
from .item_types import stored_dtype
from .rows import TRANSFER_BYTES

PIECE_BYTES = 2**24            # read at a time where the order of axes is another one in memory

Array = NDArray[Any]


class Tokens:
    """A dataset whose rows in memory are (tokens, [batch,] heads, dim), as far as it has these. Local, all of it.

    Only the rows that are asked for are read, as the box of the dataset that they are.

    Parameters
    ----------
    dataset : h5py.Dataset
    axes : Axes
        In the dataset's order.
    dtype : dtype
        Of the rows, native.
    row : tuple of int
        Shape of a row.
    element : int, optional
        The only element of the batch that is read; rows have no batch axis then.

    Attributes
    ----------
    shape : tuple of int
        Of all rows.
    dtype : dtype
    filename, name : str
    """

    def __init__(self, dataset: h5py.Dataset, axes: Axes, dtype: np.dtype[Any], row: tuple[int, ...],
                 element: int | None = None) -> None:
        self.dtype = dtype
        self.shape: tuple[int, ...] = (dataset.shape[axes.tokens], *row)
        self._dataset = dataset
        self._axes = axes
        self._element = element

    @classmethod
    def of(cls, dataset: h5py.Dataset, axes: Axes, raw: str | None = None, heads: int = 0) -> Tokens:
        """Take a dataset that `open_dataset` gave.

        Parameters
        ----------
        raw : str, optional
            See `stored_dtype`.
        heads : int
            That a hidden axis has.

        Raises
        ------
        ShapeError
            If it has not these axes.
        """
        where = f"{dataset.file.filename}: dataset {dataset.name!r}"
        if dataset.ndim != len(axes.names):
            raise ShapeError(f"{where}: expected shape ({', '.join(axes.names)}), got {dataset.shape}; if it has other "
                             "axes, say so by --axes")
        try:
            shape = axes.shape_in_memory(dataset.shape, heads)
        except ShapeError as error:
            raise ShapeError(f"{where}: {error}") from None
        return cls(dataset, axes, stored_dtype(dataset, raw), shape[1:])

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def filename(self) -> str:
        """Of the file that it is in."""
        return str(self._dataset.file.filename)

    @property
    def name(self) -> str:
        """Its path in the file."""
        return str(self._dataset.name)

    def element(self, number: int) -> Tokens:
        """Give the rows of an element of the batch alone."""
        return Tokens(self._dataset, self._axes, self.dtype, self.shape[2:], number)

    def read(self, start: int, stop: int) -> Array:
        """Read rows start..stop, bit for bit.

        Raises
        ------
        ShardError
            If a checksum does not match or the file can't be read.
        """
        rows = np.empty((stop - start, *self.shape[1:]), self.dtype)
        self.read_into(start, rows)
        return rows

    def read_into(self, start: int, rows: Array, as_shown: bool = False) -> None:
        """Read rows from `start` on into a contiguous array of their dtype and shape, bit for bit.

        Parameters
        ----------
        as_shown : bool
            Read a virtual dataset through itself, as any reader of HDF5 does, and not from its sources.

        Raises
        ------
        ShardError
            If a checksum does not match or the file can't be read.
        """
        read = read_box_as_shown if as_shown else read_box
        axes = self._axes
        whole = rows if self._element is None else rows[:, None]
        if axes.as_in_memory:
            box = whole.reshape(axes.shape_in_file(whole.shape))
            read(self._dataset, axes.start_of(start, self._element or 0), box)
            return
        for first, last in self._pieces(start, whole):
            box = np.empty(axes.shape_in_file(whole[first:last].shape), self.dtype)
            read(self._dataset, axes.start_of(start + first, self._element or 0), box)
            axes.from_file(box, whole[first:last])

    def _pieces(self, start: int, rows: Array) -> Iterator[tuple[int, int]]:
        """Cut rows, of which the first is row `start`, where chunks end: one that is compressed is read as a whole."""
        row = max(1, rows[:1].nbytes)
        step = max(1, PIECE_BYTES // row)
        chunks = self._dataset.chunks
        if chunks is not None:
            tokens = chunks[self._axes.tokens]
            step = max(1, min(-(-step // tokens) * tokens, TRANSFER_BYTES // row))
        at = 0
        while at < len(rows):
            stop = min((start + at) // step * step + step - start, len(rows))
            yield at, stop
            at = stop
