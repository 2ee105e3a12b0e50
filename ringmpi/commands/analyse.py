"""Sum up the attention weights of a result of `ringmpi attend`: where its attention went.

IN.h5 and OUT.h5 are those of `ringmpi attend`; what was computed, mask and all, is what OUT.h5 records. RESULT.h5 gets
a dataset for each thing that is asked, in the order of the input; without any, key_mass.

    mpiexec -n 4 ringmpi analyse in.h5 out.h5 result.h5 --key-mass --top 8 --rows 5,1000
"""

from __future__ import annotations

import argparse
from pathlib import Path

from .options import add_hdf5plugin, memory_limit, natural, positive, schedule, seconds


def positions(text: str) -> tuple[int, ...]:
    """Read N[,N...]: positions of queries."""
    return tuple(natural(part) for part in text.split(","))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `ringmpi analyse`."""
    parser.add_argument("input", type=Path, metavar="IN.h5")
    parser.add_argument("output", type=Path, metavar="OUT.h5")
    parser.add_argument("result", type=Path, metavar="RESULT.h5")
    asked = parser.add_argument_group("what is asked")
    asked.add_argument("--key-mass", action="store_true",
                       help="key_mass (n_k, heads): how much weight each key received, of all queries")
    asked.add_argument("--entropy", action="store_true", help="entropy (n_q, heads): of each query's weights, in nats")
    asked.add_argument("--mean-position", action="store_true",
                       help="mean_position (n_q, heads): of the keys, by their weights")
    asked.add_argument("--by-document", action="store_true",
                       help="mass_by_document (n_q, heads, n_documents): the weight of each document's keys; "
                            "offsets [0, ...] in dataset `documents` of IN.h5")
    asked.add_argument("--max-score", action="store_true",
                       help="max_score (heads,): the largest score, scaled, without sinks")
    asked.add_argument("--top", type=positive, default=0, metavar="N",
                       help="top_weights and top_positions (n_q, heads, N): the heaviest keys of each query "
                            "(default: none)")
    asked.add_argument("--rows", type=positions, default=(), metavar="N[,N...]",
                       help="rows (chosen, heads, n_k): all weights of the queries at these positions (default: none)")
    run = parser.add_argument_group("run")
    run.add_argument("--layout", choices=("contiguous", "striped", "zigzag"), default="contiguous",
                     help="which tokens each rank has while computing (default: contiguous)")
    run.add_argument("--backend", choices=("auto", "numba", "numpy"), default="auto",
                     help="where to compute (default: auto: by numba, else by numpy)")
    run.add_argument("--schedule", type=schedule, default="auto", metavar="S",
                     help="who computes what; see `ringmpi attend --help` (default: auto)")
    run.add_argument("--memory-limit", type=memory_limit, metavar="BYTES",
                     help="of the arrays and buffers of a rank at most, as in `ringmpi attend` (default: none)")
    run.add_argument("--threads", type=positive, metavar="N", help="CPU threads a rank (default: its share)")
    run.add_argument("--timeout", type=seconds, default=1800.0, metavar="S",
                     help="seconds to wait for another rank (default: 1800)")
    add_hdf5plugin(run)
    run.add_argument("--quiet", action="store_true", help="print nothing but errors")
    run.add_argument("--force", action="store_true", help="replace RESULT.h5 if it exists")
    parser.set_defaults(collective=True)


def run(arguments: argparse.Namespace) -> int:
    """Run `ringmpi analyse`; return the exit code."""
    from ..job.analyse import Question, analyse
    from ..mpi.world import world_rank
    names = ("key_mass", "entropy", "mean_position", "by_document", "max_score", "top", "rows")
    asked = {name: getattr(arguments, name) for name in names}
    question = Question(**asked) if any(asked.values()) else Question(key_mass=True)

    def say(text: str) -> None:
        if world_rank() == 0 and not arguments.quiet:
            print(text, flush=True)

    of_run = ("layout", "backend", "schedule", "memory_limit", "hdf5plugin")
    options = {name: getattr(arguments, name) for name in of_run}
    analyse(arguments.input, arguments.output, arguments.result, question, options, threads=arguments.threads,
            timeout=arguments.timeout, force=arguments.force, say=say)
    return 0
