"""Options that several commands have, and how their values are read."""

from __future__ import annotations

import argparse
from typing import Any

from ..errors import OptionError
from ..job.options import GRID_EDGES
from ..schedules.spec import ORDERS, check_memory_limit, check_schedule

DTYPES = ("float64", "float32", "bfloat16", "float16")
OF_ARRAYS = {
    "spans": "inside a span everybody sees everybody, whatever the rest says: ranges (n_spans, 2)",
    "prompts": "each document sees a prompt besides itself: ranges of keys (n_documents, 2), -1 for none",
    "parents": "each document sees what it goes on from: numbers of documents (n_documents,), -1 for none",
    "document_ids": "documents as a number for each key (n_k,), below 0 for padding",
    "q_documents": "the documents in the queries, where they differ from those in the keys: offsets [0, ...]",
    "key_mask": "nobody sees keys whose flag is false or 0: booleans (n_k,)",
}
MASKS = ("full", "causal", "window", "documents")        # of `bench kernel`
PRODUCTS = ("auto", "tiles", "widen", "pairs")
GPU_KERNELS = ("auto", "own", "library")


def window(text: str) -> tuple[int | None, int | None]:
    """Read LEFT[,RIGHT]; one number is both; an empty side is no limit."""
    parts = text.split(",") if "," in text else [text, text]
    if len(parts) != 2 or parts == ["", ""]:
        raise argparse.ArgumentTypeError(f"expected LEFT[,RIGHT], got {text!r}")
    left, right = (natural(part) if part else None for part in parts)
    return (left, right)


def schedule(text: str) -> str:
    """Read a schedule's name, or a grid. Local."""
    try:
        check_schedule(text)
    except OptionError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def memory_limit(text: str) -> int:
    """Read a number of bytes: 2GiB. Local."""
    try:
        limit = check_memory_limit(text)
    except OptionError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return limit or 0


def natural(text: str) -> int:
    """Read an integer >= 0."""
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"expected an integer >= 0, got {text!r}")
    return int(text)


def positive(text: str) -> int:
    """Read an integer >= 1."""
    if natural(text) == 0:
        raise argparse.ArgumentTypeError(f"expected an integer >= 1, got {text!r}")
    return int(text)


def seconds(text: str) -> float:
    """Read a number > 0."""
    return above_zero(text, "seconds")


def above_zero(text: str, what: str = "a number") -> float:
    """Read a number > 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not value > 0:
        raise argparse.ArgumentTypeError(f"expected {what} > 0, got {text!r}")
    return value


def add_attention(parser: argparse.ArgumentParser, recorded: bool = False, sizes: bool = False) -> None:
    """Add the options that say what is computed from which datasets.

    `recorded`: those that are not given have no default. `sizes`: the parser has its own for sizes.
    """
    def default(value: Any) -> Any:
        return argparse.SUPPRESS if recorded else value

    group = parser.add_argument_group("attention")
    group.add_argument("--causal", action="store_true", default=default(False), help="no key after the query")
    group.add_argument("--window", type=window, metavar="LEFT[,RIGHT]", default=default(None),
                       help="how many keys before and after the query are visible; one number is both, "
                            "an empty side is no limit")
    group.add_argument("--documents", action="store_true", default=default(False),
                       help="tokens see their own document only: offsets [0, ...] in dataset `documents`; tokens "
                            "from the last one on are padding")
    group.add_argument("--prefix", type=natural, default=default(None), metavar="N",
                       help="the first N keys are visible whatever --causal says")
    group.add_argument("--first", type=natural, default=default(0), metavar="N",
                       help="the first N keys are visible whatever --window says (default: 0)")
    group.add_argument("--q-offset", type=int, default=default(None), metavar="N",
                       help="position of query 0 among the keys (default: the last query is aligned with the last key)")
    group.add_argument("--keys", type=natural, default=default(None), metavar="N",
                       help="keys from number N on are padding, which nobody sees (default: none)")
    for name, text in OF_ARRAYS.items():
        group.add_argument(f"--{name.replace('_', '-')}", action="store_true", default=default(False),
                           help=f"{text}, in dataset `{name}`")
    group.add_argument("--grid", default=default(None), metavar="SHAPE",
                       help="tokens are the points of a grid, as 721x1440, flattened in C order: a point sees the "
                            "window around it, and with --causal nothing after it along the first axis")
    group.add_argument("--grid-window", default=default(None), metavar="WINDOW[,...]",
                       help="points seen along each axis, 20 on either side or 20:0 before and after; one window is "
                            "for every axis, an empty one is no limit")
    group.add_argument("--grid-periodic", default=default(None), metavar="AXIS[,...]",
                       help="axes, from 0, along which the last point is beside the first")
    group.add_argument("--grid-edges", choices=GRID_EDGES, default=default(GRID_EDGES[0]),
                       help="at other edges a window is cut off, or shifted so that every point sees as many "
                            "(default: cut)")
    group.add_argument("--scale", type=float, default=default(None), metavar="X",
                       help="factor of the scores (default: 1/sqrt(dim))")
    group.add_argument("--softcap", type=above_zero, default=default(None), metavar="X",
                       help="scaled scores s become X tanh(s / X)")
    group.add_argument("--alibi", action="store_true", default=default(False),
                       help="subtract slope times distance from each score: slopes (heads,) in dataset `alibi`")
    group.add_argument("--sinks", action="store_true", default=default(False),
                       help="one more score for each head that takes part in the softmax and has no value: (heads,) in "
                            "dataset `sinks`")
    group.add_argument("--key-bias", action="store_true", default=default(False),
                       help="add a number to the scores of each key, -inf to leave it out: (n_k,) or (n_k, heads), "
                            "in the order of --axes, in dataset `key_bias`")
    group.add_argument("--relative", action="store_true", default=default(False),
                       help="add a number by the distance of query and key to each score: a table (heads, 2 reach + 1) "
                            "by query minus key in dataset `relative`; or, with --grid and without that dataset, a "
                            "table for each axis in `relative_0`, `relative_1` and so on")
    for name in "qkv":
        group.add_argument(f"--{name}", default=default(name), metavar="NAME",
                           help=f"dataset of {name} (default: {name})")
    group.add_argument("--axes", default=default(None), metavar="A,B,C",
                       help="the axes of q, k and v in their order in the file, and of out: tokens, heads and dim, and "
                            "batch if there is one, as batch,heads,tokens,dim; hidden is heads and dim as one axis "
                            "(default: tokens,heads,dim; with --heads tokens,hidden)")
    if not sizes:
        group.add_argument("--heads", dest="query_heads", type=positive, default=default(None), metavar="N",
                           help="query heads in a hidden axis; keys have as many as fit their own (default: the axes "
                                "say how many)")
        group.add_argument("--dim-v", type=positive, default=default(None), metavar="N",
                           help="values are the first N numbers of each key, and are read and sent with it (default: "
                                "values are a dataset of their own)")
    add_hdf5plugin(group, default(False))
    group.add_argument("--raw-dtype", choices=("bfloat16",), default=default(None),
                       help="take plain 16-bit items of q, k, v (uint16, int16, opaque) for the bits of this dtype")


def add_hdf5plugin(parser: Any, default: Any = False) -> None:
    """Add the option that lets hdf5plugin decompress; an OUT.h5 does not say it in a user's place."""
    parser.add_argument("--hdf5plugin", action="store_true", default=default,
                        help="read datasets that are compressed by blosc, blosc2, zstd, lz4 or bitshuffle, with the "
                             "libraries of the package hdf5plugin: for files that you trust with them")


def add_backend(parser: Any, schedules: str = "auto") -> None:
    """Add the options that say where to compute; with `schedules` the one by default."""
    parser.add_argument("--backend", choices=("auto", "numba", "numpy", "cuda"), default="auto",
                        help="where to compute (default: auto: on the GPU that the arrays are on, else on CPUs by "
                             "numba, else by numpy)")
    parser.add_argument("--gpu-transport", choices=("auto", "direct", "staged"), default="auto",
                        help="K and V from GPU to GPU: by an MPI that takes GPU memory, or through host memory "
                             "(default: RINGMPI_GPU_TRANSPORT, else direct if MPI proves that it can)")
    parser.add_argument("--allow-gpu-sharing", action="store_true", help="let ranks share GPUs if there are too few")
    parser.add_argument("--schedule", type=schedule, default=schedules, metavar="S",
                        help="who computes what: auto (what costs least, by the rates that `ringmpi bench network` has "
                             "measured, else by usual ones), ring (keys go round, with two buffers), gather (keys come "
                             "at once, with a buffer for each), queries (queries travel), mesh (queries along one side "
                             "of a square of ranks, keys along the other), heads (tokens are exchanged for heads), or "
                             "a grid of ranks for heads x queries x keys and a carrier (ring, gather, broadcast: "
                             "blocks come to all ranks in one order, two-way: half of each block either way round, "
                             f"window: blocks are read in shared memory), 2x4x8:ring (default: {schedules})")
    parser.add_argument("--memory-limit", type=memory_limit, metavar="BYTES",
                        help="of the arrays and buffers of a rank at most, 2GiB for example: auto keeps within it, and "
                             "another schedule that does not is refused")
    add_products(parser)


def add_order(parser: Any) -> None:
    """Add the option that says in which order sums are made."""
    parser.add_argument("--order", choices=ORDERS, default=ORDERS[0],
                        help="in which order sums are made: fastest, or canonical, in which results have the same bits "
                             "on any number of ranks and threads, in any layout (numba, or cuda; default: fastest)")


def add_gpu_kernels(parser: Any) -> None:
    """Add the option that says whose kernels differentiate on GPUs."""
    parser.add_argument("--gpu-kernels", choices=GPU_KERNELS, default="auto",
                        help="whose kernels make the gradients of 16-bit types on GPUs: own, a library's (torch's), or "
                             "auto: the library's where they are found right (default: auto)")


def add_products(parser: Any) -> None:
    """Add the option that says how CPUs multiply bfloat16."""
    parser.add_argument("--bfloat16-products", choices=PRODUCTS, default="auto",
                        help="how CPUs multiply bfloat16: on tiles (AMX), widened to float32, or in pairs "
                             "(AVX512_BF16); tiles and pairs round the weights too (default: "
                             "RINGMPI_BFLOAT16_PRODUCTS, else tiles where all ranks have them, else widened)")


def refuse_idle_options(parser_error: Any, arguments: argparse.Namespace) -> None:
    """Refuse options that would have no effect."""
    if getattr(arguments, "dim_v", None) is not None and getattr(arguments, "v", "v") != "v":
        parser_error("--v: with --dim-v values are in the keys; leave one of the two out")
    from ..files.axes import Axes
    try:
        Axes.parse(arguments.axes, arguments.query_heads)
    except OptionError as error:
        parser_error(f"--{error}")
    if arguments.prefix is not None and not arguments.causal:
        parser_error("--prefix widens only --causal, which is not given")
    if arguments.first and arguments.window is None:
        parser_error("--first widens only --window, which is not given")
