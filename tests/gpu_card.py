"""What was asked, and of what: the card, the driver, what is installed, the commit. A part of `gpu_first.py`."""

import datetime
import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path

from gpu_answers import EMULATED, say

from ringmpi import device
from ringmpi.backends.cuda.sources import digest

FIELDS = ("name", "driver_version", "memory.total", "clocks.max.sm", "clocks.max.mem", "power.limit")
PACKAGES = ("numpy", "mpi4py", "torch", "jax", "nvidia-cudnn-cu13", "nvidia-cuda-nvrtc")
TOOLS = ("mpiexec", "nvcc", "ncu", "compute-sanitizer")


def about():
    """Whether there is a GPU, and what there is to know of it and of the software."""
    reason = device.reason_missing()
    first, *more = device.describe() or [""]
    card = dict(zip(FIELDS, said("nvidia-smi", f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader",
                                 "--id=0").split(", "), strict=False))
    say(part="about", ok=reason is None, **({"error": reason} if reason else {}),
        **{"card": first or card.get("name", ""), "more cards": more, "nvidia-smi": card, "emulated": EMULATED,
           "cupy": "" if reason or EMULATED else device.version(), "nvrtc": nvrtc(),
           "python": platform.python_version(), "packages": {name: installed(name) for name in PACKAGES},
           "tools": [name for name in TOOLS if shutil.which(name)], "cores": len(os.sched_getaffinity(0)),
           "commit": commit(), "kernels": digest(),
           "date": f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d}"})
    return reason is None


def said(*command):
    """What a program prints; nothing if it is missing, or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def nvrtc():
    """Version of the compiler that CuPy loads."""
    try:
        from cupy_backends.cuda.libs import nvrtc as library
        return ".".join(map(str, library.getVersion()))
    except (ImportError, RuntimeError):
        return ""


def installed(name):
    """Version of a package; nothing if it is not there."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def commit():
    """The commit: $COMMIT, for a copy of the files alone, or what git says."""
    return os.environ.get("COMMIT") or said("git", "-C", Path(__file__).parent, "describe", "--always", "--dirty",
                                            "--exclude=*", "--abbrev=40")
