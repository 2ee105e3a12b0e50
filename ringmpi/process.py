"""The process of a command: its signals, faults, log and watchdog, from before MPI starts until after it ends.

For the command line alone. A program that calls the library, or `cli.main` with arguments, is left as it is.
"""

from __future__ import annotations

import faulthandler
import logging
import math
import signal
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any, NoReturn

from .environment import launched_rank
from .phases import LOGGER
from .watchdog import Watchdog

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
TURN_SECONDS = 0.25           # by which a stuck rank is ended later than the one before it, for the first ranks
AGAIN_SECONDS = 0.01          # until a signal comes again that came where nothing may be raised
FILES = "ringmpi.files.new_file"


class Stopped(KeyboardInterrupt):
    """A signal that asks this process to end. The text says which, and what it cut short."""

    def __init__(self, number: int, doing: str) -> None:
        super().__init__(f"ended by {signal.Signals(number).name} while {doing}")
        self.number = number
        self.exit_code = 128 + number


class Process:
    """What the command line arranges for its process, as a context manager.

    Attributes
    ----------
    doing : str
        What it does now, by `phase`.
    stopped : Stopped, optional
        The signal that asked it to end: whatever fails from then on, is for that.
    """

    def __init__(self) -> None:
        rank = launched_rank()
        turn = 1.0 + TURN_SECONDS * min(rank, 8) if rank else 0.0
        self.doing = "starting"
        self.stopped: Stopped | None = None
        self._pending: int | None = None          # signal that came where nothing may be raised
        self._watchdog = Watchdog(f"rank {rank} on {socket.gethostname()}", turn)
        if sys.__stderr__ is not None:
            faulthandler.enable(sys.__stderr__, all_threads=False)
        self._handled = [number for number in STOPS if signal.getsignal(number) != signal.SIG_IGN]       # nohup
        self._handle(self._stop)
        sys.unraisablehook = self._dropped
        LOGGER.addHandler(_Listener(self.enter))
        LOGGER.setLevel(logging.DEBUG)
        LOGGER.propagate = False

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self._handle(signal.SIG_DFL)
        self._watchdog.dismiss()

    def log_to_stderr(self, quiet: bool) -> None:
        """Show the library's warnings, such as whom a rank waits for; with `quiet` only errors. Local."""
        handler = _Lines()
        handler.setFormatter(logging.Formatter("ringmpi: %(message)s"))
        handler.setLevel(logging.ERROR if quiet else logging.WARNING)
        logging.getLogger("ringmpi").addHandler(handler)

    def enter(self, doing: str, limit: float | None) -> None:
        """Take note of what is done from now on; while that has a limit no Python runs, and signals end it at once."""
        self._raise_pending()                     # a signal that cut short what was done so far
        self.doing = doing
        self._watchdog.note(doing, limit)
        self._handle(signal.SIG_DFL if limit or self.stopped else self._stop)        # a second one ends it at once

    def farewell(self, seconds: float = 0.0) -> None:
        """Let the watchdog go: this process has said why it ends, and does so within `seconds`, if given. Local."""
        self._handle(signal.SIG_DFL)              # a launcher that ends the job need not hear of it from every rank
        self._watchdog.end()
        signal.alarm(0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(math.ceil(seconds))

    def end_by_signal(self) -> NoReturn:
        """End by SIGTERM: MPICH's launcher lets the others wait in MPI_Init for a rank that ends by an exit code."""
        self.farewell()
        sys.stdout.flush()
        signal.raise_signal(signal.SIGTERM)
        raise SystemExit(128 + signal.SIGTERM)           # where SIGTERM is ignored

    def _handle(self, action: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in self._handled:
                signal.signal(number, action)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if _is_called_by_hdf5(frame):
            self._come_again(number)
            return
        self._pending = None
        self._handle(signal.SIG_DFL)              # a second one ends it at once
        self.stopped = Stopped(number, self.doing)
        raise self.stopped

    def _dropped(self, told: Any) -> None:
        """Let a signal come again that came where Python drops exceptions, as in `__del__`; else the work went on."""
        if not isinstance(told.exc_value, Stopped):
            sys.__unraisablehook__(told)
            return
        self.stopped = None
        self._handle(self._stop)
        self._come_again(told.exc_value.number)

    def _come_again(self, number: int) -> None:
        """Let a signal be raised at the end of what is done now, or soon if that takes longer."""
        self._pending = number
        signal.signal(signal.SIGALRM, self._raise_pending)
        signal.setitimer(signal.ITIMER_REAL, AGAIN_SECONDS)

    def _raise_pending(self, *_: object) -> None:
        if self._pending:
            signal.raise_signal(self._pending)


def _is_called_by_hdf5(frame: FrameType | None) -> bool:
    """Say whether this is the file that HDF5 writes through: the library crashes of what is raised in there."""
    while frame is not None:
        if frame.f_globals.get("__name__") == FILES:
            return True
        frame = frame.f_back
    return False


class _Listener(logging.Handler):
    """Passes on what is said by `phase`."""

    def __init__(self, enter: Callable[[str, float | None], None]) -> None:
        super().__init__()
        self._enter = enter

    def emit(self, record: logging.LogRecord) -> None:
        self._enter(record.getMessage(), getattr(record, "limit", None))


class _Lines(logging.Handler):
    """Prints lines on standard error, above a progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError):
            if "tqdm" in sys.modules:
                sys.modules["tqdm"].tqdm.write(self.format(record), file=sys.stderr)
            else:
                sys.stderr.write(self.format(record) + "\n")
            sys.stderr.flush()
