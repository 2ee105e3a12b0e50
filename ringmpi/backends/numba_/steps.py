"""How a pass over a block is cut: into pieces that fit the buffers, tasks for the threads, steps between two yields."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ..team import Task
from .vector import machine

TASKS = 4                   # for each thread, at least, so that none waits long for the last
TILE_SPEED = 5.0            # of the CPU's tiles on bfloat16, beside its vectors
PIECES_SPEED = 1.5          # on float32


class Limits(NamedTuple):
    """Bounds: bytes of packed K and V at a time, operations and bytes read between two yields."""

    packed_bytes: int
    step_flop: float
    step_bytes: int


def speed(acc_dtype: np.dtype[Any]) -> float:
    """Operations of this CPU's vectors on numbers of `acc_dtype`, beside AVX-512's on float32. Local."""
    return machine().vector_bytes / 64 * 4 / acc_dtype.itemsize


def equal_parts(count: int, most: int) -> list[tuple[int, int]]:
    """Cut a number of things into at most so many parts, as equal as can be. Local."""
    edges = np.linspace(0, count, min(count, most) + 1).astype(int).tolist()
    return list(itertools.pairwise(edges))


def uncounted_task(call: Callable[[int], None]) -> Task:
    """Make a task of one step that sees no pairs. Local."""
    return Task(0, [(call, 0)])
