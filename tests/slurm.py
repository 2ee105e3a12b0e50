"""A Slurm of one node: a controller, a node and munge in a folder of their own, with a key and ports of their own.

It runs as root or not, without cgroups or systemd, and beside a Slurm or munge that the machine runs already: nothing
of theirs is read or written. Its four GPUs are files that nobody opens. All that it started ends with it, and also if
the tests are killed: this file, run as a program, waits for that.
"""

import contextlib
import getpass
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import launch
import psutil

DAEMONS = ("munged", "slurmctld", "slurmd")
PROGRAMS = (*DAEMONS, "sbatch", "srun", "scancel", "scontrol", "sinfo", "squeue")
INSTALL = "apt-get install slurm-wlm munge, on Debian and Ubuntu"
SYSTEM_PATH = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])
GPUS = ("/dev/null", "/dev/zero", "/dev/full", "/dev/urandom")       # what Slurm wants is character devices, any
START_SECONDS = 30
STOP_SECONDS = 10
# A job that Slurm has nothing more to do with.
DONE = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
# cred_expire and the intervals: else a requeued job waits for minutes. FirstJobId: MPICH names its shared memory by the
# number of the job, and that of a rank which was killed under the same number would be taken for this job's.
CONFIG = """\
ClusterName=ringmpi
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
FirstJobId={first}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,bf_interval=1
SlurmdParameters=config_overrides
ReturnToService=2
MpiDefault=pmi2
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 CPUs=32 Sockets=1 CoresPerSocket=32 ThreadsPerCore=1 RealMemory=4000 Gres=gpu:{gpus}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def reason_missing():
    """Why there can be no Slurm here; nothing if there can."""
    missing = [name for name in PROGRAMS if not shutil.which(name, path=SYSTEM_PATH)]
    return f"no Slurm here, {', '.join(missing)} is missing: {INSTALL}" if missing else ""


class StartError(RuntimeError):
    """A Slurm that does not start, with what it said."""


@dataclass
class Job:
    """How a job ended: its state, the exit code of its script, and what it and its ranks said."""

    id: str
    state: str
    code: int
    log: str


class Slurm:
    """The cluster, as a context manager. `left` names the processes that had to be killed in the end."""

    def __enter__(self):
        self.left = []
        self.folder = Path(tempfile.mkdtemp(prefix="ringmpi-slurm-"))     # the name of a socket has 107 characters
        self.folder.chmod(0o755)                                          # munge wants it
        self.mark = uuid.uuid4().hex
        theirs = ("SLURM", "SBATCH", "SRUN", "PMI")                       # the tests may run in a job themselves
        kept = {name: value for name, value in os.environ.items() if not name.startswith(theirs)}
        self.env = {**kept, "PATH": SYSTEM_PATH, "SLURM_CONF": str(self.folder / "slurm.conf"), launch.MARK: self.mark}
        self._daemons = []
        self._guard = subprocess.Popen([sys.executable, __file__, self.mark, self.folder], stdin=subprocess.PIPE)
        try:
            self._configure()
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        """Cancel the jobs, end the daemons that were started, the last first, and all that they started."""
        if len(self._daemons) == len(DAEMONS) and not self._ended():
            self.command("scancel", "--user", getpass.getuser(), check=False)
            deadline = time.monotonic() + STOP_SECONDS
            while self.command("squeue", "--noheader", check=False).strip() and time.monotonic() < deadline:
                time.sleep(0.1)
        for process in reversed(self._daemons):
            process.terminate()
        for process in self._daemons:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_SECONDS)
        self.left = end(self.mark, self.folder, grace=2)
        self._guard.communicate(timeout=60)

    def _configure(self):
        """Write the key, the state folders and the configuration."""
        for name in ("state", "spool"):
            (self.folder / name).mkdir()
        (self.folder / "munge.key").touch(0o600)
        (self.folder / "munge.key").write_bytes(secrets.token_bytes(128))
        sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
        ports = [one.getsockname()[1] for one in sockets]
        for one in sockets:
            one.close()
        host = socket.gethostname().partition(".")[0]
        (self.folder / "slurm.conf").write_text(CONFIG.format(
            host=host, ports=ports, user=getpass.getuser(), folder=self.folder, gpus=len(GPUS),
            first=1000 + secrets.randbelow(5 * 10**7)))
        (self.folder / "gres.conf").write_text("".join(f"Name=gpu File={gpu}\n" for gpu in GPUS))

    def _start(self):
        """Start the daemons, and wait until the node is ready."""
        munge = self.folder / "munge"
        files = [f"--{name}-file={munge}.{name}" for name in ("key", "pid", "log", "seed")]
        self._daemon("munged", "--foreground", f"--socket={munge}.socket", *files)
        self._until(lambda: (self.folder / "munge.socket").exists())
        for name in ("slurmctld", "slurmd"):
            self._daemon(name, "-D", "-f", self.folder / "slurm.conf")
        self._until(lambda: self.command("sinfo", "--noheader", "--format=%T", check=False).strip() == "idle")

    def _daemon(self, *words):
        """Start a daemon in the foreground."""
        with (self.folder / f"{words[0]}.out").open("w") as said:
            self._daemons.append(subprocess.Popen(list(map(str, words)), stdin=subprocess.DEVNULL, stdout=said,
                                                  stderr=said, env=self.env, cwd=self.folder, start_new_session=True))

    def _until(self, ready):
        deadline = time.monotonic() + START_SECONDS
        while not ready():
            if time.monotonic() > deadline or self._ended():
                named = list(zip(DAEMONS, self._daemons, strict=False))
                guilty = [name for name, process in named if process.poll() is not None] or [name for name, _ in named]
                said = "".join(f"--- {name}\n{text_of(self.folder / f'{name}.out')[-800:]}" for name in guilty)
                raise StartError(f"a Slurm of one node does not start here:\n{said}")
            time.sleep(0.05)

    def _ended(self):
        return any(process.poll() is not None for process in self._daemons)

    def command(self, *words, check=True, folder=None, env=None):
        """Run a command of Slurm's; give what it said."""
        ran = subprocess.run([str(word) for word in words], env={**self.env, **(env or {})}, cwd=folder or self.folder,
                             stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                             timeout=60, check=False)
        assert not check or ran.returncode == 0, f"{words}: {ran.returncode}\n{ran.stdout}"
        return ran.stdout

    def submit(self, script, *arguments, options=(), folder, env=None):
        """Submit a script with arguments; give the number of the job."""
        said = self.command("sbatch", "--parsable", *options, script, *arguments, folder=folder, env=env)
        return said.strip().splitlines()[-1]

    def wait(self, number, seconds=100):
        """Wait until a job, or a task of an array (``7_2``), has ended."""
        deadline = time.monotonic() + seconds
        while True:
            said = self.command("scontrol", "show", "job", number)
            state, code, log = (re.search(rf"\b{name}=(\S+)", said).group(1) for name in
                                ("JobState", "ExitCode", "StdOut"))
            if state in DONE:
                break
            if time.monotonic() > deadline:
                self.command("scancel", number)
                raise AssertionError(f"job {number} has not ended within {seconds} s\n{said}\n{text_of(log)}")
            time.sleep(0.1)
        return Job(number, state, int(code.partition(":")[0]), text_of(log))


def text_of(path):
    """What is in a log; nothing if there is none."""
    return Path(path).read_text(errors="replace") if Path(path).exists() else ""


def end(mark, folder, grace=0.0):
    """End what a Slurm has left, after `grace` seconds in which it may end by itself; name it.

    It has the mark or, as Slurm's own processes write over their environment, the folder.
    """
    def found():
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):          # gone meanwhile, or not ours
                ours = process.cwd() == str(folder) or process.environ().get(launch.MARK) == mark
                if ours and process.status() != psutil.STATUS_ZOMBIE:
                    yield process

    deadline = time.monotonic() + grace
    while (left := list(found())) and time.monotonic() < deadline:
        time.sleep(0.1)
    names = []
    for process in left:
        with contextlib.suppress(psutil.Error):
            names.append(f"{process.pid}: {' '.join(process.cmdline())}")
            process.kill()
    return names


if __name__ == "__main__":
    _, mark_of_all, folder_of_all = sys.argv
    sys.stdin.read()                                         # ends when the tests do, whatever ends them
    end(mark_of_all, folder_of_all)
    shutil.rmtree(folder_of_all, ignore_errors=True)
