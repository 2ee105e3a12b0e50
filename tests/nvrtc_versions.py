"""NVRTC in an older version beside the installed one, and what its assembler says.

The older wheel is fetched from the package index once, `python tests/nvrtc_versions.py` does so ahead of the tests, and
unpacked to a folder for all runs. A process has the version whose libraries it loads first.
"""

import ctypes
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from emulate import one_at_a_time

OLDER = "13.0.88"             # what environments of 2025 have, and frameworks of 2026 still ask for
SECONDS = 300


def older_libraries():
    """Give the folder of the older version's libraries; an OSError or a SubprocessError if it can't be fetched."""
    folder = Path(tempfile.gettempdir()) / f"ringmpi-nvrtc-{os.getuid()}-{OLDER}"
    with one_at_a_time(folder):
        if not folder.exists():
            _fetch(folder)
    if folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} is somebody else's")
    return folder


def _fetch(folder):
    with tempfile.TemporaryDirectory(dir=folder.parent) as parent:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:", "--retries",
                   "1", "--timeout", "15", "--dest", parent, f"nvidia-cuda-nvrtc=={OLDER}"]
        subprocess.run(command, check=True, timeout=SECONDS, capture_output=True, text=True)
        wheel, = Path(parent).glob("*.whl")
        made = Path(parent) / "libraries"
        made.mkdir()
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if re.search(r"/libnvrtc(-builtins)?\.so\.[\d.]+$", name):
                    (made / Path(name).name).write_bytes(archive.read(name))
        made.rename(folder)


def load(folder):
    """Let this process, which has loaded none, have the version of `folder`; None for the installed one."""
    if folder is not None:
        for library in sorted(folder.iterdir()):       # the one that the other asks for by its name first
            ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)


def complaints(log):
    """What the compiler warns of, and what ptxas remarks of speed that is lost, which it calls no warning."""
    return [line for line in log.splitlines() if "arning" in line or "(C7" in line]


if __name__ == "__main__":
    older_libraries()
