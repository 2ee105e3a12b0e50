"""Launch ranks under mpiexec with a time limit that ends the whole process tree, and keep what each rank said."""

import contextlib
import functools
import os
import shutil
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path

import psutil

HERE = Path(__file__).parent
MARK = "RINGMPI_TEST_LAUNCH"      # an environment variable that tells the processes of one launch


@dataclass
class Result:
    code: int
    launcher: str
    ranks: list
    left: list = field(default_factory=list)      # processes that outlived the launcher

    @property
    def text(self):
        said = "".join(f"--- rank {rank}\n{text}" for rank, text in enumerate(self.ranks))
        return f"exit code {self.code}\n--- launcher\n{self.launcher}\n{said}"


def mpiexec():
    """The mpiexec of this environment, else of the machine."""
    beside = Path(sys.executable).with_name("mpiexec")
    return str(beside) if beside.exists() else shutil.which("mpiexec")


@functools.cache
def is_openmpi():
    said = subprocess.run([mpiexec(), "--version"], capture_output=True, text=True, timeout=30, check=False).stdout
    return "Open MPI" in said or "OpenRTE" in said or "prte" in said.lower()


def launch(ranks, *commands, folder, timeout=120, options=(), env=None, grace=0.0):
    """Run one command on `ranks` ranks, or `ranks` commands on one rank each; each rank's output goes to a file.

    What outlives the launcher has `grace` seconds to end by itself; then it is ended, and named in the result.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("rank-*.txt"):
        old.unlink()
    start = [sys.executable, str(HERE / "rank.py"), str(folder)]
    if len(commands) == 1:
        blocks = [["-n", str(ranks), *start, *commands[0]]]
    else:
        blocks = [["-n", "1", *start, *command] for command in commands]
    line = [mpiexec(), *options]
    for number, block in enumerate(blocks):
        line += ([":"] if number else []) + block
    mark = uuid.uuid4().hex
    with (folder / "launcher.txt").open("w+") as said:
        process = subprocess.Popen([str(x) for x in line], stdin=subprocess.DEVNULL, stdout=said, stderr=said,
                                   start_new_session=True, env={**os.environ, **(env or {}), MARK: mark}, cwd=folder)
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            code = 124
            grace = 0.0
        finally:
            left = end_tree(process, mark, grace)
    texts = [path.read_text(errors="replace") for path in sorted(folder.glob("rank-*.txt"))]
    return Result(code, (folder / "launcher.txt").read_text(errors="replace"), texts, left)


def end_tree(process, mark, grace=0.0):
    """End a launcher and all that carries its mark: ranks have sessions of their own and may outlive it. Name them."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(3)
        except subprocess.TimeoutExpired:
            process.kill()
    deadline = time.monotonic() + grace
    while (left := _marked(mark)) and time.monotonic() < deadline:
        time.sleep(0.1)
    names = [_name(one) for one in left]
    for one in left:
        with contextlib.suppress(psutil.Error):          # gone meanwhile
            one.kill()
    process.wait(10)
    return names


def _marked(mark):
    """Find the processes of a launch."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):          # gone meanwhile, or not ours
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def _name(process):
    try:
        return f"{process.pid} ({process.status()}): {' '.join(process.cmdline())}"
    except psutil.Error:
        return f"{process.pid}: gone"
