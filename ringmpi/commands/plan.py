r"""Say which schedule would be fast on a machine that need not be there: seconds, bytes and memory of each; no MPI.

The machine is described by numbers of ranks and threads, and by rates: those that `ringmpi bench network` has kept,
else usual ones, with --link and --latency in their place. What is computed is in a file, or said by sizes.

    ringmpi plan in.h5 --causal --layout striped --ranks 64 --ranks-per-node 8
    ringmpi plan --tokens 1048576 --heads 32 --kv-heads 8 --dim 128 --dtype bfloat16 --backend cuda \
        --ranks 4096 --ranks-per-node 8 --link 25GB/s --latency 2us
    ringmpi plan --tokens 1048576 ... --simulate --jitter 0.1 --slow-rank 3:2

--simulate follows the steps of one schedule, message by message: where it stops scaling, and who holds the others up.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import OptionError
from .options import (
    DTYPES,
    OF_ARRAYS,
    above_zero,
    add_attention,
    memory_limit,
    natural,
    positive,
    refuse_idle_options,
    schedule,
)
from .units import bandwidth, duration, time_text

if TYPE_CHECKING:
    from ..job.question import Question
    from ..schedules.machine import Machine
    from ..schedules.rates import Rates

NODE = 8                    # ranks, where nothing is said
MOST_RANKS = 2**20          # more are a mistake, or take minutes
MOST_TOKENS = 2**26         # of a rank, whose positions are looked at
MOST_SIZE = 2**16           # heads, and numbers of a head
SIZES = ("tokens", "queries", "heads", "kv_heads", "dim", "dim_v", "dtype")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `ringmpi plan`."""
    parser.add_argument("input", type=Path, nargs="?", metavar="IN.h5", help="what to compute; or say its sizes")
    sizes = parser.add_argument_group("sizes, without IN.h5")
    sizes.add_argument("--tokens", type=positive, metavar="N", help="keys and values")
    sizes.add_argument("--queries", type=positive, metavar="N", help="queries, at the end (default: all tokens)")
    sizes.add_argument("--heads", type=positive, metavar="H", help="query heads (default: 8)")
    sizes.add_argument("--kv-heads", type=positive, metavar="K", help="key and value heads (default: as many as heads)")
    sizes.add_argument("--dim", type=positive, metavar="D", help="of queries and keys (default: 64)")
    sizes.add_argument("--dim-v", type=positive, metavar="D", help="of values (default: dim)")
    sizes.add_argument("--dtype", choices=DTYPES, help="of q, k and v (default: float32)")
    sizes.add_argument("--values-in-keys", action="store_true",
                       help="values are the first --dim-v numbers of each key, in IN.h5 too (default: they are apart)")
    add_attention(parser, sizes=True)
    _add_machine(parser)
    plan = parser.add_argument_group("plan")
    plan.add_argument("--layout", choices=("contiguous", "striped", "zigzag"), default="contiguous",
                      help="which tokens each rank has while computing (default: contiguous)")
    plan.add_argument("--accumulator", choices=("float32", "float64"), help="dtype of sums (default: by the input's)")
    plan.add_argument("--memory-limit", type=memory_limit, metavar="BYTES",
                      help="of the arrays and buffers of a rank at most, 2GiB for example")
    plan.add_argument("--backward", action="store_true", help="count a backward pass too")
    plan.add_argument("--all", action="store_true", help="print all candidates, not only the best")
    plan.add_argument("--json", type=Path, metavar="FILE", help="write all of it; - is standard output")
    _add_simulation(parser)
    parser.set_defaults(check=functools.partial(refuse_idle_options, parser.error), error=parser.error)


def _add_machine(parser: argparse.ArgumentParser) -> None:
    machine = parser.add_argument_group("machine")
    machine.add_argument("--ranks", type=positive, required=True, metavar="P", help="MPI ranks")
    machine.add_argument("--ranks-per-node", type=positive, metavar="N",
                         help=f"(default: {NODE}, or all of fewer ranks)")
    machine.add_argument("--threads", type=positive, metavar="N",
                         help="CPU threads of a rank (default: the cores of a node over its ranks)")
    machine.add_argument("--cores", type=positive, metavar="N",
                         help="of a node (default: as here, or one for each thread of its ranks)")
    machine.add_argument("--backend", choices=("auto", "numba", "numpy", "cuda"), default="auto",
                         help="cuda: each rank computes on a GPU of its own (default: auto: on CPUs)")
    machine.add_argument("--link", type=bandwidth, metavar="B/s",
                         help="of a link between nodes, one way: 25GB/s or 200Gbit/s (default: by the rates)")
    machine.add_argument("--latency", type=duration, metavar="T",
                         help="of a message between nodes: 2us (default: by the rates)")
    machine.add_argument("--links", type=positive, metavar="N",
                         help="of a node to others, which its ranks share (default: one; with GPUs one for each)")
    machine.add_argument("--rates", type=Path, metavar="FILE",
                         help="of `ringmpi bench network` (default: RINGMPI_RATES, else those of this machine, else "
                              "usual ones)")


def _add_simulation(parser: argparse.ArgumentParser) -> None:
    simulation = parser.add_argument_group("simulation")
    simulation.add_argument("--simulate", action="store_true", help="simulate the forward pass, step by step")
    simulation.add_argument("--schedule", type=schedule, metavar="S",
                            help="the one to simulate, as in `ringmpi attend` (default: ring)")
    simulation.add_argument("--jitter", type=_share, default=0.0, metavar="X",
                            help="how unequal times of equal work are: their standard deviation over the mean "
                                 "(default: 0)")
    simulation.add_argument("--seed", type=natural, default=0, metavar="S", help="of the jitter (default: 0)")
    simulation.add_argument("--slow-rank", type=_slow_rank, action="append", default=[], metavar="RANK:X",
                            help="this rank takes X times as long to compute; may be given several times (default: "
                                 "none)")
    simulation.add_argument("--slow-link", type=_slow_link, action="append", default=[], metavar="RANK-RANK:X",
                            help="messages between these ranks take X times as long, either way; may be given several "
                                 "times (default: none)")


def _share(text: str) -> float:
    """Read a number from 0 to 10."""
    value = 0.0 if text.strip() in ("0", "0.0") else above_zero(text)
    if value > 10:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 10, as 0.1 for 10 %, got {text!r}")
    return value


def _slow_rank(text: str) -> tuple[int, float]:
    """Read RANK:X."""
    rank, colon, factor = text.partition(":")
    if not (colon and rank.isdecimal()):
        raise argparse.ArgumentTypeError(f"expected RANK:TIMES, as 3:2.0 for rank 3 at half its speed, got {text!r}")
    return int(rank), above_zero(factor, "RANK:TIMES with TIMES")


def _slow_link(text: str) -> tuple[tuple[int, int], float]:
    """Read RANK-RANK:X."""
    ends, colon, factor = text.partition(":")
    one, _, other = ends.partition("-")
    if not (colon and one.isdecimal() and other.isdecimal() and int(one) != int(other)):
        raise argparse.ArgumentTypeError("expected RANK-RANK:TIMES, as 3-4:10 for a link at a tenth of its speed, got "
                                         f"{text!r}")
    return (int(one), int(other)), above_zero(factor, "RANK-RANK:TIMES with TIMES")


def run(arguments: argparse.Namespace) -> int:
    """Run `ringmpi plan`; return the exit code."""
    from ..environment import require_single_process
    from ..files.record import check_record, write_json
    from ..files.streams import STANDARD_OUTPUT
    require_single_process("plan")
    in_file = arguments.input is not None and "hidden" in (arguments.axes or "")
    arguments.query_heads = arguments.heads if in_file else None
    arguments.check(arguments)
    _refuse(arguments)
    if arguments.json:
        check_record(arguments.json)
    question = _question(arguments)
    if arguments.simulate:
        from .plan_simulate import simulate as answer
    else:
        from .plan_table import tabulate as answer
    lines, record = answer(arguments, question)
    if arguments.json != STANDARD_OUTPUT:
        print("\n".join([*_describe(question), *lines]))
    if arguments.json:
        write_json(arguments.json, record)
    return 0


def _refuse(arguments: argparse.Namespace) -> None:
    """Refuse options that would have no effect, or do not go together."""
    error = arguments.error
    in_hidden = arguments.query_heads is not None
    said = [name for name in SIZES if getattr(arguments, name) is not None
            and not (name == "dim_v" and arguments.values_in_keys) and not (name == "heads" and in_hidden)]
    auto = arguments.schedule == "auto"
    if arguments.input is None and arguments.tokens is None:
        error("expected IN.h5, or --tokens and what else differs from the defaults")
    if arguments.values_in_keys and arguments.dim_v is None:
        error("--values-in-keys: expected --dim-v too, how many of their numbers are values")
    if arguments.values_in_keys and arguments.v != "v":
        error("--v: with --values-in-keys values are in the keys; leave one of the two out")
    if arguments.input is not None and said:
        error(f"--{said[0].replace('_', '-')}: IN.h5 says that; leave one of them out")
    for name in ("relative", "values_in_keys"):
        if getattr(arguments, name) and arguments.backend == "cuda":
            error(f"--{name.replace('_', '-')}: the CUDA backend has none yet; expected another backend")
    for name in ("axes", "documents", "key_bias", "relative", *OF_ARRAYS):
        if getattr(arguments, name) and arguments.input is None:
            error(f"--{name.replace('_', '-')}: read from IN.h5, which is not given")
    for name in ("jitter", "slow_rank", "slow_link", "schedule"):
        if getattr(arguments, name) and not arguments.simulate:
            error(f"--{name.replace('_', '-')}: says what to simulate, and --simulate is not given")
    for name in ("all", "memory_limit"):
        if getattr(arguments, name) and arguments.simulate and not (name == "memory_limit" and auto):
            error(f"--{name.replace('_', '-')}: says what to list, and --simulate follows one schedule")
    if arguments.simulate and arguments.backward:
        error("--backward: --simulate simulates the forward pass; leave one of them out")
    if arguments.ranks > MOST_RANKS:
        error(f"--ranks: expected {MOST_RANKS:,} at most, got {arguments.ranks:,}")
    for name in ("tokens", "queries"):
        if (getattr(arguments, name) or 0) > MOST_TOKENS * arguments.ranks:
            error(f"--{name}: expected {MOST_TOKENS:,} a rank at most, got {getattr(arguments, name):,} on "
                  f"{arguments.ranks:,} ranks; say how many with --ranks")
    for name in ("heads", "kv_heads", "dim", "dim_v"):
        if (getattr(arguments, name) or 0) > MOST_SIZE:
            error(f"--{name.replace('_', '-')}: expected {MOST_SIZE:,} at most, got {getattr(arguments, name):,}")
    last = arguments.ranks - 1
    slow = [rank for rank, _ in arguments.slow_rank] + [rank for link, _ in arguments.slow_link for rank in link]
    for rank in slow:
        if rank > last:
            error(f"expected a rank from 0 to {last} to be slow, got {rank}")


def _question(arguments: argparse.Namespace) -> Question:
    """Read what is asked."""
    from ..job.options import Options
    from ..job.question import Question
    in_keys = arguments.dim_v if arguments.values_in_keys else None
    options = Options.from_record({**{name: value for name, value in vars(arguments).items() if name != "schedule"},
                                   "dim_v": in_keys})
    if arguments.input is not None:
        from ..job.inputs import open_input
        with open_input(arguments.input, options) as data:
            return Question(data.sizes, options, data.mask, _machine(arguments))
    from ..job.inputs import Sizes
    from ..job.masks import make_mask
    heads, dim = arguments.heads or 8, arguments.dim or 64
    kv_heads = arguments.kv_heads or heads
    if heads % kv_heads:
        arguments.error(f"--heads must be a multiple of --kv-heads, got {heads} and {kv_heads}")
    sizes = Sizes(arguments.queries or arguments.tokens, arguments.tokens, heads, kv_heads, dim,
                  arguments.dim_v or dim, arguments.dtype or "float32", in_keys=arguments.values_in_keys)
    if sizes.in_keys and sizes.dim_v > dim:
        arguments.error(f"--dim-v must be at most --dim with --values-in-keys, got {sizes.dim_v} and {dim}")
    mask = make_mask(options)
    mask.check(sizes.n_q, sizes.n_k)
    return Question(sizes, options, mask, _machine(arguments))


def _machine(arguments: argparse.Namespace) -> Machine:
    """Describe the machine that is asked about."""
    from dataclasses import replace

    from ..environment import affinity
    from ..schedules.machine import Machine
    rates, on_gpu = _rates(arguments), arguments.backend == "cuda"
    between = rates.between._replace(
        **{name: value for name, value in (("bandwidth", arguments.link), ("latency", arguments.latency))
           if value is not None})
    here = min(arguments.ranks, arguments.ranks_per_node or NODE)
    threads = arguments.threads or max(1, (arguments.cores or len(affinity())) // here)
    cores = arguments.cores or max(len(affinity()), here * threads)
    links = arguments.links or (here if on_gpu else 1)
    return Machine(arguments.ranks, here, threads, cores, on_gpu, links, replace(rates, between=between))


def _rates(arguments: argparse.Namespace) -> Rates:
    """Give the rates that are asked for: of a file, else of this machine, else usual ones."""
    from ..engine import rates_of_this_machine
    from ..schedules.rates import CPU, GPU, Rates
    if arguments.rates is not None:
        try:
            return Rates.load(arguments.rates)
        except OSError as error:
            raise OptionError(f"--rates: expected a file that `ringmpi bench network --save` has written, got "
                              f"{arguments.rates}: {error.strerror}") from error
    on_gpu = arguments.backend == "cuda"
    text = rates_of_this_machine(on_gpu)
    return Rates.from_text(text) if text else GPU if on_gpu else CPU


def _describe(question: Question) -> list[str]:
    """Say what is computed, and on what."""
    sizes, machine = question.sizes, question.machine
    rates = machine.rates
    computes = "a GPU each" if machine.on_gpu else f"{machine.threads} thread{'s'[:machine.threads > 1]} each"
    lines = [f"{sizes.n_q:,} queries, {sizes.n_k:,} keys, heads {sizes.heads}/{sizes.kv_heads}, dim {sizes.dim}, "
             f"{sizes.dtype}, {question.options.layout}; {machine.ranks:,} rank{'s'[:machine.ranks > 1]}, "
             f"{machine.ranks_per_node} a node, "
             f"{computes}"]
    lines.append(f"rates: {rates.where}; between nodes {rates.between.bandwidth / 1e9:.3g} GB/s and "
                 f"{time_text(rates.between.latency)}, inside {rates.inside.bandwidth / 1e9:.3g} GB/s and "
                 f"{time_text(rates.inside.latency)}, {rates.forward.flops / 1e9:,.0f} GFLOP/s a "
                 f"{'GPU' if machine.on_gpu else 'thread'}")
    return lines
