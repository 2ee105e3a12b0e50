"""The scripts of jobs/ as Slurm runs them: a real Slurm of one node, started here; skipped where there is none."""

import os
import re
import shlex
import shutil
import sys
import time
from pathlib import Path

import h5py
import launch
import pytest
import slurm as one_node
from job_files import make_random
from test_jobs import said_by

from ringmpi.cli import main

JOBS = Path(__file__).parent.parent / "jobs"
FOUR = ("--ntasks-per-node=4", "--cpus-per-task=1")
TWO = ("--ntasks-per-node=2", "--cpus-per-task=1")
PLAIN = ("--backend", "numpy", "--schedule", "ring")
START = "import os, signal, sys, time\nfrom pathlib import Path\nfrom ringmpi import cli\n"
# In the place of `ringmpi`. MPICH keeps the shared memory of ranks that are killed: NOTE says where, so that the test
# can remove it.
NOTE = """
def note():
    found = {line.split()[-1] for line in open("/proc/self/maps") if "/dev/shm/mpich" in line}
    Path(f"memory-{os.getpid()}").write_text("\\n".join(found))
"""
COMPUTING = START + NOTE + """
from ringmpi.passes import Pass
cli.ABORT_SECONDS = 2                      # MPI_Abort of ranks that srun is ending waits for srun, without an end
compute = Pass._run
def act(self, work, *rest):
    rank = self.movers.carrier.comm.rank
    if "SLURM_RESTART_COUNT" not in os.environ and work.step.step == 1:
        note()
        ACT
    return compute(self, work, *rest)
Pass._run = act
sys.exit(cli.main())
"""
HELD = COMPUTING.replace("ACT", "Path(f'held-{rank}').touch(); time.sleep(60)")
KILLED = COMPUTING.replace("ACT", "os.kill(os.getpid(), signal.SIGKILL) if rank == 2 else time.sleep(60)")
SEEN = START + """
job, rank = (os.environ[f"SLURM_{name}"] for name in ("JOB_ID", "LOCALID"))
Path(f"gpus-{job}-{rank}").write_text(os.environ.get("CUDA_VISIBLE_DEVICES", "all of the node"))
for _ in range(600):                       # until both jobs run
    if len(list(Path().glob("gpus-*"))) == 4:
        sys.exit(cli.main())
    time.sleep(0.1)
"""


@pytest.fixture(scope="module")
def slurm():
    required = os.environ.get("RINGMPI_TEST_SLURM") == "required"
    reason = one_node.reason_missing() or (launch.is_openmpi() and "Slurm's PMI2 is for MPICH; this is Open MPI")
    if reason:
        assert not required, reason
        pytest.skip(reason)
    try:
        cluster = one_node.Slurm().__enter__()
    except one_node.StartError as error:
        if required:
            raise
        pytest.skip(str(error))
    yield cluster
    cluster.__exit__()
    assert not cluster.left
    assert not cluster.folder.exists()


@pytest.fixture
def folder(tmp_path):
    """Where jobs run. What MPICH kept of killed ranks is removed."""
    make_random(tmp_path / "in.h5", 203, heads=2, dim=16)
    yield tmp_path
    for note in tmp_path.glob("memory-*"):
        for path in map(Path, note.read_text().split()):
            path.unlink(missing_ok=True)


def ringmpi(folder, code=START + "sys.exit(cli.main())\n"):
    """The environment of a job whose `ringmpi` is this Python's, or some code."""
    programs = folder / "bin"
    programs.mkdir(exist_ok=True)
    (programs / "program.py").write_text(code)
    (programs / "ringmpi").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} '
                                      f'{shlex.quote(str(programs / "program.py"))} "$@"\n')
    (programs / "ringmpi").chmod(0o755)
    return {"PATH": f"{programs}{os.pathsep}{one_node.SYSTEM_PATH}"}


def right(folder, source="in.h5", target="out.h5"):
    return main(["check", str(folder / source), str(folder / target)]) == 0


def nothing_there(folder):
    """Nothing but an empty folder of shards, which a rank that is ended twice does not come to remove."""
    return not [path for path in folder.rglob("out*.h5*/**/*") if path.is_file()] and not (folder / "out.h5").exists()


def test_a_job_on_cpus(slurm, folder):
    job = slurm.wait(slurm.submit(JOBS / "cpu.sbatch", "in.h5", "out.h5", "--causal", "--layout", "striped", *PLAIN,
                                  options=FOUR, folder=folder, env={**ringmpi(folder), "SLURM_MPI_TYPE": "pmi2"}))
    assert (job.state, job.code) == ("COMPLETED", 0), job.log
    assert re.search(r"^0: 203 tokens on 4 ranks", job.log, re.MULTILINE)
    assert right(folder)
    assert (folder / f"ringmpi-{job.id}.json").exists()
    assert (folder / f"ringmpi-{job.id}.out").exists()


def test_ranks_that_are_alone(slurm, folder):
    """With another --mpi than the library's each would do the whole job, and say that all is well."""
    job = slurm.wait(slurm.submit(JOBS / "cpu.sbatch", "in.h5", "out.h5", *PLAIN, options=FOUR, folder=folder,
                                  env={**ringmpi(folder), "SLURM_MPI_TYPE": "none"}))
    assert job.state == "FAILED", job.log
    assert job.code in (4, 143), job.log                   # a rank's own, or that of those which srun ended after it
    assert "expected 4 ranks (--expect-ranks), got 1" in job.log
    assert nothing_there(folder)


@pytest.mark.parametrize(("kind", "ranks"), [("pmi2", 2), ("none", 1)])
def test_info_says_whether_the_ranks_are_together(slurm, folder, kind, ranks):
    said = slurm.command("srun", "--ntasks=2", f"--mpi={kind}", "ringmpi", "info", folder=folder, env=ringmpi(folder))
    line, = re.findall(r"^MPI +(.*)", said, re.MULTILINE)
    assert f"; {ranks} rank(s)," in line
    assert ("expected 2 ranks (SLURM_STEP_NUM_TASKS), got 1" in line) == (ranks == 1)


def test_a_killed_rank_and_another_try(slurm, folder):
    """The step ends at once, not at the time limit; the same job on the same node is right the next time."""
    start = time.monotonic()
    number = slurm.submit(JOBS / "cpu.sbatch", "in.h5", "out.h5", *PLAIN, options=FOUR, folder=folder,
                          env=ringmpi(folder, KILLED))
    job = slurm.wait(number)
    assert job.state == "FAILED", job.log
    assert job.code in (137, 142, 143), job.log            # the highest of the killed rank and of those ended after it
    assert time.monotonic() - start < 40                   # the others would compute for a minute
    assert re.search(r"^2: ringmpi: rank 2 on \S+ (was killed by SIGKILL|died) while attending", job.log, re.MULTILINE)
    assert re.search(r"^srun: error: \S+ task 2: Killed$", job.log, re.MULTILINE)
    assert nothing_there(folder)

    # MPICH's shared memory of the first try is still there, under the name that the ranks of this one would give theirs
    assert any(Path(path).exists() for note in folder.glob("memory-*") for path in note.read_text().split())
    slurm.command("scontrol", "requeue", number)
    again = slurm.wait(number)
    assert (again.state, again.code) == ("COMPLETED", 0), again.log
    assert again.log.startswith(job.log)
    assert right(folder)


def test_a_job_that_is_cancelled(slurm, folder):
    """Ranks say so. Not each: the controller and srun both end them, and the second signal does so at once."""
    number = slurm.submit(JOBS / "cpu.sbatch", "in.h5", "out.h5", *PLAIN, options=FOUR, folder=folder,
                          env=ringmpi(folder, HELD))
    deadline = time.monotonic() + 60
    while len(list(folder.glob("held-*"))) < 4:
        assert time.monotonic() < deadline, one_node.text_of(folder / f"ringmpi-{number}.out")
        time.sleep(0.1)
    slurm.command("scancel", number)
    start = time.monotonic()
    job = slurm.wait(number)
    assert job.state == "CANCELLED", job.log
    assert time.monotonic() - start < 25
    ended = re.findall(r"^(\d): ringmpi: rank (\d) on \S+ ended by SIGTERM while attending$", job.log, re.MULTILINE)
    assert ended
    assert all(label == rank for label, rank in ended)
    assert "Traceback" not in job.log
    assert nothing_there(folder)


def test_a_job_with_too_little_memory(slurm, folder):
    """It says so before it reads, and what would do."""
    job = slurm.wait(slurm.submit(JOBS / "cpu.sbatch", "in.h5", "out.h5", *PLAIN, options=(*FOUR, "--mem=150"),
                                  folder=folder, env=ringmpi(folder)))
    assert job.state == "FAILED", job.log
    assert re.search(r"^0: ringmpi: memory of a node: expected \S+ MiB for 4 ranks, got 150 MiB .SLURM_MEM_PER_NODE=",
                     job.log, re.MULTILINE), job.log
    assert nothing_there(folder)


def test_an_array(slurm, folder):
    """A task that fails does so alone, and can be done once more."""
    arguments = (JOBS / "array.sbatch", "in-%a.h5", "out-%a.h5", *PLAIN)
    env = ringmpi(folder)
    (folder / "in.h5").rename(folder / "in-1.h5")
    number = slurm.submit(*arguments, options=("--array=1-2", *TWO), folder=folder, env=env)
    first, second = (slurm.wait(f"{number}_{task}") for task in (1, 2))
    assert (first.state, first.code) == ("COMPLETED", 0), first.log
    assert (second.state, second.code) == ("FAILED", 3), second.log
    assert right(folder, "in-1.h5", "out-1.h5")
    assert not (folder / "out-2.h5").exists()

    make_random(folder / "in-2.h5", 100, heads=2, dim=16, seed=2)
    number = slurm.submit(*arguments, options=("--array=2", *TWO), folder=folder, env=env)
    second = slurm.wait(f"{number}_2")
    assert (second.state, second.code) == ("COMPLETED", 0), second.log
    assert right(folder, "in-2.h5", "out-2.h5")
    assert (folder / f"ringmpi-{number}_2.json").exists()
    assert (folder / f"ringmpi-array-{number}_2.out").exists()


def test_what_a_job_on_gpus_asks_for(slurm):
    said = slurm.command("sbatch", "--test-only", JOBS / "gpu.sbatch", "in.h5", "out.h5")
    assert re.search(r"Job \d+ to start at .* using 32 processors", said), said
    said = slurm.command("sbatch", "--test-only", "--gpus-per-node=5", JOBS / "gpu.sbatch", check=False)
    assert "Requested node configuration is not available" in said


def test_jobs_that_share_the_gpus_of_a_node(slurm, folder):
    """Each rank sees all GPUs of its job, and none of another's."""
    env = ringmpi(folder, SEEN)
    options = (*TWO, "--gpus-per-node=2")
    numbers = [slurm.submit(JOBS / "gpu.sbatch", "in.h5", f"out-{job}.h5", *PLAIN, options=options, folder=folder,
                            env=env) for job in range(2)]
    for number in numbers:
        job = slurm.wait(number)
        assert (job.state, job.code) == ("COMPLETED", 0), job.log
    seen = [{(folder / f"gpus-{number}-{rank}").read_text() for rank in range(2)} for number in numbers]
    assert sorted(map(sorted, seen)) == [["0,1"], ["2,3"]]
    for job in range(2):
        assert right(folder, target=f"out-{job}.h5")
        with h5py.File(folder / f"out-{job}.h5") as file:
            assert file["out"].shape == (203, 2, 16)


def test_mpiexec_in_a_batch_script(slurm, folder):
    """It starts the ranks through a step of Slurm's with one task a node, of which Slurm's variables speak."""
    (folder / "job").write_text(f"#!/bin/sh\n{shlex.quote(launch.mpiexec())} -n 4 ringmpi attend in.h5 out.h5 "
                                f"{shlex.join(PLAIN)}\n")
    job = slurm.wait(slurm.submit("job", options=("--ntasks=4",), folder=folder, env=ringmpi(folder)))
    assert (job.state, job.code) == ("COMPLETED", 0), job.log
    assert "203 tokens on 4 ranks" in job.log
    assert right(folder)


# How to have Slurm say what jobs/README.rst explains.
SAID = {
    "execve(): ringmpi: No such file or directory": "srun ringmpi info",
    "Invalid MPI type 'pmix', --mpi=list for acceptable types": "srun --mpi=pmix true",
    "Unable to create step for job ...: More processors requested than permitted":
        "salloc --ntasks=1 srun --ntasks=2 true",
    "Requested node configuration is not available": "sbatch --gpus-per-node=5 --wrap=true",
    "cluster configuration lacks support for cpu binding": "srun --cpu-bind=cores true",
    "error: ... task 2: Killed": "srun --ntasks=3 sh -c 'test $SLURM_PROCID != 2 || kill -9 $$'",
    "Job step aborted: Waiting up to 32 seconds for job step to finish.": "",       # of a step that is cancelled
    "internal_Init_thread(71)": "",                                                # where it does not hang instead
    "DUE TO TIME LIMIT": "",                                                       # takes a minute
}


@pytest.mark.parametrize("words", [words for words, command in SAID.items() if command])
def test_errors_that_the_page_explains_are_those_of_slurm(slurm, words):
    if "pmix" in words and "pmix: can not load" not in slurm.command("srun", "--mpi=pmix", "true", check=False):
        pytest.skip("this Slurm has PMIx")
    path = f"{Path(shutil.which('srun', path=one_node.SYSTEM_PATH)).parent}{os.pathsep}/bin"      # without a ringmpi
    said = slurm.command(*shlex.split(SAID[words]), check=False, env={"PATH": path})
    assert re.search(".*".join(map(re.escape, words.split("..."))), said), said


def test_the_page_explains_these_errors():
    assert set(said_by("Slurm, MPI or the shell")) == set(SAID)


def test_the_reason_why_there_is_none(monkeypatch):
    monkeypatch.setattr(one_node, "SYSTEM_PATH", "/nowhere")
    assert re.fullmatch(r"no Slurm here, munged, .* is missing: apt-get install .*", one_node.reason_missing())


def test_one_that_does_not_start_says_why_and_leaves_nothing(slurm, monkeypatch):
    monkeypatch.setattr(one_node, "CONFIG", one_node.CONFIG + "Nonsense=1\n")
    another = one_node.Slurm()
    with pytest.raises(one_node.StartError, match="unrecognized key: Nonsense"):
        another.__enter__()
    assert not another.left
    assert not another.folder.exists()
