"""Which tests run, and which beside which.

Tests marked `mpi` run under mpiexec only; `test_launch.py` launches them. The rest runs in plain pytest, with `-n auto`
on all cores: first what asserts seconds, one test at a time on one worker, while the others run what takes one core.
"""

import fcntl
import os
import shutil
import tempfile
from pathlib import Path

import pytest

import ringmpi
from ringmpi.device import reason_missing

# Ranks outnumber cores here: libraries must neither spin nor start pools of their own.
QUIET = {
    "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1",
    "MPIR_CVAR_POLLS_BEFORE_YIELD": "1", "MPIR_CVAR_CH4_PROGRESS_THROTTLE": "true",
    "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe", "OMPI_MCA_mpi_yield_when_idle": "true",
    "OMPI_MCA_rmaps_base_oversubscribe": "true", "OMPI_MCA_plm_ssh_agent": "false",
    "RINGMPI_RATES": os.path.join(tempfile.gettempdir(), "rates that no test has measured"),
    "OMPI_MCA_pml": "ob1", "OMPI_MCA_btl": "tcp,self", "OMPI_MCA_hwloc_base_binding_policy": "none",
}
for _name, _value in QUIET.items():
    os.environ.setdefault(_name, _value)

# Ranks and commands find the package where this process did, be it a checkout that is not installed.
CHECKOUT = Path(__file__).parents[1]
if Path(ringmpi.__file__).parents[1] == CHECKOUT:
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(CHECKOUT), os.environ.get("PYTHONPATH")]))

# These assert seconds.
TIMED = ["test_attacks.py::", "test_display.py::", "test_harness.py::", "test_process.py::", "test_under_mpiexec[links",
         "test_under_mpiexec[waits", "::test_a_part_that_hangs", "::test_a_lost_rank", "::test_a_rank_that_stops"]
# These keep more than one core busy, the longest first: most of them launch ranks.
HEAVY = ["test_nvrtc.py::", "::test_narrower_vectors", "::test_under_mpiexec", "test_slurm.py::", "test_faults.py::",
         "test_job.py::", "test_jobs.py::", "test_survive.py::", "test_checkpoints.py::", "test_readme.py::",
         "::test_the_parts_on_an_emulated_gpu",
         "::test_without_a_gpu_every_part"]

# These launch tests that are marked mpi.
LAUNCHES = ["::test_under_mpiexec", "::test_ranks_that_share_the_gpu"]
NO_PYTEST_MPI = "needs ranks, and pytest-mpi is not installed: pip install pytest-mpi"


def pytest_addoption(parser):
    parser.addoption("--sample", type=int, default=1, metavar="N",
                     help="with -m exhaustive: every Nth of these tests alone (default: 1, all)")


def pytest_configure(config):
    config.addinivalue_line("markers", "exhaustive: more of the same, or slow to compile; runs with -m exhaustive")
    config.addinivalue_line("markers", "gpu: needs a CUDA GPU; runs with -m gpu")
    if not config.pluginmanager.hasplugin("pytest_mpi"):
        config.addinivalue_line("markers", "mpi: needs ranks; runs under mpiexec --with-mpi, which pytest-mpi brings")


@pytest.fixture(autouse=True)
def small_blocks_in_pieces(request, monkeypatch):
    """Let tests of kernels have float32 in pieces where it would take longer: their blocks are small."""
    if request.path.name in ("test_pieces.py", "test_kernels.py", "test_gradient_kernels.py"):
        monkeypatch.setattr("ringmpi.backends.numba_.backend.PIECE_USES", 0)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """What -n auto means: a worker for each core that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Give one worker all that asserts seconds, one the tests on Slurm, and each the next test when it is free."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            if "test_slurm.py::" in nodeid:                 # they share the one that the first of them starts
                return "slurm"
            return "timed" if found(TIMED, nodeid) else nodeid

    config.option.loadscopereorder = False
    return Scheduling(config, log)


def found(names, nodeid):
    """Whether one of the names is part of a test's."""
    return any(name in nodeid for name in names)


def pytest_collection_modifyitems(config, items):
    for item in items:                  # else it would never run: see test_launch.py
        if item.get_closest_marker("mpi") and (item.get_closest_marker("exhaustive") or
                                               not item.path.name.startswith("test_mpi_")):
            raise pytest.UsageError(f"{item.nodeid}: expected tests marked mpi in test_mpi_*.py, and not exhaustive")
        if item.get_closest_marker("mpi") and "tmp_path_factory" in item.fixturenames:
            raise pytest.UsageError(f"{item.nodeid}: expected the fixture `folder`, got `tmp_path`, which pytest does "
                                    "not make for several processes at a time")
    asked = config.getoption("-m")
    unasked = [name for name in ("gpu", "exhaustive") if name not in asked]
    if not config.pluginmanager.hasplugin("pytest_mpi"):
        for item in filter(needs_pytest_mpi, items):
            item.add_marker(pytest.mark.skip(reason=NO_PYTEST_MPI))
    elif not config.getoption("--with-mpi"):
        unasked.append("mpi")
    dropped = [item for item in items if any(map(item.get_closest_marker, unasked))]
    items[:] = [item for item in items if not any(map(item.get_closest_marker, unasked))]
    if asked == "exhaustive":
        sample = items[::max(1, config.getoption("--sample"))]
        dropped += [item for item in items if item not in sample]
        items[:] = sample
    config.hook.pytest_deselected(items=dropped)
    if asked == "gpu" and (reason := reason_missing()):
        for item in items:
            item.add_marker(pytest.mark.skip(reason=reason))
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: turn(item.nodeid))


def needs_pytest_mpi(item):
    """Whether a test runs on ranks that pytest-mpi makes of a pytest: it is marked so, or launches what is."""
    return item.get_closest_marker("mpi") or found(LAUNCHES, item.nodeid)


def turn(nodeid):
    """Sort what asserts seconds first, and what keeps more than one core busy last."""
    if found(TIMED, nodeid):
        return 0
    return next((2 + number for number, name in enumerate(HEAVY) if name in nodeid), 1)


@pytest.fixture(autouse=True)
def _room(request):
    """On a worker: a test that takes more than one core waits for one that asserts seconds, and the other way round."""
    timed, heavy = (found(names, request.node.nodeid) for names in (TIMED, HEAVY))
    if not hasattr(request.config, "workerinput") or not (timed or heavy):
        yield
        return
    locks = [Path(tempfile.gettempdir()) / f"ringmpi-tests-{os.getuid()}.{name}" for name in ("gate", "room")]
    with locks[0].open("a") as gate, locks[1].open("a") as room:
        fcntl.flock(gate, fcntl.LOCK_EX)              # first come, first served
        fcntl.flock(room, fcntl.LOCK_EX if timed else fcntl.LOCK_SH)
        fcntl.flock(gate, fcntl.LOCK_UN)
        try:
            yield
        finally:
            fcntl.flock(room, fcntl.LOCK_UN)          # a child that lives on may have it too


@pytest.fixture(scope="session")
def comm():
    from mpi4py import MPI
    return MPI.COMM_WORLD


@pytest.fixture
def folder(comm):
    """One for all ranks."""
    made = tempfile.mkdtemp() if comm.rank == 0 else None
    yield Path(comm.bcast(made))
    comm.Barrier()
    if made:
        shutil.rmtree(made)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Under MPI a test that fails on one rank fails on all, so that the ranks stay in step."""
    if not item.get_closest_marker("mpi"):
        return (yield)
    from mpi4py import MPI
    failure = None
    try:
        result = yield
    except BaseException as error:
        failure = error
        raise
    finally:
        failed = MPI.COMM_WORLD.allgather(failure is not None)
        if failure is None and any(failed):
            pytest.fail(f"failed on ranks {[r for r, bad in enumerate(failed) if bad]}", pytrace=False)
    return result
