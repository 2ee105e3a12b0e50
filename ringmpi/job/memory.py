"""How much memory a rank will need, and about how long it will take, from the sizes alone."""

from __future__ import annotations

import sys
from typing import NamedTuple

import numpy as np

from ..backends import GPU_NAMES, backend_class, check_canonical, open_backend
from ..backends.base import Backend
from ..dtypes import DTYPES, accumulator
from ..engine import rates_of_this_machine
from ..environment import affinity, cycles_per_second, resident_bytes, shared_bytes, vector_bytes
from ..files.rows import TRANSFER_BYTES
from ..layout import Contiguous, make
from ..mask_base import BaseMask
from ..problem import masked
from ..schedules.cost import choose
from ..schedules.machine import Machine
from ..schedules.memory import arrays
from ..schedules.rates import CPU, GPU, Rates
from ..schedules.spec import Schedule, check_heads, check_schedule, resolve
from ..schedules.traffic import Shape
from .inputs import Sizes, axes_of
from .masks import make_mask
from .options import Options
from .stream_plan import Planner, schedule_to_stream

MPI_BYTES = 18 * 2**20         # measured with the mpich wheel, from 2 to 8 ranks
SAMPLES = 2**20                # queries whose keys are counted, where there are more


class Process(NamedTuple):
    """What a rank takes besides arrays, in bytes: the process with its libraries and machine code.

    Parameters
    ----------
    total : int
    shared : int
        Of it what is of files: the processes of a node have these pages together.
    """

    total: int
    shared: int


def measure_process(options: Options) -> Process:
    """Measure this process, and add what MPI and machine code will take where they are not loaded yet. Local."""
    backend = _class_of(options.backend, options.order == "canonical")        # its modules are loaded then, and count
    to_come = backend.library_bytes + (0 if "mpi4py.MPI" in sys.modules else MPI_BYTES)
    return Process(resident_bytes() + to_come, shared_bytes())


def predict_memory(sizes: Sizes, ranks: int, options: Options, process: Process, mask: BaseMask | None = None
                   ) -> dict[str, int]:
    """Predict the arrays of the rank with most tokens, in bytes; the peak is `total`. Local.

    Parameters
    ----------
    sizes : Sizes
    ranks : int
    options : Options
        Any layout but contiguous copies a shard three times while it is redistributed.
    process : Process
        What `measure_process` says of a rank's process.
    mask : BaseMask, optional
        By which a job that streams plans; without, what its arrays let be seen is not looked at.

    Returns
    -------
    dict of str to int
        Bytes of each array while attention is computed, and `total`: the largest sum of any phase, this process and
        its libraries included. With the CUDA backend: of each array in the GPU's memory, and their sum; CUDA's own
        memory comes on top.
    """
    if options.stream:
        planner = planner_of(sizes, ranks, options, process, mask)
        return planner.predict(planner.plan())
    n_q, n_k = -(-sizes.n_q // ranks), -(-sizes.n_k // ranks)
    acc_dtype = accumulator(DTYPES[sizes.dtype], options.accumulator)
    shapes = (n_q, sizes.heads, sizes.dim), (n_k, sizes.kv_heads, sizes.dim), (n_k, sizes.kv_heads, sizes.dim_v)
    canonical = options.order == "canonical"
    backend = _class_of(options.backend, canonical)
    schedule = schedule_of(sizes, ranks, options)
    held = arrays(shape_of(sizes, options), schedule, options.backend in GPU_NAMES)
    scratch = backend.scratch_bytes(*shapes, DTYPES[sizes.dtype], acc_dtype)
    if options.backend in GPU_NAMES:
        return {**held, **scratch, "total": sum(held.values()) + sum(scratch.values())}
    parts = {
        **held,
        "columns": 8 * 8 * n_q * schedule.heads * schedule.queries,
        **scratch,
    }
    copies = 0 if options.layout == "contiguous" or ranks == 1 else 3
    q, k, v, out = (parts[name] for name in ("q", "k", "v", "out"))
    back = copies if sizes.batch is None else max(1, copies)          # tokens come first again in a copy
    # Where tokens do not come first a piece is read, at most of so many bytes, and then put in order.
    q_read, k_read, v_read = (0 if axes_of(options).as_in_memory else min(x, TRANSFER_BYTES) for x in (q, k, v))
    phases = (sum(parts.values()), (1 + copies) * q + q_read, q + (1 + copies) * k + k_read,
              q + k + (1 + copies) * v + v_read, (1 + back) * out + parts["lse"])
    return {**parts, "process and libraries": process.total, "total": max(phases) + process.total}


def planner_of(sizes: Sizes, ranks: int, options: Options, process: Process, mask: BaseMask | None = None) -> Planner:
    """Give what plans the pieces of a job that streams, for ranks whose processes are as was measured. Local.

    Without the mask, what its arrays let be seen is not looked at.
    """
    backend = _class_of(options.backend, options.order == "canonical")
    return Planner(sizes, ranks, options, backend, process.total, (mask or make_mask(options)).most)


def schedule_of(sizes: Sizes, ranks: int, options: Options) -> Schedule:
    """Give the schedule of a job; ``"auto"`` as it would choose if all ranks were on this node. Local.

    Documents are not looked at.

    Raises
    ------
    OptionError
        If the heads do not allow it, or it takes more than the options' limit.
    """
    if options.stream:
        return schedule_to_stream(options, ranks)
    on_gpu = options.backend in GPU_NAMES
    text = rates_of_this_machine(on_gpu)
    cores = len(affinity())
    machine = Machine(ranks, ranks, max(1, cores // ranks), cores, on_gpu,
                      rates=Rates.from_text(text) if text else GPU if on_gpu else CPU)
    asked = check_schedule(options.schedule)
    canonical = options.order == "canonical"
    among = None if asked == "auto" and not canonical else [resolve(asked, ranks, canonical=canonical)]
    for schedule in among or ():
        check_heads(schedule, sizes.heads, sizes.kv_heads if canonical else 0)
    shape = shape_of(sizes, options)
    if among is None:
        shape = masked(shape, make_mask(options), make(options.layout, sizes.n_q, ranks),
                       make(options.layout, sizes.n_k, ranks))
    return choose(shape, machine, options.memory_limit, among=among)


def shape_of(sizes: Sizes, options: Options) -> Shape:
    """Say what is computed as far as its cost goes by it, but for what the mask lets be seen. Local."""
    dtype = DTYPES[sizes.dtype]
    return Shape(sizes.n_q, sizes.n_k, sizes.heads, sizes.kv_heads, sizes.dim, sizes.dim_v, dtype.itemsize,
                 accumulator(dtype, options.accumulator).itemsize, canonical=options.order == "canonical",
                 batch=batch_of(sizes), bias=sizes.key_bias, in_keys=sizes.in_keys)


def batch_of(sizes: Sizes) -> int:
    """Give the elements of the batch; 1 if there is no such axis. Local."""
    return 1 if sizes.batch is None else sizes.batch


def predict_seconds(pairs: list[int], sizes: Sizes, threads: list[int], backend: str) -> float:
    """Predict roughly how long the slowest rank computes, in seconds; 0 for a backend of which nothing is known. Local.

    Parameters
    ----------
    pairs : list of int
        Visible pairs of each rank.
    sizes : Sizes
    threads : list of int
        CPU threads of each rank.
    backend : str
    """
    lane_flop = _class_of(backend, canonical=False).lane_flop
    if not lane_flop:
        return 0.0
    lanes = vector_bytes() / accumulator(DTYPES[sizes.dtype], None).itemsize
    speed = lanes * lane_flop * cycles_per_second()
    flop = 2 * sizes.heads * (sizes.dim + sizes.dim_v) * batch_of(sizes)
    return max(flop * mine / (speed * number) for mine, number in zip(pairs, threads, strict=True))


def count_pairs(mask: BaseMask, sizes: Sizes, ranks: int, layout: str) -> list[int]:
    """Count the visible pairs of each rank, by a sample of the queries where there are many. Local."""
    step = max(1, sizes.n_q // SAMPLES)
    queries = np.arange(0, sizes.n_q, step)
    seen = sum((high - low for low, high in mask.bounds(queries, sizes.n_q, sizes.n_k)), np.zeros_like(queries)) * step
    if layout == "contiguous":
        starts = np.searchsorted(queries, Contiguous.even(sizes.n_q, ranks).starts)
        sums = np.concatenate([[0], np.cumsum(seen)])
        return [int(pairs) for pairs in np.diff(sums[[*starts, len(seen)]])]
    return [int(seen.sum()) // ranks + 1] * ranks


def _class_of(name: str, canonical: bool) -> type[Backend]:
    """Give the class of a backend; one for CPUs is opened, so that its modules count in the memory of this process."""
    if name in GPU_NAMES:
        if canonical:
            check_canonical(name)
        return backend_class(name)
    opened = open_backend(name, 1, canonical=canonical)
    opened.close()
    return type(opened)
