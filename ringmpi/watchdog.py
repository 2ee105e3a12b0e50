"""A small process beside each rank: it says where the rank died, and ends it where it can't end itself.

A rank that a library or the kernel ends (a fault in HDF5, no memory left) can't say a word any more, and one that is
stuck in MPI_Init or MPI_Finalize can't run any Python. The watchdog is forked before anything else has been loaded, and
hears by a pipe what the rank is doing; when the pipe closes with no farewell, the rank has died.
"""

from __future__ import annotations

import math
import os
import select
import signal
import socket
import time
import warnings
from contextlib import suppress
from pathlib import Path

END = "end"
FAULTS = (signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGABRT)
END_SECONDS = 20.0             # in which Python ends when the command is done
LONGEST_SELECT = 3600.0
LINGER_SECONDS = 2.0           # for which the first death on a node is the one that is told
STATUS_FIELD = 51 - 2          # exit_code in /proc/PID/stat, counted from the state, which follows the name


class Watchdog:
    """Watches this process from another one.

    Parameters
    ----------
    who : str
        How the rank is called: ``"rank 3 on node7"``.
    patience : float
        Seconds by which it ends its rank later than others do theirs, so that not all speak at once.
    """

    def __init__(self, who: str, patience: float = 0.0) -> None:
        reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)           # a note is never worth waiting for
        watched, launcher = os.getpid(), os.getppid()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)      # of a fork beside threads: the child starts none
            self._child = _fork()
        if self._child == 0:
            try:
                _Watch(reader, watched, launcher, who, patience).run()
            finally:
                os._exit(0)
        os.close(reader)

    def note(self, doing: str, limit: float | None = None) -> None:
        """Say what is done from now on, and how many seconds it may take. Local."""
        self._send(f"{limit or 0:g} {doing}")

    def dismiss(self) -> None:
        """Say farewell: what comes is no accident, and takes `END_SECONDS` at most. Local."""
        self._send(END)

    def end(self) -> None:
        """Say farewell, and wait until the watchdog is gone. Local."""
        if self._child is not None:
            self.dismiss()
            os.close(self._writer)
            with suppress(OSError):
                os.waitpid(self._child, 0)
            self._child = None

    def _send(self, line: str) -> None:
        if self._child is not None:
            with suppress(OSError):                    # the watchdog is gone: the work goes on
                os.write(self._writer, (line.replace("\n", " ") + "\n").encode(errors="backslashreplace"))


def _fork() -> int | None:
    """Fork; None where there may be no more processes: the work does not need a watchdog."""
    try:
        return os.fork()
    except OSError:
        return None


class _Watch:
    """The watchdog's side. It touches nothing but the pipe, standard error and the process that it watches."""

    def __init__(self, pipe: int, watched: int, launcher: int, who: str, patience: float) -> None:
        self._pipe, self._watched, self._launcher = pipe, watched, launcher
        self._who, self._patience = who, patience
        self._doing = "starting"
        self._limit = 0.0
        self._since = time.monotonic()
        # A launcher that sees the rank die kills its group: too soon for a word.
        with suppress(OSError):
            os.setpgid(0, 0)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        # Standard error stays. A launcher waits until all copies of the others are closed.
        os.closerange(0, 2)
        os.closerange(3, pipe)
        os.closerange(pipe + 1, 65536)

    def run(self) -> None:
        """Listen until the watched process says farewell or dies, or its time is up."""
        rest = b""
        while True:
            left = self._seconds_left()
            if left <= 0:
                self._end_it()
                return
            if not select.select([self._pipe], [], [], min(left, LONGEST_SELECT))[0]:
                continue
            data = os.read(self._pipe, 65536)
            if not data:
                self._tell_of_its_death()
                return
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                text = line.decode()
                if text == END:
                    self._await_its_end()
                    return
                limit, self._doing = text.split(" ", 1)
                self._limit = float(limit)
                self._since = time.monotonic()

    def _await_its_end(self) -> None:
        """Wait until the watched process, which is done, has gone; it may be stopped even now."""
        if not select.select([self._pipe], [], [], END_SECONDS)[0]:
            self._doing = "ending"
            self._limit = END_SECONDS
            self._end_it()

    def _seconds_left(self) -> float:
        return self._since + self._limit + self._patience - time.monotonic() if self._limit else math.inf

    def _end_it(self) -> None:
        seconds = time.monotonic() - self._since
        self._say(f"{self._who} is ended: it was stuck {self._doing} for {seconds:.0f} s (timeout {self._limit:g} s); "
                  "it is stopped, or another rank did not come, is stopped or far behind")
        with suppress(OSError):
            os.kill(self._watched, signal.SIGKILL)

    def _tell_of_its_death(self) -> None:
        status = self._exit_status()
        number = None if status is None else status & 127
        if number == 0:                                # it left by an exit code
            return
        first = self._first_on_node()
        if number in FAULTS or first:
            how = "died" if number is None else f"was killed by {_name(number)}"
            self._say(f"{self._who} {how} while {self._doing}{_guess(number)}")
            os.close(2)
            time.sleep(LINGER_SECONDS)

    def _first_on_node(self) -> bool:
        """Say whether no other rank of this launcher has died here just now: it ends all the others when one dies.

        The name of an abstract socket is taken, which is free again as soon as this process ends.
        """
        try:
            self._claim = socket.socket(socket.AF_UNIX)
            self._claim.bind(f"\0ringmpi-{os.getuid()}-{self._launcher}")
        except OSError:
            return False
        return True

    def _exit_status(self) -> int | None:
        """Read how the watched process ended; None where its parent was quicker to take it away."""
        try:
            fields = Path(f"/proc/{self._watched}/stat").read_text().rpartition(")")[2].split()
            return int(fields[STATUS_FIELD])
        except (OSError, IndexError, ValueError):
            return None

    def _say(self, text: str) -> None:
        with suppress(OSError):
            os.write(2, f"ringmpi: {text}\n".encode(errors="backslashreplace"))


def _guess(number: int | None) -> str:
    """Say why a rank may have been killed: only SIGKILL is what the kernel sends where memory is short."""
    if number in (None, signal.SIGKILL):
        return ": out of memory, perhaps, or ended by the launcher after another rank"
    return ": ended by the launcher after another rank, perhaps" if number == signal.SIGTERM else ""


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
