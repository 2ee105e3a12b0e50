"""Threads of the CPU backends: a team's queue, loops that fail, end early or overlap, BLAS's threads."""

import time

import numpy as np
import pytest
from test_kernels import data

from ringmpi import BackendError
from ringmpi.backends import open_backend
from ringmpi.backends.team import Task, Team
from ringmpi.score import Score
from ringmpi.softmax import State


def test_a_team_does_the_costliest_first_and_all_of_it():
    for size in (1, 3):
        order, team = [], Team(size)
        tasks = [Task(cost, [(lambda thread, cost=cost, order=order: order.append((cost, thread)), cost)])
                 for cost in (1, 5, 3)]
        assert sum(team.run(tasks)) == 9
        team.close()
        assert sorted(cost for cost, _ in order) == [1, 3, 5]
        assert {thread for _, thread in order} <= set(range(size))
        assert size > 1 or [cost for cost, _ in order] == [5, 3, 1]


def test_a_failing_step_ends_the_team_s_work():
    done = []

    def fail(thread):
        raise ValueError("broken")

    def work(thread):
        time.sleep(0.001)
        done.append(thread)

    team = Team(2)
    tasks = [Task(1000, [(fail, 1)]), *(Task(1, [(work, 1)]) for _ in range(1000))]
    with pytest.raises(ValueError, match="broken"):
        sum(team.run(tasks))
    assert len(done) < 1000
    after = len(done)
    time.sleep(0.02)
    assert len(done) == after
    team.close()


def test_one_thread_starts_none():
    import threading
    before = threading.active_count()
    q, k, v = data(0, 300, 300, 1, 1, 16, 16, "float32")
    for name in ("numba", "numpy"):
        backend, state = open_backend(name, 1), State.empty(300, 1, 16, np.float32)
        sum(backend.accumulate(state, q, k, v, np.zeros(300, int), np.full(300, 300), Score(0.1)))
        assert threading.active_count() == before
        backend.close()


@pytest.mark.parametrize("n_q", [3, 2000])
def test_one_loop_at_a_time(n_q):
    q, k, v = data(0, n_q, 3000, 2, 2, 64, 64, "float32")
    begin, end = np.zeros(n_q, int), np.full(n_q, 3000)
    backend, state = open_backend("numba", 2), State.empty(n_q, 2, 64, np.float32)
    loop = backend.accumulate(state, q, k, v, begin, end, Score(0.1))
    next(loop)
    with pytest.raises(BackendError, match="has not ended"):
        next(backend.accumulate(state, q, k, v, begin, end, Score(0.1)))
    loop.close()
    state.reset()
    assert sum(backend.accumulate(state, q, k, v, begin, end, Score(0.1))) == n_q * 3000
    backend.close()
    with pytest.raises(BackendError, match="is closed"):
        sum(backend.accumulate(state, q, k, v, begin, end, Score(0.1)))


@pytest.mark.parametrize("name", ["numba", "numpy"])
def test_a_loop_whose_backend_is_closed_says_so(name):
    q, k, v = data(0, 4000, 4000, 2, 2, 16, 16, "float32")
    backend, state = open_backend(name, 2), State.empty(4000, 2, 16, np.float32)
    loop = backend.accumulate(state, q, k, v, np.zeros(4000, int), np.full(4000, 4000), Score(0.1))
    while not next(loop):
        pass
    backend.close()
    before = state.acc.copy()
    time.sleep(0.05)
    assert (state.acc == before).all()
    with pytest.raises(BackendError, match="closed"):
        sum(loop)


@pytest.mark.parametrize("name", ["numba", "numpy"])
def test_an_error_thrown_into_a_loop_ends_its_threads_too(name):
    n = 8000
    q, k, v = data(0, n, n, 2, 2, 64, 64, "float32")
    backend, state = open_backend(name, 2), State.empty(n, 2, 64, np.float32)
    loop = backend.accumulate(state, q, k, v, np.zeros(n, int), np.full(n, n), Score(0.1))
    while not next(loop):                 # packing: nothing is folded yet
        pass
    with pytest.raises(RuntimeError, match="stop here") as held:
        loop.throw(RuntimeError("stop here"))
    before = state.acc.copy()
    time.sleep(0.1)
    assert (state.acc == before).all()
    assert held.value
    backend.close()


def test_blas_threads_are_given_back():
    """Two loops that overlap leave the process's BLAS as it was."""
    from threadpoolctl import threadpool_info
    q, k, v = data(0, 2000, 500, 1, 1, 16, 16, "float32")
    before = [pool["num_threads"] for pool in threadpool_info()]
    backends, loops = [open_backend("numpy", 2) for _ in range(2)], []
    for backend in backends:
        state = State.empty(2000, 1, 16, np.float32)
        loops.append(backend.accumulate(state, q, k, v, np.zeros(2000, int), np.full(2000, 500), Score(0.1)))
        next(loops[-1])
    for loop, backend in zip(loops, backends, strict=True):
        loop.close()
        backend.close()
    assert [pool["num_threads"] for pool in threadpool_info()] == before
