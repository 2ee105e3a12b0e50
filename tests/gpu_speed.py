"""How fast: the parts of `gpu_first.py` that measure, beside torch in the same process or beside one rank.

The cases are run one by one, through what `ringmpi bench` runs, so that each is known when it is measured.
"""

import argparse
import contextlib
import io
from dataclasses import dataclass

from gpu_answers import EMULATED, attempt

from ringmpi.commands import bench, bench_gpu
from ringmpi.commands.bench_cases import chosen
from ringmpi.commands.bench_ring import ALONE, measure_ring
from ringmpi.environment import hopper_kernel, launched_rank


@dataclass(frozen=True)
class Question:
    """Options of `ringmpi bench`, what the figure is compared with, and the least ratio that is wanted.

    `beside` names kernels of torch, whose fastest counts; without, the figure is a fraction of what a copy moves.
    """

    options: str
    beside: tuple
    bar: float
    aim: float
    note: str = ""


KERNEL = "kernel --backend cuda"
FAST = ("torch flash", "torch cudnn")
QUESTIONS = {
    "bfloat16": Question(f"{KERNEL} --dtype bfloat16 --dim 128 64 --mask full causal --heads 16 --shape 16384x16384",
                         FAST, 0.75, 1.0),
    "backward": Question(f"{KERNEL} --dtype bfloat16 --dim 128 64 --mask full causal --heads 16 --shape 8192x8192 "
                         "--pass backward", FAST, 0.9, 1.0),
    "backward-own": Question(f"{KERNEL} --dtype bfloat16 --dim 128 64 --mask full causal --heads 16 --shape 8192x8192 "
                             "--pass backward --gpu-kernels own", FAST, 0.25, 0.3, "our own kernels, no library's"),
    "float32": Question(f"{KERNEL} --dtype float32 --dim 128 --mask full --heads 8 --shape 8192x8192 "
                        "--pass forward backward", ("torch efficient",), 0.9, 1.3,
                        "ours multiplies in float32; torch's efficient kernel on tensor cores, as three products of "
                        "TF32 for one (3xTF32)"),
    "float64": Question(f"{KERNEL} --dtype float64 --dim 128 --mask full --heads 4 --shape 8192x8192 "
                        "--pass forward backward", ("torch math",), 1.5, 3.0, "torch's only kernel for float64"),
    "decode": Question(f"{KERNEL} --dtype bfloat16 --dim 128 --mask full --heads 8 --kv-heads 8 --shape 1x262144 "
                       "--kernels ringmpi", (), 0.8, 0.9, "bytes of K and V, over those that a copy reads and writes"),
    "decode-long": Question(f"{KERNEL} --dtype bfloat16 --dim 128 --mask full --heads 8 --kv-heads 2 --shape "
                            "1x524288 1x1048576 --kernels ringmpi", (), 0.8, 0.9, "as decode, with grouped heads"),
}
RING = "ring --backend cuda --allow-gpu-sharing --gpu-transport staged --dim 128 --dtype bfloat16 --heads 8 --causal "
RINGS = [Question(f"{RING}--repeat 3 --timeout 60 {more}", (), 1.1, 1.02,
                  "wall seconds of the slower of 2 ranks on one GPU, over those of one rank with all the work: at most")
         for more in ("--tokens 65536", "--tokens 131072", "--tokens 65536 --pass backward")]
SMALL = {"kernel": ["--dim", "16", "--heads", "2", "--kv-heads", "2", "--mask", "full", "--dtype", "bfloat16"],
         "ring": ["--dim", "16", "--heads", "2", "--tokens", "64"]}


def options(question, *more):
    """Give the arguments of `ringmpi bench` as its command reads them; small ones on an emulated GPU."""
    words = question.options.split()
    if EMULATED:
        words += [*SMALL[words[0]], *(["--shape", "1x40" if "1x" in question.options else "40x40"]
                                      if words[0] == "kernel" else [])]
    parser = argparse.ArgumentParser(prog="ringmpi bench")
    bench.add_arguments(parser)
    read = parser.parse_args([*words, *more])
    return read, f"{'' if hopper_kernel() else 'RINGMPI_HOPPER=0 '}ringmpi bench {' '.join([*words, *more])}"


def speed(name, *more):
    """One of `QUESTIONS`, case by case, with more options of `ringmpi bench kernel`."""
    if EMULATED:
        bench_gpu.COPY_BYTES = 2**16
    question = QUESTIONS[name]
    asked, command = options(question, *more)
    asked.kernels = asked.kernels or list(bench.KERNELS["cuda"])
    for dtype, dim, mask, shape in chosen(asked):
        for direction in asked.passes:
            one = argparse.Namespace(**{**vars(asked), "dtype": [dtype], "dim": [dim], "mask": [mask], "shape": [shape],
                                        "passes": [direction]})
            case = f"{dtype} dim {dim} {mask} {shape[0]}x{shape[1]} {direction}{'' if hopper_kernel() else ', common'}"
            attempt("speed", f"{name}: {case}", lambda one=one: measured(question, one, command))


def measured(question, one, command):
    """Measure one case; the rows of the table, and the ratio to what it is compared with."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        rows, more = bench_gpu.measure_gpu_kernels(one)
    return {**compared(question, rows), "command": command, "rows": rows, "more": more, "said": said.getvalue()}


def compared(question, rows):
    """Give the ratio: the fastest of torch's kernels over ours in seconds, or the fraction of a copy's bandwidth."""
    milliseconds = {row["kernel"]: row["ms"] for row in rows}
    peers = {name: milliseconds[name] for name in question.beside if name in milliseconds}
    ratio = None
    if peers:
        ratio = min(peers.values()) / milliseconds["ringmpi"]
    elif rows and not question.beside:
        ratio = rows[0]["of copy"]
    found = {"ours": rows[0] if rows else None, "ratio": ratio, "beside": min(peers, key=peers.get, default=None),
             "note": question.note, "bar": question.bar, "aim": question.aim,
             "reached": ratio is not None and ratio >= question.bar}
    return found | {"ok": ratio is not None or (EMULATED and bool(rows))}


def ring():
    """Seconds of two ranks on this GPU, in each layout, over those of one rank with all the work."""
    for question in RINGS:
        asked, command = options(question)
        if launched_rank():
            measure_ring(asked)
        else:
            attempt("ring", f"{asked.dtype} dim {asked.dim} {asked.tokens} tokens {asked.which}",
                    lambda question=question, asked=asked, command=command: ratio_of(question, asked, command))


def ratio_of(question, asked, command):
    """Measure a ring; the least ratio of all layouts."""
    rows = measure_ring(asked)
    seconds = {row["layout"]: row["seconds"] for row in rows}
    ratios = {name: taken / seconds[ALONE] for name, taken in seconds.items() if name != ALONE}
    best = min(ratios, key=ratios.get)
    ours = next(row for row in rows if row["layout"] == best)
    return {"ok": True, "ours": ours, "ratio": ratios[best], "beside": f"{ALONE}, layout {best}", "ratios": ratios,
            "bar": question.bar, "aim": question.aim, "reached": ratios[best] <= question.bar, "note": question.note,
            "command": f"mpiexec -n 2 {command}", "rows": rows}
