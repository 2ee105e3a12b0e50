"""Measure speed: of the kernels, with torch beside them where it is installed, of the ring, or of moving data.

    ringmpi bench kernel --dim 64 128 --mask full causal --shape 8192x8192 --pass forward backward
    mpiexec -n 4 ringmpi bench ring --tokens 16384 --causal
    mpiexec -n 2 ringmpi bench network
    mpiexec -n 2 ringmpi bench auto --tokens 64 512 --heads 8/8 8/2
    mpiexec -n 2 ringmpi bench decode --keys 16 65536 --threads 1
    mpiexec -n 2 ringmpi bench small --shape 1x64 256x256
    mpiexec -n 2 ringmpi bench weights --tokens 16384 --top 8
    mpiexec -n 2 ringmpi bench torch --tokens 512 4096 --causal --generate 64

Figures are medians over interleaved runs; GFLOP/s count visible pairs only, 2 heads (dim + dim_v) each;
of the backward pass, five products, 2 heads (3 dim + 2 dim_v).
"""

from __future__ import annotations

import argparse
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

from ..schedules.spec import ORDERS
from .options import DTYPES, MASKS, add_backend, add_gpu_kernels, add_products, positive, seconds

KERNELS = {"cpu": ("numba", "numpy", "torch"), "cuda": ("ringmpi", "torch")}
PASSES = ("forward", "backward")


class Table(NamedTuple):
    """What was measured: rows, the columns that are not printed, and what else the JSON record holds."""

    rows: list[dict[str, Any]]
    hidden: Collection[str]
    more: dict[str, Any]


def _shape(text: str) -> tuple[int, int]:
    """Read QUERIESxKEYS."""
    parts = text.split("x")
    if len(parts) != 2:
        raise argparse.ArgumentTypeError(f"expected QUERIESxKEYS, got {text!r}")
    return positive(parts[0]), positive(parts[1])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `ringmpi bench`."""
    kinds = parser.add_subparsers(dest="kind", required=True,
                                  metavar="kernel|ring|network|auto|decode|small|weights|torch")
    kernel = kinds.add_parser("kernel", help="one block on one rank: every backend, and torch where installed")
    ring = kinds.add_parser("ring", help="the whole ring: contiguous, striped and zigzag; run it under mpiexec")
    network = kinds.add_parser("network", help="redistribute, ring and calls with nothing to compute, beside bare MPI "
                                               "calls that move the same; run it under mpiexec")
    auto = kinds.add_parser("auto", help="every schedule in turns, beside what schedule auto takes and what it "
                                         "expected; run it under mpiexec")
    decode = kinds.add_parser("decode", help="a step of a cache of keys and values, beside reading them once and bare "
                                             "MPI calls; run it under mpiexec")
    small = kinds.add_parser("small", help="calls of few tokens, again and again, beside the cores' peak; run it under "
                                           "mpiexec")
    weights = kinds.add_parser("weights", help="sums over attention weights, beside the forward pass; run it under "
                                               "mpiexec")
    of_torch = kinds.add_parser("torch", help="torch's own call over all ranks, beside RingAttention in its own "
                                              "layout; run it under mpiexec")
    _add_kernel(kernel)
    _add_ring(ring)
    _add_auto(auto)
    _add_decode(decode)
    _add_small(small)
    _add_weights(weights)
    _add_torch(of_torch)
    network.add_argument("--mib", type=positive, default=64, metavar="N",
                         help="MiB of each array of a rank (default: 64)")
    network.add_argument("--save", type=Path, metavar="FILE",
                         help="where the rates go by which schedule auto chooses (default: RINGMPI_RATES, else "
                              "~/.cache/ringmpi/rates.json)")
    network.add_argument("--no-save", action="store_true", help="measure no rates, and leave the file as it is")
    for sub in (network, auto, weights):
        sub.add_argument("--backend", choices=("auto", "numba", "numpy"), default="auto",
                         help="where to compute (default: auto)")

    # Options that two or three of them have.
    for sub in (kernel, ring, network, auto, decode, small, weights, of_torch):
        sub.add_argument("--threads", type=positive, metavar="N", help="CPU threads a rank (default: its share)")
    for sub in (ring, network, auto, decode, small, weights, of_torch):
        sub.add_argument("--timeout", type=seconds, default=1800.0, metavar="S",
                         help="seconds to wait for another rank (default: 1800)")
        sub.set_defaults(collective=True)
    for sub in (kernel, ring, network, auto, decode, small, weights, of_torch):
        sub.add_argument("--repeat", type=positive, default=5, metavar="N",
                         help="runs to take the median of (default: 5)")
        sub.add_argument("--json", type=Path, metavar="FILE", help="write the table, with more columns")


def _add_kernel(kernel: argparse.ArgumentParser) -> None:
    kernel.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float32"],
                        help="of q, k and v (default: float32)")
    kernel.add_argument("--dim", nargs="+", type=positive, default=[64, 128], metavar="D",
                        help="numbers of a head (default: 64 128)")
    kernel.add_argument("--mask", nargs="+", choices=MASKS, default=["full", "causal"],
                        help="window: 4096 keys; documents: 512 tokens on average (default: full causal)")
    kernel.add_argument("--shape", nargs="+", type=_shape, default=[(8192, 8192)], metavar="QxK",
                        help="queries and keys (default: 8192x8192)")
    kernel.add_argument("--pass", nargs="+", choices=PASSES, default=["forward"], dest="passes",
                        help="backward: gradients of q, k and v from that of the result (default: forward)")
    kernel.add_argument("--key-bias", choices=("key", "head"),
                        help="numba and numpy once more, with a bias for each key, or each key and head (default: "
                             "without alone)")
    kernel.add_argument("--all", action="store_true",
                        help="the whole grid: all dtypes, dim 64, 128, 80, masks, 16384x16384, 1x1048576, 16x262144")
    kernel.add_argument("--kv-heads", type=positive, metavar="H", help="key heads (default: as many as heads)")
    kernel.add_argument("--backend", choices=("cpu", "cuda"), default="cpu",
                        help="cpu: numba and numpy on this machine's cores; cuda: ringmpi on a GPU (default: cpu)")
    kernel.add_argument("--kernels", nargs="+", choices=("numba", "numpy", "ringmpi", "torch"),
                        help="what to measure (default: numba, numpy and torch; with --backend cuda ringmpi and torch)")
    kernel.add_argument("--heads", type=positive, default=2, metavar="H", help="query heads (default: 2)")
    add_products(kernel)
    add_gpu_kernels(kernel)


def _add_ring(ring: argparse.ArgumentParser) -> None:
    ring.add_argument("--tokens", type=positive, default=8192, metavar="N", help="in all (default: 8192)")
    ring.add_argument("--dim", type=positive, default=64, metavar="D", help="numbers of a head (default: 64)")
    ring.add_argument("--dtype", choices=DTYPES, default="float32", help="of q, k and v (default: float32)")
    ring.add_argument("--causal", action="store_true", help="no key after the query")
    ring.add_argument("--window", type=positive, metavar="N",
                      help="keys before and after its position that a query sees (default: all)")
    ring.add_argument("--pass", choices=PASSES, default="forward", dest="which",
                      help="what to measure (default: forward)")
    add_backend(ring, "ring")
    add_gpu_kernels(ring)
    ring.add_argument("--order", choices=ORDERS, default=ORDERS[0],
                      help="canonical: one more row, striped in canonical order (default: none)")
    ring.add_argument("--heads", type=positive, default=4, metavar="H", help="query and key heads (default: 4)")


def _heads(text: str) -> tuple[int, int]:
    """Read QUERY/KEY heads."""
    heads, _, kv_heads = text.partition("/")
    numbers = positive(heads), positive(kv_heads or heads)
    if numbers[0] % numbers[1]:
        raise argparse.ArgumentTypeError(f"expected a multiple of the key heads, got {text!r}")
    return numbers


def _add_auto(auto: argparse.ArgumentParser) -> None:
    auto.add_argument("--tokens", nargs="+", type=positive, default=[64, 256, 1024], metavar="N",
                      help="of each rank (default: 64 256 1024)")
    auto.add_argument("--heads", nargs="+", type=_heads, default=[(8, 8), (8, 2)], metavar="Q/K",
                      help="of queries and of keys (default: 8/8 8/2)")
    auto.add_argument("--dim", nargs="+", type=positive, default=[64], metavar="D",
                      help="numbers of a head (default: 64)")
    auto.add_argument("--mask", nargs="+", choices=("full", "causal"), default=["full", "causal"],
                      help="causal is striped (default: full causal)")
    auto.add_argument("--pass", nargs="+", choices=("forward", "both"), default=["forward", "both"], dest="passes",
                      help="both: forward and backward (default: forward both)")
    auto.add_argument("--dtype", choices=DTYPES, default="float32", help="of q, k and v (default: float32)")


def _add_decode(decode: argparse.ArgumentParser) -> None:
    decode.add_argument("--keys", nargs="+", type=positive, default=[16, 65536], metavar="N",
                        help="keys that each rank has (default: 16 65536)")
    decode.add_argument("--heads", type=positive, default=8, metavar="H", help="query heads (default: 8)")
    decode.add_argument("--kv-heads", type=positive, metavar="H", help="key heads (default: as many as heads)")
    decode.add_argument("--dim", type=positive, default=128, metavar="D", help="numbers of a head (default: 128)")
    decode.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float32"],
                        help="of queries, keys and values (default: float32)")


def _add_small(small: argparse.ArgumentParser) -> None:
    small.add_argument("--shape", nargs="+", type=_shape, default=[(1, 64), (16, 64), (256, 256)], metavar="QxK",
                       help="queries and keys of each rank (default: 1x64 16x64 256x256)")
    small.add_argument("--heads", nargs="+", type=_heads, default=[(8, 8)], metavar="Q/K",
                       help="of queries and of keys (default: 8/8)")
    small.add_argument("--dim", type=positive, default=64, metavar="D", help="numbers of a head (default: 64)")
    small.add_argument("--dtype", choices=DTYPES, default="float32", help="of q, k and v (default: float32)")
    small.add_argument("--causal", action="store_true", help="no key after the query, striped")
    small.add_argument("--schedule", default="auto", metavar="NAME", help="who computes what (default: auto)")


def _add_weights(weights: argparse.ArgumentParser) -> None:
    weights.add_argument("--tokens", type=positive, default=16384, metavar="N", help="in all (default: 16384)")
    weights.add_argument("--heads", type=_heads, default=(4, 4), metavar="Q/K",
                         help="of queries and of keys (default: 4/4)")
    weights.add_argument("--dim", type=positive, default=64, metavar="D", help="numbers of a head (default: 64)")
    weights.add_argument("--dtype", choices=DTYPES, default="float32", help="of q, k and v (default: float32)")
    weights.add_argument("--causal", action="store_true", help="no key after the query, striped")
    weights.add_argument("--top", type=positive, default=8, metavar="N", help="heaviest keys (default: 8)")
    weights.add_argument("--schedule", default="ring", metavar="NAME", help="who computes what (default: ring)")


def _add_torch(of_torch: argparse.ArgumentParser) -> None:
    of_torch.add_argument("--tokens", nargs="+", type=positive, default=[512, 4096], metavar="N",
                          help="of each rank (default: 512 4096)")
    of_torch.add_argument("--heads", type=_heads, default=(8, 8), metavar="Q/K",
                          help="of queries and of keys (default: 8/8)")
    of_torch.add_argument("--dim", type=positive, default=64, metavar="D", help="numbers of a head (default: 64)")
    of_torch.add_argument("--causal", action="store_true", help="no key after the query, striped")
    of_torch.add_argument("--generate", type=positive, default=0, metavar="N",
                          help="also let a Llama of 4 layers generate so many tokens, beside one process (default: no)")
    of_torch.add_argument("--prompt", type=positive, default=1024, metavar="N",
                          help="tokens before those that it generates (default: 1024)")


def run(arguments: argparse.Namespace) -> int:
    """Run `ringmpi bench`; return the exit code."""
    table = {"kernel": _kernel, "ring": _ring, "network": _network, "auto": _auto,
             "decode": _decode, "small": _small, "weights": _weights, "torch": _torch}[arguments.kind](arguments)
    if table.rows:
        _print(table.rows, [name for name in table.rows[0] if name not in table.hidden])
        if arguments.json:
            from ..files.record import write_json
            given = {name: value for name, value in vars(arguments).items() if name != "collective"}
            write_json(arguments.json, {"arguments": given, **table.more, "rows": table.rows})
    return 0


def _kernel(arguments: argparse.Namespace) -> Table:
    if arguments.json:
        from ..files.record import check_record
        check_record(arguments.json)
    _check_kernels(arguments)
    if arguments.backend == "cuda":
        from .bench_gpu import measure_gpu_kernels as measure
    else:
        from .bench_kernel import measure_kernels as measure
    rows, more = measure(arguments)
    print("compiled or loaded in", ", ".join(f"{t:.1f} s ({name})" for name, t in more["compile_seconds"].items()))
    return Table(rows, {"threads", "GB/s", "peak GFLOP/s", "copy GB/s"}, more)


def _ring(arguments: argparse.Namespace) -> Table:
    from ..backends import choose_gpu_early
    from ..errors import OptionError
    from .bench_ring import measure_ring
    if arguments.backend != "cuda" and arguments.gpu_kernels != "auto":
        raise OptionError("--gpu-kernels: says whose kernels GPUs take; expected --backend cuda with it, got "
                          f"{arguments.backend}")
    choose_gpu_early(arguments.backend)
    return Table(measure_ring(arguments), {"compute min"}, {})


def _network(arguments: argparse.Namespace) -> Table:
    from .bench_network import measure_network
    return Table(measure_network(arguments), (), {})


def _auto(arguments: argparse.Namespace) -> Table:
    from .bench_auto import measure_auto
    rows, more = measure_auto(arguments)
    for name, figures in more.get("summary", {}).items():
        print(f"{name}: " + ", ".join(f"{key} {value:.1%}" if isinstance(value, float) else f"{value} {key}"
                                      for key, value in figures.items()))
    return Table(rows, {"all", "threads a core"}, more)


def _decode(arguments: argparse.Namespace) -> Table:
    from .bench_decode import measure_decode
    _check_heads(arguments)
    return Table(measure_decode(arguments), {"ranks", "threads"}, {})


def _small(arguments: argparse.Namespace) -> Table:
    from .bench_small import measure_small
    return Table(measure_small(arguments), {"mask", "dtype", "ranks", "threads"}, {})


def _weights(arguments: argparse.Namespace) -> Table:
    from .bench_weights import measure_weights
    return Table(measure_weights(arguments), {"mask", "dtype", "ranks"}, {})


def _torch(arguments: argparse.Namespace) -> Table:
    from .bench_torch import measure_torch
    return Table(measure_torch(arguments), {"peer spread"}, {})


def _check_heads(arguments: argparse.Namespace) -> None:
    from ..errors import OptionError
    if arguments.heads % (arguments.kv_heads or arguments.heads):
        raise OptionError(f"--heads: expected a multiple of --kv-heads {arguments.kv_heads}, got {arguments.heads}")


def _check_kernels(arguments: argparse.Namespace) -> None:
    """Fill in what is measured by default, and refuse options that would have no effect."""
    from ..errors import OptionError
    known = KERNELS[arguments.backend]
    arguments.kernels = arguments.kernels or known
    if not set(arguments.kernels) <= set(known):
        raise OptionError(f"--kernels: expected {', '.join(known)} with --backend {arguments.backend}, got "
                          f"{', '.join(arguments.kernels)}")
    if arguments.backend == "cuda":
        if "ringmpi" not in arguments.kernels:
            raise OptionError("--kernels: expected ringmpi among them with --backend cuda, which the others are beside")
        if arguments.threads:
            raise OptionError("--threads: counts CPU threads, which --backend cuda does not use")
        if arguments.key_bias:
            raise OptionError("--key-bias: there is none with --backend cuda yet")
        if arguments.bfloat16_products != "auto":
            raise OptionError("--bfloat16-products: says how CPUs multiply, and --backend cuda does not use them")
    elif arguments.gpu_kernels != "auto":
        raise OptionError("--gpu-kernels: says whose kernels GPUs take, and --backend cpu takes none")
    _check_heads(arguments)


def _print(rows: list[dict[str, Any]], names: list[str]) -> None:
    """Print a table with a column for each name."""
    cells = [[_text(row[name]) for name in names] for row in rows]
    widths = [max(len(name), *(len(line[i]) for line in cells)) for i, name in enumerate(names)]
    for line in (names, *cells):
        print("  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)))


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3f}" if value < 10 else f"{value:.1f}"
    return str(value)
