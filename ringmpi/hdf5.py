"""Files as ringmpi writes them, for programs of one's own: bfloat16 as HDF5's own type, whole or not there at all."""

from __future__ import annotations

from .files.hdf5 import create_dataset, write_file, write_rows

__all__ = ["create_dataset", "write_file", "write_rows"]
