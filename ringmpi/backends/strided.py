"""Which views of a larger array are read where they are, and how a part of one is laid out for a product."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def in_place(x: NDArray[Any]) -> NDArray[Any]:
    """Give `x`, of any shape, as the backends on CPUs read it: `x` itself if its numbers lie side by side. Local.

    So are the filled part of a longer cache, a batch of such, (heads, tokens, dim) with two axes swapped, and what was
    broadcast along a batch, tokens or heads. A copy is made of what is not aligned, whose last axis has gaps, or that
    goes backwards.
    """
    if x.flags.c_contiguous and x.flags.aligned:
        return np.asarray(x)
    strides = [stride for stride, length in zip(x.strides, x.shape, strict=True) if length != 1]
    side_by_side = not x.size or x.shape[-1] == 1 or x.strides[-1] == x.itemsize
    if side_by_side and x.flags.aligned and all(stride >= 0 and stride % x.itemsize == 0 for stride in strides):
        return np.asarray(x)
    return np.array(x, order="C", subok=False)


def for_products(x: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Give `x` in `dtype`, in the order of its axes and without overlap: BLAS does the same with it as with a copy.

    `x` itself if it is so, with any gaps between the rows. Local.
    """
    reach = x.itemsize
    ordered = x.dtype == dtype
    for stride, length in zip(reversed(x.strides), reversed(x.shape), strict=True):
        ordered &= stride >= reach
        reach = stride * length
    return x if ordered else x.astype(dtype, order="C")
