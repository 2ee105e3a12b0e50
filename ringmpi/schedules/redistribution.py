"""From one layout to another: what is redistributed, and how, is agreed on here; `row_exchange` moves it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from .. import device
from ..arrays import as_array
from ..checks import check_timeout
from ..errors import OptionError, ShapeError
from ..layout import Layout, check_spec, make, resolve
from ..mpi.comm import TIMEOUT, Comm, private_comm
from ..mpi.threads import check_thread
from .device_links import device_link
from .gpu_transport import check_transport, choose_once
from .links import Array, HostLink, Link
from .row_exchange import HostMemory, RowExchange


def redistribute(x: ArrayLike, *, comm: Any, source: str | Layout = "contiguous", target: str | Layout = "striped",
                 timeout: float = TIMEOUT, gpu_transport: str = "auto") -> Array:
    """Move the tokens of a sharded array from one layout to another. Collective over *comm*.

    Parameters
    ----------
    x : array of shape (tokens, ...), any dtype of fixed size
        This rank's shard, laid out as `source` says; tokens in the order of their positions. On the host, or on a GPU,
        on all ranks alike; of any library that `RingAttention.__call__` takes.
    comm : MPI.Intracomm
    source, target : str or Layout
        ``"contiguous"`` as source takes whatever counts the ranks bring; as target it splits evenly.
        ``"striped"``, ``"zigzag"``, or a layout object (`Contiguous` for other counts, `Custom`).
    timeout : float
        Seconds to wait for the other ranks.
    gpu_transport : {"auto", "direct", "staged"}
        As of `RingAttention`; ``"auto"`` is decided at the first such call on a communicator.

    Returns
    -------
    array of shape (tokens, ...), dtype of `x`
        This rank's shard under `target`; NumPy, or CuPy on the GPU that `x` is on, complete when the call returns. A
        new array, unless both layouts are equal: then `x`, copied only if it is not C-contiguous.

    Raises
    ------
    ShapeError, DtypeError, OptionError, BackendError
        The same on every rank: shards that differ in dtype, place or trailing shape, counts that are not the
        layout's, different layouts on different ranks, a GPU that can't be used.
    RingTimeout, RankLost
        If a rank does not take part in time, or is gone.
    """
    return redistribute_with_layouts(x, comm, source, target, timeout, gpu_transport)[0]


def redistribute_with_layouts(x: ArrayLike, comm: Any, source: str | Layout, target: str | Layout, timeout: float,
                              gpu_transport: str) -> tuple[Array, Layout, Layout]:
    """Redistribute, and give the layouts before and after, by which it is undone. Collective over *comm*."""
    check_thread()
    timeout, wrong = check_timeout(timeout)
    ring = private_comm(comm, timeout)
    with ring.one_call():
        return _moved(x, ring, source, target, timeout, wrong, gpu_transport)


def _moved(x: ArrayLike, ring: Comm, source: str | Layout, target: str | Layout, timeout: float, wrong: str,
           gpu_transport: str) -> tuple[Array, Layout, Layout]:
    # Check what this rank brings, then that all ranks mean the same.
    shard: Array = np.empty(0)
    memory: Any = HostMemory()
    options: dict[str, Any] | None = None
    with ring.noting() as failures:
        if wrong:
            raise OptionError(wrong)
        check_transport(gpu_transport)
        shard = as_array(x, "x")
        if shard.ndim == 0:
            raise ShapeError("x: expected an array of shape (tokens, ...), got a scalar")
        if shard.dtype.hasobject or not shard.dtype.itemsize:
            raise ShapeError(f"x: expected items of fixed size, got dtype {shard.dtype}")
        memory = _memory_of(shard)
        with memory.current():
            shard = memory.contiguous(shard)
        for spec in (source, target):
            check_spec(spec)
        names = [spec if isinstance(spec, str) else spec.describe() for spec in (source, target)]
        options = {"place of x": "the host" if isinstance(shard, np.ndarray) else "a GPU", "dtype of x": shard.dtype,
                   "trailing shape of x": shard.shape[1:], "source": names[0], "target": names[1],
                   "gpu_transport": gpu_transport}
    rows = ring.exchange("redistribute", timeout, np.array([len(shard) if shard.ndim else 0]).view(np.uint8),
                         failures=failures, options=options)

    # The layouts, by what all ranks brought; then move, if they differ.
    counts = np.concatenate(rows).view(np.int64).tolist()
    old = resolve(source, counts, "x")
    new = make(target, old.length, old.size)
    if new == old:
        return shard, old, new
    link = _new_link(memory, ring, gpu_transport, timeout)
    return RowExchange(old, new, ring, timeout, memory, link).run(shard), old, new


def _memory_of(x: Array) -> Any:
    """Give the memory that an array is in: the host's, or a `Device`."""
    return HostMemory() if isinstance(x, np.ndarray) else device.open_device(device.index_of(x))


def _new_link(memory: Any, comm: Comm, gpu_transport: str, timeout: float) -> Link:
    """Make a link for a kind of memory. Collective over *comm* at the first call with a GPU."""
    if isinstance(memory, HostMemory):
        return HostLink()
    return device_link(choose_once(comm, gpu_transport, timeout, memory), memory, comm)
