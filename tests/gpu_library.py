"""Torch's own kernels in the place of ours: a part of `gpu_first.py`.

Private operators of torch give a block's result beside its log-sum-exp, and gradients from those of the whole, so that
blocks can be merged exactly, but for rounding each to 16 bits. What does that cost in accuracy, and what do they take?
"""

import itertools
import statistics
import time
from typing import NamedTuple

import numpy as np
import one_block
import torch
from gpu_answers import EMULATED, arrays, attempt, errors_of, exact, intervals, within
from gpu_right import bounds

from ringmpi import device
from ringmpi.backends import open_backend
from ringmpi.dtypes import DTYPES

HEADS = 2 if EMULATED else 8
TOKENS, DIM, BLOCKS = (128, 16, 4) if EMULATED else (4096, 128, 8)
BOUND = 2.0**-6               # of errors: two roundings to bfloat16, and then some
REPEAT = 3 if EMULATED else 20
ATEN = torch.ops.aten


class Library(NamedTuple):
    """Two functions: (q, k, v, causal) to (out, lse, what the other wants), and back to the gradients of q, k and v."""

    forward: object
    backward: object


def _flash_backward(dout, q, k, v, out, lse, causal, rest):
    """With the numbers that the forward pass gave beside (out, lse): lengths, and the random state."""
    lengths, (seed, offset) = rest[:4], rest[4:6]
    return ATEN._scaled_dot_product_flash_attention_backward(dout, q, k, v, out, lse, *lengths, 0.0, causal, seed,
                                                             offset)


def _cudnn_backward(dout, q, k, v, out, lse, causal, rest):
    lengths, (seed, offset) = rest[:4], rest[4:6]
    return ATEN._scaled_dot_product_cudnn_attention_backward(dout, q, k, v, out, lse, seed, offset, None, *lengths, 0.0,
                                                             causal)


def _forward(operator, *before):
    def call(q, k, v, causal):
        out, lse, *rest = operator(q, k, v, *before, 0.0, causal)
        return out, lse, rest
    return call


ON_CPU = {"flash for CPUs": Library(
    _forward(ATEN._scaled_dot_product_flash_attention_for_cpu),
    lambda dout, q, k, v, out, lse, causal, rest: ATEN._scaled_dot_product_flash_attention_for_cpu_backward(
        dout, q, k, v, out, lse, 0.0, causal))}
ON_GPU = {"flash": Library(_forward(ATEN._scaled_dot_product_flash_attention), _flash_backward),
          "cudnn": Library(_forward(ATEN._scaled_dot_product_cudnn_attention, None, True), _cudnn_backward)}


def library():
    """What the library takes of torch, and whether it is right; errors of merged blocks, and seconds."""
    if not EMULATED:
        found_and_right()
    truth = Truth()
    for name, kernels in (ON_CPU if EMULATED else ON_GPU).items():
        case = f"torch {name}, bfloat16 dim {DIM}, {BLOCKS} blocks of {TOKENS // BLOCKS} keys merged"
        attempt("library", case, lambda kernels=kernels: truth.errors(kernels))
        for direction in ("forward", "backward"):
            attempt("library", f"torch {name} {direction}: seconds",
                    lambda kernels=kernels, direction=direction: speed_of(kernels, direction))


def found_and_right():
    """Which kernels `gpu_kernels` takes here, and gradients by them: of masks, in blocks, of grouped heads."""
    for dtype, dim in itertools.product(("bfloat16", "float16"), (128, 64, 256, 96, 40)):
        def find(dtype=dtype, dim=dim):
            gpu = open_backend("cuda", 1, device.open_device(0), gpu_kernels="library")
            gpu.prepare(DTYPES[dtype], np.dtype(np.float32), dim, dim, backward=True)
            return {"ok": True, "kernels": gpu.gradient_kernels(DTYPES[dtype], dim)}
        attempt("library-right", f"found: {dtype} dim {dim}", find)
    gpu = open_backend("cuda", 1, device.open_device(0), gpu_kernels="auto")
    n_q, n_k = 2000, 4500
    for (heads, kv_heads, dim), dtype in itertools.product([(8, 2, 128), (3, 3, 64)], ("bfloat16", "float16")):
        q, k, v, dout = arrays(0, dtype, *((n, h, dim) for n, h in (
            (n_q, heads), (n_k, kv_heads), (n_k, kv_heads), (n_q, heads))))
        for mask in ("causal", "full", "window", "documents", "random"):
            block = q, k, v, *intervals(mask, n_q, n_k), dim**-0.5

            def check(block=block, dtype=dtype, dout=dout):
                gpu.prepare(block[0].dtype, np.dtype(np.float32), block[0].shape[2], block[0].shape[2], backward=True)
                got, again = (one_block.run(gpu, *block, {}, blocks=2, dout=dout) for _ in range(2))
                answer = within(errors_of(got, exact(*block, dout)), bounds(dtype, got))
                return answer | {"kernels": gpu.gradient_kernels(block[0].dtype, block[0].shape[2]),
                                 "the same bits": {name: bool((again[name] == x).all()) for name, x in got.items()}}
            attempt("library-right", f"{dtype} {heads}/{kv_heads} heads dim {dim} {mask}", check)
    attempt("library-right", "NaN of a key that some do not see", lambda: unseen_nan(gpu))


def unseen_nan(gpu):
    """How far a NaN of a key comes, among the queries that do not see it: the first of those that it reaches."""
    n, at = 2048, 1100
    q, k, v, dout = arrays(1, "bfloat16", *[(n, 2, 128)] * 4)
    found = {}
    for name, x in (("k", k), ("v", v)):
        spoilt = x.copy()
        spoilt[at] = np.nan
        block = q, spoilt if name == "k" else k, spoilt if name == "v" else v, *intervals("causal", n, n), 0.09
        got = one_block.run(gpu, *block, {}, dout=dout)
        found[name] = {}
        for y in ("out", "dq", "dk", "dv"):
            rows = np.flatnonzero(np.isnan(got[y].astype(float)).any(axis=(1, 2)))
            found[name][y] = [int(rows[0]), len(rows)] if len(rows) else []
    clean = all(not rows or rows[0] >= at for of in found.values() for y, rows in of.items() if y in ("out", "dq"))
    return {"ok": True, "reaches no query that does not see it": clean, f"first and number of rows, NaN at {at}": found}


class Truth:
    """A causal case, and its result and gradients in float64.

    The last of equal shards of the queries are attended to, as on the last of as many ranks: all blocks of keys but the
    last are wholly visible.
    """

    def __init__(self):
        rows = TOKENS // BLOCKS
        shape = TOKENS, HEADS, DIM
        q, k, v = arrays(0, "bfloat16", *[shape] * 3)
        begin, end = (x[-rows:] for x in intervals("causal", TOKENS, TOKENS))
        q, dout = q[-rows:], arrays(1, "bfloat16", (rows, HEADS, DIM))[0]
        self.want = exact(q, k, v, begin, end, DIM**-0.5, dout)
        self.q, self.k, self.v, self.dout = (_to_torch(x) for x in (q, k, v, dout))

    def errors(self, kernels):
        """Largest errors of the merged result, of lse, and of the gradients that follow from them block by block."""
        blocks, rests, out, lse = self._merge(kernels)
        rounded = out.to(self.q.dtype)
        grads = [kernels.backward(self.dout, self.q, k, v, rounded, lse.reshape(shape), causal, rest)
                 for (k, v, causal), (rest, shape) in zip(blocks, rests, strict=True)]
        dk, dv = (torch.cat([block[at] for block in grads], dim=2) for at in (1, 2))
        found = {"out": _to_numpy(out), "lse": lse[0].cpu().numpy().T,
                 "dq": _to_numpy(sum(dq.float() for dq, _, _ in grads)), "dk": _to_numpy(dk), "dv": _to_numpy(dv)}
        errors = errors_of(found, self.want)
        errors["out rounded again"] = errors_of({"out": _to_numpy(rounded)}, self.want)["out"]
        return {"ok": all(error <= (1e-3 if name == "lse" else BOUND) for name, error in errors.items()),
                "errors": errors}

    def _merge(self, kernels):
        """Give the blocks, what the backward pass wants of each (lse in its shape), and the merged result and lse."""
        width = TOKENS // BLOCKS
        blocks, rests, out, lse = [], [], None, None
        for at in range(BLOCKS):
            keys = slice(at * width, (at + 1) * width)
            blocks.append((self.k[:, :, keys], self.v[:, :, keys], at == BLOCKS - 1))
            more, more_lse, rest = kernels.forward(self.q, *blocks[-1])
            out, lse = merged(out, lse, more.float(), more_lse.reshape(self.q.shape[:3]).float())
            rests.append((rest, more_lse.shape))
        return blocks, rests, out, lse


def merged(out, lse, more, more_lse):
    """Merge a block's result into that of the blocks before it."""
    if out is None:
        return more, more_lse
    both = torch.logaddexp(lse, more_lse)
    return out * torch.exp(lse - both)[..., None] + more * torch.exp(more_lse - both)[..., None], both


def speed_of(kernels, direction):
    """Seconds of one wholly visible block, and of the same with the merge, as the host sees them after a warm-up."""
    shape = (64 if EMULATED else 8192), (2 if EMULATED else 16), DIM
    q, k, v, dout = (_to_torch(x) for x in arrays(2, "bfloat16", *[shape] * 4))
    out, lse, rest = kernels.forward(q, k, v, False)
    state = out.float(), lse.reshape(q.shape[:3]).float()
    calls = {"block": lambda: kernels.backward(dout, q, k, v, out, lse, False, rest)}
    products = 5
    if direction == "forward":
        products = 2
        calls = {"block": lambda: kernels.forward(q, k, v, False),
                 "block and merge": lambda: _and_merge(kernels, q, k, v, state)}
    seconds = {name: _median(call) for name, call in calls.items()}
    flop = 2 * products * shape[1] * DIM * shape[0]**2
    return {"ok": True, "shape": shape, "ms": {name: 1e3 * s for name, (s, _) in seconds.items()},
            "spread": {name: spread for name, (_, spread) in seconds.items()},
            "TFLOP/s": {name: flop / s / 1e12 for name, (s, _) in seconds.items()}}


def _and_merge(kernels, q, k, v, state):
    out, lse, _ = kernels.forward(q, k, v, False)
    return merged(*state, out.float(), lse.reshape(q.shape[:3]).float())


def _median(call):
    """Median seconds of a call, of runs of four, and the spread."""
    times = []
    for _ in range(REPEAT + 1):
        _wait()
        start = time.perf_counter()
        for _ in range(4):
            call()
        _wait()
        times.append((time.perf_counter() - start) / 4)
    median = statistics.median(times[1:])
    return median, (max(times[1:]) - min(times[1:])) / median


def _wait():
    if not EMULATED:
        torch.cuda.synchronize()


def _to_torch(x):
    """Give an array as torch's kernels want it: (1, heads, n, dim)."""
    there = torch.from_numpy(x.view("i2")).view(torch.bfloat16).transpose(0, 1)[None].contiguous()
    return there if EMULATED else there.cuda()


def _to_numpy(x):
    return x[0].transpose(0, 1).float().cpu().numpy()
