"""A map of needles: random strings planted in a text at some depths, and whether attention finds them from its end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import OptionError
from .demo_text import ORDERS, Bytes, Text

DEPTHS = 11                    # from the beginning to the end
NEEDLE = 40                    # bytes of a needle
MOST = 8                       # needles at a depth
FIRST = ORDERS[-1] - 1         # byte of a needle up to which the longest context lies in it: the next one is asked for


def needles_at_a_depth(context: int) -> int:
    """Say how many needles a context has at each depth, without one on another. Local."""
    return min(MOST, context // (DEPTHS * NEEDLE))


def check_contexts(contexts: Sequence[int]) -> None:
    """Raise `OptionError` unless each context has room for needles at all depths. Local."""
    if min(contexts) < DEPTHS * NEEDLE:
        raise OptionError(f"--map: expected contexts of {DEPTHS * NEEDLE} bytes at least, which have room for a needle "
                          f"at each of {DEPTHS} depths, got {min(contexts)}")


def plant(text: Text) -> Text:
    """Plant needles in a text, and append them all once more: there the queries are. Local.

    Parameters
    ----------
    text : Text
        Of a context.

    Returns
    -------
    Text
        Its last bytes are the needles, those of the first depth first.
    """
    context = len(text.data)
    each = needles_at_a_depth(context)
    needles = np.random.default_rng(context).integers(0, 256, (DEPTHS, each * NEEDLE), np.uint8)
    data = text.data.copy()
    for number, start in enumerate(np.linspace(0, context - each * NEEDLE, DEPTHS).round().astype(int)):
        data[start:start + each * NEEDLE] = needles[number]
    offsets = np.append(text.offsets, context + needles.size)
    return Text(np.concatenate([data, needles.reshape(-1)]), [*text.names, "the needles again"], offsets)


def score(text: Text, guess: Bytes) -> NDArray[np.float64]:
    """Give the share of bytes of needles that came back right, by depth. Local.

    Parameters
    ----------
    text : Text
        As `plant` gave it.
    guess : uint8 array of shape (queries,)
        The next byte after each of the needles' at its end.
    """
    guesses, truth = (x.reshape(DEPTHS, -1, NEEDLE) for x in (guess, text.data[len(text.data) - len(guess):]))
    shares: NDArray[np.float64] = (guesses[:, :, FIRST:-1] == truth[:, :, FIRST + 1:]).mean(axis=(1, 2))
    return shares


def header() -> str:
    """Give the line above the rows. Local."""
    return "  context  right at depth " + " ".join(f"{share:>5.0%}" for share in np.linspace(0, 1, DEPTHS))


def row(context: int, scores: NDArray[np.float64], report: Any) -> str:
    """Give the line of a context. Local."""
    return (f"{context:>9,}                 " + " ".join(f"{share:>5.0%}" for share in scores)
            + f"   {report.attend_seconds:.2f} s")


def draw(path: Path, contexts: Sequence[int], scores: NDArray[np.float64]) -> None:
    """Draw the map, scores of shape (contexts, depths), into a file. Local."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(9, 1.8 + 0.5 * len(contexts)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(scores, vmin=0, vmax=1, cmap="cividis", aspect="auto")
    for (y, x), share in np.ndenumerate(scores):
        axes.text(x, y, f"{share:.0%}", ha="center", va="center", color="black" if share > 0.5 else "white",
                  fontsize="small")
    axes.set_xticks(range(DEPTHS), [f"{share:.0%}" for share in np.linspace(0, 1, DEPTHS)])
    axes.set_yticks(range(len(contexts)), [f"{context:,}" for context in contexts])
    axes.set_xlabel("where the needle is in the context, from its beginning to its end")
    axes.set_ylabel("context, bytes")
    figure.colorbar(image, label="bytes of needles that came back right")
    figure.savefig(path, dpi=150)
