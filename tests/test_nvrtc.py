"""Every kernel compiles for every architecture with NVRTC, no GPU needed; what ptxas says of registers is bounded."""

import concurrent.futures
import itertools
import multiprocessing
import os
import re

import pytest
from emulate import layout_source

from ringmpi.backends.cuda.instances import best, dkdv_kernels, dq_kernels, forward_kernels
from ringmpi.backends.cuda.sources import kernels_folder
from ringmpi.dtypes import BFLOAT16, DTYPES

nvrtc = pytest.importorskip("cupy_backends.cuda.libs.nvrtc", reason="CuPy brings the interface to NVRTC")
ARCHITECTURES = {"sm_80": (163 * 1024, 164 * 1024), "sm_90a": (227 * 1024, 228 * 1024),
                 "sm_100": (227 * 1024, 228 * 1024)}
MOST_SPILLED = 160            # bytes a thread stores outside its registers, all over the kernel; mostly before its loop
STATE = ["visible_columns",
         *(f"{kernel}<{kind}>" for kernel in ("reset", "combine", "add") for kind in ("float", "double")),
         *(f"{kernel}<{kind}, {wide}>" for kernel in ("finish", "row_delta", "rounded")
           for kind in ("bfloat16", "float16", "float", "double")
           for wide in (("double",) if kind == "double" else ("float", "double"))),
         *(f"{kernel}<{kind}>" for kernel in ("widen", "clear") for kind in ("bfloat16", "float16", "float"))]
# Dtype, dim, rows, plain: of the backward pass, and where not plain of the forward pass with score functions.
GRADIENTS = [*((dtype, dim, 1000, True) for dtype in ("float64", "float32", "bfloat16") for dim in (64, 128)),
             ("bfloat16", 256, 1000, True), ("float32", 256, 10, True), ("float64", 256, 10, True),
             ("bfloat16", 64, 1000, False), ("bfloat16", 128, 1000, False), ("float32", 128, 1000, False),
             ("float64", 128, 1000, False)]
OTHER_GRADIENTS = [case for case in GRADIENTS if case[1] == 128 and case[0] != "float32"]     # not on sm_90a


def instances(architecture):
    """What the backend would choose there: (file, name)."""
    found = {("state.cu", name) for name in STATE}
    dims = {"float64": (64, 128, 256), "float32": (64, 80, 128, 256), "bfloat16": (64, 80, 128, 192, 256),
            "float16": (128,)}
    for dtype, rows in itertools.product(DTYPES, (1, 10, 50, 1000)):
        for dim in dims[dtype]:
            kernel = best(forward_kernels(DTYPES[dtype], dim, dim, rows, 16), *ARCHITECTURES[architecture])
            found.add((kernel.file, kernel.name))
    for dtype, dim, rows, plain in GRADIENTS if architecture == "sm_90a" else OTHER_GRADIENTS:
        kind = DTYPES[dtype]
        chosen = [dq_kernels(kind, dim, dim, rows, 16, plain=plain),
                  *dkdv_kernels(kind, dim, dim, 16, plain=plain)]
        if not plain:
            chosen.append(forward_kernels(kind, dim, dim, rows, 16, plain=False))
        for candidates in chosen:
            kernel = best(candidates, *ARCHITECTURES[architecture])
            found.add((kernel.file, kernel.name))
    for align, dtype in ((2, BFLOAT16), (4, DTYPES["float32"]), (8, DTYPES["float64"])):       # odd dims
        kernel = best(forward_kernels(dtype, 33, 7, 1000, align), *ARCHITECTURES[architecture])
        found.add((kernel.file, kernel.name))
    return sorted(found)


def compile_one(architecture, file, name):
    """Compile; give NVRTC's log, in which ptxas says what the kernel takes."""
    program = nvrtc.createProgram((kernels_folder() / file).read_text(), file, (), ())
    nvrtc.addNameExpression(program, name)
    try:
        nvrtc.compileProgram(program, (f"-arch={architecture}", "--std=c++17", "--ptxas-options=-v",
                                       f"-I{kernels_folder()}", "-ftz=true", "--device-as-default-execution-space"))
    except nvrtc.NVRTCError as error:
        return f"{error}\n{nvrtc.getProgramLog(program)}"
    assert len(nvrtc.getCUBIN(program)) > 1000
    return nvrtc.getProgramLog(program)


def test_structs_lie_as_the_library_lays_them_out():
    program = nvrtc.createProgram(layout_source(), "layout.cu", (), ())
    nvrtc.compileProgram(program, ("-arch=sm_80", "--std=c++17", f"-I{kernels_folder()}",
                                   "--device-as-default-execution-space"))


@pytest.mark.exhaustive
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_compile_and_keep_to_their_registers(architecture):
    wanted = instances(architecture)
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(len(os.sched_getaffinity(0)), mp_context=context) as pool:
        logs = list(pool.map(compile_one, [architecture] * len(wanted), *zip(*wanted, strict=True)))
    for (file, name), log in zip(wanted, logs, strict=True):
        used = re.search(r"Used (\d+) registers", log)
        spilled = re.search(r"(\d+) bytes spill stores", log)
        assert used, f"{architecture} {file} {name}: {log}"
        assert "warning" not in log, f"{architecture} {file} {name}: {log}"
        print(f"{architecture} {file} {name}: {used[1]} registers, {spilled[1]} bytes spilled")  # noqa: T201
        assert int(spilled[1]) <= MOST_SPILLED, f"{architecture} {file} {name}: {spilled[1]} bytes spilled"
