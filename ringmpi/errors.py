"""The errors of ringmpi: each is a `RingError` and a built-in, and knows its exit code.

A collective call raises the same error, with the same text, on every rank.
"""

from __future__ import annotations


class RingError(Exception):
    """Base of every error that ringmpi raises on purpose."""

    exit_code = 3


class ShapeError(RingError, ValueError):
    """An array's shape does not fit the other arrays or the layout."""


class DtypeError(RingError, TypeError):
    """A dtype that attention is not defined for, or dtypes that differ."""


class OptionError(RingError, ValueError):
    """An option whose value makes no sense, or that differs between ranks."""

    exit_code = 2


class MaskError(RingError, ValueError):
    """A mask that does not fit the sequence: document offsets that do not end at its length, say."""


class CommError(RingError, TypeError):
    """What was given as a communicator is none, or can no longer be used."""

    exit_code = 4


class BackendError(RingError, RuntimeError):
    """A backend that this machine cannot run, or that failed."""

    exit_code = 4


class LaunchError(RingError, RuntimeError):
    """No MPI, or a number of ranks that is not what the launcher started."""

    exit_code = 4


class ResourceError(RingError, MemoryError):
    """Memory, or another resource of this machine, that there is not enough of."""

    exit_code = 4


class InternalError(RingError, RuntimeError):
    """An error in ringmpi itself on some rank; the text has that rank's traceback."""

    exit_code = 70


class RingTimeout(RingError, TimeoutError):
    """A message that did not come in time: a rank is lost, stopped or far behind."""

    exit_code = 5


class RankLost(RingError, ConnectionError):
    """Another rank died or gave up in mid-ring; the text says which, and what this rank was waiting for."""

    exit_code = 5


class ShardError(RingError, OSError):
    """An input file that is missing, damaged, incomplete or not to be trusted."""


class OutputError(RingError, OSError):
    """Output that could not be written; nothing is left under its name."""

    exit_code = 6


class Interrupted(RingError, InterruptedError):
    """A job that was asked to stop: what it has computed is in a checkpoint, and nothing else is written."""

    exit_code = 75
