"""Joules of a run, from the counters that processors and GPUs keep: RAPL, as Linux's powercap shows it, and NVML."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from .environment import boot_id

POWERCAP = Path("/sys/class/powercap")
EVERY = 30.0                # seconds between looks: RAPL begins at 0 again after 2^32 units, minutes at full power
MICRO, MILLI = 1e-6, 1e-3


@dataclass
class Counter:
    """A counter of energy, and what has been seen of it.

    Attributes
    ----------
    name : str
    read : callable
        Gives its value.
    unit : float
        Joules of 1.
    wraps : int
        The value after which it begins at 0 again; 0: none.
    """

    name: str
    read: Callable[[], int]
    unit: float
    wraps: int = 0
    last: int = 0
    total: int = 0

    def look(self) -> None:
        """Add what has been spent since the last look."""
        now = self.read()
        self.total += now - self.last + (self.wraps if now < self.last else 0)
        self.last = now


class Meter:
    """Counts what this node's processors and memory, and one GPU, spend within a block; other programs on them too.

    Parameters
    ----------
    gpu : str
        The UUID of a GPU; empty for none.
    powercap : path
        Where Linux shows the counters of the processors.

    Attributes
    ----------
    counters : list of Counter
    not_read : list of str
        Why there are no others.
    """

    def __init__(self, gpu: str = "", powercap: Path = POWERCAP) -> None:
        self.counters, self.not_read = _processors(powercap)
        if gpu:
            self._open(gpu)
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._watch, name="ringmpi-energy", daemon=True)

    def __enter__(self) -> Meter:
        self._look()
        for counter in self.counters:
            counter.total = 0
        if self.counters:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None,
                 traceback: TracebackType | None) -> None:
        self._stop.set()

    def read(self) -> dict[str, Any]:
        """Give what was spent so far, for `sum_up`. Local."""
        self._look()
        return {"node": [socket.gethostname(), boot_id()], "not_read": self.not_read,
                "counters": {counter.name: counter.total * counter.unit for counter in self.counters}}

    def _watch(self) -> None:
        while not self._stop.wait(EVERY):
            self._look()

    def _look(self) -> None:
        """Look at all counters; one that can't be read any more is one less."""
        with self._lock:
            for counter in [*self.counters]:
                try:
                    counter.look()
                except Exception as error:      # noqa: BLE001 (drivers raise what they like)
                    self.counters.remove(counter)
                    self.not_read.append(f"{counter.name}: {error}")

    def _open(self, gpu: str) -> None:
        try:
            import pynvml
            pynvml.nvmlInit()
            handle = pynvml.nvmlDeviceGetHandleByUUID(gpu)
            pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        except ImportError:
            self.not_read.append(f"{gpu}: nvidia-ml-py is not installed")
        except Exception as error:              # noqa: BLE001 (NVML's errors have no name that a type checker knows)
            self.not_read.append(f"{gpu}: NVML: {error}")
        else:
            self.counters.append(Counter(gpu, lambda: int(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)), MILLI))


def describe() -> str:
    """Say which counters of processors can be read, or why none. Local."""
    counters, not_read = _processors(POWERCAP)
    return ", ".join(counter.name for counter in counters) or "; ".join(not_read)


def sum_up(everyone: Sequence[dict[str, Any]], tokens: int) -> dict[str, Any]:
    """Sum up what `Meter.read` gave on all ranks. Local.

    Ranks of one node have read the same counters: each counts once, by who has seen most of it.

    Parameters
    ----------
    everyone : sequence of dict
        By rank.
    tokens : int
        That the run computed.

    Returns
    -------
    dict
        ``joules`` and ``joules_per_token``, None unless all counters of all nodes were read; and for each of the
        ``nodes`` its ``host``, joules by the name of each counter, and why there are no others, ``not_read``.
    """
    nodes: dict[tuple[str, ...], dict[str, Any]] = {}
    for one in everyone:
        node = nodes.setdefault(tuple(one["node"]), {"host": one["node"][0], "counters": {}, "not_read": []})
        for name, joules in one["counters"].items():
            node["counters"][name] = max(joules, node["counters"].get(name, 0.0))
        node["not_read"] += [reason for reason in one["not_read"] if reason not in node["not_read"]]
    whole = not any(node["not_read"] for node in nodes.values())
    joules = sum(sum(node["counters"].values()) for node in nodes.values()) if whole else None
    return {"joules": joules, "joules_per_token": None if joules is None or not tokens else joules / tokens,
            "nodes": list(nodes.values())}


def _processors(powercap: Path) -> tuple[list[Counter], list[str]]:
    """Give the counters of packages and of memory, which is not part of them; or why there are none."""
    counters: list[Counter] = []
    not_read: list[str] = []
    packages = {zone.name: _name(zone) for zone in sorted(powercap.glob("intel-rapl:*")) if zone.name.count(":") == 1}
    for zone in sorted(powercap.glob("intel-rapl:*")):
        name, package = _name(zone), packages.get(zone.name.rpartition(":")[0], "")
        if name == "dram":
            name = f"dram of {package}"
        elif not name.startswith("package"):    # cores are part of a package, and `psys` is all there is
            continue
        file = zone / "energy_uj"
        try:
            wraps = int((zone / "max_energy_range_uj").read_text())
            int(file.read_text())
        except (OSError, ValueError) as error:
            not_read.append(f"{name}: {file}: {getattr(error, 'strerror', None) or error}")
        else:
            counters.append(Counter(name, _reader(file), MICRO, wraps))
    if not counters and not not_read:
        not_read.append(f"processors: there is no counter in {powercap}")
    return counters, not_read


def _reader(file: Path) -> Callable[[], int]:
    return lambda: int(file.read_text())


def _name(zone: Path) -> str:
    try:
        return (zone / "name").read_text().strip()
    except OSError:
        return ""
