"""From one layout to another with a single Alltoallv."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..arrays import as_host_array
from ..checks import check_timeout
from ..errors import OptionError, ShapeError
from ..layout import Integers, Layout, check_spec, make, resolve
from ..mpi.comm import TIMEOUT, Comm, load, private_comm
from ..mpi.threads import check_thread

SURE_BYTES = 2**20            # what a rank always has memory for


def redistribute(x: ArrayLike, *, comm: Any, source: str | Layout = "contiguous", target: str | Layout = "striped",
                 timeout: float = TIMEOUT) -> NDArray[Any]:
    """Move the tokens of a sharded array from one layout to another. Collective over *comm*.

    Parameters
    ----------
    x : array of shape (tokens, ...), any dtype of fixed size
        This rank's shard, laid out as `source` says; tokens in the order of their positions.
    comm : MPI.Intracomm
    source, target : str or Layout
        ``"contiguous"`` as source takes whatever counts the ranks bring; as target it splits evenly.
        ``"striped"``, ``"zigzag"``, or a layout object (`Contiguous` for other counts, `Custom`).
    timeout : float
        Seconds to wait for the other ranks.

    Returns
    -------
    array of shape (tokens, ...), dtype of `x`
        This rank's shard under `target`. A new array, unless both layouts are equal: then `x`, copied only if it is
        no C-contiguous NumPy array.

    Raises
    ------
    ShapeError, DtypeError, OptionError
        The same on every rank: shards that differ in dtype or trailing shape, counts that are not the
        layout's, different layouts on different ranks.
    RingTimeout, RankLost
        If a rank does not take part in time, or is gone.
    """
    return redistribute_with_layouts(x, comm, source, target, timeout)[0]


def redistribute_with_layouts(x: ArrayLike, comm: Any, source: str | Layout, target: str | Layout,
          timeout: float) -> tuple[NDArray[Any], Layout, Layout]:
    """Redistribute, and give the layouts before and after, by which it is undone. Collective over *comm*."""
    check_thread()
    timeout, wrong = check_timeout(timeout)
    ring = private_comm(comm, timeout)
    with ring.one_call():
        return _moved(x, ring, source, target, timeout, wrong)


def _moved(x: ArrayLike, ring: Comm, source: str | Layout, target: str | Layout, timeout: float,
           wrong: str) -> tuple[NDArray[Any], Layout, Layout]:
    shard: NDArray[Any] = np.empty(0)
    names: list[Any] = []
    with ring.noting() as failures:
        if wrong:
            raise OptionError(wrong)
        shard = as_host_array(x, "x")
        if shard.ndim == 0:
            raise ShapeError("x: expected an array of shape (tokens, ...), got a scalar")
        shard = np.ascontiguousarray(shard)
        if shard.dtype.hasobject:
            raise ShapeError(f"x: expected items of fixed size, got dtype {shard.dtype}")
        for spec in (source, target):
            check_spec(spec)
        names = [spec if isinstance(spec, str) else spec.describe() for spec in (source, target)]
    rows = ring.exchange("redistribute", timeout, np.array([len(shard) if shard.ndim else 0]).view(np.uint8),
                         failures=failures,
                         options=None if failures else {
                             "dtype of x": shard.dtype, "trailing shape of x": shard.shape[1:], "source": names[0],
                             "target": names[1]})
    counts = np.concatenate(rows).view(np.int64).tolist()
    old = resolve(source, counts, "x")
    new = make(target, old.length, old.size)
    return (shard if new == old else _exchange(shard, old, new, ring, timeout)), old, new


def owned_mask(by: Layout, rank: int, positions: Integers) -> NDArray[np.bool_]:
    """Say which of `positions` are on `rank` under layout `by`. Local."""
    return by.count_below(positions + 1, rank) > by.count_below(positions, rank)


def _exchange(shard: NDArray[Any], old: Layout, new: Layout, comm: Comm, timeout: float) -> NDArray[Any]:
    """Order rows by destination, exchange them, put them in the order of their new positions."""
    mine, wanted = old.positions(comm.rank), new.positions(comm.rank)
    row_bytes = int(np.prod(shard.shape[1:])) * shard.dtype.itemsize
    largest = max(*old.counts, *new.counts) * row_bytes
    # memory may run out on one rank, and the others must not wait for it
    with comm.raise_on_all(timeout) if largest > SURE_BYTES else nullcontext():
        outgoing = [np.flatnonzero(owned_mask(new, rank, mine)) for rank in range(comm.size)]
        incoming = [np.flatnonzero(owned_mask(old, rank, wanted)) for rank in range(comm.size)]
        packed = shard[np.concatenate(outgoing)]
        received = np.empty((len(wanted), *shard.shape[1:]), shard.dtype)
        result = np.empty_like(received)
    # Counts in rows, not bytes: they stay below 2^31 for shards far beyond 2 GiB.
    row = load().BYTE.Create_contiguous(row_bytes).Commit()
    try:
        request = comm.comm.Ialltoallv([_bytes(packed), [len(rows) for rows in outgoing], row],
                                       [_bytes(received), [len(rows) for rows in incoming], row])
        comm.wait([request], timeout, lambda: f"{comm.name()} waited in redistribute for {received.nbytes} bytes")
    finally:
        row.Free()
    result[np.concatenate(incoming)] = received
    return result


def _bytes(x: NDArray[Any]) -> NDArray[np.uint8]:
    return np.frombuffer(x, np.uint8) if x.size else np.empty(0, np.uint8)
