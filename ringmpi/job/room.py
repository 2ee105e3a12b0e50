"""Whether a job's memory will do, asked before it reads: what is predicted, beside what a node lets it have."""

from __future__ import annotations

import json
import math
import socket
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace

from ..backends import GPU_NAMES
from ..environment import boot_id, node_memory
from ..errors import OptionError, ResourceError
from ..mask_base import BaseMask
from ..schedules.spec import Schedule
from .inputs import Sizes
from .memory import Process, measure_process, predict_memory, schedule_of
from .options import Options
from .run import Run

TOLERANCE = 0.10               # by which a job may take less than is predicted


def check_room(run: Run, sizes: Sizes, options: Options, mask: BaseMask) -> None:
    """Check that what all ranks of each node will take is there. Collective over *comm*.

    What a node has is what Slurm gives the job on it, else the node's own memory. On GPUs nothing is checked here: what
    is predicted is of their memory.

    Raises
    ------
    OptionError
        If the options' memory limit is too little for any schedule; it says how many ranks would do.
    ResourceError
        If a node has too little; it says what would do. The same on every rank.
    """
    needed = 0
    with run.raise_on_all():
        schedule_within(sizes, run.comm.size, options)
        process = measure_process(options)
        if options.backend not in GPU_NAMES:
            needed = predict_memory(sizes, run.comm.size, options, process, mask)["total"]
    if options.backend in GPU_NAMES:
        return
    room, source = node_memory()
    everyone = [json.loads(text) for text in
                run.allgather_text(json.dumps([socket.gethostname(), boot_id(), needed, process.shared, room, source]))]

    nodes = defaultdict(list)
    for host, boot, *numbers in everyone:
        nodes[host, boot].append(numbers)
    for (host, _), ranks in nodes.items():
        room, source = min((room, source) for *_, room, source in ranks)
        most = max(shared for _, shared, *_ in ranks)
        here = most + sum(needed - shared for needed, shared, *_ in ranks)
        check_node(sizes, options, process, here, room, f"{source} on {host}", len(ranks))


def check_node(sizes: Sizes, options: Options, process: Process, needed: int, room: int, source: str,
               ranks: int) -> None:
    """Raise `ResourceError` if `ranks` ranks on a node need more than the `room` that `source` says it has. Local.

    Parameters
    ----------
    process : Process
        What each of them takes besides arrays.
    needed, room : int
        Bytes; a tenth less than is needed may do.
    """
    if needed * (1 - TOLERANCE) <= room:
        return

    def fits(nodes: int) -> bool:
        try:
            total = predict_memory(sizes, nodes * ranks, options, process)["total"]
        except OptionError:                   # the schedule is of another number of ranks
            return False
        return (process.shared + ranks * (total - process.shared)) * (1 - TOLERANCE) <= room

    nodes = _smallest(fits, -(-sizes.n_q // ranks))
    spread = (f"{nodes * ranks:,} ranks on {nodes:,} nodes" if nodes and ranks > 1 else
              f"{nodes:,} ranks, each on a node of its own" if nodes else "fewer ranks on a node")
    raise ResourceError(f"memory of a node: expected {_mebibytes(needed)} for {ranks} rank{'s'[:ranks > 1]}, got "
                        f"{_mebibytes(room)} ({source}); ask for more (Slurm: --mem={math.ceil(needed / 2**20)}M), or "
                        f"take {spread}; nothing was read")


def schedule_within(sizes: Sizes, ranks: int, options: Options) -> Schedule:
    """Give the schedule of a job as `memory.schedule_of` does. Local.

    Raises
    ------
    OptionError
        As there; for a memory limit that is too little it says how many ranks would do.
    """
    try:
        return schedule_of(sizes, ranks, options)
    except OptionError as error:
        if options.memory_limit is None:
            raise
        schedule_of(sizes, ranks, replace(options, memory_limit=None))          # another error remains what it is

        def fits(more: int) -> bool:
            try:
                return bool(schedule_of(sizes, more, options))
            except OptionError:
                return False

        enough = _smallest(fits, sizes.n_q)
        raise OptionError(f"{error}: {enough:,} ranks would do" if enough else
                          f"{error}, but no number of ranks would do") from None


def _smallest(fits: Callable[[int], bool], most: int) -> int:
    """Give a number from 2 to `most` that fits, the smallest if larger ones do too; 0 if none is found. Local."""
    high = 2
    while not fits(high):
        if high >= most:
            return 0
        high = min(2 * high, most)
    low = 1 if high == 2 else high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def _mebibytes(nbytes: int) -> str:
    return f"{nbytes / 2**20:,.0f} MiB"
