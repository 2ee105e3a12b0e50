"""Predict the next byte of real text by attention, without any training, for growing context.

Makes q, k and v from this Python's standard library, attends on all ranks, and reports. The same queries, the last
bytes of the text, see more and more of what comes before them.

    mpiexec -n 4 ringmpi demo
"""

from __future__ import annotations

import argparse
import functools
import json
import string
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from .options import add_backend, positive, seconds

if TYPE_CHECKING:
    from ..job.report import Report
    from ..mpi.comm import Comm
    from .demo_text import Text

QUERIES = 4096
PICTURES = (".png", ".svg", ".pdf")
SEARCHED = 16                  # queries, about, of which the one that looked farthest back is quoted
HEADER = "  context  next byte  32-byte match      attend  GFLOP/s     waiting  peak a rank"


def contexts(text: str) -> list[int]:
    """Read N[,N...]: lengths of context in bytes."""
    return [positive(part) for part in text.split(",")]


def picture(text: str) -> Path:
    """Read the name of a picture."""
    path = Path(text)
    if path.suffix not in PICTURES:
        raise argparse.ArgumentTypeError(f"expected a name that ends in {', '.join(PICTURES)}, got {text!r}")
    return path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `ringmpi demo`."""
    parser.add_argument("paths", type=Path, nargs="*", metavar="PATH",
                        help="files or folders of text (default: this Python's standard library)")
    parser.add_argument("--contexts", type=contexts, default=[2**10, 2**13, 2**16, 2**18], metavar="N[,N...]",
                        help="bytes that each query sees (default: 1024,8192,65536,262144)")
    parser.add_argument("--queries", type=positive, metavar="N", help=f"bytes to predict (default: {QUERIES})")
    add_backend(parser)
    parser.add_argument("--threads", type=positive, metavar="N", help="CPU threads a rank (default: its share)")
    parser.add_argument("--timeout", type=seconds, default=1800.0, metavar="S",
                        help="seconds to wait for another rank (default: 1800)")
    parser.add_argument("--plot", type=picture, metavar="FILE",
                        help="draw where the quoted query looked, .png, .svg or .pdf; with matplotlib, the extra "
                             "`plot` (default: no picture)")
    parser.add_argument("--map", type=picture, metavar="FILE",
                        help="instead, plant random needles in the text, at depths from its beginning to its end, ask "
                             "for them behind it, and draw which were found in each context (default: no map)")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the files here (default: a temporary folder)")
    parser.set_defaults(collective=True, check=functools.partial(_check, parser.error))


def _check(error: Callable[[str], NoReturn], arguments: argparse.Namespace) -> None:
    """Refuse options that would have no effect."""
    for name in ("plot", "queries"):
        if arguments.map and getattr(arguments, name):
            error(f"--{name}: does not go together with --map, which asks for needles and quotes no retrieval")


def run(arguments: argparse.Namespace) -> int:
    """Run `ringmpi demo`; return the exit code."""
    arguments.check(arguments)
    arguments.queries = arguments.queries or QUERIES
    from ..backends import choose_gpu_early
    from ..files.paths import writing
    from ..files.record import check_record
    from ..mpi import comm as mpi
    from ..mpi.world import comm_world
    from ..pictures import check_pictures
    for name in ("plot", "map"):
        if getattr(arguments, name):
            check_pictures(f"--{name}")
            check_record(getattr(arguments, name))
    if arguments.map:
        from .demo_map import check_contexts
        check_contexts(arguments.contexts)
    choose_gpu_early(arguments.backend)
    world = comm_world(arguments.timeout)
    comm = mpi.private_comm(world, arguments.timeout, exclusive=True)
    with tempfile.TemporaryDirectory() if comm.rank == 0 else nullcontext("") as temporary:
        folder = Path(comm.allgather_text(str(arguments.keep or temporary), arguments.timeout)[0])
        with comm.raise_on_all(arguments.timeout):
            if comm.rank == 0:
                with writing(folder):
                    folder.mkdir(parents=True, exist_ok=True)
        if arguments.map:
            _map_needles(arguments, comm, folder)
        else:
            _predict(arguments, world, comm, folder)
    return 0


def _predict(arguments: argparse.Namespace, world: Any, comm: Comm, folder: Path) -> None:
    """Predict the last bytes of a text from more and more of what comes before them, and quote a retrieval."""
    from .demo_text import read_text
    if comm.rank == 0:
        print(HEADER, flush=True)
    longest = max(arguments.contexts)
    for context in sorted(set(arguments.contexts)):
        text = None
        with comm.raise_on_all(arguments.timeout):
            if comm.rank == 0:
                text = read_text(_paths(arguments), longest - context, context + arguments.queries)
        report = _attend(arguments, comm, folder, context, text, arguments.queries, (context - 1, 0))
        with comm.raise_on_all(arguments.timeout):
            if text is not None:
                right, found = _shares(text, folder / f"out-{context}.h5", arguments.queries)
                print(f"{context:>9,} {right:>10.1%} {found:>15.1%} {report.attend_seconds:>9.2f} s "
                      f"{report.gflops:>8.1f} {report.wait_seconds:>9.2f} s {report.peak_bytes / 2**20:>9,.0f} MiB",
                      flush=True)
    _quote(arguments, world, comm, folder, text)


def _map_needles(arguments: argparse.Namespace, comm: Comm, folder: Path) -> None:
    """Plant needles in texts of each length, ask for them from the end, and draw which were found."""
    import numpy as np

    from ..files.paths import writing
    from .demo_map import DEPTHS, NEEDLE, draw, header, needles_at_a_depth, plant, row, score
    from .demo_text import predict_bytes, read_text
    if comm.rank == 0:
        print(header(), flush=True)
    contexts = sorted(set(arguments.contexts))
    scores = []
    for context in contexts:
        queries = DEPTHS * NEEDLE * needles_at_a_depth(context)
        text = None
        with comm.raise_on_all(arguments.timeout):
            if comm.rank == 0:
                text = plant(read_text(_paths(arguments), 0, context))
        report = _attend(arguments, comm, folder, context, text, queries, None)
        with comm.raise_on_all(arguments.timeout):
            if text is not None:
                guess, _ = predict_bytes(*_read_result(folder / f"out-{context}.h5"))
                scores.append(score(text, guess))
                print(row(context, scores[-1], report), flush=True)
    with comm.raise_on_all(arguments.timeout):
        if comm.rank == 0:
            with writing(arguments.map):
                draw(arguments.map, contexts, np.stack(scores))
            print(f"\n{arguments.map}: the map")


def _paths(arguments: argparse.Namespace) -> list[Path]:
    from .demo_text import standard_library
    return arguments.paths or [standard_library()]


def _attend(arguments: argparse.Namespace, comm: Comm, folder: Path, context: int, text: Text | None, queries: int,
            window: tuple[int, int] | None) -> Report:
    """Make an input of the text that rank 0 has, whose last bytes have queries, and attend."""
    from ..dtypes import BFLOAT16
    from ..job.attend import attend
    from ..job.options import Options
    from .demo_text import write_text
    source = folder / f"text-{context}.h5"
    with comm.raise_on_all(arguments.timeout):
        if text is not None:
            write_text(source, text, queries, BFLOAT16, force=True)
    options = Options(causal=True, window=window, layout="striped", backend=arguments.backend,
                      gpu_transport=arguments.gpu_transport, allow_gpu_sharing=arguments.allow_gpu_sharing,
                      bfloat16_products=arguments.bfloat16_products, schedule=arguments.schedule,
                      memory_limit=arguments.memory_limit)
    return attend(source, folder / f"out-{context}.h5", options, threads=arguments.threads, timeout=arguments.timeout,
                  force=True)


def _read_result(target: Path) -> tuple[Any, Any]:
    """Read out and lse."""
    from ..files.manifest import read_manifest
    manifest = read_manifest(target)
    rows = manifest.shapes["out"][0]
    return manifest.rows("out", 0, rows), manifest.rows("lse", 0, rows)


def _shares(text: Text, target: Path, queries: int) -> tuple[float, float]:
    """Give the share of next bytes that are right, and of queries whose longest context was found."""
    from .demo_text import ORDERS, predict_bytes
    guess, head = predict_bytes(*_read_result(target))
    truth = text.data[len(text.data) - queries + 1:]
    return float((guess[:-1] == truth).mean()), float((head == len(ORDERS) - 1).mean())


def _quote(arguments: argparse.Namespace, world: Any, comm: Comm, folder: Path, text: Text | None) -> None:
    """Quote a query that found its longest context far back: where it looked, and what came back; draw it if asked."""
    from ..files.paths import writing
    from .demo_look import Files, Looks, plot
    from .demo_text import ORDERS
    longest = max(arguments.contexts)
    target = folder / f"out-{longest}.h5"
    guess: Any = None
    rows: list[int] = []
    with comm.raise_on_all(arguments.timeout):
        if text is not None:
            guess, rows = _candidates(text, target, arguments.queries)
    rows = json.loads(comm.allgather_text(json.dumps(rows), arguments.timeout)[0])
    if not rows:
        if comm.rank == 0:
            print("\nno query found its longest context")
        return

    # Of some that were right, the one that looked farthest back.
    files = Files(folder / f"text-{longest}.h5", target, longest)
    looks = Looks(world, comm, files, longest, arguments.backend, arguments.threads, arguments.timeout)
    found = {row: looks.top(row) for row in rows}
    best = max(found, key=lambda row: longest + row - int(found[row].positions[len(ORDERS) - 1, 0]))
    weights = looks.weights(best) if arguments.plot else None
    with comm.raise_on_all(arguments.timeout):
        if text is not None:
            print(_quotation(text, longest + best, chr(guess[best]), *(x[-1].tolist() for x in found[best])))
            if weights is not None:
                with writing(arguments.plot):
                    plot(arguments.plot, weights, longest + best)
                print(f"\n{arguments.plot}: its weights over all positions")


def _candidates(text: Text, target: Path, queries: int) -> tuple[Any, list[int]]:
    """Give what all queries guessed, and about `SEARCHED` that were right by their longest context."""
    import numpy as np

    from .demo_text import ORDERS, predict_bytes
    guess, head = predict_bytes(*_read_result(target))
    letters = np.frombuffer(string.ascii_letters.encode(), np.uint8)
    right = (head[:-1] == len(ORDERS) - 1) & (guess[:-1] == text.data[len(text.data) - queries + 1:])
    if (right & np.isin(guess[:-1], letters)).any():        # a letter tells a reader more than a space
        right &= np.isin(guess[:-1], letters)
    return guess, right.nonzero()[0][::max(1, int(right.sum()) // SEARCHED)].tolist()


def _quotation(text: Text, position: int, guess: str, weights: list[float], positions: list[int]) -> str:
    """Say where a query looked, by its heaviest keys, and what came back."""
    column = positions[0]
    back = text.data[max(0, column - 40):column + 40].tobytes()
    before = min(column, 40)
    return "\n".join((
        f"\none retrieval: the query at {text.place(position)} ends in",
        f"    {text.data[position - 39:position + 1].tobytes().decode(errors='replace')!r}",
        "attention put",
        *(f"    {weight:6.1%} of its weight {position - key:,} bytes before, at {text.place(key)}"
          for weight, key in zip(weights, positions, strict=True) if key >= 0),
        "the first is where this stands:",
        f"    {back[:before].decode(errors='replace')!r}",
        f"and the byte that came back is {guess!r}, which is right; there it goes on",
        f"    {back[before:].decode(errors='replace')!r}"))
