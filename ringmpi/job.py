"""Files in, attention, files out: what `ringmpi attend` does."""

from __future__ import annotations

import json
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from . import __version__, mpi
from .attention import RingAttention, check_shapes
from .backends import open_backend
from .environment import resident_bytes, shows_on_terminal
from .errors import DtypeError
from .exchange import redistribute
from .hdf5 import check_axes, check_writable, open_dataset, open_file, read_integers, read_rows, stored_dtype
from .layout import Contiguous
from .mask import Mask
from .shards import Output, Shard
from .softmax import DTYPES, accumulator

Array = NDArray[Any]

# MPI, and for Numba the machine code: measured with the mpich wheel and Numba 0.68, from 2 to 8 ranks.
LIBRARY_BYTES = {"numpy": 18 * 2**20, "numba": 64 * 2**20}


@dataclass(frozen=True)
class Options:
    """What is asked of a job; plain values, the same on every rank but `threads`."""

    causal: bool = False
    window: tuple[int | None, int | None] | None = None
    documents: bool = False
    prefix: int | None = None
    first: int = 0
    q_offset: int | None = None
    scale: float | None = None
    layout: str = "contiguous"
    backend: str = "auto"
    accumulator: str | None = None
    q: str = "q"
    k: str = "k"
    v: str = "v"

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Options:
        """Read back what `asdict` gave, from JSON too. Local."""
        known = {f.name: record[f.name] for f in fields(cls) if f.name in record}
        if known.get("window") is not None:
            known["window"] = tuple(known["window"])
        return cls(**known)


@dataclass(frozen=True)
class Sizes:
    """What an input file holds, all ranks together."""

    n_q: int
    n_k: int
    heads: int
    kv_heads: int
    dim: int
    dim_v: int
    dtype: str


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
        return (f"{self.sizes.n_q:,} tokens on {self.ranks} rank{'s' if self.ranks > 1 else ''}: "
                f"{self.gflops:.1f} GFLOP/s, {self.compute_seconds:.2f} s computing, "
                f"{self.wait_seconds:.2f} s waiting, {self.bytes_moved / 2**20:,.1f} MiB moved, "
                f"at most {self.peak_bytes / 2**20:,.0f} MiB a rank")


@contextmanager
def datasets(path: Path, options: Options) -> Iterator[tuple[h5py.File, list[h5py.Dataset], Sizes]]:
    """Open the input and check that q, k and v are there, whole, and go together. Local.

    Raises
    ------
    ShardError, ShapeError, DtypeError
        If they do not.
    """
    with open_file(path) as file:
        found = [open_dataset(file, name) for name in (options.q, options.k, options.v)]
        for dataset in found:
            check_axes(dataset, ("tokens", "heads", "dim"))
        q, k, v = found
        kinds = [stored_dtype(dataset) for dataset in found]
        if len(set(kinds)) > 1:
            raise DtypeError(f"{path}: expected q, k and v of one dtype, got {', '.join(map(str, kinds))}")
        check_shapes(q.shape, k.shape, v.shape)
        accumulator(kinds[0], options.accumulator)
        yield file, found, Sizes(len(q), len(k), q.shape[1], k.shape[1], q.shape[2], v.shape[2], str(kinds[0]))


def make_mask(file: h5py.File, options: Options, n_k: int) -> Mask:
    """Make the mask that the options and the file's `documents` give. Local.

    Raises
    ------
    MaskError, OptionError, ShardError
        If it makes no sense, or there are no documents.
    """
    documents = read_integers(file, "documents") if options.documents else None
    mask = Mask(causal=options.causal, window=options.window, documents=documents, prefix=options.prefix,
                first=options.first, q_offset=options.q_offset)
    mask.check(n_k)
    return mask


def inspect(path: Path, options: Options) -> Sizes:
    """Check an input without computing, as a dry run does. Local."""
    with datasets(path, options) as (file, _, sizes):
        make_mask(file, options, sizes.n_k)
        return sizes


class Clock:
    """Seconds of each phase of a job on this rank."""

    def __init__(self) -> None:
        self.phases: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time a block takes to phase `name`."""
        start = time.perf_counter()
        yield
        self.phases[name] = self.phases.get(name, 0.0) + time.perf_counter() - start


def attend(source: Path, target: Path, options: Options, *, threads: int | None = None, timeout: float = mpi.TIMEOUT,
           expect_ranks: int | None = None, force: bool = False, quiet: bool = True, json_path: Path | None = None,
           command: str = "") -> Report:
    """Attend from file to file: q, k, v of `source` to `out` and `lse` of `target`. Collective over COMM_WORLD.

    Parameters
    ----------
    source, target : path
        HDF5 files; the target is made with its folder of shards, or not at all.
    options : Options
    threads : int, optional
        CPU threads of this rank.
    timeout : float
        Seconds to wait for other ranks.
    expect_ranks : int, optional
        Number of ranks there must be.
    force : bool
        Replace a target that exists.
    quiet : bool
        No progress bar; without it rank 0 draws one where there is a terminal.
    json_path : path, optional
        Where rank 0 writes the full record.
    command : str
        The command line, for the record.

    Returns
    -------
    Report
        The same on every rank.

    Raises
    ------
    RingError
        One of its children, the same on every rank; nothing is left under the target's name then.
    """
    world = mpi.world(expect_ranks)
    comm = mpi.private(world)
    clock = Clock()
    asked = {"input": source, "output": target, "force": force, **asdict(options)}
    comm.agree_on(asked, timeout)
    with comm.together(timeout), datasets(source, options) as (file, _, sizes):
        mask = make_mask(file, options, sizes.n_k)
    comm.agree_on(asdict(sizes), timeout)
    output = Output(target, comm.share_text(uuid.uuid4().hex[:12], timeout)[0], force)
    with comm.together(timeout):
        if comm.rank == 0:
            output.prepare()
            if json_path:
                check_writable(json_path, force=True)
    whole = False
    try:
        out, lse, trace = _compute(world, comm, source, options, sizes, mask, threads, timeout, quiet, clock)
        record = {"ringmpi": __version__, "command": command, "ranks": comm.size,
                  "created": datetime.now(timezone.utc).isoformat(timespec="seconds"), "options": asdict(options)}
        with clock.phase("write"):
            _publish(output, comm, out, lse, sizes, record, timeout)
        whole = True
    finally:
        if not whole:
            output.discard()
    report = _report(comm, sizes, trace, clock, timeout)
    details = [json.loads(text) for text in comm.share_text(json.dumps(
        {"host": socket.gethostname(), "phases": clock.phases, "peak_bytes": resident_bytes(peak=True),
         "threads": threads or comm.threads, **trace.as_dict()}), timeout)]
    if json_path and comm.rank == 0:
        vendor = mpi.load().Get_library_version().splitlines()[0]
        write_json(json_path, {**record, "mpi": vendor, **asdict(report), "gflops": report.gflops,
                               "per_rank": details})
    return report


def _compute(world: Any, comm: mpi.Comm, source: Path, options: Options, sizes: Sizes, mask: Mask,
             threads: int | None, timeout: float, quiet: bool, clock: Clock) -> tuple[Array, Array, Any]:
    """Read, attend, and bring the result back to the order of the input."""
    bar_on = comm.rank == 0 and not quiet and shows_on_terminal()
    there = {"comm": world, "source": "contiguous", "target": options.layout, "timeout": timeout}
    rows = [Contiguous.even(n, comm.size) for n in (sizes.n_q, sizes.n_k, sizes.n_k)]
    arrays = []
    for number, layout in enumerate(rows):
        with clock.phase("read"), comm.together(timeout), datasets(source, options) as (_, found, _):
            start = layout.starts[comm.rank]
            shard = read_rows(found[number], start, start + layout.counts[comm.rank])
        with clock.phase("redistribute"):
            arrays.append(redistribute(shard, **there))
            del shard
    with RingAttention(world, mask=mask, layout=options.layout, scale=options.scale, backend=options.backend,
                       threads=threads, timeout=timeout, accumulator=options.accumulator) as attention:
        with clock.phase("attend"), tqdm(total=None, unit="pair", unit_scale=True, disable=not bar_on,
                                         desc="attend", leave=False) as bar:
            out, lse = attention(*arrays, return_lse=True, progress=lambda done, total: _advance(bar, done, total))
        trace = attention.trace
    del arrays
    back = {**there, "source": options.layout, "target": "contiguous"}
    with clock.phase("redistribute"):
        out = redistribute(out, **back)
        lse = redistribute(lse, **back)
    return out, lse, trace


def _advance(bar: tqdm[Any], done: int, total: int) -> None:
    bar.total = total
    bar.update(done)


def _publish(output: Output, comm: mpi.Comm, out: Array, lse: Array, sizes: Sizes, record: dict[str, Any],
             timeout: float) -> None:
    start = Contiguous.even(sizes.n_q, comm.size).starts[comm.rank]
    line = "{}"
    with comm.together(timeout):
        line = json.dumps(asdict(output.write(comm.rank, start, out, lse)))
    shards = [Shard(**json.loads(text)) for text in comm.share_text(line, timeout)]
    with comm.together(timeout):
        if comm.rank == 0:
            shapes = {"out": ((sizes.n_q, *out.shape[1:]), out.dtype), "lse": ((sizes.n_q, *lse.shape[1:]), lse.dtype)}
            output.publish(shards, shapes, record)


def _report(comm: mpi.Comm, sizes: Sizes, trace: Any, clock: Clock, timeout: float) -> Report:
    counts = comm.share(np.array([trace.pairs, trace.flop, trace.bytes_sent, resident_bytes(peak=True)]), timeout)
    names = sorted(clock.phases)
    seconds = comm.share(np.array([trace.compute_seconds, trace.wait_seconds, *(clock.phases[n] for n in names)]),
                         timeout).max(axis=0)
    phases = dict(zip(names, seconds[2:].tolist(), strict=True))
    pairs, flop, moved = (int(x) for x in counts[:, :3].sum(axis=0))
    return Report(sizes, comm.size, pairs, flop, phases["attend"], float(seconds[0]), float(seconds[1]), moved,
                  int(counts[:, 3].max()), phases)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file under its name only when it is whole. Local."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(content, indent=1, default=str) + "\n")
    temporary.replace(path)


def predict(sizes: Sizes, ranks: int, options: Options) -> dict[str, int]:
    """Predict the arrays of the rank with most tokens, in bytes; the peak is `total`. Local.

    Parameters
    ----------
    sizes : Sizes
    ranks : int
    options : Options
        Any layout but contiguous copies a shard three times while it is redistributed.

    Returns
    -------
    dict of str to int
        Bytes of each array while the ring runs, and `total`: the largest sum of any phase, this process and
        its libraries included.
    """
    n_q, n_k = -(-sizes.n_q // ranks), -(-sizes.n_k // ranks)
    item = DTYPES[sizes.dtype].itemsize
    wide = accumulator(DTYPES[sizes.dtype], options.accumulator).itemsize
    parts = {
        "q": n_q * sizes.heads * sizes.dim * item,
        "k": n_k * sizes.kv_heads * sizes.dim * item,
        "v": n_k * sizes.kv_heads * sizes.dim_v * item,
        "out": n_q * sizes.heads * sizes.dim_v * item,
        "lse": n_q * sizes.heads * wide,
        "acc": n_q * sizes.heads * sizes.dim_v * wide,
        "max and sum": 2 * n_q * sizes.heads * wide,
        "two K/V buffers": 2 * n_k * sizes.kv_heads * (sizes.dim + sizes.dim_v) * item if ranks > 1 else 0,
        "columns": 8 * 8 * n_q,
        "tile": 2**22,
    }
    copies = 0 if options.layout == "contiguous" or ranks == 1 else 3
    q, k, v, out = (parts[name] for name in ("q", "k", "v", "out"))
    phases = (sum(parts.values()), (1 + copies) * q, q + (1 + copies) * k, q + k + (1 + copies) * v,
              (1 + copies) * out + parts["lse"])
    base = _resident_with(options.backend)
    return {**parts, "process and libraries": base, "total": max(phases) + base}


def _resident_with(backend: str) -> int:
    """Memory of this process with the backend's modules loaded, and of what a dry run does not load."""
    open_backend(backend, 1).close()
    return resident_bytes() + LIBRARY_BYTES[backend if backend != "auto" else "numba"]
