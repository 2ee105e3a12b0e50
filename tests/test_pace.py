"""Waits: which polls count as moving data, and how long a wait sleeps between them. One process, without MPI."""

import numpy as np
import pytest

from ringmpi.mpi import movement, pace, waiting
from ringmpi.mpi.movement import LATELY, Movement
from ringmpi.mpi.pace import Pace
from ringmpi.mpi.waiting import Waiter

# Seconds of sets of polls with MPICH, by deciles: nothing to do; 64 MiB through its cells of 16 KiB, both sides.
IDLE = np.array([6.0, 6.0, 6.1, 6.2, 6.3, 6.4, 6.5, 6.7, 7.0]) * 1e-6
SENDING = np.array([15.6, 16.6, 17.8, 18.6, 19.6, 20.2, 20.8, 21.2, 22.0]) * 1e-6
TAKING = np.array([22.6, 23.2, 23.6, 24.0, 24.4, 24.8, 25.0, 25.4, 26.0]) * 1e-6


def learnt(*sets):
    known = Movement()
    for seconds in np.concatenate(sets):
        known.learn(1, seconds)
    return known


@pytest.mark.parametrize("moved", [SENDING, TAKING])
def test_polls_that_move_the_least_there_is_are_told_from_idle_ones(moved):
    known = learnt(moved, IDLE, moved)
    assert all(known.seen(1, seconds) for seconds in moved)
    assert not any(known.seen(1, seconds) for seconds in IDLE)


def test_a_machine_that_became_slower_is_not_taken_for_movement():
    known = learnt(IDLE, np.resize(2 * IDLE, LATELY - 1))
    assert all(known.seen(1, seconds) for seconds in 2 * IDLE)
    known = learnt(IDLE, np.resize(2 * IDLE, 2 * LATELY))
    assert not any(known.seen(1, seconds) for seconds in 2 * IDLE)
    known.learn(1, IDLE[0])
    assert known.seen(1, 2 * IDLE[0])


def test_a_long_transfer_stays_one():
    """With a moment's rest now and then, or when each set moves much."""
    known = learnt(np.resize(np.append(np.resize(SENDING, 5000), IDLE), 3 * LATELY))
    assert all(known.seen(1, seconds) for seconds in SENDING)
    known = learnt(IDLE, np.resize([600e-6, 620e-6], 3 * LATELY))
    assert known.seen(1, 600e-6)


def test_a_wait_outlasts_what_it_is_for_by_a_sixteenth(monkeypatch):
    """However long another rank copies in a single poll of its own; and where nothing moves the core is given away."""
    now, slept = [0.0], []
    monkeypatch.setattr(pace.time, "perf_counter", lambda: now[0])

    def sleep(seconds):
        slept.append(seconds)
        now[0] += seconds

    monkeypatch.setattr(pace.time, "sleep", sleep)
    monkeypatch.setattr(pace.os, "sched_yield", lambda: None)
    wait = Pace(60.0)
    while now[0] < 1:
        now[0] += 10e-6
        before = now[0]
        wait.tick()
        wait.rest(False)
        assert now[0] - before <= before / 16
    assert slept[-1] == pace.LONGEST_PAUSE
    assert sum(slept) > 0.97


def test_a_wait_whose_requests_change_does_not_sleep(monkeypatch):
    """Chunks that GPUs copy take no processor time, and their copies longer than a wait polls without movement."""
    now, slept = [0.0], []
    monkeypatch.setattr(pace.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(pace.time, "sleep", slept.append)
    monkeypatch.setattr(pace.os, "sched_yield", lambda: None)
    monkeypatch.setattr(Waiter, "_poll", lambda self, requests, describe, advance: (advance(), 0.0))
    requests, sleeps = [object(), object()], []

    def advance():
        now[0] += 800e-6
        sleeps.append(len(slept))
        if 100 <= len(sleeps) < 200:
            requests[len(sleeps) % 2] = object()
        return len(sleeps) == 300

    monkeypatch.setattr(Waiter, "_done_soon", lambda *_: False)
    Waiter(0, 1).wait(requests, 60.0, lambda: "", advance)
    assert sleeps[99] > 90
    assert sleeps[199] == sleeps[99]
    assert sleeps[-1] > sleeps[199] + 90


@pytest.mark.parametrize(("more", "slept"), [(False, True), (True, False)])
def test_a_wait_for_what_is_to_be_advanced_polls_at_first(monkeypatch, more, slept):
    now, naps = [0.0], []
    monkeypatch.setattr(pace.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(pace.time, "sleep", naps.append)
    monkeypatch.setattr(pace.os, "sched_yield", lambda: None)

    def poll(self, requests, describe, advance):
        now[0] += pace.NEXT / 4
        return now[0] > 0.8 * pace.NEXT, 0.0

    monkeypatch.setattr(Waiter, "_poll", poll)
    monkeypatch.setattr(waiting, "QUICK_POLLS", 0)
    Waiter(0, 1).wait([], 60.0, lambda: "", lambda: not more)
    assert bool(naps) is slept


def test_movement_does_not_take_back_that_more_is_expected(monkeypatch):
    naps = []
    monkeypatch.setattr(pace.time, "sleep", naps.append)
    mine = pace.Pace(60.0)
    mine.tick()
    mine.expect_more()
    mine.rest(True)
    monkeypatch.setattr(pace.time, "perf_counter", lambda: mine.start + pace.NEXT / 2)
    mine.tick()
    mine.rest(False)
    assert not naps
    monkeypatch.setattr(pace.time, "perf_counter", lambda: mine.start + 3 * pace.NEXT)
    mine.tick()
    mine.rest(False)
    assert naps


def test_the_first_polls_of_a_process_are_judged_too():
    known = Movement()
    assert known.seen(1, 2 * movement.IDLE * (1 + 1 / 8))
    assert not known.seen(1, movement.IDLE)
