"""The kernel for Hopper GPUs, kernels/accumulate_hopper.cu: which blocks it takes, its instances, what it is given.

It has the arguments of the kernels that `cuda` chooses else, but for tensor maps in place of K and V, and it is
compiled for sm_90a. RINGMPI_HOPPER=0 takes it away.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...device import Device
from ...dtypes import BFLOAT16
from ...score import Score
from .sources import Kernel

Array = Any
FILE = "accumulate_hopper.cu"
ARCHITECTURE = "sm_90a"
CAPABILITY = 9, 0
TYPES = {BFLOAT16: "bfloat16", np.dtype(np.float16): "float16"}
MOST_DIM, KEYS = 128, 128
MOST_INTERVALS = 4            # each is a launch; many of them are short, and then one of another kernel has all
FEWEST_ROWS = 65              # of a key head; below, most of a block's rows would be idle
PANEL_COLUMNS, PANEL_ALIGN = 64, 1024        # as in panels.cuh


def takes(device: Device, q: Array, k: Array, v: Array, score: Score) -> bool:
    """Say whether the kernel can fold these arrays. Local.

    Parameters
    ----------
    device : Device
    q : array of shape (n_q, heads, dim), on the GPU
    k : array of shape (n_k, kv_heads, dim), on the GPU
    v : array of shape (n_k, kv_heads, dim_v), on the GPU
    score : Score
        The kernel has no score functions.
    """
    if device.capability != CAPABILITY or q.dtype not in TYPES or not score.plain:
        return False
    dims = q.shape[2], v.shape[2]
    aligned = all(dim % 8 == 0 for dim in dims) and all(x.data.ptr % 16 == 0 for x in (q, k, v))
    return aligned and max(dims) <= MOST_DIM and len(q) * q.shape[1] // k.shape[1] >= FEWEST_ROWS


def instance(dtype: np.dtype[Any], dim: int, dim_v: int) -> Kernel:
    """Give the instance for arrays of that dtype and width. Local."""
    wide, wide_v = (-(-n // PANEL_COLUMNS) * PANEL_COLUMNS for n in (dim, dim_v))
    groups = 3 if wide == wide_v == 64 else 2      # as many as there are registers for
    stages = 3 if wide + wide_v < 256 else 2
    barriers = 4 * stages * 8
    shared_bytes = PANEL_ALIGN + 2 * (64 * groups * wide + stages * KEYS * (wide + wide_v)) + barriers
    name = f"accumulate<{TYPES[dtype]}, {wide}, {wide_v}, {groups}, {KEYS}, {stages}>"
    return Kernel(FILE, name, 64 * groups, KEYS, 128 * (groups + 1), shared_bytes, MOST_DIM, 1)


def maps(device: Device, k: Array, v: Array) -> tuple[NDArray[Any], NDArray[Any]]:
    """Give what the kernel is given in place of K and V. Local."""
    box = KEYS, 1, PANEL_COLUMNS
    return device.tensor_map(k, box), device.tensor_map(v, box)
