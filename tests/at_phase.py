"""What a rank of the attacks runs: `ringmpi`, but one rank says when it has begun a phase, and may wait there.

    python at_phase.py FILE RANK PHASE NUMBER HOLD ARGUMENT...

When rank RANK begins the NUMBER-th phase whose name begins with PHASE, it writes its process id to FILE. With HOLD
`held` it goes on when FILE is gone, or after a minute.
"""

import os
import sys
import time
from contextlib import contextmanager
from pathlib import Path

from ringmpi import phases

HOLD_SECONDS = 60
COMPILE_SECONDS = 2.0         # instead of minutes: all kernels have been compiled before

name, chosen, start, number, hold = sys.argv[1:6]
file = Path(name)
del sys.argv[1:6]
rank = os.environ.get("PMI_RANK") or os.environ.get("OMPI_COMM_WORLD_RANK") or "0"
original = phases.phase
left = [int(number)]


@contextmanager
def phase(doing, limit=None, whole=False):
    with original(doing, limit, whole):
        if doing.startswith("compiling"):
            sys.modules["ringmpi.engine"].COMPILE_TIMEOUT = COMPILE_SECONDS
        if doing.startswith(start) and rank == chosen:
            left[0] -= 1
            if not left[0]:
                tell()
        yield


def tell():
    new = file.with_suffix(".new")
    new.write_text(str(os.getpid()))
    new.rename(file)
    deadline = time.monotonic() + HOLD_SECONDS
    while hold == "held" and file.exists() and time.monotonic() < deadline:
        time.sleep(0.005)


phases.phase = phase

from ringmpi.cli import main  # noqa: E402 (it takes `phase` by its name)

sys.exit(main())
