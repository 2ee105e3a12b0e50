"""Run the kernels of kernels/ on the CPU: compile them by g++ with emulator/ in place of the GPU's instructions."""

import contextlib
import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
from fake_device import FakeArray, FakeDevice

from ringmpi.backends.sources import kernels_folder
from ringmpi.device import Device

EMULATOR = Path(__file__).parent / "emulator"
COMPILER = shutil.which("g++")


@functools.cache
def _folder():
    """Where compiled kernels are kept, for all processes and runs with the same sources."""
    sources = [*sorted(kernels_folder().glob("*.cu*")), *sorted(EMULATOR.iterdir())]
    digest = hashlib.sha256(b"\0".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"ringmpi-emulator-{os.getuid()}-{digest}"
    if folder.exists() and folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} is somebody else's")
    if not folder.exists():
        with tempfile.TemporaryDirectory(dir=tempfile.gettempdir()) as parent:
            (Path(parent) / "sources").mkdir()
            for source in sources:             # the emulator's platform.cuh last, in place of the GPU's
                shutil.copy(source, Path(parent) / "sources" / source.name)
            with contextlib.suppress(OSError):             # another process was quicker
                (Path(parent) / "sources").rename(folder)
    return folder


@functools.cache
def function(file, name):
    """Compile kernel `name` of `file`, or load it; a function that runs it on a grid."""
    folder = _folder()
    path = folder / f"{hashlib.sha256(f'{file} {name}'.encode()).hexdigest()[:16]}.so"
    if not path.exists():
        code = (f'#include "emulator.h"\n#include "{file}"\n'
                'extern "C" void run(const unsigned* grid, unsigned threads, size_t shared, unsigned seed, '
                f"void** arguments) {{ emulator::run(grid, threads, shared, seed, &{name}, arguments); }}\n")
        temporary = path.with_suffix(f".{os.getpid()}")
        subprocess.run([COMPILER, "-std=c++17", "-O1", "-w", "-shared", "-fPIC", "-x", "c++", "-", "-o", temporary],
                       input=code, text=True, cwd=folder, check=True, timeout=300)
        temporary.rename(path)
    return ctypes.CDLL(str(path)).run


class EmulatedDevice(FakeDevice, Device):
    """A lazy device that runs the real kernels, and copies between host and device in the pieces of `Device`."""

    def __init__(self, seed=0, capability=(9, 0), shared_bytes=227 * 1024, shared_bytes_processor=228 * 1024):
        super().__init__(seed)
        self.capability, self.shared_bytes = capability, shared_bytes
        self.shared_bytes_processor = shared_bytes_processor
        self.launched = []
        self.cache = {}

    def compile(self, path, names, options):
        return [(name, function(path.name, name)) for name in names]

    def launch(self, kernel, grid, threads, shared_bytes, arguments, stream):
        name, compiled = kernel
        self.launched.append((name, grid, threads, shared_bytes))
        super().launch(functools.partial(run, compiled), grid, threads, shared_bytes, arguments, stream)


def run(compiled, grid, threads, shared_bytes, arguments, seed=0):
    """Run a compiled kernel to its end; arguments are fake arrays and NumPy scalars."""
    # An array is passed as its address, a scalar as it is; the kernel gets the address of each.
    values = [np.array(x.data.ptr if isinstance(x, FakeArray) else x) for x in arguments]
    addresses = (ctypes.c_void_p * len(values))(*(x.ctypes.data for x in values))
    sizes = (ctypes.c_uint * 3)(*grid, *[1] * (3 - len(grid)))
    compiled(sizes, ctypes.c_uint(threads), ctypes.c_size_t(shared_bytes), ctypes.c_uint(seed), addresses)
