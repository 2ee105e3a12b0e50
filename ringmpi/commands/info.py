"""Say what would run here: MPI, backends, HDF5, threads; and why not the rest. On several ranks, of each."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
from collections import defaultdict
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from .. import __version__

if TYPE_CHECKING:
    from ..job.survey import Link, Place

WIDTH = 16                         # of the names of lines
HOSTS = 32                         # that are shown, at most


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `ringmpi info`."""
    parser.add_argument("--json", action="store_true",
                        help="print it as JSON, with all ranks and all links (default: text)")
    parser.add_argument("--no-links", action="store_true",
                        help="measure no links between the ranks (default: latency and bandwidth round the ring)")


def run(arguments: argparse.Namespace) -> int:
    """Run `ringmpi info`; return the exit code. Collective over COMM_WORLD."""
    from ..energy import describe
    from ..environment import affinity, launched_rank, launched_sizes
    places, links, odd = _survey(not arguments.no_links)
    lines = {
        "ringmpi": f"{__version__}, Python {platform.python_version()}, {platform.machine()}",
        "MPI": _mpi(),
        "launcher": ", ".join(f"{k}={v}" for k, v in launched_sizes().items()) or "none: one process",
        **_gpus(),
        "GPU transport": _transport(),
        **{f"backend {name}": text for name, text in _backends().items()},
        "h5py": _h5py(),
        "cores": f"{len(affinity())} this process may run on",
        "energy": describe(),
        "packages": ", ".join(f"{name} {_version(name)}" for name in ("numpy", "mpi4py", "ml_dtypes", "tqdm")),
    }
    if launched_rank() != 0:              # of the launcher: ranks that do not know each other are all number 0
        return 0
    if arguments.json:
        print(json.dumps({**lines, "ranks": [asdict(place) for place in places],
                          "links": [asdict(link) for link in links], "odd": odd}, indent=1))
        return 0
    for name, text in lines.items():
        print(f"{name:{WIDTH}}{text}")
    for line in _of_ranks(places, links):
        print(line)
    for text in odd:
        print(f"{'LOOK AT':{WIDTH}}{text}")
    return 0


def _survey(measures: bool) -> tuple[list[Place], list[Link], list[str]]:
    """Give where the ranks run, the links between them, and what is odd. Collective over COMM_WORLD."""
    from ..environment import launched_rank
    from ..errors import LaunchError
    from ..job.survey import find_odd, gather_places, measure_links, this_place
    from ..mpi.comm import private_comm
    from ..mpi.world import INFO_TIMEOUT, find_apart, start, world
    from ..phases import phase
    try:
        start(INFO_TIMEOUT)
    except LaunchError as error:
        return [this_place(launched_rank())], [], [str(error)]
    comm = private_comm(world(), INFO_TIMEOUT, exclusive=True)
    places = gather_places(comm, INFO_TIMEOUT)
    links: list[Link] = []
    if measures and comm.size > 1:
        with phase("measuring the links of the ring", limit=INFO_TIMEOUT):
            links = measure_links(comm, INFO_TIMEOUT)
    apart = find_apart()
    return places, links, [*([apart] if apart else []), *find_odd(places, links)]


def _of_ranks(places: list[Place], links: list[Link]) -> list[str]:
    """Give a line for each kind of rank on each host, and two on the links."""
    from ..job.survey import describe_links, name_ranks, name_runs
    if len(places) < 2:
        return []
    kinds: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for place in places:
        kinds[place.host, tuple(place.cores), place.gpu].append(place.rank)
    shown = [f"{name_ranks(ranks)} on {host}: {'cores' if len(cores) > 1 else 'core'} {name_runs(cores)}"
             f"{f', GPU {gpu}' if gpu else ''}" for (host, cores, gpu), ranks in kinds.items()]
    more = [f"and {len(shown) - HOSTS} more: see --json"] if len(shown) > HOSTS else []
    return [f"{'where':{WIDTH}}{text}" for text in [*shown[:HOSTS], *more]] + [
        f"{'links':{WIDTH}}{text}" for text in describe_links(places, links)]


def _mpi() -> str:
    from ..errors import LaunchError
    from ..mpi.world import describe
    try:
        return describe()
    except LaunchError as error:
        return str(error)


def _gpus() -> dict[str, str]:
    from .. import device
    lines = device.describe()
    return {f"GPU {i}": line for i, line in enumerate(lines)} or {"GPUs": str(device.reason_missing())}


def _transport() -> str:
    from ..errors import RingError
    from ..schedules.gpu_transport import choose_alone
    try:
        chosen = choose_alone()
    except RingError as error:
        return str(error)
    return f"{chosen.name}: {chosen.reason}"


def _backends() -> dict[str, str]:
    from ..backends import NAMES, backend_class, reason_missing
    return {name: reason_missing(name) or f"yes ({backend_class(name).describe()})" for name in NAMES if name != "auto"}


def _h5py() -> str:
    import h5py
    return f"{h5py.version.version}, HDF5 {h5py.version.hdf5_version}"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
