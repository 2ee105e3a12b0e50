"""Launch ranks under mpiexec with a time limit that ends the whole process tree, and keep what each rank said."""

import functools
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil

HERE = Path(__file__).parent


@dataclass
class Result:
    code: int
    launcher: str
    ranks: list

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


def launch(ranks, *commands, folder, timeout=120, options=(), env=None):
    """Run one command on `ranks` ranks, or `ranks` commands on one rank each; each rank's output goes to a file."""
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
    with (folder / "launcher.txt").open("w+") as said:
        process = subprocess.Popen([str(x) for x in line], stdin=subprocess.DEVNULL, stdout=said, stderr=said,
                                   start_new_session=True, env={**os.environ, **(env or {})}, cwd=folder)
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            code = 124
        finally:
            end_tree(process)
    texts = [path.read_text(errors="replace") for path in sorted(folder.glob("rank-*.txt"))]
    return Result(code, (folder / "launcher.txt").read_text(errors="replace"), texts)


def end_tree(process):
    """End a launcher and all it started, ranks in sessions of their own included."""
    try:
        tree = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        tree = []
    session = [p for p in psutil.process_iter() if _session(p.pid) == process.pid]
    if process.poll() is None:
        process.terminate()
        psutil.wait_procs(tree, timeout=3)
        process.kill()
    for child in {*tree, *session}:
        try:
            child.kill()
        except psutil.NoSuchProcess:
            continue
    process.wait(10)


def _session(pid):
    try:
        return os.getsid(pid)
    except (ProcessLookupError, PermissionError):
        return None
