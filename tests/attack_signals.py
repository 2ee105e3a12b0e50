"""Signals to one rank in each phase of `attend`: phases x signals x ranks."""

import contextlib
import itertools
import os
import random
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple
from unittest import mock

import launch
from attack_cases import DONE, HERE, Case, arrays, left_over, make_input, new_folder
from fault_matrix import NOTHING, ROWS, launched

# How the name of a phase begins, the how many-th of that name it is, and the backend that has it.
PHASES = {
    "before MPI": ("running attend", 1, "numpy"),
    "starting MPI": ("starting MPI", 1, "numpy"),
    "opening the input": ("reading", 1, "numpy"),
    "reading": ("reading", 3, "numpy"),
    "redistributing": ("redistributing /q", 1, "numpy"),
    "attending": ("attending", 1, "numpy"),
    "compiling kernels": ("compiling kernels", 1, "numba"),
    "redistributing the result": ("redistributing the result", 1, "numpy"),
    "writing": ("writing", 1, "numpy"),
    "publishing": ("writing", 2, "numpy"),
    "waiting for the others to end": ("waiting for the other ranks", 1, "numpy"),
    "finalizing MPI": ("finalizing MPI", 1, "numpy"),
}
STOP_AND_GO = "SIGSTOP, SIGCONT"
ROW = {"SIGTERM": ROWS["plain-term"], "SIGINT": ROWS["plain-int"], "SIGKILL": ROWS["plain-kill"],
       "SIGSTOP": ROWS["plain-stop"], STOP_AND_GO: ROWS["plain-cont"]}
SIGNALS = tuple(ROW)
STOPPED_SECONDS = 0.5
TIMEOUT = 3.0                  # of a job one rank of which stays stopped
LONG_TIMEOUT = 60.0            # of the others, which must not need it
MARGIN = 25.0                  # seconds for starting, and for all others that have this machine
GRACE = 5.0                    # seconds in which what outlives the launcher has to end


class Attack(NamedTuple):
    """One rank gets a signal at the start of a phase (held), or some milliseconds later, in whatever it does then."""

    phase: str
    name: str
    ranks: int
    rank: int
    delay: float | None = None

    def __str__(self):
        when = "held" if self.delay is None else f"after {self.delay * 1e3:.0f} ms"
        return f"{self.phase}: {self.name} to rank {self.rank} of {self.ranks}, {when}"

    @property
    def codes(self):
        """The exit codes that the matrix allows."""
        late = {DONE} if self.delay is not None else set()
        # whatever ends it there, it ends by SIGTERM
        early = launched(128 + signal.SIGTERM) if self.phase == "before MPI" and self.name == "SIGINT" else set()
        return ROW[self.name].codes | late | early

    @property
    def tidy(self):
        """Whether nothing but a whole output may be left: the rank hears of it, before the last exchange of all."""
        return ROW[self.name].left == NOTHING and self.delay is None and self.phase != "publishing"


def matrix(ranks=(2, 3), seed=0):
    """Every attack: at the start of each phase, and at some moment after it."""
    chance = random.Random(seed)
    for count, phase, name in itertools.product(ranks, PHASES, SIGNALS):
        for rank in sorted({0, count - 1}):
            yield Attack(phase, name, count, rank)
            yield Attack(phase, name, count, rank, chance.choice((0.001, 0.003, 0.01, 0.03)))


CUT = ("before MPI", "starting MPI", "reading", "redistributing", "attending", "compiling kernels", "writing",
       "publishing", "finalizing MPI")


def cut():
    """At most 40 attacks: each phase that is named and each signal, on rank 0 and rank 1 of two by turns."""
    pairs = [*itertools.product(CUT, SIGNALS[:-1]), *itertools.product(CUT[2::2], SIGNALS[-1:])]
    for number, (phase, name) in enumerate(pairs):
        yield Attack(phase, name, 2, 0 if phase == "publishing" else (number + number // 4) % 2)


def signals(folder, attacks=None, at_once=4):
    """Signals to one rank. Most of the time ranks wait, so some cases run at once."""
    attacks = list(matrix() if attacks is None else attacks)
    right = {}
    for kind in sorted({(attack.ranks, PHASES[attack.phase][2]) for attack in attacks}):
        right[kind] = make_input(new_folder(folder, _input(*kind)), 300, kind[0], _options(kind[1]))
    with mock.patch("ringmpi.files.shards.probe"), ThreadPoolExecutor(at_once) as pool:         # `flips` has it
        yield from pool.map(lambda numbered: _run(folder, *numbered, right), enumerate(attacks))


def _input(ranks, backend):
    return f"{backend}-{ranks}"


def _options(backend):
    return ["--backend", backend, "--layout", "striped"]


def _run(folder, number, attack, right):
    case = new_folder(folder, f"case{number}")
    here, over = folder / f"here{number}", threading.Event()
    start, which, backend = PHASES[attack.phase]
    timeout = TIMEOUT if attack.name == "SIGSTOP" else LONG_TIMEOUT
    line = [HERE / "at_phase.py", here, attack.rank, start, which, "held" if attack.delay is None else "goes on",
            "attend", folder / _input(attack.ranks, backend) / "in.h5", case / "out.h5", *_options(backend),
            "--timeout", timeout]
    sender = threading.Thread(target=_send, args=(attack, here, over))
    sender.start()
    began = time.monotonic()
    result = launch.launch(attack.ranks, list(map(str, line)), folder=folder / f"said{number}", grace=GRACE,
                           timeout=60 + timeout)
    seconds = time.monotonic() - began
    over.set()
    sender.join()
    reached = bool(list(folder.glob(f"here{number}.sent")))
    wrong = _judge(attack, result, case / "out.h5", right[attack.ranks, backend], reached)
    if seconds > timeout % LONG_TIMEOUT + MARGIN:
        wrong = f"took {seconds:.0f} s; {wrong}"
    return Case(str(attack), f"{attack.name}: exit {result.code}", wrong)


def _send(attack, here, over):
    """Wait until the rank is there, and send it what is asked for."""
    while not here.exists():
        if over.wait(0.002):
            return
    process = int(here.read_text())
    here.with_suffix(".sent").touch()
    time.sleep(attack.delay or 0)
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, getattr(signal, attack.name.split(",")[0]))
        if attack.name == STOP_AND_GO:
            over.wait(STOPPED_SECONDS)
            os.kill(process, signal.SIGCONT)
    if attack.name != "SIGSTOP":
        here.unlink()


def _judge(attack, result, out, right, reached):
    """Say what is wrong with how a case ended; empty if nothing is."""
    if result.code not in attack.codes:
        return f"exit {result.code}: {result.text[-1500:]}"
    if not reached:
        return "the phase was not reached"
    if result.left:
        return f"processes left: {result.left}"
    if "Traceback" in result.text or "Exception ignored" in result.text:
        return f"traceback: {result.text[-1500:]}"
    if result.code != DONE and "ringmpi: " not in result.text:
        return f"not a word: {result.text[-500:]}"
    if out.exists() and arrays(out) != right:
        return "other numbers"
    if result.code == DONE and not out.exists():
        return "exit 0, and no out.h5"
    left = left_over(out.parent) if attack.tidy else []
    return f"left: {left}: {result.text[-1500:]}" if left else ""
