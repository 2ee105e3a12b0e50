"""Every kernel compiles for every architecture with two versions of NVRTC, no GPU needed; what it spills is bounded."""

import concurrent.futures
import itertools
import multiprocessing
import os
import re
import subprocess

import pytest
from emulate import layout_source
from nvrtc_versions import OLDER, complaints, load, older_libraries

from ringmpi.backends.cuda import hopper
from ringmpi.backends.cuda.instances import (
    best,
    dbias_kernels,
    dkdv_kernels,
    dq_kernels,
    drelative_kernels,
    forward_kernels,
)
from ringmpi.backends.cuda.sources import Kind, kernels_folder
from ringmpi.device import OPTIONS
from ringmpi.dtypes import BFLOAT16, DTYPES

nvrtc = pytest.importorskip("cupy_backends.cuda.libs.nvrtc", reason="CuPy brings the interface to NVRTC")
ARCHITECTURES = {"sm_80": (163 * 1024, 164 * 1024), "sm_90a": (227 * 1024, 228 * 1024),
                 "sm_100": (227 * 1024, 228 * 1024)}
# Bytes a thread stores outside its registers, all over the kernel; mostly before its loop.
MOST_SPILLED = {"installed": dict.fromkeys(ARCHITECTURES, 192),
                OLDER: {"sm_80": 160, "sm_90a": 192, "sm_100": 600}}
STATE = ["visible_columns", "add_parts",
         *(f"{kernel}<{kind}>" for kernel in ("reset", "combine", "add", "add_rows", "add_heads",
                                                     "lse_for_weights") for kind in ("float", "double")),
         *(f"{kernel}<{kind}, {wide}>" for kernel in ("finish", "row_delta", "rounded")
           for kind in ("bfloat16", "float16", "float", "double")
           for wide in (("double",) if kind == "double" else ("float", "double"))),
         *(f"widen<{kind}>" for kind in ("bfloat16", "float16", "float")),
         *(f"{kernel}<{kind}>" for kernel in ("find_not_finite", "clear_rows")
           for kind in ("bfloat16", "float16", "float", "double"))]
# Dtype, dim, rows, plain: of the backward pass, and where not plain of the forward pass with score functions, with a
# bias of the keys and without; where dim is 128 of both in canonical order too.
GRADIENTS = [*((dtype, dim, 1000, True) for dtype in ("float64", "float32", "bfloat16") for dim in (64, 128)),
             ("bfloat16", 256, 1000, True), ("float32", 256, 10, True), ("float64", 256, 10, True),
             ("float64", 80, 1000, True),
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
    gradients = GRADIENTS if architecture == "sm_90a" else OTHER_GRADIENTS
    for (dtype, dim, rows, plain), canonical, biased in itertools.product(gradients, (False, True), (False, True)):
        if canonical and dim != 128:
            continue
        kind = DTYPES[dtype], dim, dim
        flags = Kind(plain, canonical, biased)
        chosen = [dq_kernels(*kind, rows, 16, flags), *dkdv_kernels(*kind, 16, flags)]
        if canonical or not plain or biased:
            chosen.append(forward_kernels(*kind, rows, 16, flags))
        if biased:
            chosen.append(dbias_kernels(*kind, 16, flags))
        for candidates in chosen:
            kernel = best(candidates, *ARCHITECTURES[architecture])
            found.add((kernel.file, kernel.name))
    # Several intervals, a bias by distance, and both of these with score functions.
    for (dtype, dim, rows, plain), (relative, several) in itertools.product(gradients, (
            (False, True), (True, False), (True, True))):
        if rows < 1000 or (plain and relative and several):
            continue
        kind = DTYPES[dtype], dim, dim
        flags = Kind(plain, relative=relative, several=several)
        chosen = [forward_kernels(*kind, rows, 16, flags), dq_kernels(*kind, rows, 16, flags),
                  *dkdv_kernels(*kind, 16, flags)]
        if relative:
            chosen.append(drelative_kernels(*kind, 16, flags))
        for candidates in chosen:
            kernel = best(candidates, *ARCHITECTURES[architecture])
            found.add((kernel.file, kernel.name))
    for align, dtype in ((2, BFLOAT16), (4, DTYPES["float32"]), (8, DTYPES["float64"])):       # odd dims
        kernel = best(forward_kernels(dtype, 33, 7, 1000, align), *ARCHITECTURES[architecture])
        found.add((kernel.file, kernel.name))
    if architecture == hopper.ARCHITECTURE:
        for dtype, dim, dim_v in itertools.product(hopper.TYPES, (64, 128), (64, 128)):
            found.add((hopper.FILE, hopper.instance(dtype, dim, dim_v).name))
    return sorted(found)


def compile_one(version, architecture, file, name, source=None):
    """Compile; give NVRTC's log, in which ptxas says what the kernel takes."""
    if version == OLDER:
        assert nvrtc.getVersion() == tuple(int(part) for part in OLDER.split(".")[:2])
    program = nvrtc.createProgram(source or (kernels_folder() / file).read_text(), file, (), ())
    nvrtc.addNameExpression(program, name)
    try:
        nvrtc.compileProgram(program, (f"-arch={architecture}", "--std=c++17", "--ptxas-options=-v",
                                       f"-I{kernels_folder()}", *OPTIONS))
    except nvrtc.NVRTCError as error:
        return f"{error}\n{nvrtc.getProgramLog(program)}"
    assert len(nvrtc.getCUBIN(program)) > 1000
    return nvrtc.getProgramLog(program)


def test_structs_lie_as_the_library_lays_them_out():
    program = nvrtc.createProgram(layout_source(), "layout.cu", (), ())
    nvrtc.compileProgram(program, ("-arch=sm_80", "--std=c++17", f"-I{kernels_folder()}",
                                   "--device-as-default-execution-space"))


def test_remarks_of_ptxas_are_seen():
    """Without its launch bounds the kernel for Hopper can't move registers between warpgroups, which is no warning."""
    made = hopper.instance(BFLOAT16, 64, 64)
    source = (kernels_folder() / hopper.FILE).read_text()
    unbounded = re.sub(r"__launch_bounds__\(.*\)", "", source)
    assert unbounded != source
    log = compile_one("installed", hopper.ARCHITECTURE, hopper.FILE, made.name, unbounded)
    assert "arning" not in log
    assert any("setmaxnreg" in line for line in complaints(log)), log


def compile_all(version, architecture, wanted):
    """Compile in processes of that version."""
    try:
        folder = older_libraries() if version == OLDER else None
    except (OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"NVRTC {OLDER} can't be fetched: {error} {getattr(error, 'stderr', '')}")
    context = multiprocessing.get_context("spawn")
    workers = len(os.sched_getaffinity(0))
    with concurrent.futures.ProcessPoolExecutor(workers, context, initializer=load, initargs=(folder,)) as pool:
        cases = [version] * len(wanted), [architecture] * len(wanted), *zip(*wanted, strict=True)
        return list(pool.map(compile_one, *cases))


@pytest.mark.exhaustive
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("version", MOST_SPILLED)
def test_kernels_compile_and_keep_to_their_registers(version, architecture):
    wanted = instances(architecture)
    logs = compile_all(version, architecture, wanted)
    for (file, name), log in zip(wanted, logs, strict=True):
        used = re.search(r"Used (\d+) registers", log)
        spilled = re.search(r"(\d+) bytes spill stores", log)
        assert used, f"{architecture} {file} {name}: {log}"
        assert not complaints(log), f"{architecture} {file} {name}: {log}"
        print(f"{architecture} {file} {name}: {used[1]} registers, {spilled[1]} bytes spilled")  # noqa: T201
        most = 0 if file == hopper.FILE else MOST_SPILLED[version][architecture]
        if name.endswith("true, false, true, true, false>"):           # all at once: functions, distance, intervals
            most = max(most, 256)
        assert int(spilled[1]) <= most, f"{architecture} {file} {name}: {spilled[1]} bytes spilled"
