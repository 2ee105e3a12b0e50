"""Draw what a job did, of the record that `attend --json` wrote; or, without one, which rank computes which pairs."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import options

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ENDS = (".png", ".svg", ".pdf", ".html")
PICTURES = ("timeline", "balance", "scaling", "bench", "pairs")
MOST_TOKENS = 2048


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `ringmpi plot`."""
    parser.add_argument("records", type=Path, nargs="*", metavar="RECORD.json",
                        help="of `attend --json` or `bench --json`; several show how a job scales (default: none, for "
                             "the picture `pairs`)")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE",
                        help=f"what to draw into: a name that ends in {', '.join(ENDS)}; a page in HTML has all "
                             "pictures of a record (default: none)")
    parser.add_argument("--picture", choices=PICTURES, default=None,
                        help="which (default: what the records are of)")
    parser.add_argument("--trace", type=Path, metavar="FILE",
                        help="write the record as a trace for Perfetto or Chrome (default: none)")
    parser.add_argument("--force", action="store_true", help="replace files that exist")
    group = parser.add_argument_group("pairs", "who computes which pairs of a short sequence")
    group.add_argument("--tokens", type=options.positive, default=64, metavar="N", help="of the sequence (default: 64)")
    group.add_argument("--ranks", type=options.positive, default=4, metavar="P", help="that share it (default: 4)")
    group.add_argument("--layout", choices=("contiguous", "striped", "zigzag"), default="striped",
                       help="who has which tokens (default: striped)")
    group.add_argument("--causal", action="store_true", help="no key after the query")
    group.add_argument("--window", type=options.window, metavar="LEFT[,RIGHT]", default=None,
                       help="keys before and after the query (default: all)")


def run(arguments: argparse.Namespace) -> int:
    """Run `ringmpi plot`; return the exit code."""
    from ..environment import require_single_process
    from ..errors import OptionError
    from ..files.paths import check_writable
    from ..pictures import check_pictures
    require_single_process("plot")
    if arguments.output is None and arguments.trace is None:
        raise OptionError("plot: expected -o FILE, or --trace FILE")
    if arguments.output is not None:
        if arguments.output.suffix not in ENDS:
            raise OptionError(f"-o: expected a name that ends in {', '.join(ENDS)}, got {arguments.output}")
        check_pictures("plot")
    for path in filter(None, (arguments.output, arguments.trace)):
        check_writable(path, arguments.force)
    if arguments.trace is not None:
        _write_trace(arguments)
    if arguments.output is not None:
        _draw(arguments)
    return 0


def _write_trace(arguments: argparse.Namespace) -> None:
    from ..errors import OptionError
    from ..pictures.perfetto import make_trace
    from ..pictures.record import make_timeline, read_record
    if len(arguments.records) != 1:
        raise OptionError(f"--trace: expected one record, got {len(arguments.records)}")
    trace = make_trace(make_timeline(read_record(arguments.records[0])))
    _write(arguments.trace, (json.dumps(trace) + "\n").encode(), arguments.force)


def _draw(arguments: argparse.Namespace) -> None:
    """Draw into the file; a page has all pictures that there are."""
    import io

    from ..pictures.page import make_page
    figures = _figures(arguments)
    if arguments.output.suffix == ".html":
        _write(arguments.output, make_page("ringmpi", _facts(arguments), figures).encode(), arguments.force)
        return
    file = io.BytesIO()
    figure = figures[0][1]
    if arguments.output.suffix != ".svg":
        figure.patch.set_alpha(1)
        figure.patch.set_facecolor("white")
    figure.savefig(file, format=arguments.output.suffix[1:], dpi=150)
    _write(arguments.output, file.getvalue(), arguments.force)


def _figures(arguments: argparse.Namespace) -> list[tuple[str, Figure]]:
    """Make the pictures that are asked for: all that there are of a record without --picture."""
    from ..errors import OptionError
    from ..pictures import draw
    from ..pictures.record import make_timeline, read_record
    records, wished = arguments.records, arguments.picture
    if not records:
        if wished not in (None, "pairs"):
            raise OptionError(f"plot: expected a record for the picture {wished}, got none")
        return [("Who computes which pairs", _draw_pairs(arguments))]
    if wished == "pairs":
        raise OptionError("plot: expected no record for the picture pairs, which is of --tokens, --ranks and a mask")
    if len(records) > 1 or wished == "scaling":
        if wished not in (None, "scaling"):
            raise OptionError(f"plot: expected one record for the picture {wished}, got {len(records)}")
        return [("Scaling", draw.draw_scaling([read_record(path) for path in records]))]
    rows = _bench_rows(records[0])
    if rows is not None:
        if wished not in (None, "bench"):
            raise OptionError(f"plot: expected the record of attend for the picture {wished}, got one of a benchmark")
        return [("Beside its peers", draw.draw_bench(rows))]
    if wished == "bench":
        raise OptionError("plot: expected what bench --json wrote for the picture bench, got another record")
    timeline = make_timeline(read_record(records[0]))
    makers = {"timeline": ("Timeline", draw.draw_timeline), "balance": ("Balance", draw.draw_balance)}
    return [(heading, make(timeline)) for name, (heading, make) in makers.items() if wished in (None, name)]


def _draw_pairs(arguments: argparse.Namespace) -> Figure:
    from ..errors import OptionError
    from ..layout import make
    from ..mask import Mask
    from ..pictures.draw import draw_pairs
    if arguments.tokens > MOST_TOKENS:
        raise OptionError(f"--tokens: expected at most {MOST_TOKENS} for a picture of all pairs, "
                          f"got {arguments.tokens}")
    mask = Mask(causal=arguments.causal, window=arguments.window)
    return draw_pairs(mask, make(arguments.layout, arguments.tokens, arguments.ranks), arguments.layout)


def _bench_rows(path: Path) -> list[dict[str, Any]] | None:
    """Give the rows of a benchmark's record; None if it is none."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return None                                 # `read_record` says what is wrong
    rows = content.get("rows") if isinstance(content, dict) else content
    return rows if isinstance(rows, list) and all(isinstance(row, dict) for row in rows) else None


def _facts(arguments: argparse.Namespace) -> dict[str, str]:
    """Give what a page says above its pictures: of a single record of a job."""
    from ..pictures.job import describe_job
    from ..pictures.record import make_timeline, read_record
    if len(arguments.records) != 1 or _bench_rows(arguments.records[0]) is not None:
        return {}
    record = read_record(arguments.records[0])
    return describe_job(record, make_timeline(record))


def _write(path: Path, content: bytes, force: bool) -> None:
    """Write a file whole."""
    from ..files.new_file import new_file
    with new_file(path, force=force) as file:
        file.write(content)
        file.finish()
