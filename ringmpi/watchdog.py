"""A small process beside each rank: it says where the rank died, and ends it where it can't end itself.

A rank that a library or the kernel ends (a fault in HDF5, no memory left) can't say a word any more, and one that is
stuck in MPI_Init or MPI_Finalize can't run any Python. The watchdog is forked before anything else has been loaded, and
hears by a pipe what the rank is doing; when the pipe closes with no farewell, the rank has died.
"""

from __future__ import annotations

import os
import select
import signal
import time
import warnings
from contextlib import suppress
from pathlib import Path

END = "end"
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
        watched = os.getpid()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)      # of a fork beside threads: the child starts none
            self._child = os.fork()
        if self._child == 0:
            try:
                _Watch(reader, watched, who, patience).run()
            finally:
                os._exit(0)
        os.close(reader)

    def note(self, doing: str, limit: float | None = None) -> None:
        """Say what is done from now on, and how many seconds it may take. Local."""
        self._send(f"{limit or 0:g} {doing}")

    def end(self) -> None:
        """Say farewell: what comes is no accident. Local."""
        if self._child:
            self._send(END)
            os.close(self._writer)
            with suppress(OSError):
                os.waitpid(self._child, 0)
            self._child = 0

    def _send(self, line: str) -> None:
        if self._child:
            with suppress(OSError):                    # the watchdog is gone: the work goes on
                os.write(self._writer, (line.replace("\n", " ") + "\n").encode(errors="backslashreplace"))


class _Watch:
    """The watchdog's side. It touches nothing but the pipe, standard error and the process that it watches."""

    def __init__(self, pipe: int, watched: int, who: str, patience: float) -> None:
        self._pipe, self._watched, self._who, self._patience = pipe, watched, who, patience
        self._doing = "starting"
        self._limit = 0.0
        self._since = time.monotonic()
        self._told_to_end = False
        # A signal to the whole group is the launcher's or the user's way to end a job: no accident.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._note_signal)
        for number in (signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTSTP):
            signal.signal(number, signal.SIG_IGN)
        # Standard error stays. A launcher waits until all copies of the others are closed.
        os.closerange(0, 2)
        os.closerange(3, pipe)
        os.closerange(pipe + 1, 65536)

    def _note_signal(self, *_: object) -> None:
        self._told_to_end = True

    def run(self) -> None:
        """Listen until the watched process says farewell or dies, or its time is up."""
        rest = b""
        while True:
            if not select.select([self._pipe], [], [], self._seconds_left())[0]:
                self._end_it()
                return
            data = os.read(self._pipe, 65536)
            if not data:
                self._tell_of_its_death()
                return
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                text = line.decode()
                if text == END:
                    return
                limit, self._doing = text.split(" ", 1)
                self._limit = float(limit)
                self._since = time.monotonic()

    def _seconds_left(self) -> float | None:
        end = self._since + self._limit + self._patience
        return max(0.0, end - time.monotonic()) if self._limit else None

    def _end_it(self) -> None:
        seconds = time.monotonic() - self._since
        self._say(f"{self._who} is ended: it was stuck {self._doing} for {seconds:.0f} s (timeout {self._limit:g} s); "
                  "another rank did not come, is stopped or far behind")
        with suppress(OSError):
            os.kill(self._watched, signal.SIGKILL)

    def _tell_of_its_death(self) -> None:
        status = self._exit_status()
        if self._told_to_end or (status is not None and status & 127 == 0):
            return
        how = f"was killed by {_name(status & 127)}" if status is not None else "died"
        self._say(f"{self._who} {how} while {self._doing}")

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


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
