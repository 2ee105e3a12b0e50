"""Recompute sampled rows of a result in float64 and print the largest error; exit 1 if it is too large.

Every byte of the result is checked against its digest first. Options default to those the result records.

    ringmpi check in.h5 out.h5 --rows 64
"""

from __future__ import annotations

import argparse
import functools
from dataclasses import asdict
from pathlib import Path

from .options import add_attention, natural, positive, refuse_idle_options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `ringmpi check`."""
    parser.add_argument("input", type=Path, metavar="IN.h5")
    parser.add_argument("output", type=Path, metavar="OUT.h5")
    parser.add_argument("--rows", type=positive, default=64, metavar="N", help="rows to recompute (default: 64)")
    parser.add_argument("--seed", type=natural, default=0, metavar="S", help="which rows (default: 0)")
    add_attention(parser, recorded=True)
    parser.set_defaults(check=functools.partial(refuse_idle_options, parser.error))


def run(arguments: argparse.Namespace) -> int:
    """Run `ringmpi check`; return the exit code."""
    from ..environment import require_single_process
    from ..files.shards import verify
    from ..files.single import is_single, verify_single
    from ..job.audit import audit
    from ..job.options import Options
    require_single_process("check")
    written = verify_single(arguments.output) if is_single(arguments.output) else verify(arguments.output)
    recorded = asdict(Options.from_record(written.record.get("options", {}))) | {"hdf5plugin": False}
    options = recorded | {name: value for name, value in vars(arguments).items() if name in recorded}
    arguments.check(argparse.Namespace(**options))
    result = audit(arguments.input, written, Options.from_record(options), arguments.rows, arguments.seed)
    print(result)
    return 0 if result.passed else 1
