"""Remove what interrupted runs have left beside OUT.h5: shards in OUT.h5.shards/ that no output shows.

What was written to within some hours is left alone, as a run may be at work there.

    ringmpi clean out.h5 --dry-run
"""

from __future__ import annotations

import argparse
from pathlib import Path

from .options import natural
from .units import size_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `ringmpi clean`."""
    parser.add_argument("output", type=Path, metavar="OUT.h5")
    parser.add_argument("--older-than", type=natural, default=24, metavar="HOURS",
                        help="leave alone what was written to since then (default: 24)")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be removed")


def run(arguments: argparse.Namespace) -> int:
    """Run `ringmpi clean`; return the exit code."""
    from ..environment import require_single_process
    from ..files.leftovers import find_leftovers, remove_empty
    require_single_process("clean")
    freed = 0
    for leftover in find_leftovers(arguments.output):
        number = len(leftover.files)
        what = f"{leftover.path}: {number} file{'s'[:number != 1]}, {size_text(leftover.nbytes)}"
        if leftover.idle < 3600 * arguments.older_than:
            print(f"{what}, left alone: written to {leftover.idle / 3600:.1f} hours ago")
            continue
        if not arguments.dry_run:
            leftover.remove()
        freed += leftover.nbytes
        print(f"{what}{', would be removed' if arguments.dry_run else ', removed'}")
    if not arguments.dry_run:
        remove_empty(arguments.output)
    print(f"{size_text(freed)} {'would be free' if arguments.dry_run else 'freed'}")
    return 0
