"""The launcher of the MPI tests: its time limit ends every process, and it shows what each rank said."""

import time

import launch
import psutil


def test_time_limit_ends_every_process(tmp_path):
    code = "import os, sys, time; print('rank', os.getpid(), flush=True); time.sleep(600)"
    start = time.perf_counter()
    result = launch.launch(2, ["-c", code], folder=tmp_path, timeout=6)
    assert result.code == 124
    assert time.perf_counter() - start < 30
    pids = [int(text.split()[1]) for text in result.ranks]
    assert len(pids) == 2, result.text
    deadline = time.perf_counter() + 5
    while any(psutil.pid_exists(pid) for pid in pids) and time.perf_counter() < deadline:
        time.sleep(0.05)
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_a_failure_is_a_failure(tmp_path):
    result = launch.launch(2, ["-c", "import sys; from mpi4py import MPI; print('said'); sys.exit(3)"], folder=tmp_path)
    assert result.code == 3, result.text
    assert [text.strip() for text in result.ranks] == ["said", "said"]
