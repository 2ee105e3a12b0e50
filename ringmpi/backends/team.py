"""A team of threads that share one queue of tasks; the caller is one of them, and yields between steps."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from threading import Event

from ..errors import BackendError

POLL_SECONDS = 0.002        # how often the caller yields while it waits for the others


@dataclass
class Task:
    """Steps to do one after the other, each made when it is about to run.

    Attributes
    ----------
    cost : int
        Of all steps together.
    steps : iterable of (callable, int)
        A call that is given the thread's number, and its cost.
    """

    cost: int
    steps: Iterable[tuple[Callable[[int], object], int]]


class Team:
    """`size` threads, the caller's among them. One alone makes no thread at all. Local."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._closed = False
        self._live: set[Event] = set()
        self._pool = ThreadPoolExecutor(size - 1, thread_name_prefix="ringmpi") if size > 1 else None

    def run(self, tasks: list[Task]) -> Generator[int, None, None]:
        """Do the tasks, the costliest first; yield the cost done since the last yield. Local.

        The caller must go on to the end or close the iterator: after either no thread works on the tasks any more.
        """
        self.check()
        if self._pool is None or len(tasks) < 2:
            yield from self._alone(tasks)
            return
        queue = deque(sorted(tasks, key=_by_cost))
        stop = Event()
        self._live.add(stop)
        done: deque[int] = deque()
        others = range(1, min(self.size, len(tasks)))
        helpers = [self._pool.submit(_drain, queue, number, done, stop) for number in others]
        try:
            while (task := _next(queue)) is not None:
                for call, cost in task.steps:
                    call(0)
                    yield cost + _collect(done)
                    self.check()
            while working := [helper for helper in helpers if not helper.done()]:
                wait(working, POLL_SECONDS, FIRST_COMPLETED)
                yield _collect(done)
            self.check()
            for helper in helpers:
                helper.result()
            yield _collect(done)
        finally:                # an abandoned loop: nobody may write any more
            stop.set()
            wait(helpers)
            self._live.discard(stop)

    def _alone(self, tasks: list[Task]) -> Generator[int, None, None]:
        """Do tasks in which no other thread helps."""
        for task in sorted(tasks, key=_by_cost):
            for call, cost in task.steps:
                call(0)
                yield cost
                self.check()

    def check(self) -> None:
        """Raise `BackendError` if the team is closed. Local."""
        if self._closed:
            raise BackendError("this backend is closed; open another one")

    def close(self) -> None:
        """End the threads, in the middle of their tasks if need be. Local."""
        self._closed = True
        for stop in list(self._live):
            stop.set()
        if self._pool:
            self._pool.shutdown()


def _by_cost(task: Task) -> int:
    return -task.cost


def _next(queue: deque[Task]) -> Task | None:
    try:
        return queue.popleft()
    except IndexError:          # another thread took the last one
        return None


def _drain(queue: deque[Task], number: int, done: deque[int], stop: Event) -> None:
    try:
        while (task := _next(queue)) is not None:
            for call, cost in task.steps:
                if stop.is_set():
                    return
                call(number)
                done.append(cost)
    except BaseException:
        stop.set()              # the others need not go on
        queue.clear()
        raise


def _collect(done: deque[int]) -> int:
    return sum(done.popleft() for _ in range(len(done)))
