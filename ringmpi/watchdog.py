"""A small process beside each rank: it says where the rank died, and kills it if it can't end by itself.

A rank that a library or the kernel kills (a fault in HDF5, no memory left) can't print anything, and one that is stuck
in MPI_Init or MPI_Finalize runs no Python. The watchdog is forked before anything else is loaded, and is told through
a pipe what the rank is doing. If the pipe closes without a farewell, the rank has died.
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
END_SECONDS = 20.0             # that Python may take to end once the command is done
LONGEST_SELECT = 3600.0
LINGER_SECONDS = 2.0           # in which further deaths on a node are not reported: the launcher kills the other ranks
STATUS_FIELD = 51 - 2          # exit_code in /proc/PID/stat, counted from the state, which follows the name


class Watchdog:
    """Watches this process from another one.

    Parameters
    ----------
    who : str
        The name of the rank: ``"rank 3 on node7"``.
    patience : float
        Seconds beyond a limit after which it kills its rank; not the same for all, so that not all print at once.
    """

    def __init__(self, who: str, patience: float = 0.0) -> None:
        reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)           # a note is never worth waiting for
        watched = os.getpid()
        launcher = os.getppid()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)      # of a fork beside threads: the child needs none
            self._child = _fork()
        if self._child == 0:
            try:
                _Watch(reader, watched, launcher, who, patience).run()
            finally:
                os._exit(0)
        os.close(reader)

    def note(self, doing: str, limit: float | None = None) -> None:
        """Tell the watchdog what is done from now on, and how many seconds it may take. Local."""
        self._send(f"{limit or 0:g} {doing}")

    def dismiss(self) -> None:
        """Say farewell: this process ends on purpose, within `END_SECONDS`. Local."""
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
    """Fork; return None if no more processes are allowed: the work does not need a watchdog."""
    try:
        return os.fork()
    except OSError:
        return None


class _Watch:
    """The watchdog's side: it uses the pipe, standard error and the process that it watches, and nothing else."""

    def __init__(self, pipe: int, watched: int, launcher: int, who: str, patience: float) -> None:
        self._pipe = pipe
        self._watched = watched
        self._launcher = launcher
        self._who = who
        self._patience = patience
        self._doing = "starting"
        self._limit = 0.0
        self._since = time.monotonic()
        # A launcher that sees the rank die kills its process group, before the watchdog could say a word.
        with suppress(OSError):
            os.setpgid(0, 0)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        # Standard error stays open. A launcher waits until all copies of the other files are closed.
        os.closerange(0, 2)
        os.closerange(3, pipe)
        os.closerange(pipe + 1, 65536)

    def run(self) -> None:
        """Listen until the watched process says farewell or dies, or its time is up."""
        rest = b""
        while True:
            # wait for a note, the end of the pipe or the limit
            left = self._seconds_left()
            if left <= 0:
                self._kill()
                return
            if not select.select([self._pipe], [], [], min(left, LONGEST_SELECT))[0]:
                continue
            data = os.read(self._pipe, 65536)
            if not data:
                self._report_death()
                return
            # take in the notes that are complete
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                text = line.decode()
                if text == END:
                    self._await_end()
                    return
                limit, self._doing = text.split(" ", 1)
                self._limit = float(limit)
                self._since = time.monotonic()

    def _await_end(self) -> None:
        """Wait until the watched process, which is done, has gone: it can still get stuck."""
        if not select.select([self._pipe], [], [], END_SECONDS)[0]:
            self._doing = "ending"
            self._limit = END_SECONDS
            self._kill()

    def _seconds_left(self) -> float:
        return self._since + self._limit + self._patience - time.monotonic() if self._limit else math.inf

    def _kill(self) -> None:
        seconds = time.monotonic() - self._since
        self._say(f"{self._who} is ended: it was stuck {self._doing} for {seconds:.0f} s (timeout {self._limit:g} s); "
                  "it is stopped, or another rank did not come, is stopped or far behind")
        with suppress(OSError):
            os.kill(self._watched, signal.SIGKILL)

    def _report_death(self) -> None:
        """Say how the watched process died, unless the launcher has killed it after another rank."""
        status = self._exit_status()
        number = None if status is None else status & 127
        if number == 0:                                # it exited
            return
        first = self._first_on_node()
        if number in FAULTS or first:
            how = "died" if number is None else f"was killed by {_name(number)}"
            self._say(f"{self._who} {how} while {self._doing}{_guess(number)}")
            os.close(2)
            time.sleep(LINGER_SECONDS)

    def _first_on_node(self) -> bool:
        """Say whether this is the first rank of its launcher to die on this node within `LINGER_SECONDS`.

        The first claims the name of an abstract socket, which is free again as soon as this process ends.
        """
        try:
            self._claim = socket.socket(socket.AF_UNIX)
            self._claim.bind(f"\0ringmpi-{os.getuid()}-{self._launcher}")
        except OSError:
            return False
        return True

    def _exit_status(self) -> int | None:
        """Read how the watched process ended; None if its parent has reaped it already."""
        try:
            fields = Path(f"/proc/{self._watched}/stat").read_text().rpartition(")")[2].split()
            return int(fields[STATUS_FIELD])
        except (OSError, IndexError, ValueError):
            return None

    def _say(self, text: str) -> None:
        with suppress(OSError):
            os.write(2, f"ringmpi: {text}\n".encode(errors="backslashreplace"))


def _guess(number: int | None) -> str:
    """Say why a rank may have been killed: SIGKILL is what the kernel sends when memory runs out."""
    if number in (None, signal.SIGKILL):
        return ": out of memory, perhaps, or ended by the launcher after another rank"
    return ": ended by the launcher after another rank, perhaps" if number == signal.SIGTERM else ""


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
