"""Say what would run here: MPI, backends, HDF5, threads; and why not the rest."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform

from .. import __version__


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`ringmpi info` has no arguments of its own."""


def run(arguments: argparse.Namespace) -> int:
    """Run `ringmpi info`; return the exit code."""
    from ..environment import affinity, launched_rank, launched_sizes
    lines = {
        "ringmpi": f"{__version__}, Python {platform.python_version()}, {platform.machine()}",
        "MPI": _mpi(),
        "launcher": ", ".join(f"{k}={v}" for k, v in launched_sizes().items()) or "none: one process",
        **_gpus(),
        "GPU transport": _transport(),
        **{f"backend {name}": text for name, text in _backends().items()},
        "h5py": _h5py(),
        "cores": f"{len(affinity())} this process may run on",
        "packages": ", ".join(f"{name} {_version(name)}" for name in ("numpy", "mpi4py", "ml_dtypes", "tqdm")),
    }
    if launched_rank() == 0:
        for name, text in lines.items():
            print(f"{name:16}{text}")
    return 0


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
