"""Going on without ranks that die, ``attend --survive``: on Open MPI with ULFM; elsewhere it is an error."""

import json

import launch
import pytest
from job_files import make_random

from ringmpi.cli import main
from ringmpi.files.shards import verify

CLI = ["-m", "ringmpi"]
FAULT_TOLERANT = ["--with-ft", "ulfm"]
# VICTIMS: ranks of COMM_WORLD, each with the number of ranks among which and the step in which it dies.
DYING = """
import os, signal, sys
from ringmpi.cli import main
from ringmpi.passes import Pass
compute = Pass._run
def dying(self, work, *rest):
    comm = self.movers.carrier.comm
    if (int(os.environ["OMPI_COMM_WORLD_RANK"]), comm.size, work.step.step) in VICTIMS:
        os.kill(os.getpid(), signal.SIGKILL)
    return compute(self, work, *rest)
Pass._run = dying
sys.exit(main())
"""
ulfm = pytest.mark.skipif(not launch.is_openmpi(), reason="ranks outlive others on Open MPI only")


@pytest.fixture
def source(tmp_path):
    return make_random(tmp_path / "in.h5", 503, heads=4, kv_heads=2, dim=16)


def survive(source, folder, victims, *options):
    return launch.launch(4, ["-c", DYING.replace("VICTIMS", repr(victims)), "attend", source, folder / "out.h5",
                             "--causal", "--layout", "striped", "--survive", "--timeout", "20", *options],
                         folder=folder / "said", options=FAULT_TOLERANT, timeout=100)


def right(source, out, ranks):
    manifest = verify(out)
    assert len(manifest.shards) == ranks
    assert len(list(out.with_name("out.h5.shards").iterdir())) == 1          # of the first try nothing is left
    return main(["check", str(source), str(out), "--rows", "200"]) == 0


def test_an_mpi_that_ends_the_job_is_an_error(source, tmp_path):
    result = launch.launch(2, [*CLI, "attend", source, tmp_path / "out.h5", "--survive"], folder=tmp_path / "said")
    assert result.code == 4, result.text
    assert "--survive: expected Open MPI 5, started by mpiexec --with-ft ulfm, got" in result.text
    assert not list(tmp_path.glob("out.h5*"))


def test_one_file_that_all_write_is_refused(source, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["attend", str(source), str(tmp_path / "out.h5"), "--survive", "--output-driver", "mpio"])
    assert "leave out --output-driver" in capsys.readouterr().err


@ulfm
@pytest.mark.parametrize(("victims", "schedule"), [
    ([(0, 4, 1)], "ring"), ([(2, 4, 0)], "mesh"), ([(3, 4, 2)], "1x1x4:broadcast"), ([(1, 4, 1), (3, 3, 1)], "ring")])
def test_the_others_go_on(source, tmp_path, victims, schedule):
    """With the right result, though rank 0 be among them, and though one more be lost then."""
    result = survive(source, tmp_path, victims, "--backend", "numpy", "--schedule", schedule)
    assert result.code == 0, result.text
    left = 4 - len(victims)
    assert f"going on with {left} of {left + 1} ranks" in result.text
    assert f"503 tokens on {left} ranks" in result.text
    assert right(source, tmp_path / "out.h5", left)


@ulfm
def test_they_go_on_from_the_last_checkpoint(source, tmp_path):
    result = survive(source, tmp_path, [(2, 4, 3)], "--backend", "numpy", "--schedule", "ring", "--checkpoint",
                     tmp_path / "kept", "--checkpoint-every", "0.001", "--json", tmp_path / "run.json")
    assert result.code == 0, result.text
    assert "going on with 3 of 4 ranks" in result.text
    assert json.loads((tmp_path / "run.json").read_text())["pairs"] <= 0.5 * 503 * 504 / 2          # the rest was kept
    assert right(source, tmp_path / "out.h5", 3)
    assert not (tmp_path / "kept").exists() or not list((tmp_path / "kept").iterdir())
