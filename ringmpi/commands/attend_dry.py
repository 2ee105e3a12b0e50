"""What `ringmpi attend --dry-run` says: what a run would need, and whether that is there."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace

from ..backends import GPU_NAMES
from ..checks import check_threads
from ..dtypes import DTYPES, accumulator
from ..environment import affinity, launched_nodes, launched_rank, launched_sizes, slurm_memory
from ..job.inputs import Sizes, open_input
from ..job.memory import batch_of, count_pairs, measure_process, planner_of, predict_memory, predict_seconds
from ..job.options import Options
from ..job.outputs import check_paths
from ..job.parallel import check_driver
from ..job.report import RecordPaths
from ..job.room import check_node, schedule_within
from ..job.stream import check_streamable
from ..job.stream_plan import Planner, usual_limit
from ..mask_base import BaseMask
from ..schedules.movers import carrier_class
from ..schedules.spec import Schedule
from .units import size_text, time_text


def dry_run(arguments: argparse.Namespace, options: Options) -> int:
    """Check input and paths, and print what a run would need; return the exit code. Local: one rank, without MPI.

    Raises
    ------
    ResourceError
        If Slurm gives the job too little memory on a node.
    """
    if launched_rank():
        return 0
    check_threads(arguments.threads)
    if options.stream:
        check_streamable(options)
    with open_input(arguments.input, options) as data:
        sizes, mask = data.sizes, data.mask
    check_paths(arguments.input, arguments.output, RecordPaths(arguments.json, arguments.report), arguments.force,
                arguments.checkpoint)
    check_driver(options.output_driver)
    ranks = arguments.expect_ranks or max(launched_sizes().values(), default=1)
    here = -(-ranks // min(ranks, launched_nodes()))
    threads = arguments.threads or max(1, len(affinity()) // here)

    elements = "" if sizes.batch is None else f"batch of {sizes.batch:,}, "
    print(f"{elements}{sizes.n_q:,} queries, {sizes.n_k:,} keys, heads {sizes.heads}/{sizes.kv_heads}, "
          f"dim {sizes.dim}, dim_v {sizes.dim_v}, {sizes.dtype}, {ranks} rank{'s' if ranks > 1 else ''}")
    if options.stream and options.memory_limit is None:
        options = replace(options, memory_limit=usual_limit(here))
    schedule = schedule_within(sizes, ranks, options)
    process = measure_process(options)
    parts = predict_memory(sizes, ranks, options, process, mask)
    for name, size in parts.items():
        print(f"{name:24}{size / 2**20:12.1f} MiB a rank")
    chosen = options.schedule == "auto" and options.order != "canonical" and not options.stream
    print(f"{'schedule':24}{schedule!s:>12}{' chosen as if all ranks were on this node' if chosen else ''}")
    traffic = (_describe_passes(planner_of(sizes, ranks, options, process, mask), mask) if options.stream else
               _describe_traffic(parts, schedule))
    for line in (*traffic, *_describe_result(sizes, options),
                 *_describe_time(sizes, options, mask, ranks, threads)):
        print(line)
    room = slurm_memory()
    if room is not None and options.backend not in GPU_NAMES:
        needed = process.shared + here * (parts["total"] - process.shared)
        check_node(sizes, options, process, needed, *room, ranks=here)
    return 0


def _describe_traffic(parts: dict[str, int], schedule: Schedule) -> Iterator[str]:
    """Say what a rank sends in the forward pass, by the bytes of its arrays."""
    carrier = carrier_class(schedule.carrier)
    sharing = schedule.queries
    block = parts["k"] + parts["v"] + parts.get("key_bias", 0)
    keys = block * (0 if carrier.in_place else schedule.keys - 1)
    queries = (parts["q"] + (parts["acc"] + parts["max and sum"]) // sharing) * (sharing - 1)
    heads = (block + sum(parts[name] for name in ("q", "out", "lse"))) * (schedule.heads - 1) // schedule.heads
    yield f"{'K/V traffic':24}{keys / 2**20:12.1f} MiB sent by a rank at most, " \
          f"{carrier.path_text.format(schedule.keys - 1)}"
    if sharing > 1:
        yield f"{'query traffic':24}{queries / 2**20:12.1f} MiB, queries to {sharing - 1} ranks and their states home"
    if schedule.heads > 1:
        yield f"{'head traffic':24}{heads / 2**20:12.1f} MiB, more where several ranks have a head of the keys"


def _describe_passes(planner: Planner, mask: BaseMask) -> Iterator[str]:
    """Say how often keys and values are read and sent where they do not stay."""
    sizes, ranks = planner.sizes, planner.ranks
    pieces = planner.plan()
    seen = planner.passes(mask, pieces)
    most, total = max(seen, default=0), sum(seen)
    block = min(pieces.block, sizes.n_k) * planner.block_bytes / ranks / 2**20
    share = max(1, -(-sizes.n_k // pieces.block))
    yield f"{'pieces':24}{len(seen):12,} of {min(pieces.piece, sizes.n_q):,} queries, which meet up to {most:,} " \
          f"block{'s'[:most != 1]} of {pieces.block:,} keys: {total:,} in all"
    yield f"{'K/V read':24}{total * block:12.1f} MiB by a rank, {total / share:.1f} times its share of the input; up " \
          f"to {most * block:,.1f} MiB for a piece"
    yield f"{'K/V traffic':24}{total * block * (ranks - 1):12.1f} MiB sent by a rank, in {ranks - 1} hops each time; " \
          f"up to {most * block * (ranks - 1):,.1f} MiB for a piece"


def _describe_result(sizes: Sizes, options: Options) -> Iterator[str]:
    """Say what is written, and what a matrix of all scores would have taken."""
    dtype = DTYPES[sizes.dtype]
    wide = accumulator(dtype, options.accumulator).itemsize
    rows = sizes.n_q * sizes.heads * batch_of(sizes)
    written = rows * (sizes.dim_v * dtype.itemsize + wide)
    yield f"{'output':24}{written / 2**20:12.1f} MiB on disk, out and lse of all ranks"
    yield f"{'matrix of scores':24}{size_text(rows * sizes.n_k * wide):>12} of all ranks, which is never made"


def _describe_time(sizes: Sizes, options: Options, mask: BaseMask, ranks: int, threads: int) -> Iterator[str]:
    """Say how long the slowest rank would compute on CPUs like this one, where that can be said."""
    pairs = count_pairs(mask, sizes, ranks, options.layout)
    seconds = 0.0 if options.backend in GPU_NAMES else predict_seconds(pairs, sizes, [threads] * ranks, options.backend)
    if seconds:
        each = f"{threads} thread{'s'[:threads > 1]} a rank"
        yield f"{'computing':24}{time_text(seconds):>12} about, on CPUs like this one, {each}"
