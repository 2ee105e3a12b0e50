"""Files in, attention, files out: what `ringmpi attend` does."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from ..attention import RingAttention
from ..backends import choose_gpu_early
from ..checkpoint.calls import Keeping, Stop
from ..files.manifest import Shard
from ..files.shards import Output
from ..mpi import comm as mpi
from ..schedules.redistribution import redistribute
from .checkpoints import Checkpoints
from .inputs import Input, open_input, read_shard
from .options import Options
from .outputs import check_paths, gather_shards, publish, rows_of_results, write_shard
from .report import Display, Report, gather_report, gather_start, make_record, write_record
from .room import check_room
from .run import Run
from .stream import Stream, with_limit

Array = NDArray[Any]


def attend(source: Path, target: Path, options: Options, *, threads: int | None = None, timeout: float = mpi.TIMEOUT,
           expect_ranks: int | None = None, force: bool = False, display: Display | None = None,
           json_path: Path | None = None, command: str = "", keeping: Keeping | None = None,
           requests: Callable[[], Stop] | None = None) -> Report:
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
    keeping : Keeping, optional
        Where checkpoints are kept.
    requests : callable, optional
        With `keeping`: called when MPI is up, gives what is asked on this rank whether to stop.

    Returns
    -------
    Report
        The same on every rank.

    Raises
    ------
    RingError
        One of its children; the same on every rank but for `RingTimeout` and `RankLost`. Nothing is left under the
        target's name then, unless only the JSON record could not be written, or ranks were lost in the last exchange.
    Interrupted
        If a rank was asked to stop: what has been computed is in a checkpoint.
    """
    choose_gpu_early(options.backend)
    run = Run.start(timeout, expect_ranks)
    checkpoints = Checkpoints(run, keeping, requests() if keeping and requests else None)
    options = with_limit(run, options)
    output = _agree_on_output(run, source, target, {**asdict(options), **checkpoints.options()}, force)

    # Read, redistribute, attend, redistribute back and write, or leave nothing behind.
    with run.comm.telling(), ExitStack() as files:
        data = _open_on_all(run, files, source, options)
        check_room(run, data.sizes, options)
        _prepare(run, output, source, json_path, checkpoints)
        try:
            with _make_attention(run, data, options, threads) as attention:
                shown = display if run.comm.rank == 0 else None
                shards = (_stream if options.stream else _attend_at_once)(run, attention, data, options, output, shown,
                                                                          checkpoints)
            record = make_record(run.comm.size, attention, options, command)
        except BaseException:
            output.discard()                  # rank 0 can't have published: it needs this rank's shards
            raise

    # Publish and report.
    with run.comm.telling():
        publish(run, output, shards, rows_of_results(data.sizes, options.accumulator), record)
        checkpoints.clear()
        report = gather_report(run, data.sizes, attention)
        write_record(run, json_path, attention, record, report)
    return report


def _agree_on_output(run: Run, source: Path, target: Path, options: dict[str, Any], force: bool) -> Output:
    """Check that all ranks were asked for the same; give this run's folder of shards a name that no other run has."""
    asked = {"input": source, "output": target, "force": force, **options}
    run.comm.check_same_options(asked, run.timeout)
    return Output(target, run.allgather_text(uuid.uuid4().hex[:12])[0], force)


def _open_on_all(run: Run, files: ExitStack, source: Path, options: Options) -> Input:
    """Open the input, and check that all ranks see the same."""
    with run.raise_on_all():
        data = files.enter_context(open_input(source, options))
    run.comm.check_same_options(asdict(data.sizes), run.timeout)
    return data


def _prepare(run: Run, output: Output, source: Path, json_path: Path | None, checkpoints: Checkpoints) -> None:
    """Check on rank 0 that output and checkpoints can be written, and make the output's folder."""
    with run.raise_on_all():
        if run.comm.rank == 0:
            check_paths(source, output.path, json_path, output.force)
            checkpoints.check()
            output.prepare()


def _make_attention(run: Run, data: Input, options: Options, threads: int | None) -> RingAttention:
    return RingAttention(run.world, mask=data.mask, layout=options.layout, scale=options.scale,
                         softcap=options.softcap, alibi=data.alibi, backend=options.backend, threads=threads,
                         timeout=run.timeout, accumulator=options.accumulator, gpu_transport=options.gpu_transport,
                         allow_gpu_sharing=options.allow_gpu_sharing, bfloat16_products=options.bfloat16_products,
                         schedule=options.schedule, memory_limit=options.memory_limit, order=options.order)


def _attend_at_once(run: Run, attention: RingAttention, data: Input, options: Options, output: Output,
                    display: Display | None, checkpoints: Checkpoints) -> list[Shard]:
    """Attend with all that is in the input at once; give the shards of all ranks."""
    out, lse = _compute(run, attention, data, options, display, checkpoints)
    return gather_shards(run, [write_shard(run, output, data.sizes.n_q, out, lse)])


def _stream(run: Run, attention: RingAttention, data: Input, options: Options, output: Output,
            display: Display | None, checkpoints: Checkpoints) -> list[Shard]:
    """Attend with a piece of the input at a time; give the shards of all ranks."""
    start = gather_start(run, data, options, attention)
    if display is not None:
        display.start(start)
    streamed = Stream(run, attention, data, options, output, checkpoints)
    with display.attending(run.comm.progress_of_all) if display else nullcontext():
        shards = streamed.attend()
    run.timer.move(attention.trace.compile_seconds, source="attend", target="compile")
    return shards


def _compute(run: Run, attention: RingAttention, data: Input, options: Options, display: Display | None,
             checkpoints: Checkpoints) -> tuple[Array, Array]:
    """Give this rank's rows of the result, in the order of the input."""
    start = gather_start(run, data, options, attention)
    if display is not None:
        display.start(start)

    arrays = [read_shard(run, attention, dataset) for dataset in (data.q, data.k, data.v)]
    out, lse = _attend(run, attention, arrays, data.sinks, display, checkpoints)
    del arrays
    attention.close()                         # its buffers go before the result is copied
    with run.timer.phase("redistribute", "redistributing the result"):
        out = _redistribute_back(run, attention, out)
        lse = _redistribute_back(run, attention, lse)
    return out, lse


def _attend(run: Run, attention: RingAttention, arrays: list[Any], sinks: Array | None, display: Display | None,
            checkpoints: Checkpoints) -> tuple[Array, Array]:
    """Attend, and bring the result to the host."""
    done = 0

    def report(pairs: int, total: int) -> None:
        nonlocal done
        done += pairs
        sharing = attention.schedule.heads    # each of the ranks that share heads sees a pair, for some of the heads
        run.comm.report_progress(done // sharing, total // sharing)

    shown = display.attending(run.comm.progress_of_all) if display else nullcontext()
    with run.timer.phase("attend", "attending"), shown:
        out, lse = checkpoints.attend(attention, arrays, sinks, report)
        with run.raise_on_all(), attention.backend.current():
            out, lse = attention.backend.to_numpy(out), attention.backend.to_numpy(lse)
    run.timer.move(attention.trace.compile_seconds, source="attend", target="compile")
    return out, lse


def _redistribute_back(run: Run, attention: RingAttention, x: Array) -> Array:
    back: Array = redistribute(x, comm=run.world, source=attention.layout, target="contiguous", timeout=run.timeout)
    return back
