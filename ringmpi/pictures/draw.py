"""The pictures themselves, by matplotlib: on light and dark ground, with one rank or many."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..layout import Layout
from ..mask_base import BaseMask
from .record import Timeline

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Wong 2011, *Points of view: color blindness*; ink that can be read on white and on black.
COLOURS = {"compute": "#0072B2", "wait": "#D55E00", "exchange": "#CC79A7", "setup": "#999999", "compile": "#56B4E9"}
INK = "#7f7f7f"
MOST_MESSAGES = 600                # that are drawn
LABELLED = 32                      # ranks that have a label each
BEFORE = 0.1                       # of the seconds of the steps is shown before them
HALF = 0.35                        # of a lane's height
LANE = 0.36                        # inches of a rank
OWNERS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999")


def draw_timeline(timeline: Timeline) -> Figure:
    """Draw a lane for each rank: computing, waiting, and each block on its way. Local."""
    from matplotlib.collections import LineCollection, PolyCollection
    figure, (axes,) = _figure(1, min(12.0, 1.6 + LANE * timeline.ranks))
    for what, colour in COLOURS.items():
        corners = [[(span.start, span.rank - HALF), (span.stop, span.rank - HALF), (span.stop, span.rank + HALF),
                    (span.start, span.rank + HALF)] for span in timeline.spans
                   if span.what == what and span.stop > span.start]
        if corners:
            axes.add_collection(PolyCollection(corners, facecolor=colour, edgecolor="white", linewidth=0.3, label=what))
    shown = timeline.messages[:: max(1, math.ceil(len(timeline.messages) / MOST_MESSAGES))]
    axes.add_collection(LineCollection([[(message.start, message.sender), (message.stop, message.receiver)]
                                        for message in shown], color=INK, linewidth=0.6, alpha=0.7))
    _rank_axis(axes, timeline.ranks)
    first = min((span.start for span in timeline.spans if span.what == "compute"), default=0.0)
    axes.set_xlim(max(0.0, first - BEFORE * (timeline.seconds - first)), timeline.seconds or 1.0)
    axes.set_xlabel("seconds since the first rank began; a line is a block on its way")
    axes.set_title(f"{timeline.grid} on {_ranks(timeline.ranks)}: {100 * timeline.hidden:.1f} % of the steps "
                   f"computing, {100 * (1 - timeline.hidden):.1f} % waiting", loc="left", color=INK)
    _legend(axes)
    return figure


def draw_balance(timeline: Timeline) -> Figure:
    """Draw pairs and seconds of each rank, step by step on top of each other. Local."""
    from matplotlib.collections import PolyCollection
    figure, panels = _figure(2, 3.4)
    pairs: dict[int, list[float]] = defaultdict(list)
    seconds: dict[int, list[float]] = defaultdict(list)
    for span in timeline.spans:
        if span.what == "compute":
            pairs[span.rank].append(span.pairs)
            seconds[span.rank].append(span.stop - span.start)
    waits = [sum(span.stop - span.start for span in timeline.spans if span.rank == rank and span.what == "wait")
             for rank in range(timeline.ranks)]
    for axes, values, title in ((panels[0], pairs, "visible pairs"), (panels[1], seconds, "seconds")):
        bottom = np.zeros(timeline.ranks)
        for step in range(max(map(len, values.values()), default=0)):
            heights = np.array([values[rank][step] if step < len(values[rank]) else 0.0
                                for rank in range(timeline.ranks)])
            corners = [[(rank - HALF, low), (rank + HALF, low), (rank + HALF, high), (rank - HALF, high)]
                       for rank, (low, high) in enumerate(zip(bottom, bottom + heights, strict=True)) if high > low]
            axes.add_collection(PolyCollection(corners, facecolor=COLOURS["compute"], edgecolor="white", linewidth=0.4,
                                               alpha=0.55 + 0.45 * (step % 2), label=None if step else "compute"))
            bottom += heights
        if title == "seconds":
            axes.bar(range(timeline.ranks), waits, 2 * HALF, bottom, color=COLOURS["wait"], label="wait")
            bottom = bottom + waits
            _legend(axes)
        axes.set_xlim(-0.6, timeline.ranks - 0.4)
        axes.set_ylim(0, 1.05 * bottom.max(initial=0.0) or 1.0)
        most, mean = bottom.max(initial=0.0), bottom.mean() if len(bottom) else 0.0
        axes.set_title(f"{title}: the most is {most / mean:.2f} of the mean" if mean else title, loc="left", color=INK)
        axes.set_xlabel("rank; a shade is a step")
        axes.xaxis.get_major_locator().set_params(integer=True)
    return figure


def draw_scaling(records: Sequence[dict[str, Any]]) -> Figure:
    """Draw seconds of attention over the ranks of several records, beside the slope of perfect scaling. Local."""
    figure, (axes,) = _figure(1, 3.6)
    ranks = np.array([record["ranks"] for record in records])
    seconds = np.array([record["attend_seconds"] for record in records])
    order = np.argsort(ranks, kind="stable")
    axes.plot(ranks[order], seconds[order], "o-", color=COLOURS["compute"], label="measured")
    first = order[0]
    some = np.unique(ranks)
    axes.plot(some, seconds[first] * ranks[first] / some, "--", color=INK, label="in proportion to the ranks")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("ranks")
    axes.set_ylabel("seconds of attention", color=INK)
    _legend(axes)
    return figure


def draw_bench(rows: Sequence[dict[str, Any]]) -> Figure:
    """Draw bars of what a benchmark measured, beside its peer where there is one. Local."""
    named = [row for row in rows if isinstance(row.get("ratio"), (int, float))]
    figure, (axes,) = _figure(1, 1.6 + 0.3 * len(named))
    names = [", ".join(str(row[name]) for name in row if isinstance(row[name], str) and not _is_number(row[name]))
             for row in named]
    axes.barh(range(len(named)), [row["ratio"] for row in named], color=COLOURS["compute"], height=0.7)
    axes.axvline(1.0, color=INK, linewidth=1)
    axes.set_yticks(range(len(named)), names)
    axes.invert_yaxis()
    axes.set_xlabel("ratio to the peer in the same run; the line is as fast as the peer")
    return figure


def draw_pairs(mask: BaseMask, layout: Layout, name: str) -> Figure:
    """Draw which rank computes which pairs of a short sequence, and how many each has. Local.

    Parameters
    ----------
    mask : mask
    layout : Layout
        Of queries and keys.
    name : str
        Of the layout, for the title.
    """
    length, size = layout.length, layout.size
    owner = np.full((length, length), np.nan)
    counts = []
    for rank in range(size):
        rows = layout.positions(rank)
        seen = np.zeros((len(rows), length), np.bool_)
        columns = np.arange(length)
        for low, high in mask.bounds(rows, length, length):
            seen |= (columns >= np.asarray(low)[:, None]) & (columns < np.asarray(high)[:, None])
        owner[rows] = np.where(seen, rank, np.nan)
        counts.append(int(seen.sum()))
    figure, (axes, bars) = _figure(2, 4.2)
    from matplotlib.colors import ListedColormap
    colours = [OWNERS[rank % len(OWNERS)] for rank in range(size)]
    axes.imshow(owner, cmap=ListedColormap(colours), vmin=-0.5, vmax=size - 0.5, interpolation="nearest")
    axes.set_xlabel("key")
    axes.set_ylabel("query", color=INK)
    axes.set_title(f"{name}: who computes which pairs", loc="left", color=INK)
    bars.bar(range(size), counts, color=colours)
    bars.set_xlabel("rank")
    mean = sum(counts) / size
    bars.set_title(f"visible pairs: the most is {max(counts) / mean:.2f} of the mean" if mean else "visible pairs",
                   loc="left", color=INK)
    bars.xaxis.get_major_locator().set_params(integer=True)
    return figure


def _figure(panels: int, height: float) -> tuple[Figure, list[Any]]:
    """Make a figure with panels side by side, whose ground is that of the page."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(9, height), layout="constrained")
    figure.patch.set_alpha(0)
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    for panel in axes:
        panel.patch.set_alpha(0)
        panel.tick_params(colors=INK)
        panel.xaxis.label.set_color(INK)
        for spine in panel.spines.values():
            spine.set_color(INK)
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
    return figure, axes


def _rank_axis(axes: Any, ranks: int) -> None:
    step = max(1, math.ceil(ranks / LABELLED))
    axes.set_yticks(range(0, ranks, step), [f"rank {rank}" for rank in range(0, ranks, step)])
    axes.set_ylim(ranks - 0.5, -0.5)


def _legend(axes: Any) -> None:
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, labelcolor=INK)


def _ranks(count: int) -> str:
    return f"{count} rank{'' if count == 1 else 's'}"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
