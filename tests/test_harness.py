"""The launcher of the MPI tests: its time limit ends every process, and it shows what each rank said.

And what is skipped where something is missing: pytest-mpi, a compiler.
"""

import os
import re
import subprocess
import sys
import time
from importlib.util import find_spec

import launch
import psutil

import ringmpi


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


def test_ranks_import_the_package_that_is_tested(tmp_path):
    """Be it a checkout that is not installed."""
    result = launch.launch(1, ["-c", "import ringmpi; print(ringmpi.__file__)"], folder=tmp_path)
    assert result.ranks == [f"{ringmpi.__file__}\n"], result.text


def outcomes(*arguments, env=None):
    """Run pytest in the folder of the tests; give its exit code, what it says, and how many tests did what."""
    said = subprocess.run([sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", *arguments],
                          capture_output=True, text=True, timeout=100, cwd=launch.HERE, check=False,
                          env={**os.environ, "COLUMNS": "200", **(env or {})})
    counts = {name: int(count) for count, name in re.findall(r"(\d+) (\w+)", said.stdout.splitlines()[-1])}
    return said.returncode, said.stdout + said.stderr, counts


def test_without_pytest_mpi_what_needs_ranks_is_skipped_with_the_reason():
    code, said, counts = outcomes("-p", "no:pytest_mpi", "test_mpi_schedules.py", "test_launch.py", "test_layout.py")
    assert code == 0, said
    assert counts["passed"] > 3, said
    assert counts["skipped"] > 10, said
    assert "needs ranks, and pytest-mpi is not installed" in said
    assert set(counts) <= {"passed", "skipped", "deselected"}, said


# As if there were a GPU, which can't be opened.
GPU = """
from ringmpi import device

def fail(index):
    raise LookupError("this is the GPU")

device.reason_missing = lambda: None
device.open_device = fail
"""
ON_GPUS = ["-k", "dense or width or few", "test_cuda.py", "test_cuda_gradients.py", "test_hopper.py"]


def test_without_a_compiler_a_gpu_is_tested_all_the_same(tmp_path):
    """What is emulated is skipped."""
    (tmp_path / "as_if_there_were_a_gpu.py").write_text(GPU)
    env = {"PATH": "/nowhere", "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    with_ranks = ["--with-mpi", "test_mpi_cuda.py"] if find_spec("pytest_mpi") else []
    code, said, counts = outcomes("-p", "as_if_there_were_a_gpu", "-m", "gpu", "--tb=no", *ON_GPUS, *with_ranks,
                                  env=env)
    assert code == 1, said
    assert "LookupError: this is the GPU" in said
    assert counts["errors"] > 50
    assert not set(counts) & {"passed", "failed", "skipped"}, said
    code, said, counts = outcomes(*ON_GPUS, env=env)
    assert code == 0, said
    assert "g++ compiles the kernels for the CPU, and is not installed" in said
    assert counts["skipped"] > 50, said
