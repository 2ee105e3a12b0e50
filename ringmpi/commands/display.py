"""What rank 0 shows of a job while it runs: a bar on a terminal; elsewhere lines for a log."""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any

from tqdm import tqdm

from ..environment import launched_sizes
from ..job.memory import batch_of, count_pairs, measure_process, predict_memory, predict_seconds
from ..job.report import Start
from ..phases import Listener

TICK_SECONDS = 0.25
STEP = 0.1                     # share of the work after which there is a line ...
STEP_SECONDS = 5.0             # ... but none sooner after the last one than this
LINE_SECONDS = 60.0            # without a line, after which there is one in any case
MANY_THREADS = 8               # of a single rank, from which on the log asks whether one rank is meant


class Display:
    """Shows the start, the phases and the progress of a job, from a thread of its own. Local, on rank 0.

    Parameters
    ----------
    bar : bool
        Draw a bar; otherwise write lines.
    """

    def __init__(self, bar: bool) -> None:
        self._draws = bar
        self._bar: Any = None
        self._lines = _Lines()
        self._counts: Callable[[], tuple[int, int]] | None = None
        self._pairs = 1
        self._doing = "preparing"
        self._since = time.monotonic()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._tick, daemon=True)
        self._listener = Listener(self._enter)

    def start(self, start: Start) -> None:
        """Describe the job, and begin to show it; or begin anew, on other ranks."""
        pairs = count_pairs(start.mask, start.sizes, len(start.hosts), start.options.layout)
        self._pairs = max(1, sum(pairs) * batch_of(start.sizes))
        for line in describe(start, pairs):
            self._say(line)
        if self._thread.is_alive():
            if self._bar is not None:
                self._bar.reset(self._pairs)
            return
        self._listener.start()
        if self._draws:
            self._bar = tqdm(total=self._pairs, unit="pair", unit_scale=True, leave=False, file=sys.stderr)
        self._thread.start()

    def __enter__(self) -> Display:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 where: TracebackType | None) -> None:
        if self._thread.is_alive():
            self._done.set()
            self._thread.join()
            self._listener.stop()
        if self._bar is not None:
            self._bar.close()

    @contextmanager
    def attending(self, counts: Callable[[], tuple[int, int]]) -> Iterator[None]:
        """Show within a block how many pairs all ranks have done: the first number that `counts` returns."""
        if self._bar is not None:
            self._bar.reset()
        self._lines.restart()
        self._counts = counts
        try:
            yield
        finally:
            self._counts = None
        if self._bar is not None:
            self._bar.n = self._pairs

    def _enter(self, doing: str, *_: object) -> None:
        self._doing = doing
        self._since = time.monotonic()

    def _tick(self) -> None:
        while not self._done.wait(TICK_SECONDS):
            share = min(1.0, self._counts()[0] / self._pairs) if self._counts else None
            if self._bar is None:
                line = self._lines.due(self._doing, time.monotonic() - self._since, share)
                if line:
                    self._say(line)
                continue
            if share is not None:
                self._bar.n = int(share * self._pairs)
            self._bar.set_description(self._doing)

    def _say(self, text: str) -> None:
        with suppress(OSError):           # a log that can't be written must not cost the result
            tqdm.write(f"ringmpi: {text}", file=sys.stderr)
            sys.stderr.flush()


class _Lines:
    """Decides when the log gets a line, and what it says."""

    def __init__(self) -> None:
        self._last = self._start = time.monotonic()
        self._next = STEP

    def restart(self) -> None:
        """Begin to count the work."""
        self._start = time.monotonic()
        self._next = STEP

    def due(self, doing: str, seconds: float, share: float | None) -> str:
        """Give the line that is due; empty if none is.

        Parameters
        ----------
        doing : str
            The phase.
        seconds : float
            How long it has lasted.
        share : float or None
            How much of the work is done, if it is counted.
        """
        # a line is due after a step of the work, or a long silence
        now = time.monotonic()
        silence = now - self._last
        stepped = share is not None and share >= self._next and silence >= STEP_SECONDS
        if not stepped and silence < LINE_SECONDS:
            return ""
        self._last = now
        # without a share of the work the time so far is all there is to say
        if share is None:
            return f"{doing} for {_clock(seconds)} so far"
        self._next = (share // STEP + 1) * STEP
        spent = now - self._start
        left = f", about {_clock(spent * (1 - share) / share)} left" if share else ""
        return f"{doing}: {share:.0%} in {_clock(spent)}{left}"


def describe(start: Start, pairs: list[int]) -> list[str]:
    """Describe a job, where it runs and what it will need; ask about a single rank that may be an accident. Local."""
    sizes = start.sizes
    ranks = len(start.hosts)
    options = start.options
    memory = "at most" if options.stream else "predicted:"
    nbytes = (options.memory_limit if options.stream else
              predict_memory(sizes, ranks, options, measure_process(options))["total"])
    seconds = predict_seconds(pairs, sizes, start.threads, start.backend)
    time_needed = f", {_rough(seconds)}" if seconds else ""
    lines = [f"{_many(ranks, 'rank')} on {_hosts(start.hosts)}, {_each(start.threads)} ({start.backend}); "
             f"{start.source}: {sizes.of_batch}{sizes.n_q:,} queries, {sizes.n_k:,} keys, "
             f"heads {sizes.heads}/{sizes.kv_heads}, dim {sizes.dim}, {sizes.dtype}; "
             f"{memory} {(nbytes or 0) / 2**20:,.0f} MiB a rank{time_needed}"]
    # a launcher that started more ranks, or many threads, make a single rank look like a mistake
    more = [f"{name} says {size}" for name, size in launched_sizes().items() if size > 1]
    if ranks == 1 and (more or start.threads[0] >= MANY_THREADS):
        lines.append(f"this is one rank alone ({', '.join(more) or _many(start.threads[0], 'thread')}): is it meant? "
                     "`mpiexec -n N ringmpi attend ...`, or srun, starts N")
    return lines


def _hosts(hosts: list[str]) -> str:
    names = list(Counter(hosts))
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more nodes" if len(names) > 4 else "")


def _each(threads: list[int]) -> str:
    few, many = min(threads), max(threads)
    if len(threads) == 1:
        return _many(many, "thread")
    return f"{_many(many, 'thread')} each" if few == many else f"{few} to {many} threads each"


def _many(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _rough(seconds: float) -> str:
    return "some seconds" if seconds < 5 else f"about {_clock(float(f'{seconds:.2g}'))}"


def _clock(seconds: float) -> str:
    """Write seconds as 42 s, 3:05 min or 2:03:05 h."""
    whole = round(seconds)
    if whole < 100:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02} h" if hours else f"{minutes}:{rest:02} min"
