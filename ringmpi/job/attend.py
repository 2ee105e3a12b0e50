"""Files in, attention, files out: what `ringmpi attend` does."""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Protocol, get_type_hints

import h5py
import numpy as np
from numpy.typing import NDArray

from .. import __version__, device
from ..attention import RingAttention
from ..checks import check_shapes
from ..dtypes import accumulator
from ..environment import resident_bytes
from ..errors import CommError, DtypeError, OptionError, RankLost, RingError, RingTimeout, ShardError
from ..files.hdf5 import check_axes, open_dataset, open_file, read_floats, read_integers, read_rows, read_rows_into
from ..files.manifest import Shard
from ..files.new_file import STANDARD_OUTPUT, check_record, check_writable, write_json
from ..files.shards import Output
from ..files.stored import RAW_DTYPE, stored_dtype
from ..layout import Contiguous
from ..mask import Mask
from ..mpi import comm as mpi
from ..mpi.clocks import clock_offset
from ..mpi.world import comm_world, library
from ..phases import phase
from ..schedules.redistribution import redistribute

Array = NDArray[Any]
MOST_OFFSETS = 2**20           # of documents, however few tokens there are: 8 MiB


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
    softcap: float | None = None
    alibi: bool = False
    sinks: bool = False
    layout: str = "contiguous"
    backend: str = "auto"
    accumulator: str | None = None
    gpu_transport: str = "auto"
    allow_gpu_sharing: bool = False
    bfloat16_products: str = "auto"
    q: str = "q"
    k: str = "k"
    v: str = "v"
    raw_dtype: str | None = None

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Options:
        """Read back what `asdict` gave, from JSON too. Local.

        Raises
        ------
        ShardError
            If a value is none that `asdict` gives.
        """
        known = {f.name: record[f.name] for f in fields(cls) if f.name in record}
        hints = get_type_hints(cls)
        sides = known.pop("window", None)
        for name, value in known.items():
            number = isinstance(value, int) and isinstance(0.0, hints[name])       # JSON's 1 for 1.0
            if not isinstance(value, hints[name]) and not number:
                raise ShardError(f"expected options that a run can have, got {name} = {value!r}")
        if sides is not None:
            if not isinstance(sides, (list, tuple)) or [type(x) in (int, type(None)) for x in sides] != [True, True]:
                raise ShardError(f"expected options that a run can have, got window = {sides!r}")
            known["window"] = tuple(sides)
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


@dataclass(frozen=True)
class Start:
    """What a job is when its ranks know each other and its input; `hosts` and `threads` by rank."""

    source: Path
    sizes: Sizes
    options: Options
    mask: Mask
    backend: str
    hosts: list[str]
    threads: list[int]


class Display(Protocol):
    """What shows on rank 0 how a job goes."""

    def start(self, start: Start) -> None:
        """Begin to show it."""

    def attending(self, counts: Callable[[], tuple[int, int]]) -> AbstractContextManager[None]:
        """Show, within a block, the pairs that all ranks have done: the first of `counts`."""


@contextmanager
def datasets(path: Path, options: Options) -> Iterator[tuple[h5py.File, list[h5py.Dataset], Sizes]]:
    """Open the input and check that q, k and v are there, whole, and go together. Local.

    Raises
    ------
    ShardError, ShapeError, DtypeError
        If they do not.
    """
    with open_file(path) as file:
        found = [open_dataset(file, name, options.raw_dtype) for name in (options.q, options.k, options.v)]
        for dataset in found:
            check_axes(dataset, ("tokens", "heads", "dim"))
        q, k, v = found
        kinds = [stored_dtype(dataset, options.raw_dtype) for dataset in found]
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
    documents = read_integers(file, "documents", max(n_k + 1, MOST_OFFSETS)) if options.documents else None
    mask = Mask(causal=options.causal, window=options.window, documents=documents, prefix=options.prefix,
                first=options.first, q_offset=options.q_offset)
    mask.check(n_k)
    return mask


def read_heads(file: h5py.File, options: Options, heads: int) -> dict[str, NDArray[np.float64] | None]:
    """Read what the scores of each head are changed by, as far as it is asked for: `alibi` and `sinks`. Local.

    Raises
    ------
    ShapeError, DtypeError, ShardError
        If there is not one number for each head.
    """
    return {name: read_floats(file, name, heads) if wanted else None
            for name, wanted in (("alibi", options.alibi), ("sinks", options.sinks))}


def inspect(path: Path, options: Options) -> Sizes:
    """Check an input without computing, as a dry run does. Local."""
    with datasets(path, options) as (file, _, sizes):
        make_mask(file, options, sizes.n_k)
        read_heads(file, options, sizes.heads)
        return sizes


class Clock:
    """Seconds of each phase of a job on this rank."""

    def __init__(self) -> None:
        self.phases: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str, doing: str) -> Iterator[None]:
        """Add the time a block takes to phase `name`, and say what is done in it."""
        start = time.perf_counter()
        with phase(doing):
            yield
        self.phases[name] = self.phases.get(name, 0.0) + time.perf_counter() - start

    def apart(self, name: str, phase: str, seconds: float) -> None:
        """Give `seconds` of a phase a name of their own."""
        self.phases[phase] -= seconds
        self.phases[name] = self.phases.get(name, 0.0) + seconds


def attend(source: Path, target: Path, options: Options, *, threads: int | None = None, timeout: float = mpi.TIMEOUT,
           expect_ranks: int | None = None, force: bool = False, display: Display | None = None,
           json_path: Path | None = None, command: str = "") -> Report:
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
    display : Display, optional
        Shows on rank 0 how it goes.
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
        One of its children; the same on every rank but for `RingTimeout` and `RankLost`. Nothing is left under the
        target's name then, unless only the JSON record could not be written, or ranks were lost in the last exchange.
    """
    if options.backend == "cuda":
        device.choose_early()     # UCX takes the network card next to the GPU that is current when MPI starts
    world = comm_world(timeout, expect_ranks)
    comm = mpi.private_comm(world, timeout, exclusive=True)
    clock = Clock()
    asked = {"input": source, "output": target, "force": force, **asdict(options)}
    comm.check_same_options(asked, timeout)
    output = Output(target, comm.allgather_text(uuid.uuid4().hex[:12], timeout)[0], force)
    with comm.telling(), ExitStack() as files:
        with comm.raise_on_all(timeout):
            file, found, sizes = files.enter_context(datasets(source, options))
            mask = make_mask(file, options, sizes.n_k)
            of_heads = read_heads(file, options, sizes.heads)
        comm.check_same_options(asdict(sizes), timeout)
        with comm.raise_on_all(timeout):
            if comm.rank == 0:
                check_paths(source, target, json_path, force)
                output.prepare()
        try:
            attention = RingAttention(world, mask=mask, layout=options.layout, scale=options.scale,
                                      softcap=options.softcap, alibi=of_heads["alibi"], backend=options.backend,
                                      threads=threads, timeout=timeout, accumulator=options.accumulator,
                                      gpu_transport=options.gpu_transport, allow_gpu_sharing=options.allow_gpu_sharing,
                                      bfloat16_products=options.bfloat16_products)
            with attention:
                start = _start(comm, Start(source, sizes, options, mask, attention.backend.name, [], []), attention)
                shown = display if comm.rank == 0 else None
                if shown is not None:
                    shown.start(start)
                out, lse = _compute(world, comm, attention, found, of_heads["sinks"], shown, clock)
            record = {"ringmpi": __version__, "command": command, "ranks": comm.size,
                      "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                      "backend": attention.backend.name, "options": asdict(options), **_products(attention),
                      **_gpus(attention)}
            first = Contiguous.even(sizes.n_q, comm.size).starts[comm.rank]
            with clock.phase("write", f"writing {target}"), comm.raise_on_all(timeout):
                line = json.dumps(asdict(output.write(comm.rank, first, out, lse)))
        except BaseException:
            output.discard(comm.rank)         # rank 0 can't have published: it needs this rank's line
            raise
    with comm.telling():
        _publish(output, comm, line, {"out": out, "lse": lse}, record, clock, timeout)
        report = _report(comm, sizes, attention.trace, clock, timeout)
        _write_record(json_path, comm, attention, record, report, clock, timeout)
    return report


def _start(comm: mpi.Comm, start: Start, attention: RingAttention) -> Start:
    """Complete what is known at the start by the hosts and threads of all ranks. Collective over *comm*."""
    mine = json.dumps([socket.gethostname(), attention.backend.threads])
    everyone = [json.loads(text) for text in comm.allgather_text(mine, attention.timeout)]
    return replace(start, hosts=[host for host, _ in everyone], threads=[threads for _, threads in everyone])


def _products(attention: RingAttention) -> dict[str, Any]:
    """Say how bfloat16 was multiplied; nothing on GPUs, which do that in one way."""
    return {} if attention.backend.device else {"bfloat16_products": attention.backend.products}


def _gpus(attention: RingAttention) -> dict[str, Any]:
    """Say which GPUs computed, by rank, and how K and V got from one to the other; nothing on CPUs."""
    if attention.transport is None:
        return {}
    return {"gpus": attention.gpus, "gpu_transport": attention.transport.name,
            "gpu_transport_reason": attention.transport.reason}


def _publish(output: Output, comm: mpi.Comm, line: str, rows: dict[str, Array], record: dict[str, Any], clock: Clock,
             timeout: float) -> None:
    """Exchange the lines of the manifest; rank 0 publishes."""
    try:
        shards = [Shard(**json.loads(text)) for text in comm.allgather_text(line, timeout)]
        shapes = {name: ((shards[-1].stop, *mine.shape[1:]), mine.dtype) for name, mine in rows.items()}
        with clock.phase("write", f"writing {output.path}"), comm.raise_on_all(timeout):
            if comm.rank == 0:
                output.publish(shards, shapes, record)
    except RingError as error:
        if not isinstance(error, (RingTimeout, RankLost, CommError)):      # agreed: it is not there
            output.discard(comm.rank)
        raise
    if comm.rank == 0:
        output.clear_replaced()


def _write_record(path: Path | None, comm: mpi.Comm, attention: RingAttention, record: dict[str, Any], report: Report,
                  clock: Clock, timeout: float) -> None:
    """Gather what every rank has to tell; rank 0 writes it as JSON."""
    mine = {"host": socket.gethostname(), "phases": clock.phases, "peak_bytes": resident_bytes(peak=True),
            "threads": attention.backend.threads, "clock_offset": clock_offset(comm, timeout),
            **attention.trace.as_dict()}
    details = [json.loads(text) for text in comm.allgather_text(json.dumps(mine), timeout)]
    with comm.raise_on_all(timeout):
        if path and comm.rank == 0:
            write_json(path, {**record, "mpi": library(), **asdict(report), "gflops": report.gflops,
                              "per_rank": details})


def _compute(world: Any, comm: mpi.Comm, attention: RingAttention, found: list[h5py.Dataset], sinks: Array | None,
             display: Display | None, clock: Clock) -> tuple[Array, Array]:
    """Read, attend, and bring the result back to the order of the input."""
    arrays = [_read(world, comm, attention, dataset, clock) for dataset in found]
    done = 0

    def report(pairs: int, total: int) -> None:
        nonlocal done
        done += pairs
        comm.report_progress(done, total)

    with clock.phase("attend", "attending"), display.attending(comm.progress_of_all) if display else nullcontext():
        out, lse = attention(*arrays, sinks=sinks, return_lse=True, progress=report)
        with comm.raise_on_all(attention.timeout), attention.backend.current():
            out, lse = attention.backend.to_numpy(out), attention.backend.to_numpy(lse)
    clock.apart("compile", "attend", attention.trace.compile_seconds)
    del arrays
    attention.close()                         # its buffers go before the result is copied
    back = {"comm": world, "source": attention.layout, "target": "contiguous", "timeout": attention.timeout}
    with clock.phase("redistribute", "redistributing the result"):
        out = redistribute(out, **back)
        lse = redistribute(lse, **back)
    return out, lse


def _read(world: Any, comm: mpi.Comm, attention: RingAttention, dataset: h5py.Dataset, clock: Clock) -> Any:
    """Read this rank's rows of a dataset to where the backend computes, in the layout that it computes in."""
    layout, backend = Contiguous.even(len(dataset), comm.size), attention.backend
    start, count = layout.starts[comm.rank], layout.counts[comm.rank]
    shape, dtype = (count, *dataset.shape[1:]), stored_dtype(dataset, RAW_DTYPE)     # as `datasets` has allowed
    reading = f"reading {dataset.file.filename}"
    if attention.layout == "contiguous":
        with clock.phase("read", reading), comm.raise_on_all(attention.timeout), backend.current():
            return backend.read_rows(shape, dtype, lambda at, rows: read_rows_into(dataset, start + at, rows))
    with clock.phase("read", reading), comm.raise_on_all(attention.timeout):
        shard = read_rows(dataset, start, start + count, RAW_DTYPE)
    with clock.phase("redistribute", f"redistributing {dataset.name}"):
        shard = redistribute(shard, comm=world, target=attention.layout, timeout=attention.timeout)
        with comm.raise_on_all(attention.timeout), backend.current():
            return backend.to_device(shard)


def _report(comm: mpi.Comm, sizes: Sizes, trace: Any, clock: Clock, timeout: float) -> Report:
    counts = comm.allgather(np.array([trace.pairs, trace.flop, trace.bytes_sent, resident_bytes(peak=True)]), timeout)
    names = sorted(clock.phases)
    seconds = comm.allgather(np.array([trace.compute_seconds, trace.wait_seconds, *(clock.phases[n] for n in names)]),
                         timeout).max(axis=0)
    phases = dict(zip(names, seconds[2:].tolist(), strict=True))
    pairs, flop, moved = (sum(map(int, column)) for column in counts[:, :3].T)
    return Report(sizes, comm.size, pairs, flop, phases["attend"], float(seconds[0]), float(seconds[1]), moved,
                  int(counts[:, 3].max()), phases)


def check_paths(source: Path, target: Path, json_path: Path | None, force: bool) -> None:
    """Check that input, output and record are different files, and that the outputs can be written. Local.

    Raises
    ------
    OptionError
        If two of them are one file, or HDF5 can't refer to the output's shards.
    OutputError
        If `target` exists and not `force`, or one can't be written.
    """
    if "%" in target.name:
        raise OptionError(f"{target}: expected a name without %: HDF5 takes it for a pattern of files")
    if not target.name.isprintable():
        raise OptionError(f"{str(target)!r}: expected a name of printable UTF-8 text, by which HDF5 finds the shards")
    streams = (None, STANDARD_OUTPUT)
    named = {"input": source, "output": target} | ({"--json": json_path} if json_path not in streams else {})
    seen: dict[Path, str] = {}
    for name, path in named.items():
        other = seen.setdefault(Path(os.path.realpath(path)), name)
        if other != name:
            raise OptionError(f"{path}: expected different files, got the same one as {other} and {name}")
    check_writable(target, force)
    if json_path:
        check_record(json_path)
