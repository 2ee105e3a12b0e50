"""Where a query of the demo looked: its heaviest keys, by `ringmpi.analysis.top`, and a picture of all its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..analysis import Top, Weights
from ..backends import HOST_NAMES
from ..files.hdf5 import open_dataset, read_rows
from ..files.manifest import read_manifest
from ..files.opening import open_file
from ..layout import Contiguous
from ..mask import Mask
from ..mpi.comm import Comm
from .demo_text import ORDERS

HEAVIEST = 3
PIXELS = 2000              # of a picture: more positions are shown by the largest weight of each


class Files(NamedTuple):
    """An input of the demo, its result, and the position of the first query."""

    source: Path
    target: Path
    first: int


class Looks:
    """Asks where queries looked, one at a time; every rank has the query and some of the keys. Collective.

    Parameters
    ----------
    world : MPI.Intracomm
    comm : Comm
        The private one on it.
    files : Files
    context : int
        Keys that a query sees.
    backend : str
    threads : int, optional
    timeout : float
    """

    def __init__(self, world: Any, comm: Comm, files: Files, context: int, backend: str, threads: int | None,
                 timeout: float) -> None:
        self._world = world
        self._comm = comm
        self._files = files
        self._context = context
        self._options = {"layout": "replicated", "threads": threads, "timeout": timeout,
                         "backend": backend if backend in HOST_NAMES else "auto"}
        self._timeout = timeout
        with comm.raise_on_all(timeout), open_file(files.source) as file:
            k = open_dataset(file, "k")
            self._tokens = len(k)
            layout = Contiguous.even(len(k), comm.size)
            start = layout.starts[comm.rank]
            self._k = read_rows(k, start, start + layout.counts[comm.rank])

    def top(self, row: int) -> Top:
        """Give the heaviest keys of each head for a query, by its row, each (heads, n); the same on all ranks."""
        q, lse = self._query(row)
        with self._weights(row) as weights:
            found = weights.top(q, self._k, HEAVIEST, lse)
        return Top(found.weights[0], found.positions[0])

    def weights(self, row: int) -> NDArray[np.float32]:
        """Give all weights of a query, (heads, tokens), on all ranks."""
        q, lse = self._query(row)
        with self._weights(row) as weights:
            pieces = [piece[0] for _, piece in weights.rows(q, self._k, lse, [0])]
        mine = np.concatenate([np.empty((len(ORDERS), 0), np.float32), *pieces], axis=1)
        shares = self._comm.exchange("", self._timeout, np.ascontiguousarray(mine.T).reshape(-1).view(np.uint8))
        return np.concatenate([share.view(np.float32).reshape(-1, len(ORDERS)) for share in shares]).T

    def _weights(self, row: int) -> Weights:
        mask = Mask(causal=True, window=(self._context - 1, 0), q_offset=self._files.first + row)
        return Weights(self._world, mask=mask, **self._options)

    def _query(self, row: int) -> tuple[Any, Any]:
        """Read a query and its lse."""
        with self._comm.raise_on_all(self._timeout):
            with open_file(self._files.source) as file:
                q = read_rows(open_dataset(file, "q"), row, row + 1)
            lse = read_manifest(self._files.target).rows("lse", row, row + 1)
        return q, lse


def plot(path: Path, weights: NDArray[np.float32], position: int) -> None:
    """Draw the weights of a query over the positions of the keys, (heads, tokens), into a file. Local."""
    from matplotlib.figure import Figure
    tokens = weights.shape[1]
    step = -(-tokens // PIXELS)
    starts = np.arange(0, tokens, step)
    figure = Figure(figsize=(9, 1.6 * len(weights)), layout="constrained")
    panels = figure.subplots(len(weights), sharex=True, sharey=True, squeeze=False)[:, 0]
    for panel, mine, order in zip(panels, weights, ORDERS, strict=True):
        panel.vlines(starts, 0, np.maximum.reduceat(mine, starts), linewidth=1)
        panel.axvline(position, color="0.7", linewidth=1)
        panel.set_ylim(0, 1.05)
        panel.set_title(f"head that looks for the same {order} bytes", loc="left", fontsize="small")
    panels[-1].set_xlabel("position of the key in the text, bytes; the grey line is the query")
    figure.supylabel("weight")
    figure.savefig(path, dpi=150)
