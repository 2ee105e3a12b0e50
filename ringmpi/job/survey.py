"""What each rank sees of where it runs, what is odd about it, and how fast the links of the ring are."""

from __future__ import annotations

import json
import os
import platform
import socket
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import numpy as np

from .. import __version__, device
from ..environment import affinity, launched_local_rank, node_memory
from ..mpi.comm import Comm
from ..mpi.world import library, thread_level

ROUNDS, BATCHES = 40, 5              # of small messages there and back
LARGE, TIMES = 2**22, 6              # bytes of a large one, and how often it goes there and back
TAG = 7
SLOW = 3.0                           # times slower than the median of the links is worth a word


@dataclass
class Place:
    """Where a rank runs.

    Attributes
    ----------
    rank : int
    host : str
    cores : list of int
        That it may run on.
    node_cores : int
        That the node has.
    gpu : str
        The UUID of the GPU of its place; empty without one.
    gpus : list of str
        The UUIDs of all that it sees.
    memory : int
        Bytes that the job may take on its node.
    mpi, thread_level, ringmpi, python : str
    """

    rank: int
    host: str
    cores: list[int]
    node_cores: int
    gpu: str = ""
    gpus: list[str] = field(default_factory=list)
    memory: int = 0
    mpi: str = ""
    thread_level: str = ""
    ringmpi: str = ""
    python: str = ""


@dataclass
class Link:
    """The way from a rank to the next of the ring: seconds of an empty message, and bytes a second of a large one."""

    source: int
    target: int
    latency: float
    bandwidth: float


def this_place(rank: int) -> Place:
    """Say where this process runs, without asking MPI or GPUs. Local."""
    return Place(rank, socket.gethostname(), sorted(affinity()), os.cpu_count() or 1, memory=node_memory()[0],
                 ringmpi=__version__, python=platform.python_version())


def gather_places(comm: Comm, timeout: float) -> list[Place]:
    """Say of each rank where it runs. Collective over *comm*."""
    gpus = [device.open_device(index).uuid for index in range(device.count())]
    local = launched_local_rank() or 0
    mine = this_place(comm.rank)
    mine.gpu, mine.gpus = gpus[local % len(gpus)] if gpus else "", gpus
    mine.mpi, mine.thread_level = library(), thread_level()
    return [Place(**json.loads(text)) for text in comm.allgather_text(json.dumps(asdict(mine)), timeout)]


def measure_links(comm: Comm, timeout: float) -> list[Link]:
    """Measure the way from each rank to the next of the ring, while its neighbours' rest. Collective over *comm*.

    Two ranks pass messages to and fro: half the time there and back, of the best of some batches of small ones and of
    the best large one.
    """
    size, rank = comm.size, comm.rank
    pairs = [(source, (source + 1) % size) for source in range(size)] if size > 2 else [(0, 1)][:size - 1]
    mine = np.zeros(2)
    # Even ones, odd ones, and the last by itself where their number is odd.
    for turn in range(3):
        comm.exchange("", timeout)
        for source, target in pairs:
            last = size % 2 == 1 and source == size - 1
            if (2 if last else source % 2) == turn and rank in (source, target):
                measured = _measure(comm, target if rank == source else source, rank == source)
                mine = measured if rank == source else mine
    everyone = comm.allgather(mine, timeout)
    return [Link(source, target, *everyone[source].tolist()) for source, target in pairs]


def _measure(comm: Comm, other: int, first: bool) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Pass messages to and fro; give seconds of an empty one and bytes a second of a large one."""
    small, large = np.zeros(8, np.uint8), np.zeros(LARGE, np.uint8)
    batches = []
    for _ in range(BATCHES):
        start = time.perf_counter()
        for _ in range(ROUNDS):
            _pass(comm, small, other, first)
        batches.append((time.perf_counter() - start) / (2 * ROUNDS))
    times = []
    for _ in range(TIMES):
        start = time.perf_counter()
        _pass(comm, large, other, first)
        times.append((time.perf_counter() - start) / 2)
    return np.array([min(batches), LARGE / min(times)])


def _pass(comm: Comm, message: np.ndarray[tuple[int], np.dtype[np.uint8]], other: int, first: bool) -> None:
    """Send a message and get it back, or the other way round."""
    if first:
        comm.comm.Send(message, other, TAG)
        comm.comm.Recv(message, other, TAG)
    else:
        comm.comm.Recv(message, other, TAG)
        comm.comm.Send(message, other, TAG)


def find_odd(places: Sequence[Place], links: Sequence[Link] = ()) -> list[str]:
    """Say what is worth a look, and what to do about it. Local."""
    found = []
    hosts: dict[str, list[Place]] = defaultdict(list)
    for place in places:
        hosts[place.host].append(place)
    for host, here in hosts.items():
        cores = set().union(*(place.cores for place in here))
        ranks = name_ranks([place.rank for place in here])
        if len(here) > len(cores):
            found.append(f"{host}: {ranks} have {_count(len(cores), 'core')} for {len(here)} ranks, which wait for "
                         "each other; start as many ranks as there are cores, or fewer")
        alone = [place.rank for place in here if len(place.cores) == 1]
        if alone and here[0].node_cores >= 2 * len(here):
            found.append(f"{host}: {name_ranks(alone)} may run on one core each of {here[0].node_cores}, so threads "
                         "get none; with Slurm say --cpus-per-task, with mpiexec --bind-to none, or more cores a rank")
        by_gpu: dict[str, list[int]] = defaultdict(list)
        for place in here:
            if place.gpu:
                by_gpu[place.gpu].append(place.rank)
        found += [f"{host}: {name_ranks(some)} share the GPU {gpu}; start a rank for each GPU, or say allow_gpu_sharing"
                  for gpu, some in by_gpu.items() if len(some) > 1]
    for name in ("mpi", "ringmpi", "python", "thread_level"):
        values: dict[str, list[int]] = defaultdict(list)
        for place in places:
            values[getattr(place, name)].append(place.rank)
        if len(values) > 1:
            found.append(f"{name.replace('_', ' ')} differs: " +
                         "; ".join(f"{value} on {name_ranks(some)}" for value, some in values.items()))
        elif name == "thread_level" and places and places[0].thread_level in ("single", "funneled"):
            found.append(f"MPI has thread level {places[0].thread_level}: calls from other threads than the main one, "
                         "as torch makes for GPU tensors, are errors; initialise it with MPI_THREAD_SERIALIZED or more")
    for kind, some in _kinds_of_links(places, links).items():
        usual = _median(some)
        found += [f"the way from rank {link.source} on {places[link.source].host} to rank {link.target} on "
                  f"{places[link.target].host} is slow: {_describe(link)}, where the median {kind} is "
                  f"{_describe(usual)}" for link in some if len(some) > 2 and (link.latency > SLOW * usual.latency
                                                         or link.bandwidth < usual.bandwidth / SLOW)]
    return found


def _kinds_of_links(places: Sequence[Place], links: Sequence[Link]) -> dict[str, list[Link]]:
    """Give the links within hosts and those between hosts, which are not to be compared with each other."""
    kinds: dict[str, list[Link]] = defaultdict(list)
    for link in links:
        same = places[link.source].host == places[link.target].host
        kinds["within a host" if same else "between hosts"].append(link)
    return kinds


def _median(links: Sequence[Link]) -> Link:
    return Link(0, 0, statistics.median(x.latency for x in links), statistics.median(x.bandwidth for x in links))


def describe_links(places: Sequence[Place], links: Sequence[Link]) -> list[str]:
    """Give a line on the links within hosts, one on those between hosts, and one on the slowest. Local."""
    if not links:
        return []
    slowest = min(links, key=lambda link: link.bandwidth)
    return [*(f"{kind}: median {_describe(_median(some))}" for kind, some in _kinds_of_links(places, links).items()),
            f"slowest {_describe(slowest)}, from rank {slowest.source} on {places[slowest.source].host} to rank "
            f"{slowest.target} on {places[slowest.target].host}"]


def name_ranks(ranks: Sequence[int]) -> str:
    """Name ranks, in runs: ``ranks 0-3, 7``. Local."""
    return f"rank{'s' if len(ranks) > 1 else ''} {name_runs(ranks)}"


def name_runs(numbers: Sequence[int]) -> str:
    """Write ascending numbers in runs: ``0-3, 7``. Local."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _describe(link: Link) -> str:
    return f"{link.latency * 1e6:.1f} us, {link.bandwidth / 1e9:.2f} GB/s"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
