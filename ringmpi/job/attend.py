"""Files in, attention, files out: what `ringmpi attend` does."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from ..attention import RingAttention
from ..backends import choose_gpu_early
from ..checkpoint.search import Keeping
from ..checkpoint.watch import Stop
from ..energy import Meter
from ..errors import InternalError, OutputError
from ..files.shards import Output
from ..mpi import comm as mpi
from ..mpi.world import check_survival, is_loss, survivors
from ..schedules.redistribution import redistribute
from .checkpoints import Checkpoints
from .inputs import Input, axes_of, open_input, read_bias_shard, read_shard
from .options import Options
from .outputs import Result, Shards, check_paths
from .parallel import DRIVER, Together
from .report import (
    NO_PATHS,
    Display,
    RecordPaths,
    Report,
    gather_report,
    gather_start,
    make_record,
    write_record,
)
from .room import check_room
from .run import Run
from .stream import Stream, with_limit

Array = NDArray[Any]

log = logging.getLogger("ringmpi")


def attend(source: Path, target: Path, options: Options, *, threads: int | None = None, timeout: float = mpi.TIMEOUT,
           expect_ranks: int | None = None, force: bool = False, display: Display | None = None,
           records: RecordPaths = NO_PATHS, command: str = "", keeping: Keeping | None = None,
           requests: Callable[[], Stop] | None = None, survive: bool = False) -> Report:
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
    records : RecordPaths
        Where rank 0 writes the full record, and a page on it.
    command : str
        The command line, for the record.
    keeping : Keeping, optional
        Where checkpoints are kept.
    requests : callable, optional
        With `keeping`: called when MPI is up, gives what is asked on this rank whether to stop.
    survive : bool
        When ranks die, go on with those that are left, from the last checkpoint or the beginning. Experimental.

    Returns
    -------
    Report
        The same on every rank.

    Raises
    ------
    RingError
        One of its children; the same on every rank but for `RingTimeout` and `RankLost`. Nothing is left under the
        target's name then, unless only a record could not be written, or ranks were lost in the last exchange.
    Interrupted
        If a rank was asked to stop: what has been computed is in a checkpoint.
    """
    choose_gpu_early(options.backend)
    run = Run.start(timeout, expect_ranks)
    job = _Job(source, target, options, threads, force, display, records, command, survive)
    stop = requests() if keeping and requests else None
    if survive:
        check_survival()
    output: Result | None = None
    lost: Exception | None = None
    while True:
        try:
            if lost is not None:
                run = _without_the_lost(run, output, lost)
            checkpoints = Checkpoints(run, keeping, stop)
            output = _agree_on_output(run, job, checkpoints)
            return _attend_once(run, job, output, checkpoints)
        except Exception as error:
            if not survive or error is lost or not is_loss(error):
                raise
            lost = error
        # What was asked for may be for as many ranks as there were, and the newest checkpoint may be of this job.
        job = replace(job, options=replace(job.options, schedule="auto"))
        if keeping and keeping.resume == "require":
            keeping = replace(keeping, resume="auto")


@dataclass(frozen=True)
class _Job:
    """What is asked for; see `attend`."""

    source: Path
    target: Path
    options: Options
    threads: int | None
    force: bool
    display: Display | None
    records: RecordPaths
    command: str
    survive: bool


def _attend_once(run: Run, job: _Job, output: Result, checkpoints: Checkpoints) -> Report:
    """Attend from file to file on the ranks that there are."""
    # Read, redistribute, attend, redistribute back and write, or leave nothing behind.
    compute = _stream if job.options.stream else _attend_at_once
    with run.comm.telling(), ExitStack() as files:
        if job.options.stream:
            job = replace(job, options=with_limit(run, job.options))
        data = _open_on_all(run, files, job.source, job.options)
        check_room(run, data.sizes, job.options, data.mask)
        with run.raise_on_all():
            if run.comm.rank == 0:
                check_paths(job.source, job.target, job.records, job.force, checkpoints.folder)
            output.prepare()
        try:
            with _make_attention(run, data, job.options, job.threads) as attention, _meter(attention) as meter:
                record = compute(run, attention, data, job, output, checkpoints)
        except BaseException:
            output.discard()                  # rank 0 can't have published: it needs this rank's rows
            raise

    # Publish and report.
    with run.comm.telling():
        output.publish()
        checkpoints.clear()
        report = gather_report(run, data.sizes, attention)
        write_record(run, job.records, attention, record, report, meter.read())
    return report


def _without_the_lost(run: Run, output: Result | None, error: Exception) -> Run:
    """Begin anew with the ranks that are left; or raise `error` if nobody has died."""
    world = survivors(run.timeout)
    if world is None:
        raise error
    left = Run.on(world, run.timeout)
    with left.raise_on_all():
        if left.comm.rank == 0:
            if output is not None and output.is_published():
                raise OutputError(f"{output.path} is there and whole, but not all that was to be said of it: {error}")
            if output is not None:
                output.discard_of_all()
            log.warning("going on with %d of %d ranks: %s", left.comm.size, run.comm.size, error)
    return left


def _agree_on_output(run: Run, job: _Job, checkpoints: Checkpoints) -> Result:
    """Check that all ranks were asked for the same; give this run's folder of shards a name that no other run has."""
    run.comm.check_same_options({
        "input": job.source, "output": job.target, "force": job.force, "survive": job.survive, **asdict(job.options),
        **checkpoints.options()}, run.timeout)
    name = run.allgather_text(uuid.uuid4().hex[:12])[0]
    if job.options.output_driver == DRIVER:
        return Together(run, job.target, job.force, axes_of(job.options))
    return Shards(run, Output(job.target, name, job.force, axes_of(job.options)))


def _open_on_all(run: Run, files: ExitStack, source: Path, options: Options) -> Input:
    """Open the input, and check that all ranks see the same."""
    with run.raise_on_all():
        data = files.enter_context(open_input(source, options))
    run.comm.check_same_options(asdict(data.sizes), run.timeout)
    return data


def _make_attention(run: Run, data: Input, options: Options, threads: int | None) -> RingAttention:
    return RingAttention(run.world, mask=data.mask, layout=options.layout, scale=options.scale,
                         softcap=options.softcap, alibi=data.alibi, backend=options.backend, threads=threads,
                         timeout=run.timeout, accumulator=options.accumulator, gpu_transport=options.gpu_transport,
                         allow_gpu_sharing=options.allow_gpu_sharing, bfloat16_products=options.bfloat16_products,
                         schedule=options.schedule, memory_limit=options.memory_limit, order=options.order)


def _meter(attention: RingAttention) -> Meter:
    device = attention.backend.device
    return Meter(device.uuid if device else "")


def _start(run: Run, attention: RingAttention, data: Input, job: _Job) -> Display | None:
    """Describe the job; give what shows how it goes, on rank 0."""
    display = job.display if run.comm.rank == 0 else None
    start = gather_start(run, data, job.options, attention)
    if display is not None:
        display.start(start)
    return display


def _stream(run: Run, attention: RingAttention, data: Input, job: _Job, output: Result,
            checkpoints: Checkpoints) -> dict[str, Any]:
    """Attend with a piece of the queries and a block of the keys at a time, and write; say how it was made."""
    if not isinstance(output, Shards):
        raise InternalError("a job that streams writes shards")
    display = _start(run, attention, data, job)
    stream = Stream(run, attention, data, job.options, output.output, checkpoints)
    with display.attending(run.comm.progress_of_all) if display else nullcontext():
        shards = stream.attend()
    run.timer.move(attention.trace.compile_seconds, source="attend", target="compile")
    record = make_record(run.comm.size, attention, job.options, job.command)
    output.take(shards if run.comm.rank == 0 else [], data.sizes.n_q, stream.rows, record)
    return record


def _attend_at_once(run: Run, attention: RingAttention, data: Input, job: _Job, output: Result,
                    checkpoints: Checkpoints) -> dict[str, Any]:
    """Attend with all that is in the input, and write; say how it was made."""
    out, lse = _compute(run, attention, data, job, checkpoints)
    record = make_record(run.comm.size, attention, job.options, job.command)
    output.write(data.sizes.n_q, {"out": out, "lse": lse}, record)
    return record


def _compute(run: Run, attention: RingAttention, data: Input, job: _Job, checkpoints: Checkpoints
             ) -> tuple[Array, Array]:
    """Give this rank's rows of the result, in the order of the input."""
    display = _start(run, attention, data, job)
    in_keys = data.sizes.in_keys
    arrays = [_swapped(data, read_shard(run, attention, tokens))
              for tokens in (data.q, data.k, *([] if in_keys else [data.v]))]
    extra = {"sinks": data.sinks, "key_bias": _swapped(data, read_bias_shard(run, attention, data.key_bias)),
             "relative": data.relative, "dim_v": data.sizes.dim_v if in_keys else None}
    out, lse = _attend(run, attention, arrays, extra, display, checkpoints)
    del arrays, extra
    attention.close()                         # its buffers go before the result is copied
    with run.timer.phase("redistribute", "redistributing the result"):
        out = _redistribute_back(run, attention, _swapped(data, out))
        lse = _redistribute_back(run, attention, _swapped(data, lse))
    return out, lse


def _swapped(data: Input, x: Any) -> Any:
    """View an array with the batch axis before that of the tokens, as calls have it, or the other way round."""
    return x if data.sizes.batch is None or x is None else x.swapaxes(0, 1)


def _attend(run: Run, attention: RingAttention, arrays: list[Any], extra: dict[str, Any],
            display: Display | None, checkpoints: Checkpoints) -> tuple[Array, Array]:
    """Attend, and bring the result to the host; `extra` are sinks, key_bias, relative and dim_v."""
    done = 0

    def report(pairs: int, total: int) -> None:
        nonlocal done
        done += pairs
        sharing = attention.schedule.heads    # each of the ranks that share heads sees a pair, for some of the heads
        run.comm.report_progress(done // sharing, total // sharing)

    shown = display.attending(run.comm.progress_of_all) if display else nullcontext()
    with run.timer.phase("attend", "attending"), shown:
        out, lse = checkpoints.attend(attention, arrays, extra, report)
        with run.raise_on_all(), attention.backend.current():
            out, lse = attention.backend.to_numpy(out), attention.backend.to_numpy(lse)
    run.timer.move(attention.trace.compile_seconds, source="attend", target="compile")
    return out, lse


def _redistribute_back(run: Run, attention: RingAttention, x: Array) -> Array:
    back: Array = redistribute(x, comm=run.world, source=attention.layout, target="contiguous", timeout=run.timeout)
    return back
