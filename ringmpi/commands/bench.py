"""Measure speed: of the kernels, with torch beside them where it is installed, or of the ring.

    ringmpi bench kernel --tokens 8192 --dim 64 --causal
    mpiexec -n 4 ringmpi bench ring --tokens 16384 --causal

Figures are medians over interleaved runs; GFLOP/s count visible pairs only, 2 heads (dim + dim_v) each.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .options import DTYPES, positive, seconds


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `ringmpi bench`."""
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="kernel|ring")
    kernel = kinds.add_parser("kernel", help="one block on one rank: every backend, and torch where installed")
    ring = kinds.add_parser("ring", help="the whole ring: contiguous, striped and zigzag; run it under mpiexec")
    for sub in (kernel, ring):
        sub.add_argument("--tokens", type=positive, default=8192, metavar="N", help="in all (default: 8192)")
        sub.add_argument("--heads", type=positive, default=4, metavar="H")
        sub.add_argument("--dim", type=positive, default=64, metavar="D")
        sub.add_argument("--dtype", choices=DTYPES, default="float32")
        sub.add_argument("--causal", action="store_true")
        sub.add_argument("--threads", type=positive, metavar="N", help="CPU threads a rank")
        sub.add_argument("--repeat", type=positive, default=5, metavar="N", help="runs to take the median of")
        sub.add_argument("--json", type=Path, metavar="FILE", help="write the table")
    ring.add_argument("--backend", choices=("auto", "numba", "numpy"), default="auto")
    ring.add_argument("--timeout", type=seconds, default=1800.0, metavar="S")


def run(arguments: argparse.Namespace) -> int:
    """Run `ringmpi bench`; return the exit code."""
    rows = _kernel(arguments) if arguments.kind == "kernel" else _ring(arguments)
    if rows:
        names = list(rows[0])
        print("  ".join(f"{name:>14}" for name in names))
        for row in rows:
            print("  ".join(f"{row[name]:>14.3f}" if isinstance(row[name], float) else f"{row[name]!s:>14}"
                            for name in names))
        if arguments.json:
            from ..job import write_json
            write_json(arguments.json, {"arguments": vars(arguments), "rows": rows})
    return 0


def _medians(runs: dict[str, Callable[[], Any]], repeat: int) -> dict[str, float]:
    """Median seconds of each; one warm-up, then in turns, so that a noisy minute strikes all alike."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(repeat + 1):
        for name, call in runs.items():
            start = time.perf_counter()
            call()
            if number:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def _kernel(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    import numpy as np

    from ..backends import NAMES, open_backend, reason_missing
    from ..environment import cores, refuse_many
    from ..softmax import State, accumulator, check_dtype
    refuse_many("bench kernel")
    n, heads, dim, dtype = arguments.tokens, arguments.heads, arguments.dim, check_dtype(arguments.dtype, "--dtype")
    threads = arguments.threads or len(cores())
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((n, heads, dim)).astype(dtype) for _ in range(3))
    begin, end = np.zeros(n, np.int64), np.arange(1, n + 1) if arguments.causal else np.full(n, n)
    flop = 4 * heads * dim * int(end.sum())
    state = State.empty(n, heads, dim, accumulator(dtype))

    def fold(backend: Any) -> None:
        state.reset()
        for _ in backend.accumulate(state, q, k, v, begin, end, dim**-0.5):
            pass

    backends = [open_backend(name, threads) for name in NAMES if name != "auto" and reason_missing(name) is None]
    runs: dict[str, Callable[[], Any]] = {b.name: lambda b=b: fold(b) for b in backends}  # type: ignore[misc]
    peer = _torch(q, k, v, arguments.causal, threads)
    if peer:
        runs["torch"] = peer
    medians = _medians(runs, arguments.repeat)
    reference = medians.get("torch")
    return [{"kernel": name, "threads": threads, "seconds": t, "GFLOP/s": flop / t / 1e9,
             "x torch": reference / t if reference else "not installed"} for name, t in medians.items()]


def _torch(q: Any, k: Any, v: Any, causal: bool, threads: int) -> Callable[[], Any] | None:
    try:
        import torch
    except ImportError:
        return None
    torch.set_num_threads(threads)
    kind = getattr(torch, str(q.dtype))
    a, b, c = (torch.from_numpy(x.astype("f8").transpose(1, 0, 2).copy()).to(kind)[None] for x in (q, k, v))
    return lambda: torch.nn.functional.scaled_dot_product_attention(a, b, c, is_causal=causal)


def _ring(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    import numpy as np

    from .. import layout, mpi
    from ..attention import RingAttention
    from ..mask import Mask
    from ..softmax import check_dtype
    world = mpi.world()
    comm, dtype = mpi.private(world, arguments.timeout), check_dtype(arguments.dtype, "--dtype")
    objects = {name: RingAttention(world, mask=Mask(causal=arguments.causal), layout=name, timeout=arguments.timeout,
                                   backend=arguments.backend, threads=arguments.threads) for name in layout.NAMES}
    traces: dict[str, list[Any]] = {name: [] for name in objects}

    def attend(name: str) -> None:
        n = layout.make(name, arguments.tokens, comm.size).counts[comm.rank]
        rng = np.random.default_rng(comm.rank)
        q, k, v = (rng.standard_normal((n, arguments.heads, arguments.dim)).astype(dtype) for _ in range(3))
        comm.share([0], arguments.timeout)
        start = time.perf_counter()
        objects[name](q, k, v)
        traces[name].append((time.perf_counter() - start, objects[name].trace))

    for _ in range(arguments.repeat + 1):
        for name in objects:
            attend(name)
    rows = []
    for name, runs in traces.items():
        figures = [(taken, t.compute_seconds, t.wait_seconds, t.flop, t.bytes_sent) for taken, t in runs[1:]]
        mine = [statistics.median(column) for column in zip(*figures, strict=True)]
        everyone = comm.share(np.array(mine, np.float64), arguments.timeout)
        slowest = float(everyone[:, 0].max())
        rows.append({"layout": name, "ranks": comm.size, "seconds": slowest,
                     "GFLOP/s": float(everyone[:, 3].sum()) / slowest / 1e9,
                     "compute max": float(everyone[:, 1].max()),
                     "compute min": float(everyone[:, 1].min()),
                     "wait max": float(everyone[:, 2].max()), "MiB moved": float(everyone[:, 4].sum()) / 2**20})
        objects[name].close()
    return rows if comm.rank == 0 else []
