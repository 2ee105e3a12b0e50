"""Run the kernels of kernels/ on the CPU: compile them by g++ with emulator/ in place of the GPU's instructions."""

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
    """Where libraries are kept while the tests run."""
    return tempfile.TemporaryDirectory(prefix="ringmpi-emulator-")


@functools.cache
def library(file, names):
    """Compile kernels `names` of `file`; a loaded library whose function kernel_N runs the Nth."""
    folder = Path(_folder().name) / hashlib.sha256(f"{file} {names}".encode()).hexdigest()[:16]
    folder.mkdir()
    for source in (*kernels_folder().glob("*.cu*"), *EMULATOR.iterdir()):
        shutil.copy(source, folder / source.name)              # the emulator's platform.cuh last
    functions = "".join(
        f'extern "C" void kernel_{i}(const unsigned* grid, unsigned threads, size_t shared, unsigned seed, '
        f"void** arguments) {{ emulator::run(grid, threads, shared, seed, &{name}, arguments); }}\n"
        for i, name in enumerate(names))
    (folder / "unit.cpp").write_text(f'#include "emulator.h"\n#include "{file}"\n{functions}')
    flags = os.environ.get("RINGMPI_TEST_CXXFLAGS", "-O2").split()
    subprocess.run([COMPILER, "-std=c++17", *flags, "-w", "-shared", "-fPIC", "-o", "unit.so", "unit.cpp"],
                   cwd=folder, check=True, timeout=300)
    return ctypes.CDLL(str(folder / "unit.so"))


class EmulatedDevice(FakeDevice, Device):
    """A lazy device that runs the real kernels, and copies between host and device in the pieces of `Device`."""

    def __init__(self, seed=0, capability=(9, 0), shared_bytes=227 * 1024, shared_bytes_processor=228 * 1024):
        super().__init__(seed)
        self.capability, self.shared_bytes = capability, shared_bytes
        self.shared_bytes_processor = shared_bytes_processor
        self.launched = []

    def compile(self, path, names, options):
        functions = library(path.name, tuple(names))
        return [getattr(functions, f"kernel_{i}") for i in range(len(names))]

    def launch(self, kernel, grid, threads, shared_bytes, arguments, stream):
        self.launched.append((kernel, grid, threads, shared_bytes))
        super().launch(lambda *sizes_and_arguments: run(kernel, *sizes_and_arguments), grid, threads, shared_bytes,
                       arguments, stream)


def run(function, grid, threads, shared_bytes, arguments, seed=0):
    """Run a compiled kernel to its end; arguments are fake arrays and NumPy scalars."""
    # An array is passed as its address, a scalar as it is; the kernel gets the address of each.
    values = [np.array(x.data.ptr if isinstance(x, FakeArray) else x) for x in arguments]
    addresses = (ctypes.c_void_p * len(values))(*(x.ctypes.data for x in values))
    sizes = (ctypes.c_uint * 3)(*grid, *[1] * (3 - len(grid)))
    function(sizes, ctypes.c_uint(threads), ctypes.c_size_t(shared_bytes), ctypes.c_uint(seed), addresses)
