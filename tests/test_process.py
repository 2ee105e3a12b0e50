"""The command line's process under mpiexec: signals, deaths, and ranks that are missing at MPI's start or end.

Each case ends in a bounded time, with an exit code that docs/exitcodes.rst names and one line on standard error that
says why.
"""

import os
import re
import signal
import subprocess
import sys
import time

import launch
import pytest

from ringmpi.cli import main
from ringmpi.files.shards import verify
from ringmpi.watchdog import Watchdog, _guess

RANK = "rank = int(os.environ.get('PMI_RANK') or os.environ.get('OMPI_COMM_WORLD_RANK') or 0)\n"
# Whoever starts the tests may ignore SIGHUP, as nohup does, and so would the ranks.
START = ("import os, signal, sys, time\nfrom ringmpi.cli import main\n"
         "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n" + RANK)
BEFORE_MPI = START + "if rank == 1: {act}\nsys.exit(main())\n"
# What mpiexec says when a rank ends by SIGTERM before MPI is up: MPICH, Open MPI, and MPICH if its launcher was just
# about to answer that rank.
ENDED_EARLY = (15, 143, 255)
# Of another rank than 0, while it computes with the block of a neighbour.
COMPUTING = START + """
from ringmpi.passes import Pass
compute = Pass._run
def act(self, work, *rest):
    if rank == 1 and work.step.step == 1:
        {act}
    return compute(self, work, *rest)
Pass._run = act
sys.exit(main())
"""
READING = START + """
from ringmpi.job import attend as job
from ringmpi.phases import phase
read = job.read_shard
def act(run, attention, tokens):
    if rank == 1:
        with phase("reading " + tokens.filename):
            os.kill(os.getpid(), signal.SIGSEGV)
    return read(run, attention, tokens)
job.read_shard = act
sys.exit(main())
"""
FIRST_CALL = START + """
from ringmpi.mpi import comm as mpi
private_comm = mpi.private_comm
def act(*rest, **more):
    if rank == 1:
        os.kill(os.getpid(), signal.SIGINT)
    time.sleep(2)                          # the others have not begun to wait
    return private_comm(*rest, **more)
mpi.private_comm = act
sys.exit(main())
"""
AT_THE_END = START + """
from ringmpi.commands import attend
run = attend.run
def act(options):
    code = run(options)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    return code
attend.run = act
sys.exit(main())
"""
FINALIZING = START + """
from ringmpi.mpi import world
meet = world._meet
def act(*rest):
    meet(*rest)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
world._meet = act
sys.exit(main())
"""
ENDING = START + """
from ringmpi import watchdog
watchdog.END_SECONDS = 2.0              # for the watchdog's side, which is forked in main
code = main()
if rank == 1:
    os.kill(os.getpid(), signal.SIGSTOP)
sys.exit(code)
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("input") / "in.h5"
    assert main(["make", "random", str(path), "--tokens", "200", "--heads", "2", "--dim", "16"]) == 0
    return path


def attend(code, source, tmp_path, timeout=20, ranks=3):
    """Run `attend`, with a limit on the time that it takes whatever happens; give the result and the seconds."""
    start = time.perf_counter()
    result = launch.launch(ranks, ["-c", code, "attend", source, tmp_path / "out.h5", "--timeout", str(timeout),
                                   "--backend", "numpy", "--schedule", "ring"], folder=tmp_path / "said", timeout=60)
    assert result.code != 124, result.text
    return result, time.perf_counter() - start


def said(result):
    """The lines that this package has printed on all ranks."""
    return [line for line in "\n".join(result.ranks).splitlines() if line.startswith("ringmpi: ")]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_a_signal_on_one_rank(source, tmp_path, name):
    """It says so, and what it was doing; the others hear of it at once, and nothing is left behind."""
    code = COMPUTING.format(act=f"os.kill(os.getpid(), signal.{name})")
    result, seconds = attend(code, source, tmp_path)
    assert result.code == 128 + getattr(signal, name), result.text
    assert re.search(rf"^ringmpi: rank 1 on \S+ ended by {name} while attending$", result.ranks[1], re.MULTILINE)
    assert "Traceback" not in result.text
    assert seconds < 15
    assert not list(tmp_path.glob("out.h5*")), result.text


def test_a_signal_where_python_drops_exceptions(source, tmp_path):
    """In `__del__`, say: it is not lost."""
    stop = "type('D', (), {'__del__': lambda self: os.kill(os.getpid(), signal.SIGTERM)})()"
    code = COMPUTING.format(act=f"{stop}; time.sleep(1)")
    result, _ = attend(code, source, tmp_path)
    assert result.code == 143, result.text
    assert "ended by SIGTERM while attending" in result.ranks[1]
    assert "ignored" not in result.text


@pytest.mark.parametrize("seconds", [0.01, 30.0])
def test_a_signal_where_hdf5_calls(source, tmp_path, seconds):
    """An exception there would crash HDF5: the signal waits until HDF5 has returned, not for the alarm."""
    code = START + f"""
from ringmpi.files import new_file as files
from ringmpi import process
process.AGAIN_SECONDS = {seconds}
todo = [1]
class Calls:
    def __getattr__(self, name):
        if name == "pwrite" and rank in todo:
            todo.clear()
            os.kill(os.getpid(), signal.SIGINT)
        return getattr(os, name)
files.os = Calls()
sys.exit(main())
"""
    result, _ = attend(code, source, tmp_path)
    assert result.code == 130, result.text
    assert re.search(r"ended by SIGINT while (writing|reading) ", result.ranks[1])
    assert "Traceback" not in result.text


@pytest.mark.parametrize("place", ["_parse", "_run"])
def test_a_signal_before_the_command_begins(source, tmp_path, place):
    """Rank 1 says so, and the others do not wait for it in MPI_Init."""
    code = START + f"""
from ringmpi import cli
usual = cli.{place}
def act(*rest):
    if rank == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return usual(*rest)
cli.{place} = act
sys.exit(main())
"""
    result, seconds = attend(code, source, tmp_path, timeout=30)
    assert result.code in ENDED_EARLY, result.text
    assert re.search(r"^ringmpi: rank 1 on \S+ ended by SIGTERM while starting$", result.ranks[1], re.MULTILINE)
    assert "Traceback" not in result.text
    assert seconds < 15


def test_a_signal_at_the_very_end(source, tmp_path):
    """No traceback, and the result is there."""
    code = START + """
from ringmpi import watchdog
end = watchdog.Watchdog.dismiss
def act(self):
    if rank == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    end(self)
watchdog.Watchdog.dismiss = act
sys.exit(main())
"""
    result, _ = attend(code, source, tmp_path)
    assert result.code in ENDED_EARLY, result.text
    assert "Traceback" not in result.text
    verify(tmp_path / "out.h5")


def test_the_exit_code_of_an_error_that_all_ranks_know(source, tmp_path):
    """A launcher ends the others when the first rank exits with it: they have the same code nevertheless."""
    code = START + """
from ringmpi.mpi import world
leave = world.leave
def act(timeout):
    leave(timeout)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGTERM)
world.leave = act
sys.argv[sys.argv.index("attend") + 1] = "missing.h5"
sys.exit(main())
"""
    result, _ = attend(code, source, tmp_path)
    assert result.code == 3, result.text
    assert "missing.h5: no such file" in result.text


def test_a_signal_between_two_calls(source, tmp_path):
    """The others are told even though no exchange is under way, and remove what they wrote."""
    code = START + """
from ringmpi.job import attend as job
from ringmpi.layout import Contiguous
even = Contiguous.even
def act(*rest):
    if rank == 1 and job.Output.done:
        os.kill(os.getpid(), signal.SIGTERM)
    return even(*rest)
compute = job._compute
def computed(*rest):
    try:
        return compute(*rest)
    finally:
        job.Output.done = True
job.Output.done = False
job._compute = computed
Contiguous.even = act
sys.exit(main())
"""
    result, _ = attend(code, source, tmp_path)
    assert result.code == 143, result.text
    assert "rank 1 gave up: ended by SIGTERM while" in result.ranks[0]
    assert not list(tmp_path.glob("out.h5*")), result.text


def test_an_interrupt_in_the_first_call(source, tmp_path):
    """There is no communicator yet on which the others could be told: the job is aborted."""
    result, seconds = attend(FIRST_CALL, source, tmp_path, timeout=30)
    assert result.code == 130, result.text
    assert re.search(r"ringmpi: rank 1 on \S+ ended by SIGINT while ", result.ranks[1])
    assert seconds < 15


def test_a_rank_without_mpi(source, tmp_path):
    """The others wait in MPI_Init, where they can't be told: it ends by a signal, and the launcher ends them."""
    code = BEFORE_MPI.format(act="os.environ['MPI4PY_LIBMPI'] = '/nowhere/libmpi.so'")
    result, seconds = attend(code, source, tmp_path, timeout=30)
    assert result.code in ENDED_EARLY, result.text
    assert len([line for line in said(result) if "no MPI library" in line]) == 1, result.text
    assert seconds < 15


def test_an_error_of_ours_before_mpi(source, tmp_path):
    code = BEFORE_MPI.format(act="sys.modules['ringmpi.job.attend'] = None")
    result, seconds = attend(code, source, tmp_path, timeout=30)
    assert result.code in ENDED_EARLY, result.text
    assert "Traceback" in result.ranks[1]
    assert seconds < 15


def test_a_rank_that_does_not_come_to_the_start(source, tmp_path):
    code = BEFORE_MPI.format(act="os.kill(os.getpid(), signal.SIGSTOP)")
    result, seconds = attend(code, source, tmp_path, timeout=2)
    assert result.code in (9, 137), result.text
    assert re.search(r"rank \d on \S+ is ended: it was stuck starting MPI for \d s \(timeout 2 s\)", result.text)
    assert seconds < 15


def test_a_rank_that_does_not_come_to_the_end(source, tmp_path):
    """Rank 0 names it; the result is there and whole."""
    result, seconds = attend(AT_THE_END, source, tmp_path, timeout=2)
    assert result.code == 5, result.text
    assert re.search(r"rank 0 on \S+ was done, and waited for rank 1 to end for 2\.\d s", result.ranks[0]), result.text
    assert seconds < 15
    verify(tmp_path / "out.h5")


def test_a_rank_that_stops_in_finalize(source, tmp_path):
    result, seconds = attend(FINALIZING, source, tmp_path, timeout=2)
    assert result.code in (9, 137), result.text
    assert re.search(r"rank \d on \S+ is ended: it was stuck finalizing MPI for \d s", result.text), result.text
    assert seconds < 15
    verify(tmp_path / "out.h5")


def test_a_rank_that_stops_when_all_is_done(source, tmp_path):
    result, seconds = attend(ENDING, source, tmp_path, timeout=30)
    assert result.code in (9, 137), result.text
    assert re.search(r"rank 1 on \S+ is ended: it was stuck ending for \d s", result.text), result.text
    assert seconds < 15
    verify(tmp_path / "out.h5")


def test_a_crash_names_the_file_that_was_read(source, tmp_path):
    result, seconds = attend(READING, source, tmp_path, timeout=30)
    assert result.code in (11, 139), result.text
    assert "Fatal Python error: Segmentation fault" in result.ranks[1]
    how = "(was killed by SIGSEGV|died)"
    assert re.search(rf"^ringmpi: rank 1 on \S+ {how} while reading {source}\b", result.text, re.MULTILINE), result.text
    assert seconds < 15


def test_a_killed_rank_is_told_once(source, tmp_path):
    """The launcher then kills the others; with more ranks than cores, one of them may be reported in its place."""
    result, _ = attend(COMPUTING.format(act="os.kill(os.getpid(), signal.SIGKILL)"), source, tmp_path, timeout=30)
    assert result.code not in (0, 124), result.text
    dead = re.findall(r"rank \d on \S+ (?:was killed by SIGKILL|died) while .*: out of memory, perhaps", result.text)
    assert len(dead) == 1, result.text


@pytest.mark.parametrize("arguments", [["attend", "in.h5"], ["fly"], ["make", "random", "x.h5", "--tokens", "3"], []])
def test_ranks_say_once_what_all_would_say(tmp_path, arguments):
    result = launch.launch(3, ["-m", "ringmpi", *arguments], folder=tmp_path, timeout=60)
    assert result.code == (4 if "make" in arguments else 2), result.text
    assert len([text for text in result.ranks if text.strip()]) == 1, result.text


def test_ranks_leave_together(tmp_path):
    """Even after an error, if they have agreed on it."""
    result = launch.launch(3, ["-m", "ringmpi", "attend", tmp_path / "none.h5", tmp_path / "out.h5"],
                           folder=tmp_path / "said", timeout=60)
    assert result.code == 3, result.text
    assert "Abort" not in result.text
    assert len(said(result)) == 1


def beside(act):
    """What the watchdog says of a process that ends by `act`."""
    code = f"import os, signal; from ringmpi.watchdog import Watchdog; w = Watchdog('rank 7 on n'); {act}"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False)
    return process.stderr


def test_a_watchdog():
    assert beside("w.note('reading a\\nb'); w.end()") == ""
    assert beside("w.note('reading'); os._exit(6)") == ""
    assert re.fullmatch(r"ringmpi: rank 7 on n (was killed by SIGABRT|died) while reading a b.*\n",
                        beside("w.note('reading a\\nb'); os.abort()"))
    assert "stuck starting MPI for 1 s (timeout 0.5 s)" in beside("w.note('starting MPI', 0.5); signal.pause()")
    assert beside("w.note('starting MPI', float('inf')); import time; time.sleep(0.3); w.end()") == ""
    assert beside("w.note('starting MPI', 0.2); w.note('reading'); import time; time.sleep(0.5); w.end()") == ""


def test_a_guess_why_a_rank_was_killed():
    assert "out of memory" in _guess(signal.SIGKILL)
    assert _guess(None) == _guess(signal.SIGKILL)
    assert "launcher" in _guess(signal.SIGTERM)
    assert "memory" not in _guess(signal.SIGTERM)
    assert _guess(signal.SIGINT) == _guess(signal.SIGSEGV) == ""


def test_work_goes_on_without_a_watchdog(monkeypatch):
    watchdog = Watchdog("rank 0 on n")
    os.kill(watchdog._child, signal.SIGKILL)
    time.sleep(0.1)
    for _ in range(3):
        watchdog.note("reading")
    watchdog.end()
    watchdog.end()

    def fork():
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr("os.fork", fork)
    watchdog = Watchdog("rank 0 on n")
    watchdog.note("reading")
    watchdog.end()
