"""Tests marked `mpi` run under mpiexec only; `test_launch.py` launches them. The rest runs in plain pytest."""

import os

import pytest

from ringmpi.device import reason_missing

# Ranks outnumber cores here: libraries must neither spin nor start pools of their own.
QUIET = {
    "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1",
    "MPIR_CVAR_POLLS_BEFORE_YIELD": "1", "MPIR_CVAR_CH4_PROGRESS_THROTTLE": "true",
    "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe", "OMPI_MCA_mpi_yield_when_idle": "true",
    "OMPI_MCA_rmaps_base_oversubscribe": "true", "OMPI_MCA_plm_ssh_agent": "false",
    "OMPI_MCA_pml": "ob1", "OMPI_MCA_btl": "tcp,self", "OMPI_MCA_hwloc_base_binding_policy": "none",
}
for _name, _value in QUIET.items():
    os.environ.setdefault(_name, _value)


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a CUDA GPU; runs with -m gpu")


def pytest_collection_modifyitems(config, items):
    if config.getoption("-m") != "gpu":
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("gpu")])
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]
    elif reason := reason_missing():
        for item in items:
            item.add_marker(pytest.mark.skip(reason=reason))
    if config.getoption("--with-mpi"):
        return
    mpi = [item for item in items if item.get_closest_marker("mpi")]
    items[:] = [item for item in items if not item.get_closest_marker("mpi")]
    config.hook.pytest_deselected(items=mpi)


@pytest.fixture(scope="session")
def comm():
    from mpi4py import MPI
    return MPI.COMM_WORLD


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
