"""`ringmpi attend --checkpoint`: stopped on request, killed and gone on with, the same bits as without."""

import re
import shutil
from types import SimpleNamespace

import h5py
import launch
import numpy as np
import pytest
from attack_cases import arrays, left_over
from fault_matrix import ROWS
from job_files import make_random, read_arrays, write_arrays

from ringmpi.checkpoint.plan import ResumablePlan
from ringmpi.cli import main

STOPPED = 75
OPTIONS = ["--causal", "--layout", "striped", "--backend", "numpy", "--schedule", "ring"]
MANIFEST = "manifest.json"
# A rank gets signals when it computes with the block of a neighbour; `number` counts the items of work.
AT_STEP = """
import os, signal, sys, time
from ringmpi.cli import main
from ringmpi.passes import Pass
rank = int(os.environ.get('PMI_RANK') or os.environ.get('OMPI_COMM_WORLD_RANK') or 0)
chosen, number, act = int(sys.argv.pop(1)), int(sys.argv.pop(1)), sys.argv.pop(1)
compute = Pass._run
def acting(self, work, *rest):
    compute(self, work, *rest)
    if rank == chosen and work.step.step == number:
        exec(act)
Pass._run = acting
sys.exit(main())
"""
# A rank is killed just before or just after the n-th call of the system by which it publishes a checkpoint.
KILLED = """
import os, signal, sys
from ringmpi.cli import main
rank = int(os.environ.get('PMI_RANK') or os.environ.get('OMPI_COMM_WORLD_RANK') or 0)
chosen, name, number, when = int(sys.argv.pop(1)), sys.argv.pop(1), int(sys.argv.pop(1)), sys.argv.pop(1)
original, left = getattr(os, name), [number]
def dying(*arguments, **more):
    mine = rank == chosen and is_for_a_checkpoint()
    left[0] -= mine
    if mine and not left[0] and when == 'before':
        os.kill(os.getpid(), signal.SIGKILL)
    result = original(*arguments, **more)
    if mine and not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    return result
def is_for_a_checkpoint():
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_globals.get('__name__') in ('ringmpi.files.generations', 'ringmpi.files.states'):
            return True
        frame = frame.f_back
    return False
setattr(os, name, dying)
sys.exit(main())
"""


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """An input, and what is right for it on 3 ranks."""
    folder = tmp_path_factory.mktemp("checkpoints")
    make_random(folder / "in.h5", 301, heads=4, kv_heads=2, dim=16)
    result = launch.launch(3, ["-m", "ringmpi", "attend", folder / "in.h5", folder / "right.h5", *OPTIONS],
                           folder=folder / "said")
    assert result.code == 0, result.text
    return folder / "in.h5", arrays(folder / "right.h5")


def attend(case, folder, *options, start=("-m", "ringmpi"), ranks=3, env=None):
    return launch.launch(ranks, [*start, "attend", case[0], folder / "out.h5", *OPTIONS, "--checkpoint", folder / "c",
                                 "--timeout", "60", *options], folder=folder / "said", env=env)


def interrupt(case, folder, rank=1, number=0, act="os.kill(os.getpid(), signal.SIGUSR1)", options=()):
    return attend(case, folder, *options, start=["-c", AT_STEP, rank, number, act])


def is_right(case, folder):
    """The whole right output, and nothing else."""
    return arrays(folder / "out.h5") == case[1] and not left_over_besides(folder)


def left_over_besides(folder):
    return [name for name in left_over(folder) if not name.startswith("said")]


def complete(folder):
    return sorted(path.parent.name for path in (folder / "c").glob(f"*/{MANIFEST}"))


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGTERM"])
def test_stopped_on_request_and_gone_on_with(case, tmp_path, name):
    """Twice; the signal comes to one rank, in another step each time."""
    shares = []
    for number in (0, 1):
        result = interrupt(case, tmp_path, number + 1, number, f"os.kill(os.getpid(), signal.{name})")
        assert result.code == STOPPED, result.text
        shares += re.findall(r"ringmpi: rank 0: stopped|ringmpi: stopped on request: (\d+)% is computed", result.text)
        assert len(complete(tmp_path)) == 1
        assert not list(tmp_path.glob("out.h5*")), result.text
        assert "Traceback" not in result.text
    assert len(shares) == 2
    assert 0 < int(shares[0]) < int(shares[1]) < 100
    result = attend(case, tmp_path)
    assert result.code == 0, result.text
    assert is_right(case, tmp_path)


# To mpiexec, which forwards it; the rank stays in the step until it must have come to all.
TO_THE_LAUNCHER = """
import psutil
above = psutil.Process().parents()
next(one for one in above if one.name().startswith(("mpiexec", "prterun", "hydra"))
     and not one.parent().name().startswith(("mpiexec", "hydra"))).send_signal(signal.SIGUSR1)
time.sleep(1)
"""


def test_a_request_to_the_launcher(case, tmp_path):
    result = interrupt(case, tmp_path, 1, 0, TO_THE_LAUNCHER)
    assert result.code in ROWS["request-launcher"].codes, result.text
    assert len(complete(tmp_path)) == 1
    result = attend(case, tmp_path, "--resume", "require")
    assert result.code == 0, result.text
    assert is_right(case, tmp_path)


def test_checkpoints_on_the_way_are_gone_when_the_output_is_there(case, tmp_path):
    killed = attend(case, tmp_path, "--checkpoint-every", "1e-9",
                    start=["-c", AT_STEP, 2, 2, "os.kill(os.getpid(), signal.SIGKILL)"])
    assert killed.code not in (0, STOPPED)
    assert len(complete(tmp_path)) == 1
    result = attend(case, tmp_path, "--checkpoint-every", "1e-9", "--resume", "require")
    assert result.code == 0, result.text
    assert arrays(tmp_path / "out.h5") == case[1]
    assert not (tmp_path / "c").exists()


def test_requests_after_the_last_step_end_the_job_as_usual(case, tmp_path):
    result = interrupt(case, tmp_path, 0, 2)
    assert result.code == 0, result.text
    assert is_right(case, tmp_path)


def test_a_second_sigterm_ends_it_at_once(case, tmp_path):
    twice = "os.kill(os.getpid(), signal.SIGTERM); time.sleep(1.1); os.kill(os.getpid(), signal.SIGTERM)"
    result = interrupt(case, tmp_path, 0, 0, twice)
    assert result.code not in (0, STOPPED), result.text
    assert "ended by SIGTERM" in result.text
    assert not list(tmp_path.glob("out.h5"))


def test_without_checkpoints_sigterm_ends_as_ever(case, tmp_path):
    result = launch.launch(2, ["-c", AT_STEP, 0, 0, "os.kill(os.getpid(), signal.SIGTERM)", "attend", case[0],
                               tmp_path / "out.h5", *OPTIONS], folder=tmp_path / "said")
    assert result.code not in (0, STOPPED), result.text
    assert "ended by SIGTERM" in result.text


def test_resume(case, tmp_path):
    """`require` without one fails, `never` leaves it alone, and `auto` says why one is not used."""
    result = attend(case, tmp_path, "--resume", "require")
    assert result.code == 3, result.text
    assert "has no complete checkpoint to go on from" in result.text
    assert not list(tmp_path.glob("out.h5*"))

    assert interrupt(case, tmp_path).code == STOPPED
    before = complete(tmp_path)
    result = attend(case, tmp_path, "--resume", "require", "--scale", "0.5")
    assert result.code == 2, result.text
    assert "expected a checkpoint of this call: scale is None there and 0.5 here" in result.text
    result = attend(case, tmp_path, "--scale", "0.5")
    assert result.code == 0, result.text
    assert "no checkpoint is used, and all is computed" in result.text
    assert "scale is None there and 0.5 here" in result.text
    assert complete(tmp_path) == before
    result = attend(case, tmp_path, "--force", "--resume", "never")
    assert result.code == 0, result.text
    assert arrays(tmp_path / "out.h5") == case[1]
    assert complete(tmp_path) == before


def test_other_ranks_go_on_in_another_layout(case, tmp_path):
    """From 3 ranks to 2, and to 4: the same numbers to rounding."""
    assert interrupt(case, tmp_path, 0, 1).code == STOPPED
    shutil.copytree(tmp_path / "c", tmp_path / "again")
    for ranks, layout in ((2, "zigzag"), (4, "contiguous")):
        result = attend(case, tmp_path, "--layout", layout, "--resume", "require", "--force", ranks=ranks)
        assert result.code == 0, result.text
        with h5py.File(tmp_path / "out.h5") as file:
            for name in ("out", "lse"):
                want = np.frombuffer(case[1][name], "f4").reshape(file[name].shape)
                assert np.abs(file[name][...] - want).max() < 2e-6 * np.abs(want).max()
        assert not (tmp_path / "c").exists()
        shutil.copytree(tmp_path / "again", tmp_path / "c")


def test_another_input_is_not_gone_on_with(case, tmp_path):
    assert interrupt(case, tmp_path).code == STOPPED
    q, k, v = read_arrays(case[0])
    v[300, 1, 3] += 1
    write_arrays(tmp_path / "in.h5", {"q": q, "k": k, "v": v})
    other = tmp_path / "in.h5", None
    result = attend(other, tmp_path, "--resume", "require")
    assert result.code == 2, result.text
    assert "v (by its fingerprint) is" in result.text
    assert not list(tmp_path.glob("out.h5*"))


def code(*arguments):
    try:
        return main([str(x) for x in arguments])
    except SystemExit as stop:
        return stop.code


def test_options_that_would_do_nothing(case, capsys):
    for option in (["--resume", "auto"], ["--checkpoint-every", "3"]):
        assert code("attend", case[0], "out.h5", *option) == 2
        assert "say where they are kept, --checkpoint DIR" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made(case, tmp_path, capsys):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "no" / "such", tmp_path / "file"):
        for more in ([], ["--dry-run"]):
            arguments = case[0], tmp_path / "out.h5", "--backend", "numpy", "--checkpoint", folder, *more
            assert code("attend", *arguments) == 6
            assert str(folder) in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("name", ["out.h5", "out.h5.shards", "out.h5.shards/c", "in.h5", "run.json", "link/out.h5"])
def test_checkpoints_have_a_place_of_their_own(case, tmp_path, capsys, name):
    """No file of the job's, nor where its shards lie."""
    (tmp_path / "in.h5").symlink_to(case[0])
    (tmp_path / "link").symlink_to(tmp_path)
    before = case[0].read_bytes()
    for more in ([], ["--dry-run"], ["--force"]):
        assert code("attend", case[0], tmp_path / "out.h5", "--json", tmp_path / "run.json", "--backend", "numpy",
                    "--checkpoint", tmp_path / name, *more) == 2
        said = capsys.readouterr().err
        assert re.search("expected different files, got the same one as .* and --checkpoint|"
                         "expected another folder for --checkpoint than that of the output's shards", said), said
    assert case[0].read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.h5", "link"]


def test_two_calls_in_one_folder(case, tmp_path):
    """Each has checkpoints of its own; the end of one takes nothing from the other."""
    assert interrupt(case, tmp_path).code == STOPPED
    mine = complete(tmp_path)
    assert interrupt(case, tmp_path, options=["--scale", "0.5"]).code == STOPPED
    other = set(complete(tmp_path)) - set(mine)
    assert len(other) == 1
    result = attend(case, tmp_path, "--resume", "require", "--checkpoint-every", "1e-9")
    assert result.code == 0, result.text
    assert arrays(tmp_path / "out.h5") == case[1]
    assert complete(tmp_path) == sorted(other)
    result = attend(case, tmp_path, "--resume", "require", "--scale", "0.5", "--force")
    assert result.code == 0, result.text
    assert not (tmp_path / "c").exists()


def test_what_a_killed_job_has_left_half_written_goes(case, tmp_path):
    """Also if the job that is done has found no checkpoint, and written none."""
    killed = attend(case, tmp_path, "--checkpoint-every", "1e-9", start=["-c", KILLED, 1, "link", 1, "before"])
    assert killed.code not in (0, STOPPED)
    assert list((tmp_path / "c").iterdir())
    assert not complete(tmp_path)
    result = attend(case, tmp_path)
    assert result.code == 0, result.text
    assert arrays(tmp_path / "out.h5") == case[1]
    assert not (tmp_path / "c").exists()


# The rank gets SIGTERM while it writes its states, after SIGUSR1 has asked it to; and perhaps once more.
WRITING = """
import os, signal, sys, time
from ringmpi.files.generations import NewGeneration
write, times = NewGeneration.write, int(sys.argv.pop(1))
def ended(self, rank, arrays):
    for _ in range(times if rank == 1 else 0):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)            # at once: Slurm's controller and srun both send it
        time.sleep(1.1)
    return write(self, rank, arrays)
NewGeneration.write = ended
""" + AT_STEP


@pytest.mark.parametrize("times", [1, 2])
def test_sigterm_while_a_checkpoint_is_written(case, tmp_path, times):
    """After SIGUSR1: the first is one request more, the second ends it at once, and the last checkpoint is there."""
    assert interrupt(case, tmp_path).code == STOPPED
    result = attend(case, tmp_path, start=["-c", WRITING, times, 1, 1, "os.kill(os.getpid(), signal.SIGUSR1)"])
    if times == 1:
        assert result.code == STOPPED, result.text
    else:
        assert result.code not in (0, STOPPED), result.text
        assert "ended by SIGTERM while saving a checkpoint" in result.text
    assert complete(tmp_path)
    result = attend(case, tmp_path, "--resume", "require")
    assert result.code == 0, result.text
    assert is_right(case, tmp_path)


def test_sigterm_after_the_checkpoint_changes_nothing(case, tmp_path):
    """A launcher ends the other ranks as soon as the first has ended with 75."""
    leaving = ("from ringmpi.mpi import world\n"
               "leave = world.leave\n"
               "def left(timeout):\n"
               "    leave(timeout)\n"
               "    for _ in range(3):\n"
               "        os.kill(os.getpid(), signal.SIGTERM)\n"
               "world.leave = left\n")
    result = attend(case, tmp_path, start=["-c", AT_STEP.replace("sys.exit", f"{leaving}sys.exit"), 0, 0,
                                           "os.kill(os.getpid(), signal.SIGUSR1)"])
    assert result.code == STOPPED, result.text
    assert len(complete(tmp_path)) == 1


def test_where_warnings_are_errors_all_ranks_end(case, tmp_path):
    """A checkpoint that is not used, and one that can't be written, are a warning of one rank."""
    assert interrupt(case, tmp_path).code == STOPPED
    for file in (tmp_path / "c").glob("*/00001.state"):
        file.write_bytes(b"")
    result = attend(case, tmp_path, "--timeout", "20", start=["-W", "error", "-m", "ringmpi"])
    assert result.code in ROWS["werror"].codes, result.text
    assert "no checkpoint is used, and all is computed" in result.text
    assert not list(tmp_path.glob("out.h5*"))


@pytest.mark.parametrize(("first", "apart"), [((0, 0), True), ((0, 4), False), ((0, 9), False), ((9, 9), True)])
def test_rows_come_apart_only_where_what_they_see_begins_alike(first, apart):
    """Keys up to 9, and from 20 on: rows that see none of the former begin with the latter if they come alone."""
    intervals = [(np.array(first), np.array([9, 9])), (np.array([20, 20]), np.array([30, 31]))]
    part = SimpleNamespace(columns=slice(0, 40))
    plan = SimpleNamespace(_all_kept=True, parts=[[part]], bounds=[None], _whole=lambda which, source: [intervals])
    work = SimpleNamespace(columns=slice(None), source=0)
    assert ResumablePlan.comes_apart(plan, work, [slice(0, 1), slice(1, 2)]) == apart
