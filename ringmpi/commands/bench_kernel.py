"""One block on one rank: every backend, and torch on the same data where it is installed.

Runs are interleaved, the yardsticks (multiply-adds in registers, bytes read from memory) among them, so that a noisy
minute strikes all alike; times are medians, yardsticks the best seen.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..backends import NAMES, open_backend, reason_missing
from ..backends.products import wish
from ..checks import check_threads
from ..dtypes import accumulator, check_dtype
from ..environment import cores, require_single_process
from ..mask import Mask
from ..score import Score
from ..softmax import State, finish

MASKS = ("full", "causal", "window", "documents")
GRID = {"dtype": ("float32", "float64", "bfloat16", "float16"), "dim": (64, 128, 80), "mask": MASKS,
        "shape": ((16384, 16384), (1, 2**20), (16, 2**18))}
WINDOW = 4096               # keys that a query sees with the mask `window`
DOCUMENT = 512              # tokens of a document, on average
MEMORY = 2**29              # bytes to measure reading with: more than caches hold
FEW = 16                    # queries, at most, where memory can be the limit


@dataclass
class Case:
    """A block to attend to: arrays, what each query sees, and what that costs."""

    dtype: str
    dim: int
    mask: str
    shape: tuple[int, int]
    heads: int
    kv_heads: int

    def __post_init__(self) -> None:
        kind, (n_q, n_k), rng = check_dtype(self.dtype, "--dtype"), self.shape, np.random.default_rng(0)
        self.q, self.k, self.v = (rng.standard_normal((n, h, self.dim), np.float32).astype(kind) for n, h in
                                  ((n_q, self.heads), (n_k, self.kv_heads), (n_k, self.kv_heads)))
        self.offsets = self._offsets(n_k)
        mask = {"full": Mask(), "causal": Mask(causal=True), "window": Mask(window=(WINDOW - 1, 0)),
                "documents": Mask(documents=self.offsets)}[self.mask]
        (self.begin, self.end), = mask.bounds(np.arange(n_q), n_q, n_k)
        self.dout = rng.standard_normal(self.q.shape, np.float32).astype(kind)
        self.flop = 4 * self.heads * self.dim * int((self.end - self.begin).sum())        # of the forward pass
        self.visible = slice(int(self.begin.min()), int(self.end.max()))
        self.bytes = self.k[self.visible].nbytes + self.v[self.visible].nbytes
        self.scale = self.dim**-0.5

    @staticmethod
    def _offsets(n_k: int) -> Any:
        cuts = np.random.default_rng(1).choice(np.arange(1, n_k), max(0, n_k // DOCUMENT - 1), replace=False)
        return np.concatenate([[0], np.sort(cuts), [n_k]])

    def __str__(self) -> str:
        return f"{self.dtype} dim {self.dim} {self.mask} {self.shape[0]}x{self.shape[1]}"


def measure(arguments: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Measure every case that is asked for; give the rows of the table, and what else is worth keeping. Local."""
    require_single_process("bench kernel")
    chosen = {name: grid if arguments.all else getattr(arguments, name) for name, grid in GRID.items()}
    threads = check_threads(arguments.threads) or len(cores())
    backends = {name: open_backend(name, threads) for name in NAMES
                if name in arguments.kernels and reason_missing(name) is None}
    if "numba" in backends:
        backends["numba"].settle(wish(arguments.bfloat16_products), [backends["numba"].ways])
    compiled: dict[str, float] = {}
    memory = np.ones(MEMORY // 4, np.float32)
    rows = []
    for dtype, dim, mask, shape in itertools.product(*chosen.values()):
        if dtype not in compiled:
            start, kind = time.perf_counter(), check_dtype(dtype, "--dtype")
            for backend in backends.values():
                for direction in {"forward", *arguments.passes}:
                    backend.prepare(kind, accumulator(kind), dim, dim, backward=direction == "backward")
            compiled[dtype] = time.perf_counter() - start
        case = Case(dtype, dim, mask, shape, arguments.heads, arguments.kv_heads or arguments.heads)
        for direction in arguments.passes:
            rows += _compare(case, direction, backends, threads, arguments, memory)
    for backend in backends.values():
        backend.close()
    return rows, {"compile_seconds": compiled}


def _compare(case: Case, direction: str, backends: dict[str, Any], threads: int, arguments: argparse.Namespace,
             memory: Any) -> list[dict[str, Any]]:
    from ..backends.numba_.peak import multiply_add_peak, read_bandwidth
    runs = {name: (_forward if direction == "forward" else _backward)(case, backend)
            for name, backend in backends.items()}
    peer = _torch(case, direction, threads) if "torch" in arguments.kernels else None
    if peer:
        runs["torch"] = peer
    in_pairs = (direction == "forward" and case.dtype == "bfloat16" and case.dim % 2 == 0 and "numba" in backends
                and backends["numba"].products == "pairs")
    product = "pairs" if in_pairs else str(accumulator(case.q.dtype))
    times: dict[str, list[float]] = {name: [] for name in runs}
    peaks, bandwidths = [], []
    for number in range(arguments.repeat + 1):
        for name, call in runs.items():
            start = time.perf_counter()
            call()
            if number:                    # the first is the warm-up
                times[name].append(time.perf_counter() - start)
        peaks.append(multiply_add_peak(product, threads, 0.02))
        bandwidths.append(read_bandwidth(threads, memory))
    peak, bandwidth = max(peaks), max(bandwidths)
    from_memory = direction == "forward" and len(case.q) <= FEW and case.bytes > MEMORY // 4
    medians = {name: statistics.median(column) for name, column in times.items()}
    flop = case.flop if direction == "forward" else case.flop * 5 // 2            # two products, five products
    return [{"pass": direction, "dtype": case.dtype, "dim": case.dim, "mask": case.mask,
             "queries": case.shape[0], "keys": case.shape[1], "heads": f"{case.heads}/{case.kv_heads}",
             "threads": threads, "kernel": name, "seconds": t,
             "spread": (max(times[name]) - min(times[name])) / t if len(times[name]) > 1 else None,
             "GFLOP/s": flop / t / 1e9, "peak GFLOP/s": peak / 1e9, "of peak": flop / t / peak,
             "GB/s": case.bytes / t / 1e9, "of read": case.bytes / t / bandwidth if from_memory else None,
             "x torch": medians["torch"] / t if "torch" in medians else None} for name, t in medians.items()]


def _forward(case: Case, backend: Any) -> Callable[[], Any]:
    """Give the forward pass of a backend."""
    state = State.empty(len(case.q), case.heads, case.dim, accumulator(case.q.dtype))

    def fold() -> None:
        state.reset()
        for _ in backend.accumulate(state, case.q, case.k, case.v, case.begin, case.end, Score(case.scale)):
            pass

    return fold


def _backward(case: Case, backend: Any) -> Callable[[], Any]:
    """Give the backward pass of a backend, from the forward pass's result on."""
    kind = accumulator(case.q.dtype)
    state, block = State.empty(len(case.q), case.heads, case.dim, kind), (case.q, case.k, case.v)
    for _ in backend.accumulate(state, *block, case.begin, case.end, Score(case.scale)):
        pass
    out, lse = np.empty(case.dout.shape, case.q.dtype), np.empty(case.q.shape[:2], kind)
    finish(state, case.end > case.begin, out, lse)
    dq, dk, dv = (np.empty(x.shape, kind) for x in block)

    def differentiate() -> None:
        dk.fill(0)
        dv.fill(0)
        gradient = backend.new_gradient(case.dout, out, lse, None, dq)
        for _ in backend.backward(gradient, *block, dk, dv, case.begin, case.end, Score(case.scale)):
            pass

    return differentiate


def _torch(case: Case, direction: str, threads: int) -> Callable[[], Any] | None:
    """Give torch's scaled_dot_product_attention on the same data, as its user would call it; None if not installed.

    The backward pass is autograd's alone: the graph is made before.
    """
    try:
        import torch
    except ImportError:
        return None
    torch.set_num_threads(threads)
    attention, kind = torch.nn.functional.scaled_dot_product_attention, getattr(torch, case.dtype)
    q, k, v, dout = (torch.from_numpy(x.astype(np.float64).transpose(1, 0, 2).copy()).to(kind)[None]
                     for x in (case.q, case.k, case.v, case.dout))
    options: Any = {"enable_gqa": True} if case.heads != case.kv_heads else {}
    whole = slice(len(case.q)), slice(len(case.k))
    pieces = [whole]
    if case.mask == "causal" and len(case.q) == len(case.k):
        options["is_causal"] = True
    elif case.mask == "documents" and len(case.q) == len(case.k):
        pieces = [(slice(a, b),) * 2 for a, b in itertools.pairwise(case.offsets.tolist())]
    elif case.mask != "full":
        pieces = [(whole[0], case.visible)]
        j = torch.arange(len(case.k))[case.visible]
        seen = (j >= torch.from_numpy(case.begin)[:, None]) & (j < torch.from_numpy(case.end)[:, None])
        options["attn_mask"] = None if seen.all() else seen
    blocks = [(q[:, :, a], k[:, :, b], v[:, :, b]) for a, b in pieces]
    if direction == "forward":
        return lambda: [attention(*block, **options) for block in blocks]
    leaves = [x.requires_grad_() for block in blocks for x in block]
    outs, douts = [attention(*block, **options) for block in blocks], [dout[:, :, a] for a, _ in pieces]
    return lambda: torch.autograd.grad(outs, leaves, douts, retain_graph=True)
