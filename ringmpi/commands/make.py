"""Make an input file for `ringmpi attend`: random numbers, q, k and v from real text, or arrays of other files.

ringmpi make random in.h5 --tokens 8192 --heads 8 --kv-heads 2 --dim 64 --dtype bfloat16
ringmpi make text in.h5 --tokens 65536
ringmpi make numpy in.h5 q.npy k.npy v.npy
ringmpi make numpy in.h5 layer.safetensors --q layer.0.q --k layer.0.k --v layer.0.v
"""

from __future__ import annotations

import argparse
from pathlib import Path

from .options import DTYPES, natural, positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `ringmpi make`."""
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="random|text|numpy")
    random = kinds.add_parser("random", help="standard normal numbers")
    text = kinds.add_parser("text", help="keys from hashed contexts, values from the bytes that follow")
    for sub in (random, text):
        sub.add_argument("output", type=Path, metavar="OUT.h5")
        sub.add_argument("--tokens", type=natural, required=True, metavar="N", help="keys and values")
        sub.add_argument("--queries", type=natural, metavar="N", help="queries, at the end (default: all tokens)")
        sub.add_argument("--force", action="store_true", help="replace OUT.h5 if it exists")
    random.add_argument("--heads", type=positive, default=8, metavar="H", help="query heads (default: 8)")
    random.add_argument("--kv-heads", type=positive, metavar="K",
                        help="key and value heads (default: as many as heads)")
    random.add_argument("--dim", type=positive, default=64, metavar="D", help="of queries and keys (default: 64)")
    random.add_argument("--dim-v", type=positive, metavar="D", help="of values (default: dim)")
    random.add_argument("--dtype", choices=DTYPES, default="float32", help="of q, k and v (default: float32)")
    random.add_argument("--documents", type=positive, metavar="N", help="also N packed documents of random length")
    random.add_argument("--seed", type=natural, default=0, metavar="S", help="of the numbers (default: 0)")
    text.add_argument("paths", type=Path, nargs="*", metavar="PATH",
                      help="files or folders (default: this Python's standard library)")
    text.add_argument("--start", type=natural, default=0, metavar="N", help="bytes to skip first (default: 0)")
    text.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of q, k and v (default: bfloat16)")
    _add_numpy(kinds.add_parser("numpy", help="arrays of .npy, .npz and .safetensors files, in the order of their "
                                              "axes"))
    parser.set_defaults(error=parser.error)


def _add_numpy(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("output", type=Path, metavar="OUT.h5")
    parser.add_argument("paths", type=Path, nargs="+", metavar="FILE",
                        help=".npy, whose array is called as the file, .npz, or .safetensors (extra safetensors)")
    for name in "qkv":
        parser.add_argument(f"--{name}", default=name, metavar="NAME",
                            help=f"array that becomes {name} (default: {name})")
    parser.add_argument("--array", action="append", default=[], metavar="NAME",
                        help="one more that is taken, under its own name, as documents or alibi; once for each "
                             "(default: none)")
    parser.add_argument("--raw-dtype", choices=("bfloat16",),
                        help="take plain 16-bit items of q, k, v for the bits of this dtype (default: none)")
    parser.add_argument("--force", action="store_true", help="replace OUT.h5 if it exists")


def run(arguments: argparse.Namespace) -> int:
    """Run `ringmpi make`; return the exit code."""
    from ..environment import require_single_process
    require_single_process("make")
    if arguments.kind == "numpy":
        return _numpy(arguments)
    if arguments.queries is None:
        arguments.queries = arguments.tokens
    return _random(arguments) if arguments.kind == "random" else _text(arguments)


def _random(arguments: argparse.Namespace) -> int:
    import numpy as np

    from ..dtypes import check_dtype
    from ..files.hdf5 import create_dataset, write_array, write_file, write_rows
    from ..files.rows import row_ranges
    tokens = arguments.tokens
    kv_heads = arguments.kv_heads or arguments.heads
    if arguments.heads % kv_heads:
        arguments.error(f"--heads must be a multiple of --kv-heads, got {arguments.heads} and {kv_heads}")
    if arguments.documents and arguments.documents > tokens:
        arguments.error(f"--documents must be at most --tokens, got {arguments.documents} and {tokens}")
    dtype = check_dtype(arguments.dtype, "--dtype")
    dim = arguments.dim
    shapes = {"q": (arguments.queries, arguments.heads, dim), "k": (tokens, kv_heads, dim),
              "v": (tokens, kv_heads, arguments.dim_v or dim)}

    # Each array has a generator of its own, and is written some rows at a time.
    with write_file(arguments.output, arguments.force) as file:
        for number, (name, shape) in enumerate(shapes.items()):
            rng = np.random.default_rng([arguments.seed, number])
            dataset = create_dataset(file, name, shape, dtype)
            for start, stop in row_ranges(shape, np.dtype(np.float64)):
                write_rows(dataset, start, rng.standard_normal((stop - start, *shape[1:])).astype(dtype))
        if arguments.documents:
            rng = np.random.default_rng([arguments.seed, len(shapes)])
            inner = rng.choice(np.arange(1, tokens), arguments.documents - 1, replace=False)
            write_array(file, "documents", np.concatenate([[0], np.sort(inner), [tokens]]))
        file.attrs["seed"] = arguments.seed
    return 0


def _numpy(arguments: argparse.Namespace) -> int:
    from contextlib import ExitStack

    from ..errors import DtypeError, OptionError, ShapeError, ShardError
    from ..files.foreign import Stored, open_arrays
    from ..files.hdf5 import create_dataset, write_file, write_rows
    wanted = {"q": arguments.q, "k": arguments.k, "v": arguments.v, **{name: name for name in arguments.array}}
    if len(wanted) < 3 + len(arguments.array) or any("/" in name or name in ("", ".") for name in wanted):
        arguments.error(f"--array: expected names that differ, without a slash, and not q, k or v, got "
                        f"{' '.join(arguments.array)}")
    with ExitStack() as files:
        found: dict[str, Stored] = {}
        for path in arguments.paths:
            for name, stored in files.enter_context(open_arrays(path)).items():
                if found.setdefault(name, stored) is not stored:
                    raise OptionError(f"{path}: expected names that differ, got {name!r} here and in "
                                      f"{found[name].where}")
        missing = [name for name in wanted.values() if name not in found]
        if missing:
            raise ShardError(f"expected an array {missing[0]!r}, got {', '.join(sorted(found)[:20])}; say which is "
                             "which by --q, --k and --v")
        file = files.enter_context(write_file(arguments.output, arguments.force))
        for name, source in wanted.items():
            stored = found[source]
            dtype = stored.dtype_in_memory(arguments.raw_dtype if name in "qkv" else None)
            if name in "qkv" and dtype.kind == "i":
                raise DtypeError(f"{stored.where}: expected floats for {name}, got {stored.dtype}")
            if not stored.shape:
                raise ShapeError(f"{stored.where}: expected an array with axes, got a scalar")
            dataset = create_dataset(file, name, stored.shape, dtype)
            at = 0
            for rows in stored.rows(arguments.raw_dtype if name in "qkv" else None):
                write_rows(dataset, at, rows)
                at += len(rows)
    return 0


def _text(arguments: argparse.Namespace) -> int:
    from ..dtypes import check_dtype
    from .demo_text import read_text, standard_library, write_text
    if arguments.queries > arguments.tokens:
        arguments.error(f"--queries must be at most --tokens, got {arguments.queries} and {arguments.tokens}")
    text = read_text(arguments.paths or [standard_library()], arguments.start, arguments.tokens)
    write_text(arguments.output, text, arguments.queries, check_dtype(arguments.dtype, "--dtype"),
               arguments.force)
    return 0
