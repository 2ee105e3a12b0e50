"""The types of a dataset's items: NumPy's, HDF5's in a file, and HDF5's in memory."""

from __future__ import annotations

from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from ..dtypes import BFLOAT16, DTYPES
from ..errors import DtypeError

BFLOAT16_FIELDS = (15, 7, 8, 0, 7)     # sign, exponent position and size, mantissa position and size
RAW_DTYPE = "bfloat16"         # what 16-bit items that are no floats may be said to be


def stored_dtype(dataset: h5py.Dataset, raw: str | None = None) -> np.dtype[Any]:
    """Give the NumPy dtype of a dataset's floats, bfloat16 included. Local.

    bfloat16 is the floating-point type that HDF5 2.0 calls H5T_FLOAT_BFLOAT16LE. `ringmpi.files.hdf5` writes it with
    any version of HDF5::

        with write_file(Path("in.h5")) as file:
            for name, x in {"q": q, "k": k, "v": v}.items():       # NumPy arrays of ml_dtypes.bfloat16
                write_rows(create_dataset(file, name, x.shape, x.dtype), 0, x)

    A torch tensor becomes such an array by ``x.view(torch.int16).numpy().view(ml_dtypes.bfloat16)``.

    Parameters
    ----------
    dataset : h5py.Dataset
    raw : str, optional
        ``"bfloat16"``: take plain 16-bit items (unsigned, signed or opaque) for the bits of bfloat16; opaque ones
        are little-endian.

    Raises
    ------
    DtypeError
        If they are not float64, float32, bfloat16 or float16.
    """
    item = dataset.id.get_type()
    if isinstance(item, h5py.h5t.TypeFloatID):
        if item.get_size() == 2 and item.get_fields() == BFLOAT16_FIELDS and item.get_ebias() == 127:
            return BFLOAT16
        native: np.dtype[Any] = np.dtype(dataset.dtype.newbyteorder("="))
        if native in DTYPES.values():
            return native

    # What other programs store bfloat16 as: taken for it on request only.
    is_raw = item.get_size() == 2 and isinstance(item, h5py.h5t.TypeIntegerID | h5py.h5t.TypeOpaqueID)
    if is_raw and raw == RAW_DTYPE:
        return BFLOAT16
    remedy = ("; if these are the bits of bfloat16, say --raw-dtype bfloat16, or write HDF5's own bfloat16 as "
              "ringmpi.files.hdf5.write_rows does") if is_raw else ""
    where = f"{dataset.file.filename}: dataset {dataset.name!r}"
    raise DtypeError(f"{where}: expected items of {', '.join(DTYPES)}, got {dataset.dtype}{remedy}")


def file_type(dtype: np.dtype[Any]) -> Any:
    """Give the HDF5 type that `dtype` is stored as, little-endian. Local.

    bfloat16 is the type that HDF5 2.0 calls H5T_FLOAT_BFLOAT16LE, built by hand so that older libraries write and read
    it too.
    """
    if dtype != BFLOAT16:
        return h5py.h5t.py_create(dtype.newbyteorder("<"))
    item = h5py.h5t.IEEE_F16LE.copy()
    item.set_fields(*BFLOAT16_FIELDS)
    item.set_ebias(127)
    return item


def memory_type(dataset: h5py.Dataset, dtype: np.dtype[Any]) -> Any:
    """Give the HDF5 type as which a dataset's items are read into memory of `dtype`, bit for bit. Local."""
    item = dataset.id.get_type()
    if isinstance(item, h5py.h5t.TypeOpaqueID):
        return item
    if dtype == BFLOAT16 and isinstance(item, h5py.h5t.TypeIntegerID):
        signed = item.get_sign() == h5py.h5t.SGN_2
        return h5py.h5t.NATIVE_INT16 if signed else h5py.h5t.NATIVE_UINT16
    return file_type(dtype)


def bits(x: NDArray[Any]) -> NDArray[Any]:
    """Give an array as h5py takes and fills it: bfloat16 as the integers of its bits. Local."""
    return x.view(np.uint16) if x.dtype == BFLOAT16 else x
