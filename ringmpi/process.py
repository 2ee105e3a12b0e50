"""The process of a command: its signals, faults, log and watchdog, from before MPI starts until after it ends.

For the command line only. A program that calls the library, or `cli.main` with arguments, keeps its process as it is.
"""

from __future__ import annotations

import faulthandler
import logging
import math
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any, NoReturn

from .environment import launched_rank
from .phases import LOGGER, Listener
from .watchdog import Watchdog

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
REQUEST = signal.SIGUSR1      # asks a job that keeps checkpoints to leave one and end, as the first SIGTERM does
STAGGER_SECONDS = 0.25        # between the ends of ranks that are all stuck, so that they don't all print at once
TWICE_SECONDS = 1.0           # a SIGTERM so soon after the first is no second one: Slurm's controller and srun send it
AGAIN_SECONDS = 0.01          # until a signal that came where nothing may be raised comes again
HDF5_CALLS = "ringmpi.files.new_file"         # the module of ours that HDF5 calls


class Stopped(KeyboardInterrupt):
    """A signal that asks this process to end. The text says which, and what it interrupted."""

    def __init__(self, number: int, doing: str) -> None:
        super().__init__(f"ended by {signal.Signals(number).name} while {doing}")
        self.number = number
        self.exit_code = 128 + number


class Process:
    """Sets the process of a command up: signals, faults, log and watchdog. A context manager.

    Attributes
    ----------
    doing : str
        What the process does now, as announced by `phase`.
    stopped : Stopped, optional
        The signal that asked the process to end: the cause of whatever fails from then on.
    """

    def __init__(self) -> None:
        rank = launched_rank()
        patience = 1.0 + STAGGER_SECONDS * min(rank, 8) if rank else 0.0
        self.doing = "starting"
        self.stopped: Stopped | None = None
        self._heeds_requests = False
        self._requested = False
        self._terminated = math.inf               # when a first SIGTERM came, which was taken for a request
        self._pending: int | None = None          # a signal that came where nothing may be raised
        self._whole = False                       # whether it is to wait for the end of what is done now
        self._watchdog = Watchdog(f"rank {rank} on {socket.gethostname()}", patience)
        # a fault prints the Python stack; a signal raises `Stopped`, even where Python would drop it
        if sys.__stderr__ is not None:
            faulthandler.enable(sys.__stderr__, all_threads=False)
        self._handled = [number for number in STOPS if signal.getsignal(number) != signal.SIG_IGN]       # nohup
        self._handle(self._on_signal)
        sys.unraisablehook = self._on_unraisable
        # the watchdog hears of every phase
        Listener(self.enter).start()
        LOGGER.propagate = False

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self._handle(signal.SIG_DFL)
        self._watchdog.dismiss()

    def log_to_stderr(self, quiet: bool) -> None:
        """Show the library's warnings, such as whom a rank waits for; only its errors if `quiet`. Local."""
        handler = _StderrHandler()
        handler.setFormatter(logging.Formatter("ringmpi: %(message)s"))
        handler.setLevel(logging.ERROR if quiet else logging.WARNING)
        logging.getLogger("ringmpi").addHandler(handler)

    def heed_requests(self) -> Callable[[], bool]:
        """Let SIGUSR1, and a first SIGTERM, ask the process to stop; give what says whether one has. Local.

        To be called when MPI is up: MPICH takes SIGUSR1 for itself when it starts.
        """
        self._heeds_requests = True
        if threading.current_thread() is threading.main_thread():
            signal.signal(REQUEST, self._on_request)
        return lambda: self._requested

    def enter(self, doing: str, limit: float | None, whole: bool = False) -> None:
        """Note what is done from now on. If that has a limit, no Python runs, and signals end the process at once.

        They wait for the end of what is to be done `whole`.
        """
        self._whole = False
        self._raise_pending()                     # a signal that interrupted what was done so far
        self._whole = whole
        self.doing = doing
        self._watchdog.note(doing, limit)
        at_once = self.stopped or (limit and not whole)           # a second one ends it at once
        self._handle(signal.SIG_DFL if at_once else self._on_signal)

    def settle(self) -> None:
        """Let SIGTERM change nothing any more: all is done but for MPI's end. Local.

        The first rank to exit with a code that is not 0 has a launcher end the others.
        """
        if signal.SIGTERM in self._handled and threading.current_thread() is threading.main_thread():
            self._handled.remove(signal.SIGTERM)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def farewell(self, seconds: float = 0.0) -> None:
        """Dismiss the watchdog: this process has said why it ends, and ends within `seconds`, if given. Local."""
        self._handle(signal.SIG_DFL)              # if the launcher ends the job now, not every rank need say so
        self._watchdog.end()
        signal.alarm(0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(math.ceil(seconds))

    def end_by_signal(self) -> NoReturn:
        """End by SIGTERM: if a rank exits before MPI_Init, MPICH's launcher leaves the others waiting in theirs."""
        self.farewell()
        sys.stdout.flush()
        signal.raise_signal(signal.SIGTERM)
        raise SystemExit(128 + signal.SIGTERM)           # where SIGTERM is ignored

    def _handle(self, action: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in self._handled:
                signal.signal(number, action)

    def _on_request(self, *_: object) -> None:
        self._requested = True

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._heeds_requests and number == signal.SIGTERM:
            self._requested = True
            self._terminated = min(self._terminated, time.monotonic())
            if time.monotonic() - self._terminated < TWICE_SECONDS:
                return
        if self._whole:
            self._pending = number
            return
        if _is_called_by_hdf5(frame):
            self._postpone(number)
            return
        self._pending = None
        self._handle(signal.SIG_DFL)              # a second one ends it at once
        self.stopped = Stopped(number, self.doing)
        raise self.stopped

    def _on_unraisable(self, unraisable: Any) -> None:
        """Repeat a signal that came where Python drops exceptions, as in `__del__`: else the work would go on."""
        if not isinstance(unraisable.exc_value, Stopped):
            sys.__unraisablehook__(unraisable)
            return
        self.stopped = None
        self._handle(self._on_signal)
        self._postpone(unraisable.exc_value.number)

    def _postpone(self, number: int) -> None:
        """Repeat a signal when the next phase begins, or after `AGAIN_SECONDS` if that is sooner."""
        self._pending = number
        signal.signal(signal.SIGALRM, self._raise_pending)
        signal.setitimer(signal.ITIMER_REAL, AGAIN_SECONDS)

    def _raise_pending(self, *_: object) -> None:
        if self._pending:
            signal.raise_signal(self._pending)


def _is_called_by_hdf5(frame: FrameType | None) -> bool:
    """Say whether HDF5 is on the stack, writing through a file of ours: an exception there would crash it."""
    while frame is not None:
        if frame.f_globals.get("__name__") == HDF5_CALLS:
            return True
        frame = frame.f_back
    return False


class _StderrHandler(logging.Handler):
    """Prints lines on standard error, above the progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError):
            if "tqdm" in sys.modules:
                sys.modules["tqdm"].tqdm.write(self.format(record), file=sys.stderr)
            else:
                sys.stderr.write(self.format(record) + "\n")
            sys.stderr.flush()
