"""The command line: finds the command, runs it, turns errors into exit codes."""

from __future__ import annotations

import argparse
import importlib
import sys
import traceback
from collections.abc import Sequence

from . import __version__
from .environment import launched_rank
from .errors import CommError, LaunchError, RankLost, RingError, RingTimeout

COMMANDS = {
    "attend": "attention from an HDF5 file to an HDF5 file",
    "make": "make an input file: random numbers, or real text",
    "check": "recompute sampled rows of a result in float64",
    "merge": "copy a sharded result into one plain file",
    "info": "what would run here, and why not the rest",
    "demo": "real text to next-byte predictions, for growing context",
    "bench": "speed of the kernels and of the ring",
}
EXIT_CODES = """\
exit codes: 0 done | 1 a check failed | 2 usage | 3 bad input (nothing written) | 4 environment (MPI, ranks,
backend) | 5 timeout or lost rank | 6 output could not be written | 70 an error in ringmpi itself"""
GRACE_SECONDS = 2.0          # that a rank which gave up leaves to the others to say why


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="ringmpi", description="Exact attention over long sequences on a ring of MPI ranks.",
        formatter_class=argparse.RawDescriptionHelpFormatter, epilog="commands:\n" + "\n".join(
            f"  {name:8}{text}" for name, text in COMMANDS.items()) + f"\n\n{EXIT_CODES}")
    parser.add_argument("--version", action="version", version=f"ringmpi {__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=", ".join(COMMANDS))
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="see `ringmpi COMMAND --help`")
    chosen = parser.parse_args(arguments)
    command = importlib.import_module(f".commands.{chosen.command}", __package__)
    own = argparse.ArgumentParser(prog=f"ringmpi {chosen.command}", description=command.__doc__,
                                  formatter_class=argparse.RawDescriptionHelpFormatter, epilog=EXIT_CODES)
    command.add_arguments(own)
    options = own.parse_args(chosen.arguments)
    try:
        return int(command.run(options))
    except RingError as error:
        return _explain(error)
    except Exception:         # noqa: BLE001 (the other ranks must not wait for this one)
        return _break_off(70, f"ringmpi: rank {_rank()} failed:\n{traceback.format_exc()}")
    except KeyboardInterrupt:
        return _break_off(130, "ringmpi: interrupted")


def _explain(error: RingError) -> int:
    """Say what went wrong. Errors are the same on every rank, so one speaks; but a lost rank each sees its own way."""
    text = f"ringmpi: {error}"
    if isinstance(error, (RingTimeout, RankLost, CommError)):
        return _break_off(error.exit_code, text, GRACE_SECONDS)
    if _rank() == 0 or isinstance(error, LaunchError):
        print(text, file=sys.stderr, flush=True)
    return error.exit_code


def _break_off(code: int, text: str, grace: float = 0.0) -> int:
    """End every rank of the job, where there are others."""
    print(text, file=sys.stderr, flush=True)
    from .world import end_job
    end_job(code, grace)
    return code


def _rank() -> int:
    """Rank in COMM_WORLD once MPI is up, before that what the launcher says."""
    from .world import world_rank
    rank = world_rank()
    return launched_rank() if rank is None else rank
