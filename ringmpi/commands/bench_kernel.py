"""`bench kernel` on CPUs: every backend, and torch on the same data where it is installed.

The yardsticks (multiply-adds in registers, bytes read from memory) are measured between the runs; the best seen counts.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from ..backends import NAMES, open_backend, reason_missing
from ..backends.products import wish
from ..checks import check_threads
from ..dtypes import accumulator
from ..environment import affinity, require_single_process
from ..score import Score
from ..softmax import State, finish
from .bench_cases import FEW, Case, chosen, interleave, prepare, spread, timed

MEMORY = 2**29              # bytes to measure reading with: more than caches hold


def measure_kernels(arguments: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Measure every case that is asked for; give the rows of the table, and what else is worth keeping. Local."""
    require_single_process("bench kernel")
    threads = check_threads(arguments.threads) or len(affinity())
    backends = {name: open_backend(name, threads) for name in NAMES
                if name in arguments.kernels and reason_missing(name) is None}
    if "numba" in backends:
        backends["numba"].settle(wish(arguments.bfloat16_products), [backends["numba"].ways])
    memory = np.ones(MEMORY // 4, np.float32)

    compile_seconds: dict[str, float] = {}
    rows = []
    for dtype, dim, mask, shape in chosen(arguments):
        if dtype not in compile_seconds:
            start = time.perf_counter()
            for backend in backends.values():
                prepare(backend, dtype, dim, arguments.passes)
                if arguments.key_bias:
                    prepare(backend, dtype, dim, arguments.passes, plain=False)
            compile_seconds[dtype] = time.perf_counter() - start
        case = Case(dtype, dim, mask, shape, arguments.heads, arguments.kv_heads or arguments.heads)
        for direction in arguments.passes:
            rows += _compare(case, direction, backends, threads, arguments, memory)
    more: dict[str, Any] = {"compile_seconds": compile_seconds}
    if "numba" in backends:
        more |= {"bfloat16_products": backends["numba"].products,
                 "float32_products": backends["numba"].float32_products}
    for backend in backends.values():
        backend.close()
    return rows, more


def _compare(case: Case, direction: str, backends: dict[str, Any], threads: int, arguments: argparse.Namespace,
             memory: Any) -> list[dict[str, Any]]:
    """Measure one pass of one case; give a row for each backend, and for torch."""
    from ..backends.numba_.peak import multiply_add_peak, read_bandwidth
    forward = direction == "forward"
    run = _forward if forward else _backward
    plain = Score(case.scale)
    scores = {"": plain}
    if arguments.key_bias:
        biases = 1 if arguments.key_bias == "key" else case.heads
        scores[", key_bias"] = plain.of_key_bias(np.random.default_rng(2).standard_normal(
            (len(case.k), biases)).astype(accumulator(case.q.dtype)))
    runs = {f"{name}{more}": timed(run(case, backend, score)) for name, backend in backends.items()
            for more, score in scores.items()}
    peer = _torch(case, direction, threads) if "torch" in arguments.kernels else None
    if peer:
        runs["torch"] = timed(peer)

    product = _product(case, backends) if forward else str(accumulator(case.q.dtype))
    peaks: list[float] = []
    bandwidths: list[float] = []

    def measure_yardsticks() -> None:
        peaks.append(multiply_add_peak(product, threads, 0.02))
        bandwidths.append(read_bandwidth(threads, memory))

    times = interleave(runs, arguments.repeat, measure_yardsticks)
    medians = {name: statistics.median(column) for name, column in times.items()}
    peak, bandwidth, flop = max(peaks), max(bandwidths), case.flop(direction)
    from_memory = forward and len(case.q) <= FEW and case.bytes > MEMORY // 4
    return [{**case.columns(direction), "threads": threads, "kernel": name, "seconds": t,
             "spread": spread(times[name], t),
             "GFLOP/s": flop / t / 1e9, "peak GFLOP/s": peak / 1e9, "of peak": flop / t / peak,
             "GB/s": case.bytes / t / 1e9, "of read": case.bytes / t / bandwidth if from_memory else None,
             **({"x plain": medians.get(name.removesuffix(", key_bias"), t) / t} if arguments.key_bias else {}),
             "x torch": medians["torch"] / t if "torch" in medians else None} for name, t in medians.items()]


def _product(case: Case, backends: dict[str, Any]) -> str:
    """Say what Numba multiplies with in the forward pass, whose peak is the yardstick: bfloat16 has other ways too."""
    way = backends["numba"].products if case.dtype == "bfloat16" and "numba" in backends else "widen"
    if (way == "pairs" and case.dim % 2 == 0) or (way == "tiles" and len(case.q) > FEW):
        return str(way)
    return str(accumulator(case.q.dtype))


def _forward(case: Case, backend: Any, score: Score) -> Callable[[], object]:
    """Give a call that runs the forward pass of a backend."""
    state = State.empty(len(case.q), case.heads, case.dim, accumulator(case.q.dtype))

    def forward() -> None:
        state.reset()
        for _ in backend.accumulate(state, case.q, case.k, case.v, case.begin, case.end, score):
            pass

    return forward


def _backward(case: Case, backend: Any, score: Score) -> Callable[[], object]:
    """Give a call that runs the backward pass of a backend, from a result of the forward pass."""
    acc_dtype = accumulator(case.q.dtype)
    state = State.empty(len(case.q), case.heads, case.dim, acc_dtype)
    block = case.q, case.k, case.v
    for _ in backend.accumulate(state, *block, case.begin, case.end, score):
        pass
    out = np.empty(case.dout.shape, case.q.dtype)
    lse = np.empty(case.q.shape[:2], acc_dtype)
    finish(state, case.end > case.begin, out, lse)
    dq, *of_keys = (np.empty(x.shape, acc_dtype) for x in block)
    of_bias = [] if score.key_bias is None else [np.empty_like(score.key_bias)]

    def backward() -> None:
        for x in (*of_keys, *of_bias):
            x.fill(0)
        gradient = backend.new_gradient(case.dout, out, lse, None, dq)
        for _ in backend.backward(gradient, *block, *of_keys, case.begin, case.end, score, *of_bias):
            pass

    return backward


def _torch(case: Case, direction: str, threads: int) -> Callable[[], object] | None:
    """Give torch's scaled_dot_product_attention on the same data, as its user would call it; None if not installed.

    The backward pass is autograd's alone: the graph is made before.
    """
    try:
        import torch
    except ImportError:
        return None
    torch.set_num_threads(threads)
    attention = torch.nn.functional.scaled_dot_product_attention
    dtype = getattr(torch, case.dtype)
    q, k, v, dout = (torch.from_numpy(x.astype(np.float64).transpose(1, 0, 2).copy()).to(dtype)[None]
                     for x in (case.q, case.k, case.v, case.dout))

    # torch takes a causal mask by its name, documents one by one, and any other mask as an array.
    options: Any = {"enable_gqa": True} if case.heads != case.kv_heads else {}
    square = len(case.q) == len(case.k)
    parts = [(slice(len(case.q)), slice(len(case.k)))]
    if case.mask == "causal" and square:
        options["is_causal"] = True
    elif case.mask == "documents" and square:
        parts = [(slice(a, b),) * 2 for a, b in itertools.pairwise(case.offsets.tolist())]
    elif case.mask != "full":
        parts = [(slice(len(case.q)), case.visible)]
        j = torch.arange(len(case.k))[case.visible]
        seen = (j >= torch.from_numpy(case.begin)[:, None]) & (j < torch.from_numpy(case.end)[:, None])
        options["attn_mask"] = None if seen.all() else seen

    blocks = [(q[:, :, a], k[:, :, b], v[:, :, b]) for a, b in parts]
    if direction == "forward":
        return lambda: [attention(*block, **options) for block in blocks]
    leaves = [x.requires_grad_() for block in blocks for x in block]
    outs = [attention(*block, **options) for block in blocks]
    douts = [dout[:, :, a] for a, _ in parts]
    return lambda: torch.autograd.grad(outs, leaves, douts, retain_graph=True)
