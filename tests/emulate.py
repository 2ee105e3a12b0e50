"""Run the kernels of kernels/ on the CPU: compile them by g++ with emulator/ in place of the GPU's instructions.

A test that comes to need g++ is skipped where there is none; so no mark on a file, which would skip what runs on a GPU.
"""

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from fake_device import FakeArray, FakeDevice

from ringmpi.backends.cuda.arguments import gradient_type, problem_type, score_type, state_type
from ringmpi.backends.cuda.sources import kernels_folder
from ringmpi.device import Device, Struct

# TensorMap in emulator/hopper.cuh: x first.
MAP = np.dtype([("address", np.uint64), ("sizes", np.uint64, 3), ("strides", np.uint64, 3), ("box", np.uint32, 3),
                ("rest", np.uint32, 15)])

SINGLE, DOUBLE = np.dtype(np.float32), np.dtype(np.float64)
STRUCTS = {"Problem<float>": problem_type(SINGLE), "Problem<double>": problem_type(DOUBLE),
           "PackedScore<float>": score_type(SINGLE), "PackedScore<double>": score_type(DOUBLE),
           "StateArrays<float>": state_type(), "StateArrays<double>": state_type(),
           "GradientInputs<bfloat16>": gradient_type(), "GradientInputs<double>": gradient_type()}

EMULATOR = Path(__file__).parent / "emulator"
COMPILER = shutil.which("g++")
OPTIONS = "-std=c++17", "-O1", "-w", "-fPIC"


def require_compiler():
    """Skip the test that asks, or that asks for a fixture, where g++ is missing."""
    if COMPILER is None:
        pytest.skip("g++ compiles the kernels for the CPU, and is not installed")


@contextlib.contextmanager
def one_at_a_time(path):
    """Where `path` is not there, let one process make it while the others wait."""
    if path.exists():
        yield
        return
    with path.with_suffix(".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@functools.cache
def _folder():
    """Where compiled kernels are kept, for all processes and runs with the same sources."""
    sources = [*sorted(kernels_folder().glob("*.cu*")), *sorted(EMULATOR.iterdir())]
    digest = hashlib.sha256(b"\0".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"ringmpi-emulator-{os.getuid()}-{digest}"
    if folder.exists() and folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} is somebody else's")
    with one_at_a_time(folder):
        if not folder.exists():
            _gather(sources, folder)
    return folder


def _gather(sources, folder):
    """Put the sources in one folder, the emulator's platform.cuh last, in place of the GPU's; compile the header."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as parent:
        made = Path(parent) / "sources"
        made.mkdir()
        for source in sources:
            shutil.copy(source, made / source.name)
        subprocess.run([COMPILER, *OPTIONS, "-x", "c++-header", "emulator.h"], cwd=made, check=True, timeout=300)
        made.rename(folder)


@functools.cache
def function(file, name):
    """Compile kernel `name` of `file`, or load it; a function that runs it on a grid."""
    folder = _folder()
    path = folder / f"{hashlib.sha256(f'{file} {name}'.encode()).hexdigest()[:16]}.so"
    with one_at_a_time(path):
        if not path.exists():
            _compile(file, name, path)
    return ctypes.CDLL(str(path)).run


def _compile(file, name, path):
    code = (f'#include "emulator.h"\n#include "{file}"\n'
            'extern "C" void run(const unsigned* grid, unsigned threads, size_t shared, unsigned seed, '
            f"void** arguments) {{ emulator::run(grid, threads, shared, seed, &{name}, arguments); }}\n")
    temporary = path.with_suffix(f".{os.getpid()}")
    subprocess.run([COMPILER, *OPTIONS, "-shared", "-x", "c++", "-", "-o", temporary],
                   input=code, text=True, cwd=path.parent, check=True, timeout=300)
    temporary.rename(path)


def layout_source():
    """C++ that compiles only if the structs of the kernels lie in memory as the library lays them out."""
    lines = ['#include "score.cuh"', '#include "rows.cuh"', "static_assert(sizeof(VisibleColumns) == 4 * 4);"]
    for name, dtype in STRUCTS.items():
        lines.append(f"static_assert(sizeof({name}) == {dtype.itemsize});")
        lines += [f"static_assert(__builtin_offsetof({name}, {field}) == {dtype.fields[field][1]});"
                  for field in dtype.names]
    return "\n".join(lines) + "\n"


def compile_layout():
    """Compile `layout_source`; an error of g++ if it does not."""
    require_compiler()
    subprocess.run([COMPILER, *OPTIONS, "-fsyntax-only", "-x", "c++", "-"], input=layout_source(), text=True,
                   cwd=_folder(), check=True, timeout=300)


class EmulatedDevice(FakeDevice, Device):
    """A lazy device that runs the real kernels, and copies between host and device in the pieces of `Device`."""

    array = Device.array
    host = Device.host

    def __init__(self, seed=0, capability=(9, 0), shared_bytes=227 * 1024, shared_bytes_processor=228 * 1024):
        require_compiler()
        super().__init__(seed)
        self.capability = capability
        self.shared_bytes = shared_bytes
        self.shared_bytes_processor = shared_bytes_processor
        self.launched = []
        self.cache = {}
        self._staging, self._free = [], []
        self._next_piece = 0

    def compile(self, path, names, options):
        return [(name, function(path.name, name)) for name in names]

    def compile_for(self, architecture, path, name, options):
        return name, function(path.name, name)

    def tensor_map(self, x, box):
        made = np.zeros(1, MAP)
        made["address"], made["sizes"], made["strides"] = x.data.ptr, x.shape[::-1], x.strides[::-1]
        made["box"] = tuple(box)[::-1]
        if x.ndim != 3 or x.itemsize != 2 or x.data.ptr % 16 or any(stride % 16 for stride in x.strides[:-1]):
            raise ValueError("cuTensorMapEncodeTiled would refuse this")
        if not x.flags.c_contiguous or box[-1] * 2 > 128 or max(box) > 256:
            raise ValueError("cuTensorMapEncodeTiled would refuse this")
        return made

    def seconds(self, work):
        start = time.perf_counter()
        work()
        self.caller_stream().synchronize()
        return time.perf_counter() - start

    def launch(self, kernel, grid, threads, shared_bytes, arguments, stream):
        name, compiled = kernel
        self.launched.append((name, grid, threads, shared_bytes))
        super().launch(functools.partial(run, compiled), grid, threads, shared_bytes, arguments, stream)


def run(compiled, grid, threads, shared_bytes, arguments, seed=0):
    """Run a compiled kernel to its end; arguments are fake arrays, NumPy scalars and structs."""
    # An array is passed as its address, others as they are; the kernel gets the address of each.
    plain = (x.value if isinstance(x, Struct) else x.data.ptr if isinstance(x, FakeArray) else x for x in arguments)
    values = [np.array(x) for x in plain]
    addresses = (ctypes.c_void_p * len(values))(*(x.ctypes.data for x in values))
    sizes = (ctypes.c_uint * 3)(*grid, *[1] * (3 - len(grid)))
    compiled(sizes, ctypes.c_uint(threads), ctypes.c_size_t(shared_bytes), ctypes.c_uint(seed), addresses)
