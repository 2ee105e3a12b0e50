"""Copy the result of `ringmpi attend` with all its shards, checked byte for byte, into one plain HDF5 file."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `ringmpi merge`."""
    parser.add_argument("output", type=Path, metavar="OUT.h5")
    parser.add_argument("single", type=Path, metavar="SINGLE.h5")
    parser.add_argument("--force", action="store_true", help="replace SINGLE.h5 if it exists")


def run(arguments: argparse.Namespace) -> int:
    """Run `ringmpi merge`; return the exit code."""
    from ..environment import require_single_process
    from ..files.shards import merge_shards
    require_single_process("merge")
    merge_shards(arguments.output, arguments.single, arguments.force)
    return 0
