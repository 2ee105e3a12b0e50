"""Are the kernels right: the parts of `gpu_first.py` that compare one block's results with float64."""

import itertools
import os
import subprocess
import sys
import time

import numpy as np
import one_block
import oracle
from gpu_answers import EMULATED, arrays, attempt, backend, errors_of, exact, intervals, say, within

from ringmpi import Grid, Mask
from ringmpi.backends.cuda.backend import BACKWARD_TESTS, FORWARD_TESTS, HOPPER_TESTS
from ringmpi.backends.cuda.self_test import SelfTest
from ringmpi.dtypes import DTYPES, TENSOR_TOLERANCE, accumulator

TOGETHER = max(1, len(os.sched_getaffinity(0)) - 2)      # proofs: compiling takes a core each
CASE_SECONDS = 80.0                                      # of a proof, which compiles
NARROW = ("bfloat16", "float16")
LSE = {"float64": 1e-13, "float32": 4e-6, "bfloat16": 4e-6, "float16": 4e-6}


def prove(hopper):
    """Every kernel on the cases that it is tested by before it is used, the common ones first, side by side."""
    waiting = proofs(hopper)
    running = []
    while waiting or running:
        while waiting and len(running) < TOGETHER:
            case = waiting.pop(0)
            command = [sys.executable, os.path.join(os.path.dirname(__file__), "gpu_first.py"), "proof", *case]
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL,
                                       env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"})
            running.append((" ".join(case), time.monotonic() + CASE_SECONDS, process))
        running = [job for job in running if _goes_on(*job)]
        time.sleep(0.05)


def _goes_on(case, latest, process):
    """Whether a proof still runs; say so if it ended, or had to be ended, without an answer of its own."""
    if process.poll() is None and time.monotonic() < latest:
        return True
    if process.poll() is None:
        process.kill()
        say(part="prove", case=case, ok=False, error=f"no end after {CASE_SECONDS:.0f} s: compiling, or a hang")
    elif process.returncode not in (0, 1):
        say(part="prove", case=case, ok=False, error=f"ended with code {process.returncode}: see log.txt")
    process.wait()
    return False


def proofs(hopper):
    """Arguments of `proof`."""
    if EMULATED:
        return [("bfloat16", "16", "16", "plain", "forward")]
    if hopper:
        return [(dtype, *dims, "plain", "forward") for dims in itertools.product(("128", "64"), repeat=2)
                for dtype in NARROW]
    found = [(dtype, dim, dim, "plain", way) for dim in ("128", "64") for way in ("forward", "backward")
             for dtype in (*NARROW, "float32", "float64")]
    kinds = ("bfloat16", "float32", "float64")
    found += [(dtype, "64", "64", "functions", way) for way in ("forward", "backward") for dtype in kinds]
    found += [(dtype, "64", "64", scores, way) for scores in ("bias", "several", "relative")
              for way in ("forward", "backward") for dtype in ("bfloat16", "float32")]
    return found + [(dtype, "256", "256", "plain", way) for dtype in kinds for way in ("forward", "backward")]


def proof(dtype, dim, dim_v, scores, way):
    """One of them, for every size that chooses a kernel of its own; whether all were right."""
    kind, backward = DTYPES[dtype], way == "backward"
    bound = {8: 1e-12, 4: 2e-5, 2: 5e-2 if backward else 2e-2}[kind.itemsize]
    gpu = backend()
    sizes = BACKWARD_TESTS if backward else HOPPER_TESTS if gpu.hopper and scores == "plain" else FORWARD_TESTS
    found = []
    for n_q, n_k in sizes:
        def check(n_q=n_q, n_k=n_k):
            test = SelfTest(n_q, n_k, int(dim), int(dim_v), kind, accumulator(kind), scores != "functions", backward,
                            biased=scores == "bias", relative=scores == "relative", several=scores == "several")
            with gpu.device.current():
                error = test.error(gpu)
            return {"ok": error <= bound, "errors": {"all": error}, "bound": bound,
                    "files": sorted({key[0] for key in gpu.device.cache if isinstance(key, tuple)})}
        case = f"{dtype} {dim}/{dim_v} {scores} {way} {n_q}x{n_k}"
        found.append(attempt("prove", named(case, gpu), check))
    return all(found)


def named(case, gpu):
    """Say of a case which kernel is asked for."""
    return f"{case}, hopper" if gpu.hopper else case


def masks(hopper):
    """Masks, grouped heads, blocks: the result, lse and the gradients."""
    gpu = backend()
    sizes = [(4, 2, 16)] if EMULATED else [(8, 2, 128), (3, 3, 64)]
    dtypes = NARROW if hopper else ("bfloat16",) if EMULATED else (*NARROW, "float32", "float64")
    n_q, n_k = (60, 150) if EMULATED else (1000, 2300)
    for (heads, kv_heads, dim), dtype in itertools.product(sizes, dtypes):
        q, k, v, dout = arrays(0, dtype, *((n, h, dim) for n, h in (
            (n_q, heads), (n_k, kv_heads), (n_k, kv_heads), (n_q, heads))))
        for mask in ("causal", "full", "window", "documents", "random"):
            block = q, k, v, *intervals(mask, n_q, n_k), dim**-0.5

            def check(block=block, dtype=dtype, dout=None if hopper else dout):
                got = one_block.run(gpu, *block, {}, blocks=3, dout=dout)
                return within(errors_of(got, exact(*block, dout)), bounds(dtype, got))
            attempt("masks", named(f"{dtype} {heads}/{kv_heads} heads dim {dim} {mask}", gpu), check)
    if not hopper:
        many_intervals(gpu)
        biased_keys(gpu)
        by_distance(gpu)
    if not hopper and not EMULATED:
        few_queries(gpu)


def bounds(dtype, names):
    """How large errors may be, by name: results are rounded, and weights too before."""
    return {name: LSE[dtype] if name == "lse" else 2 * TENSOR_TOLERANCE[dtype] if name == "out"
            else 2 * one_block.BOUND[dtype] for name in names}


def many_intervals(gpu):
    """Windows over a grid, a tree of documents, and documents that come again."""
    shape, dim = ((3, 7, 6), 16) if EMULATED else ((12, 9, 16), 64)
    n = int(np.prod(shape))
    edges = (0, n // 6, n // 2, n // 2 + n // 5, n)
    masks = {"grid": Grid(shape, (1, 2, 3), (False, True, True)),
             "tree": Mask(documents=edges, parents=(-1, 0, 1, 0), causal=True),
             "documents that come again": Mask(document_ids=np.arange(n) * 7 // 4 % 5)}
    for dtype, (name, mask) in itertools.product(("bfloat16",) if EMULATED else DTYPES, masks.items()):
        q, k, v, dout = arrays(6, dtype, *((n, heads, dim) for heads in (4, 2, 2, 4)))
        begin, end = (np.array(edge) for edge in zip(*mask.bounds(np.arange(n), n, n), strict=True))
        block = q, k, v, begin, end, dim**-0.5

        def check(block=block, dtype=dtype, dout=dout):
            got = one_block.run(gpu, *block, {}, blocks=2, dout=dout)
            return within(errors_of(got, exact(*block, dout)), bounds(dtype, got))
        attempt("masks", f"{dtype} {name}: {len(begin)} intervals", check)


def by_distance(gpu):
    """A bias by distance, of positions and of the axes of a grid, and its gradient; the same bits each time."""
    n_q, n_k, dim = (60, 150, 16) if EMULATED else (700, 1500, 64)
    for dtype, kind in itertools.product(("bfloat16",) if EMULATED else ("bfloat16", "float32", "float64"),
                                         ("relative of neighbours", "axes and relative")):
        q, k, v, dout = arrays(7, dtype, *((n, h, dim) for n, h in ((n_q, 4), (n_k, 2), (n_k, 2), (n_q, 4))))
        begin, end = intervals("causal", n_q, n_k)
        score, _ = oracle.functions(kind, 4, np.arange(n_q) + n_k - n_q, np.arange(n_k))
        block = q, k, v, begin, end, dim**-0.5

        def check(block=block, dtype=dtype, dout=dout, score=score):
            got, again = (_with_tables(one_block.run(gpu, *block, score, blocks=3, dout=dout)) for _ in range(2))
            want = _with_tables(oracle.dense(*block[:3], oracle.sees(*block[3:5], len(block[1])), block[5], dout=dout,
                                             **score))
            same = all((again[name] == x).all() for name, x in got.items())
            answer = within(errors_of(got, want), {name: bounds(dtype, ["dq"])["dq"] for name in got}
                            | bounds(dtype, [name for name in got if name[:4] != "drel"]))
            return answer | {"ok": answer["ok"] and same, "the same bits": same}
        attempt("masks", f"{dtype} a bias by distance, {kind}", check)


def _with_tables(found):
    """Give what `dense` gives with the gradient of each table by itself."""
    return {name: x for name, x in found.items() if name != "drelative"} | {
        f"drelative {axis}": x for axis, x in enumerate(found["drelative"])}


def biased_keys(gpu):
    """A bias of each key and head, which leaves some out, and its gradient."""
    n_q, n_k, dim = (60, 150, 16) if EMULATED else (700, 1500, 64)
    score = {"key_bias": oracle.key_bias("left out by head", 4, n_k)}
    for dtype in ("bfloat16",) if EMULATED else ("bfloat16", "float32"):
        q, k, v, dout = arrays(4, dtype, *((n, h, dim) for n, h in ((n_q, 4), (n_k, 2), (n_k, 2), (n_q, 4))))
        begin, end = intervals("causal", n_q, n_k)
        block = q, k, v, begin, end, dim**-0.5

        def check(block=block, dtype=dtype, dout=dout):
            got = one_block.run(gpu, *block, score, blocks=3, dout=dout)
            j = np.arange(n_k)
            see = (j >= block[3][:, None]) & (j < block[4][:, None])
            want = oracle.dense(*block[:3], see, block[5], dout=dout, **score)
            return within(errors_of(got, want), bounds(dtype, got))
        attempt("masks", f"{dtype} a bias of the keys", check)


def few_queries(gpu):
    """Where keys are split into parts."""
    n_k = 100_000
    for dtype, queries in itertools.product(DTYPES, (1, 16)):
        q, k, v = arrays(1, dtype, (queries, 8, 128), (n_k, 2, 128), (n_k, 2, 128))
        begin, end = np.arange(queries) * 3, n_k - np.arange(queries) * 5

        def check(block=(q, k, v, begin, end, 0.09), dtype=dtype):
            got = one_block.run(gpu, *block, {})
            return within(errors_of(got, exact(*block)), bounds(dtype, got))
        attempt("masks", f"{dtype} {queries} queries, {n_k} keys", check)


def long(hopper):
    """Races and waits for too little show in long runs: sampled rows, and the same bits each time."""
    gpu = backend()
    n, heads = (300, 2) if EMULATED else (16384, 8)
    dims = (16,) if EMULATED else (128, 64)
    for dtype, dim, mask in itertools.product(("bfloat16",) if hopper or EMULATED else ("bfloat16", "float32"), dims,
                                              ("causal", "full")):
        q, k, v = arrays(2, dtype, *[(n, heads, dim)] * 3)
        begin, end = intervals(mask, n, n)
        rows = np.sort(np.random.default_rng(3).choice(n, 64, replace=False))

        def check(q=q, k=k, v=v, begin=begin, end=end, rows=rows, scale=dim**-0.5, dtype=dtype):
            first, *others = (one_block.run(gpu, q, k, v, begin, end, scale, {}) for _ in range(4))
            same = all((other[name] == x).all() for other in others for name, x in first.items())
            sampled = {name: x[rows] for name, x in first.items()}
            grown = max(1.0, len(k) / 4096)**0.5 if dtype == "float32" else 1.0       # rounding of longer sums
            most = {name: grown * bound for name, bound in bounds(dtype, sampled).items()}
            answer = within(errors_of(sampled, exact(q[rows], k, v, begin[rows], end[rows], scale)), most)
            return answer | {"ok": answer["ok"] and same, "the same bits": same}
        attempt("long", named(f"{dtype} dim {dim} {mask} {n}x{n}", gpu), check)
