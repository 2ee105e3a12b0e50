"""What a rank of the fault matrix runs: `ringmpi`, but on some rank something happens at some place.

    python at_fault.py FAULTS ARGUMENT...

FAULTS is JSON: a list of [rank, place, number, act]. A place is `phase WORDS`, the NUMBER-th phase whose name begins
so, `step N`, when the rank has computed step N, or `before NAME MODULE` or `after NAME MODULE`, the NUMBER-th call of
`os.NAME` under the module `ringmpi.files.MODULE`. An act is signals that the rank sends itself, by their names, a
second apart where there are several, or the name of an error of the system, with which the call fails.
"""

import errno
import json
import os
import signal
import sys
import time
from contextlib import contextmanager

from ringmpi import phases

APART_SECONDS = 1.1            # a SIGTERM so much later is a second one


class Fault:
    """Does what is asked for when the rank has come to a place for the NUMBER-th time."""

    def __init__(self, number, act):
        self.left = number
        self.act = act

    def happen(self):
        self.left -= 1
        if self.left:
            return
        if hasattr(errno, self.act):
            code = getattr(errno, self.act)
            raise OSError(code, os.strerror(code))
        for at, name in enumerate(self.act.split()):
            time.sleep(APART_SECONDS if at else 0)
            os.kill(os.getpid(), getattr(signal, name))


def in_phases(words, fault):
    original = phases.phase

    @contextmanager
    def phase(doing, limit=None, whole=False):
        with original(doing, limit, whole):
            if doing.startswith(words):
                fault.happen()
            yield

    phases.phase = phase


def in_steps(step, fault):
    from ringmpi.passes import Pass
    compute = Pass._run

    def run(self, work, *rest):
        compute(self, work, *rest)
        if work.step.step == int(step):
            fault.happen()

    Pass._run = run


def in_calls(when, name, module, fault):
    original = getattr(os, name)

    def call(*arguments, **more):
        here = is_under(f"ringmpi.files.{module}")
        if here and when == "before":
            fault.happen()
        result = original(*arguments, **more)
        if here and when == "after":
            fault.happen()
        return result

    setattr(os, name, call)


def is_under(module):
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_globals.get("__name__") == module:
            return True
        frame = frame.f_back
    return False


mine = int(os.environ.get("PMI_RANK") or os.environ.get("OMPI_COMM_WORLD_RANK") or 0)
faults = [fault for fault in json.loads(sys.argv.pop(1)) if fault[0] == mine]
# First those in phases: what takes `phase` by its name is imported after that.
for _, place, number, act in sorted(faults, key=lambda fault: not fault[1].startswith("phase")):
    kind, where = place.split(" ", 1)
    if kind == "phase":
        in_phases(where, Fault(number, act))
    elif kind == "step":
        in_steps(where, Fault(number, act))
    else:
        in_calls(kind, *where.split(), Fault(number, act))

from ringmpi.cli import main  # noqa: E402

sys.exit(main())
