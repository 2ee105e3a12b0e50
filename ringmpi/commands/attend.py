"""Attend from IN.h5 to OUT.h5 on as many ranks as mpiexec or srun starts.

IN.h5 holds datasets q, k, v of shape (tokens, heads, dim). OUT.h5 gets `out` and `lse` in the same order; its shards
are beside it in OUT.h5.shards/.

    mpiexec -n 4 ringmpi attend in.h5 out.h5 --causal --layout striped
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ..environment import command_line, stderr_is_terminal
from ..job.options import OUTPUT_DRIVERS
from .options import add_attention, add_backend, add_order, positive, refuse_idle_options, seconds

if TYPE_CHECKING:
    from ..checkpoint.search import Keeping

EVERY_SECONDS = 600.0          # between checkpoints


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `ringmpi attend`."""
    parser.add_argument("input", type=Path, metavar="IN.h5")
    parser.add_argument("output", type=Path, metavar="OUT.h5")
    add_attention(parser)
    run = parser.add_argument_group("run")
    run.add_argument("--layout", choices=("contiguous", "striped", "zigzag"), default="contiguous",
                     help="which tokens each rank has while computing; striped and zigzag balance --causal "
                          "(default: contiguous)")
    add_backend(run)
    add_order(run)
    run.add_argument("--accumulator", choices=("float32", "float64"), help="dtype of sums (default: by the input's)")
    run.add_argument("--threads", type=positive, metavar="N", help="CPU threads a rank (default: its share)")
    run.add_argument("--timeout", type=seconds, default=1800.0, metavar="S",
                     help="seconds to wait for another rank (default: 1800)")
    run.add_argument("--expect-ranks", type=positive, metavar="N",
                     help="fail unless there are N ranks (default: as many as the launcher's variables say)")
    run.add_argument("--json", type=Path, metavar="FILE", help="write the full record of the run; - is standard output")
    run.add_argument("--report", type=page, metavar="FILE.html",
                     help="write a page on the run that stands alone: facts, timeline, balance; with matplotlib, the "
                          "extra `plot` (default: none)")
    run.add_argument("--output-driver", choices=OUTPUT_DRIVERS, default=OUTPUT_DRIVERS[0],
                     help="shards: a file for each rank, and OUT.h5 shows them as one; mpio: all ranks write one file "
                          "together, by an h5py that was built with MPI (default: shards)")
    run.add_argument("--stream", action="store_true",
                     help="read keys and values block by block as they are needed, and queries in pieces: for what "
                          "does not fit in memory. --memory-limit is of the whole process of a rank then (default: 0.8 "
                          "of what the node, or Slurm, lets its ranks have)")
    add_checkpoints(run)
    run.add_argument("--survive", action="store_true",
                     help="experimental: when ranks die, go on with those that are left, from the last checkpoint or "
                          "the beginning; for Open MPI 5 under mpiexec --with-ft ulfm")
    run.add_argument("--dry-run", action="store_true", help="check the input; predict memory, time and traffic; no MPI")
    run.add_argument("--quiet", action="store_true", help="print nothing but errors: no start, no progress, no result")
    run.add_argument("--force", action="store_true", help="replace OUT.h5 if it exists")
    parser.set_defaults(check=functools.partial(_check, parser.error), collective=True, process=None)


def add_checkpoints(run: Any) -> None:
    """Declare the options about checkpoints."""
    run.add_argument("--checkpoint", type=Path, metavar="DIR",
                     help="keep checkpoints in this folder, which is made if need be: by SIGUSR1 or SIGTERM all ranks "
                          "write one and end with exit code 75, and the same command goes on from it; it is removed "
                          "when OUT.h5 is there (default: none)")
    run.add_argument("--checkpoint-every", type=seconds, metavar="S",
                     help="write one at the end of a step when so many seconds have passed since the last "
                          f"(default: {EVERY_SECONDS:g})")
    run.add_argument("--resume", choices=("auto", "never", "require"),
                     help="go on from a checkpoint in DIR: if there is one of this input and these options, never, or "
                          "fail unless there is (default: auto)")


def page(text: str) -> Path:
    """Read the name of a page."""
    path = Path(text)
    if path.suffix != ".html":
        raise argparse.ArgumentTypeError(f"expected a name that ends in .html, got {text!r}")
    return path


def _check(error: Callable[[str], NoReturn], arguments: argparse.Namespace) -> None:
    """Refuse options that would have no effect."""
    refuse_idle_options(error, arguments)
    if arguments.survive and arguments.output_driver != OUTPUT_DRIVERS[0]:
        error("--survive: ranks that write one file together can't go on without each other; leave out --output-driver")
    if arguments.survive and arguments.stream:
        error("--survive: does not go together with --stream; give the same command on the ranks that are left: with "
              "--checkpoint it goes on after the last piece of queries that is done")
    for name in ("relative", "dim_v") if arguments.backend == "cuda" else ():
        if getattr(arguments, name):
            error(f"--{name.replace('_', '-')}: does not go together with --backend cuda yet")
    for name in ("checkpoint_every", "resume"):
        if arguments.checkpoint is None and getattr(arguments, name) is not None:
            error(f"--{name.replace('_', '-')} is about checkpoints: say where they are kept, --checkpoint DIR")


def run(arguments: argparse.Namespace) -> int:
    """Run `ringmpi attend`; return the exit code."""
    arguments.check(arguments)
    from ..files.streams import STANDARD_OUTPUT
    from ..job.attend import attend
    from ..job.options import Options
    from ..job.report import RecordPaths
    from ..mpi.world import world_rank
    from .display import Display
    options = Options.from_record(vars(arguments))
    if arguments.dry_run:
        from .attend_dry import dry_run
        return dry_run(arguments, options)
    with nullcontext() if arguments.quiet else Display(stderr_is_terminal()) as display:
        report = attend(
            arguments.input, arguments.output, options, threads=arguments.threads, timeout=arguments.timeout,
            expect_ranks=arguments.expect_ranks, force=arguments.force, display=display,
            records=RecordPaths(arguments.json, arguments.report), command=command_line(), keeping=_keeping(arguments),
            requests=arguments.process and arguments.process.heed_requests, survive=arguments.survive)
    if world_rank() == 0 and not arguments.quiet:
        print(report, file=sys.stderr if arguments.json == STANDARD_OUTPUT else sys.stdout)
    return 0


def _keeping(arguments: argparse.Namespace) -> Keeping | None:
    """Say where checkpoints are kept, if they are."""
    from ..checkpoint.search import Keeping
    if arguments.checkpoint is None:
        return None
    return Keeping(arguments.checkpoint, arguments.checkpoint_every or EVERY_SECONDS, arguments.resume or "auto")
