"""The command line: finds the command, runs it, and turns errors into exit codes."""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import signal
import socket
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from . import __version__
from .environment import launched_rank, launched_together
from .errors import BackendError, CommError, OutputError, RankLost, ResourceError, RingError, RingTimeout, ShardError
from .files.streams import standard_output
from .phases import phase
from .process import Process
from .watchdog import END_SECONDS

COMMANDS = {
    "attend": "attention from an HDF5 file to an HDF5 file",
    "make": "make an input file: random numbers, real text, or arrays of .npy, .npz and .safetensors",
    "check": "recompute sampled rows of a result in float64",
    "analyse": "where the attention of a result went: sums over its weights",
    "merge": "copy a sharded result into one plain file",
    "clean": "remove what interrupted runs have left beside a result",
    "plan": "which schedule would be fast on a machine, and why",
    "info": "what would run here, and why not the rest",
    "plot": "pictures of what a job did, and of who computes what",
    "demo": "real text to next-byte predictions, for growing context",
    "bench": "speed of the kernels and of the ring",
}
EXIT_CODES = """\
exit codes: 0 done | 1 a check failed | 2 usage | 3 bad input (nothing written) | 4 environment (MPI, ranks,
backend, memory) | 5 timeout or lost rank | 6 output could not be written | 70 an error in ringmpi itself |
75 stopped on request, with a checkpoint to go on from |
129 SIGHUP | 130 SIGINT | 143 SIGTERM, or a rank that can't start MPI while others do | 137 stuck in MPI's own
start or end"""
GRACE_SECONDS = 2.0          # that a rank which gave up leaves the others to say why, and to remove what they wrote
ABORT_SECONDS = 10           # that MPI_Abort may take
TIMEOUT = 60.0               # seconds, for commands that have no --timeout
SYSTEM_ERRORS = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EPIPE), OutputError.exit_code),
    **dict.fromkeys((errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EAGAIN), ResourceError.exit_code),
    **dict.fromkeys((errno.EIO, errno.ESTALE, errno.EACCES, errno.EPERM, errno.ENOENT, errno.EISDIR, errno.ENOTDIR,
                     errno.ELOOP, errno.ENAMETOOLONG), ShardError.exit_code),
}


class Parser(argparse.ArgumentParser):
    """Prints on one rank only: all ranks have the same arguments."""

    def _print_message(self, message: str, file: Any = None) -> None:
        if launched_rank() == 0:
            super()._print_message(message, file)


class PrintCompletion(argparse.Action):
    """Print a script by which a shell completes this command line, and end."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, shell: Any,
                 option: str | None = None) -> None:
        """Do so, of the options that the commands have. Local."""
        try:
            import shtab
        except ImportError:
            parser.exit(BackendError.exit_code, f"ringmpi: {option}: shtab is not installed; pip install shtab\n")
        whole = Parser(prog="ringmpi")
        commands = whole.add_subparsers()
        for name, text in COMMANDS.items():
            command = commands.add_parser(name, help=text)
            _module(name).add_arguments(command)
            _complete_files(command, shtab.FILE)
        parser._print_message(shtab.complete(whole, shell), sys.stdout)
        parser.exit()


def _complete_files(parser: argparse.ArgumentParser, kind: Any) -> None:
    """Have the arguments that are paths completed as files, those of subcommands too."""
    for action in parser._actions:
        if action.type is Path:
            action.complete = kind                 # type: ignore[attr-defined]
        if isinstance(action, argparse._SubParsersAction):
            for part in action.choices.values():
                _complete_files(part, kind)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code.

    Without `arguments` they are those of this process, which is then set up for the command: signals, log, watchdog,
    and the end of MPI. With `arguments` the process is the caller's, and is left as it is.
    """
    if arguments is not None:
        return _run(*_parse(arguments))
    _open_streams()
    with Process() as process:
        try:
            code = _run_and_leave(process)
        except KeyboardInterrupt as error:        # a signal before the command begins, or after it
            code = _end(_ending(error), process, collective=True)
    _end_without_mpi(code)
    return code


def _end_without_mpi(code: int) -> None:
    """End the process here if ranks were lost: mpi4py would call MPI_Finalize, which may wait for them."""
    if _world_rank() is not None:
        from .mpi.world import has_survived
        if has_survived():
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)


def _open_streams() -> None:
    """Open /dev/null for each standard stream that is closed: else the next file opened would take its number."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)            # gets the lowest number that is free
    sys.stdout = sys.stdout or open(os.devnull, "w")       # noqa: SIM115 (for the whole process)
    sys.stderr = sys.stderr or open(os.devnull, "w")       # noqa: SIM115


def _run_and_leave(process: Process) -> int:
    """Run the command that this process's arguments name, and leave MPI; return the exit code."""
    name, options = _parse(sys.argv[1:])
    process.log_to_stderr(getattr(options, "quiet", False))
    code = _run(name, options, process)
    if code:
        process.settle()
    code = _exit_code_of(lambda: _leave(code, getattr(options, "timeout", TIMEOUT)), process)
    process.enter("ending", END_SECONDS)
    return code


def _parse(arguments: Sequence[str]) -> tuple[str, argparse.Namespace]:
    """Find the command, and read its options."""
    parser = Parser(
        prog="ringmpi", description="Exact attention over long sequences on a ring of MPI ranks.",
        formatter_class=argparse.RawDescriptionHelpFormatter, epilog="commands:\n" + "\n".join(
            f"  {name:8}{text}" for name, text in COMMANDS.items()) + f"\n\n{EXIT_CODES}")
    parser.add_argument("--version", action="version", version=f"ringmpi {__version__}")
    parser.add_argument("--print-completion", choices=("bash", "zsh", "tcsh"), action=PrintCompletion, metavar="SHELL",
                        help="print what has bash, zsh or tcsh complete this command line (default: none; needs shtab)")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", nargs="?", help=", ".join(COMMANDS))
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="see `ringmpi COMMAND --help`")
    chosen = parser.parse_args(arguments)
    if chosen.command is None:
        parser.error(f"expected a COMMAND: {', '.join(COMMANDS)}; see `ringmpi --help`")
    command = _module(chosen.command)
    own = Parser(prog=f"ringmpi {chosen.command}", description=command.__doc__,
                 formatter_class=argparse.RawDescriptionHelpFormatter, epilog=EXIT_CODES)
    command.add_arguments(own)
    return chosen.command, own.parse_args(chosen.arguments)


@contextmanager
def _short_warnings() -> Iterator[None]:
    """Print a warning as one line for users, without the line of code that it comes from."""
    usual = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"ringmpi: {message}\n"
    try:
        yield
    finally:
        warnings.formatwarning = usual


def _module(name: str) -> Any:
    return importlib.import_module(f".commands.{name}", __package__)


def _run(name: str, options: argparse.Namespace, process: Process | None = None) -> int:
    """Run the command; return the exit code."""
    collective = getattr(options, "collective", False) and not getattr(options, "dry_run", False)
    if hasattr(options, "process"):                # a command that hears requests
        options.process = process
    with phase(f"running {name}"):
        return _exit_code_of(lambda: _do(name, options), process, collective)


def _do(name: str, options: argparse.Namespace) -> int:
    with _short_warnings(), standard_output():
        return int(_module(name).run(options))


def _leave(code: int, timeout: float) -> int:
    """Flush standard output, and leave MPI together with the other ranks."""
    from .mpi.world import leave
    sys.stdout.flush()
    leave(timeout)
    return code


def _exit_code_of(action: Callable[[], int], process: Process | None, collective: bool = False) -> int:
    """Run `action`; return its exit code, or that of the error by which it ends."""
    try:
        return action()
    except (Exception, KeyboardInterrupt) as error:         # noqa: BLE001 (other ranks must not wait for this one)
        # HDF5 and MPI turn an interrupt within their callbacks into errors of their own
        return _end(_ending((process and process.stopped) or error), process, collective)


class Ending(NamedTuple):
    """How a command that fails ends."""

    code: int
    text: str                   # empty: nobody needs to be told
    agreed: bool = False        # the same error on every rank: one prints it, and all leave MPI together
    grace: float = 0.0          # seconds that this rank leaves the others before it ends the job


def _ending(error: BaseException) -> Ending:
    """Say how this error ends a command."""
    if isinstance(error, OutputError) and _is_of_broken_pipe(error):
        return Ending(error.exit_code, "", agreed=True)
    if isinstance(error, RingError):
        alone = isinstance(error, (RingTimeout, RankLost, CommError))        # the text differs from rank to rank
        return Ending(error.exit_code, str(error), not alone, GRACE_SECONDS if alone else 0.0)
    if isinstance(error, KeyboardInterrupt):
        code = getattr(error, "exit_code", 128 + signal.SIGINT)
        return Ending(code, f"{_who()} {str(error) or 'interrupted'}", grace=GRACE_SECONDS / 2)
    if isinstance(error, MemoryError):
        return Ending(ResourceError.exit_code, f"{_who()}: not enough memory: {error}; `ringmpi attend --dry-run` says "
                                               "what a rank needs, and more ranks need less each")
    if isinstance(error, OSError) and error.errno in SYSTEM_ERRORS:
        return Ending(SYSTEM_ERRORS[error.errno], f"{_who()}: {error}")
    return Ending(70, f"{_who()} failed:\n{''.join(traceback.format_exception(error))}")


def _is_of_broken_pipe(error: BaseException | None) -> bool:
    """Say whether it comes of a pipe whose reader has gone, as `head` does: it has enough, or says itself why."""
    while error is not None and not isinstance(error, BrokenPipeError):
        error = error.__cause__
    return error is not None


def _end(ending: Ending, process: Process | None, collective: bool) -> int:
    """Print the reason, and end the other ranks if they can't know of it; return the exit code."""
    # one rank speaks for all, unless the error is its own or MPI, which numbers the ranks, has not started
    before_mpi = collective and _world_rank() is None and launched_together()
    if ending.text and (not ending.agreed or before_mpi or _rank() == 0):
        with suppress(OSError):
            print(f"ringmpi: {ending.text}", file=sys.stderr, flush=True)
    # the others may be waiting in MPI_Init, or for this rank
    if before_mpi and process is not None:
        process.end_by_signal()
    if not ending.agreed:
        if process is not None:
            process.farewell(ending.grace + ABORT_SECONDS)
        if _world_rank() is not None:
            from .mpi.world import end_job
            end_job(ending.code, ending.grace)
    return ending.code


def _who() -> str:
    return f"rank {_rank()} on {socket.gethostname()}"


def _rank() -> int:
    """Give the rank in COMM_WORLD once MPI is up; before that, what the launcher says."""
    rank = _world_rank()
    return launched_rank() if rank is None else rank


def _world_rank() -> int | None:
    """Give the rank in COMM_WORLD; None before MPI is up, when an import may be what was interrupted."""
    if "mpi4py.MPI" not in sys.modules:
        return None
    from .mpi.world import world_rank
    return world_rank()
