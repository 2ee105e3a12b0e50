"""One block on one GPU: the CUDA backend, and torch's scaled_dot_product_attention by each of its own backends.

Times are the GPU's own, between two events, with the GPU kept busy before the first so that the host is ahead of it;
medians over interleaved runs. The yardstick is a copy from GPU memory to GPU memory, bytes read and written. The
backward pass is all of it, from the result and its gradient on: ours sums in the accumulator's type, and leaves the
gradients in it, whosever kernels it takes; torch's is autograd's alone.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import statistics
import sys
import time
from typing import Any

import numpy as np

from ..backends import open_backend
from ..device import Device, open_device
from ..dtypes import accumulator
from ..environment import require_single_process
from ..errors import RingError
from ..score import Score
from .bench_cases import FEW, Case, Timed, chosen, interleave, prepare, spread

TORCH = ("flash_attention", "cudnn_attention", "efficient_attention", "math")
COPY_BYTES = 2**31


def measure_gpu_kernels(arguments: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Measure every case that is asked for; give the rows of the table, and what else is worth keeping. Local."""
    require_single_process("bench kernel")
    device = open_device(0)
    backend = open_backend("cuda", 1, device, gpu_kernels=arguments.gpu_kernels)
    compiled: dict[str, float] = {}
    rows = []
    for dtype, dim, mask, shape in chosen(arguments):
        try:
            with device.current():
                start = time.perf_counter()
                prepare(backend, dtype, dim, arguments.passes)
                compiled.setdefault(f"{dtype} {dim}", time.perf_counter() - start)
                case = Case(dtype, dim, mask, shape, arguments.heads, arguments.kv_heads or arguments.heads)
                for direction in arguments.passes:
                    rows += _compare(case, direction, backend, device, arguments)
        except (RingError, RuntimeError, MemoryError) as error:           # the other cases are worth having
            print(f"{dtype} dim {dim} {mask} {shape[0]}x{shape[1]}: {type(error).__name__}: {error}", file=sys.stderr,
                  flush=True)
    backend.close()
    more = {"compile_seconds": compiled, "device": device.name, "uuid": device.uuid}
    return rows, more | ({"differentiated_by": backend.differentiated_by} if "backward" in arguments.passes else {})


def _compare(case: Case, direction: str, backend: Any, device: Device, arguments: argparse.Namespace
             ) -> list[dict[str, Any]]:
    # What runs: ours, the cost of loading and storing the state alone, and torch.
    copy = _copy(device)
    forward = direction == "forward"
    runs: dict[str, Timed] = {"ringmpi": _ours(case, backend, device, len(case.k)) if forward
                              else _our_gradient(case, backend, device)}
    if forward and len(case.q) > FEW:
        runs["state in and out"] = _ours(case, backend, device, 1)
    if "torch" in arguments.kernels:
        runs.update(_torch(case, direction))
    copies: list[float] = []
    times = interleave(runs, arguments.repeat, lambda: copies.append(COPY_BYTES / copy()))
    bandwidth = max(copies)
    medians = {name: statistics.median(column) for name, column in times.items()}
    peers = {name: seconds for name, seconds in medians.items() if name.startswith("torch")}
    best, whole = min(peers.values(), default=None), medians["ringmpi"]
    flop = case.flop(direction)
    rows = []
    for name, seconds in medians.items():
        attention = name != "state in and out"
        rows.append({
            **case.columns(direction), "kernel": name, "ms": 1e3 * seconds, "spread": spread(times[name], seconds),
            "TFLOP/s": flop / seconds / 1e12 if attention else None,
            "x best torch": best / seconds if best and attention else None,
            "of copy": case.bytes / seconds / bandwidth if forward and attention and len(case.q) <= FEW else None,
            "of ringmpi": None if attention else seconds / whole, "copy GB/s": bandwidth / 1e9})
    return rows


def _ours(case: Case, backend: Any, device: Device, keys: int) -> Timed:
    """Give a run of our kernel: state from memory, the first `keys` keys, state to memory."""
    kind = accumulator(case.q.dtype)
    state = backend.new_state(len(case.q), case.heads, case.dim, kind)
    q, k, v = (backend.to_device(x) for x in (case.q, case.k, case.v))
    begin, end = (np.minimum(x, keys) for x in (case.begin, case.end))

    def run() -> float:
        backend.reset(state)
        loop = backend.accumulate(state, q, k, v, begin, end, Score(case.scale))
        seconds = device.seconds(lambda: next(loop))
        for _ in loop:
            pass
        return seconds
    return run


def _our_gradient(case: Case, backend: Any, device: Device) -> Timed:
    """Give a run of our backward pass, from the result of the forward pass on."""
    kind = accumulator(case.q.dtype)
    state = backend.new_state(len(case.q), case.heads, case.dim, kind)
    q, k, v, dout = (backend.to_device(x) for x in (case.q, case.k, case.v, case.dout))
    block = case.begin, case.end, Score(case.scale)
    for _ in backend.accumulate(state, q, k, v, *block):
        pass
    out, lse = backend.empty(q.shape, q.dtype), backend.empty(q.shape[:2], kind)
    backend.finish(state, backend.to_device(case.end > case.begin), out, lse)
    dq, dk, dv = (backend.empty(x.shape, kind) for x in (q, k, v))

    def launch() -> Any:
        backend.clear(dk)
        backend.clear(dv)
        loop = backend.backward(backend.new_gradient(dout, out, lse, None, dq), q, k, v, dk, dv, *block)
        next(loop)
        return loop

    def run() -> float:
        loops: list[Any] = []
        seconds = device.seconds(lambda: loops.append(launch()))
        for _ in loops[0]:
            pass
        return seconds
    return run


def _copy(device: Device) -> Timed:
    """Give a copy within the GPU's memory that moves COPY_BYTES in all."""
    source, target = (device.empty((COPY_BYTES // 2,), np.uint8) for _ in range(2))
    return lambda: device.seconds(lambda: device.copy(target, source, device.caller_stream()))


def _torch(case: Case, direction: str) -> dict[str, Timed]:
    """Give torch's attention on the same data by each of its backends that takes it; none if there is no torch."""
    try:
        import torch
        from torch.nn.attention import SDPBackend, sdpa_kernel
    except ImportError:
        return {}
    if not torch.cuda.is_available():
        return {}
    causal = case.mask == "causal" and case.shape[0] > 1       # one query sees all keys
    if case.mask not in ("full", "causal") or (causal and case.shape[0] != case.shape[1]):
        return {}                                              # torch's fast kernels have no such mask
    torch.backends.cuda.matmul.allow_tf32 = False         # float32 means float32
    attention = torch.nn.functional.scaled_dot_product_attention
    kind = getattr(torch, case.dtype)
    q, k, v, dout = (torch.from_numpy(x.view(f"i{x.itemsize}")).to("cuda").view(kind).transpose(0, 1)[None].contiguous()
                     for x in (case.q, case.k, case.v, case.dout))
    leaves = [x.requires_grad_(direction == "backward") for x in (q, k, v)]
    options: Any = {"enable_gqa": True} if case.heads != case.kv_heads else {}
    cuda: Any = torch.cuda

    def run(backend: Any) -> float:
        first, last = (cuda.Event(enable_timing=True) for _ in range(2))
        with sdpa_kernel(backend):
            out = attention(q, k, v, is_causal=causal, **options) if direction == "backward" else None
            cuda.synchronize()
            cuda._sleep(5_000_000)                        # cycles: the host gets ahead
            first.record()
            if out is None:
                attention(q, k, v, is_causal=causal, **options)
            else:
                torch.autograd.grad(out, leaves, dout)
            last.record()
        last.synchronize()
        return float(first.elapsed_time(last)) / 1e3

    runs: dict[str, Timed] = {}
    for name in TORCH:
        once = functools.partial(run, getattr(SDPBackend, name.upper()))
        with contextlib.suppress(RuntimeError):           # this backend does not take such arguments, or memory ran out
            once()
            runs[f"torch {name.removesuffix('_attention')}"] = once
        cuda.empty_cache()
    return runs
