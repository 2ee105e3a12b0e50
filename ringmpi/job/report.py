"""What a job says of itself: to a display at its start, in a report at its end, and in its JSON record."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from .. import __version__
from ..attention import RingAttention
from ..energy import sum_up
from ..environment import resident_bytes
from ..files.record import write_json, write_text
from ..mask_base import BaseMask
from ..mpi.clocks import clock_offset
from ..mpi.world import library
from .inputs import Input, Sizes
from .options import Options
from .run import Run


@dataclass(frozen=True)
class Start:
    """A job when its ranks have met and its input is open; `hosts` and `threads` by rank."""

    source: Path
    sizes: Sizes
    options: Options
    mask: BaseMask
    backend: str
    hosts: list[str]
    threads: list[int]


class RecordPaths(NamedTuple):
    """Where the full record of a run is written, if it is: as JSON, and as a page with pictures."""

    json: Path | None = None
    page: Path | None = None


NO_PATHS = RecordPaths()


class Display(Protocol):
    """Shows on rank 0 how a job goes."""

    def start(self, start: Start) -> None:
        """Begin to show it."""

    def attending(self, counts: Callable[[], tuple[int, int]]) -> AbstractContextManager[None]:
        """Show, within a block, the pairs that all ranks have done: the first of `counts`."""


@dataclass
class Report:
    """What a run did; times in seconds, of the slowest rank; sizes in bytes."""

    sizes: Sizes
    ranks: int
    pairs: int = 0
    flop: int = 0
    attend_seconds: float = 0.0
    compute_seconds: float = 0.0
    wait_seconds: float = 0.0
    bytes_moved: int = 0
    peak_bytes: int = 0
    phases: dict[str, float] = field(default_factory=dict)

    @property
    def gflops(self) -> float:
        """10^9 floating-point operations on visible pairs a second, all ranks together."""
        return self.flop / self.attend_seconds / 1e9 if self.attend_seconds else 0.0

    def __str__(self) -> str:
        return (f"{self.sizes.of_batch}{self.sizes.n_q:,} tokens on {self.ranks} rank{'s' if self.ranks > 1 else ''}: "
                f"{self.gflops:.1f} GFLOP/s, {self.compute_seconds:.2f} s computing, "
                f"{self.wait_seconds:.2f} s waiting, {self.bytes_moved / 2**20:,.1f} MiB moved, "
                f"at most {self.peak_bytes / 2**20:,.0f} MiB a rank")


def gather_start(run: Run, data: Input, options: Options, attention: RingAttention) -> Start:
    """Describe a job by what all ranks know. Collective over *comm*."""
    mine = json.dumps([socket.gethostname(), attention.backend.threads])
    everyone = [json.loads(text) for text in run.allgather_text(mine)]
    return Start(data.path, data.sizes, options, data.mask, attention.backend.name,
                 [host for host, _ in everyone], [threads for _, threads in everyone])


def gather_report(run: Run, sizes: Sizes, attention: RingAttention) -> Report:
    """Sum up what all ranks did. Collective over *comm*."""
    # Counts are integers and times are not: one exchange for each.
    trace = attention.trace
    moved = trace.bytes_sent + trace.exchanged_bytes_sent
    counts = run.comm.allgather(np.array([trace.pairs, trace.flop, moved, resident_bytes(peak=True)]), run.timeout)
    names = sorted(run.timer.phases)
    mine = np.array([trace.compute_seconds, trace.wait_seconds, *(run.timer.phases[name] for name in names)])
    seconds = run.comm.allgather(mine, run.timeout).max(axis=0).tolist()

    pairs, flop, bytes_moved = (sum(map(int, column)) for column in counts[:, :3].T)
    phases = dict(zip(names, seconds[2:], strict=True))
    pairs //= attention.schedule.heads            # a pair is seen by each of the ranks that share its heads
    return Report(sizes, run.comm.size, pairs, flop, attend_seconds=phases["attend"], compute_seconds=seconds[0],
                  wait_seconds=seconds[1], bytes_moved=bytes_moved, peak_bytes=int(counts[:, 3].max()), phases=phases)


def make_record(ranks: int, attention: RingAttention, options: Options, command: str) -> dict[str, Any]:
    """Say how a result was made, for OUT.h5 and the JSON record. Local.

    With GPUs: which, by rank, and how K and V got from one to the next. Without: how bfloat16 was multiplied, and
    float32, which GPUs do in one way only.
    """
    record = {"ringmpi": __version__, "command": command, "ranks": ranks,
              "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
              "backend": attention.backend.name, "grid": str(attention.schedule), "options": asdict(options)}
    if not attention.backend.device:
        record["bfloat16_products"] = attention.backend.products
        record["float32_products"] = attention.backend.float32_products
    if attention.transport is not None:
        record |= {"gpus": attention.gpus, "gpu_transport": attention.transport.name,
                   "gpu_transport_reason": attention.transport.reason}
    return record


def write_record(run: Run, records: RecordPaths, attention: RingAttention, record: dict[str, Any], report: Report,
                 spent: dict[str, Any]) -> None:
    """Gather what every rank has to tell, and energy `spent`; rank 0 writes it as asked. Collective over *comm*.

    Raises
    ------
    OutputError
        If it can't be written.
    """
    mine = {"host": socket.gethostname(), "phases": run.timer.phases, "peak_bytes": resident_bytes(peak=True),
            "threads": attention.backend.threads, "clock_offset": clock_offset(run.comm, run.timeout),
            "energy": spent, **attention.trace.as_dict()}
    everyone = [json.loads(text) for text in run.allgather_text(json.dumps(mine))]
    with run.raise_on_all():
        if any(records) and run.comm.rank == 0:
            energy = sum_up([one.pop("energy") for one in everyone], report.sizes.n_q * report.sizes.elements)
            whole = {**record, "mpi": library(), **asdict(report), "gflops": report.gflops, "energy": energy,
                     "per_rank": everyone}
            if records.json:
                write_json(records.json, whole)
            if records.page:
                from ..pictures.job import make_job_page
                write_text(records.page, make_job_page(whole))
