"""Torch's kernels in the place of ours, as `gpu_kernels` takes them: a part of `gpu_first.py`."""

import itertools

import numpy as np
import one_block
from gpu_answers import EMULATED, arrays, attempt, errors_of, exact, intervals, within
from gpu_right import bounds

from ringmpi import device
from ringmpi.backends import open_backend
from ringmpi.backends.cuda import library as torch_kernels
from ringmpi.dtypes import DTYPES

TYPES = ("bfloat16",) if EMULATED else ("bfloat16", "float16")
DIMS = (16,) if EMULATED else (128, 64, 256, 40)
CASES = [(2, 1, 16)] if EMULATED else [(8, 2, 128), (3, 3, 64)]
QUERIES, KEYS = (60, 150) if EMULATED else (2000, 4500)
TOKENS, SPOILT = (200, 110) if EMULATED else (2048, 1100)


def library():
    """Which kernels are taken here, and gradients by them: of masks, in blocks, of grouped heads."""
    if EMULATED:
        from test_library import on_cpu
        torch_kernels.FEWEST_PAIRS = torch_kernels.LEAST = 1
        torch_kernels.kernels = lambda gpu: [on_cpu()]
    for dtype, dim in itertools.product(TYPES, DIMS):
        attempt("library", f"found: {dtype} dim {dim}", lambda dtype=dtype, dim=dim: found(dtype, dim))
    gpu = open_backend("cuda", 1, device.open_device(0), gpu_kernels="library")
    masks(gpu, CASES, TYPES, ("causal", "full", "window", "documents", "random"))
    attempt("library", "how far a NaN comes", lambda: unseen_nan(gpu))
    if not EMULATED:                   # the one that is second choice here
        every = torch_kernels.kernels
        torch_kernels.kernels = lambda gpu: every(gpu)[1:]
        gpu.device.cache.pop(torch_kernels.FOUND)
        attempt("library", "found: the second choice", lambda: found("bfloat16", 128))
        masks(gpu, CASES[:1], TYPES[:1], ("causal", "full", "documents"))


def masks(gpu, cases, dtypes, names):
    """Gradients of a block with some masks."""
    for (heads, kv_heads, dim), dtype in itertools.product(cases, dtypes):
        q, k, v, dout = arrays(0, dtype, *((n, h, dim) for n, h in (
            (QUERIES, heads), (KEYS, kv_heads), (KEYS, kv_heads), (QUERIES, heads))))
        for mask in names:
            block = q, k, v, *intervals(mask, QUERIES, KEYS), dim**-0.5
            attempt("library", f"{dtype} {heads}/{kv_heads} heads dim {dim} {mask}",
                    lambda block=block, dtype=dtype, dout=dout: gradients(gpu, dtype, block, dout))


def found(dtype, dim):
    """Which kernel was found right."""
    gpu = open_backend("cuda", 1, device.open_device(0), gpu_kernels="library")
    gpu.prepare(DTYPES[dtype], np.dtype(np.float32), dim, dim, backward=True)
    return {"ok": gpu.wants_out(DTYPES[dtype], np.dtype(np.float32), dim, dim, True)}


def gradients(gpu, dtype, block, dout):
    """Errors in two blocks of keys, and which results have the same bits again."""
    got, again = (one_block.run(gpu, *block, {}, blocks=2, dout=dout) for _ in range(2))
    same = {name: bool((again[name] == x).all()) for name, x in got.items()}
    return within(errors_of(got, exact(*block, dout)), bounds(dtype, got)) | {
        "by": gpu.differentiated_by, "the same bits": same}


def unseen_nan(gpu):
    """The first row that is NaN, and how many are, where a key or a value is: causal, so that rows before it do not
    see it. Torch's kernels let it reach rows of its tile."""
    q, k, v, dout = arrays(1, "bfloat16", *[(TOKENS, 2, DIMS[0])] * 4)
    reached = {}
    for name in ("k", "v"):
        spoilt = {"k": k.copy(), "v": v.copy()}
        spoilt[name][SPOILT] = np.nan
        got = one_block.run(gpu, q, spoilt["k"], spoilt["v"], *intervals("causal", TOKENS, TOKENS), 0.09, {}, dout=dout)
        for of in ("out", "dq"):
            rows = np.flatnonzero(np.isnan(got[of].astype(float)).any(axis=(1, 2)))
            reached[f"{of} by {name}"] = [int(rows[0]), len(rows)]
    right = all(reached[f"out by {name}"] == [SPOILT, TOKENS - SPOILT] for name in ("k", "v"))
    return {"ok": right and all(first > SPOILT - 128 for first, _ in reached.values()), "NaN at": SPOILT,
            "first row, and rows": reached}
