"""Links between the memories of GPUs: MPI is given GPU memory, or blocks are staged through the host.

Blocks are put in place, and kernels read them, on the stream that is current when the pass begins; kernels on another
stream must be done, or followed by that stream, when the next item of work is asked for. All methods are called with
the device current.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ..mpi.comm import Comm
from .gpu_transport import Transport
from .links import Array, DirectTransfer, Link, Peer, Transfer, chunks, start
from .staging import CHUNK_BYTES, CHUNKS, IncomingChannel, OutgoingChannel, StagedReceive, StagedSend


class DeviceLink(Link):
    """Slots in a GPU's memory; what the two ways to move them have in common.

    Parameters
    ----------
    device : Device
    """

    own_slots = 1

    def __init__(self, device: Any) -> None:
        super().__init__()
        self._device = device
        self._stream: Any = None
        self._own_block_ready: Any = None       # the event of the copy of this rank's own block into the first slot
        self._reads_done: Any = None         # the event of the kernels that read the blocks given up so far

    def begin(self) -> None:
        """Begin to move blocks: what the caller has put on the GPU's current stream comes first. Local."""
        self._stream = self._device.caller_stream()
        if self._reads_done is not None:     # on another stream, in the call before this
            self._device.follow(self._stream, self._reads_done)

    def put_own_block(self, arrays: Sequence[Array]) -> tuple[Array, ...]:
        """Copy this rank's own block into the first slot, for `send_own`; return views of it there. Local."""
        views = self.views(0, [array.shape for array in arrays], [array.dtype for array in arrays])
        for view, array in zip(views, arrays, strict=True):
            self._device.copy(view, array, self._stream)
        self._own_block_ready = self._device.record(self._stream)
        self._own = views
        return views

    def to_send(self, number: int, sizes: Sequence[int], peer: Peer, written: bool = False) -> Transfer:
        """Make the transfer of the block in slot `number`; see `Link.to_send`. Local."""
        return self._send(number, sizes, peer, self._device.record(self._stream) if written else None)

    def send_own(self, peer: Peer) -> None:
        """Start to send this rank's own block. Local."""
        start(self._send(0, [x.nbytes for x in self._own], peer, self._own_block_ready), self.outgoing)

    def end_step(self) -> None:
        """Forget the transfers that are done; all kernels that use the step's block have been launched. Local."""
        super().end_step()
        if self._stream is not None:   # None on one rank alone
            self._reads_done = self._device.record(self._stream)

    def _send(self, number: int, sizes: Sequence[int], peer: Peer, after: Any) -> Transfer:
        """Make the transfer out of a slot, which may begin after an event."""
        raise NotImplementedError

    def _new_slot(self, nbytes: int) -> Array:
        return self._device.message_buffer(nbytes)


class DirectLink(DeviceLink):
    """Slots in a GPU's memory, which MPI is given: for an MPI library that is CUDA-aware.

    Neither MPI nor mpi4py waits for a stream, so a message is started only when the GPU has done what comes before.

    Parameters
    ----------
    device : Device
    """

    def to_receive(self, number: int, sizes: Sequence[int], peer: Peer) -> DirectTransfer:
        """Make the transfer into slot `number`, which begins once kernels no longer read the slot. Local."""
        return DirectTransfer(self._messages(number, sizes), peer, self._reads_done,
                              "(not asked for yet: this rank's GPU still reads the buffer)")

    def _send(self, number: int, sizes: Sequence[int], peer: Peer, after: Any) -> DirectTransfer:
        return DirectTransfer(self._messages(number, sizes), peer, after,
                              "(not sent yet: this rank's GPU still writes the buffer)")


class StagedLink(DeviceLink):
    """Slots in a GPU's memory; blocks travel in chunks through page-locked host memory, for any MPI library.

    While one chunk is copied out here, the one before is on the wire, and those before that are copied in there. The
    transfers of one direction go one after the other.

    Parameters
    ----------
    device : Device
    chunk_bytes : int
        The same on all ranks: both sides cut a block alike.
    neighbours : sequence of bool
        For each rank, whether it shares memory with this one, which both ends know. Chunks to and from the others are
        messages. None at all means no rank.
    """

    def __init__(self, device: Any, chunk_bytes: int | None = None, neighbours: Sequence[bool] = ()) -> None:
        super().__init__(device)
        self._chunk_bytes = chunk_bytes or CHUNK_BYTES
        self._neighbours = neighbours
        self._channels: list[Any] = []                 # in, out

    def reserve(self, sizes: Sequence[int]) -> None:
        """Make slots, and buffers on the host, unless those there are large enough. Local."""
        self._reserve_channels(max(sizes, default=0))
        super().reserve(sizes)

    def reserve_exchange(self, incoming: Sequence[int], outgoing: Sequence[int], more: int) -> tuple[Array, Array]:
        """Make slots for one exchange, and buffers on the host; see `Link.reserve_exchange`. Local."""
        self._reserve_channels(max(*incoming, *outgoing))
        return super().reserve_exchange(incoming, outgoing, more)

    def _reserve_channels(self, nbytes: int) -> None:
        buffers = [min(self._chunk_bytes, nbytes)] * min(CHUNKS, math.ceil(nbytes / self._chunk_bytes))
        if not self._channels or self._channels[0].nbytes < sum(buffers):
            everyone = bool(self._neighbours) and all(self._neighbours)
            self._channels = []            # the old ones go first
            self._channels = [IncomingChannel(self._device, buffers, not everyone),
                              OutgoingChannel(self._device, buffers, any(self._neighbours))]

    def cancel(self) -> list[Any]:
        """Give everything up in mid-way; return what MPI or a GPU may still write to. Local."""
        still_used, channels, self._channels = super().cancel(), self._channels, []
        return [*still_used, *channels] if still_used else []

    def to_receive(self, number: int, sizes: Sequence[int], peer: Peer) -> StagedReceive:
        """Make the transfer into slot `number`, which begins once kernels no longer read the slot. Local."""
        block = chunks(self._slot(number), sum(sizes), self._chunk_bytes)
        return StagedReceive(self._channels[0], block, peer, self._reads_done, self._shares(peer))

    def _send(self, number: int, sizes: Sequence[int], peer: Peer, after: Any) -> StagedSend:
        block = chunks(self._slot(number), sum(sizes), self._chunk_bytes)
        return StagedSend(self._channels[1], block, peer, after, self._shares(peer))

    def _shares(self, peer: Peer) -> bool:
        return bool(self._neighbours) and self._neighbours[peer.rank]


def device_link(transport: Transport, device: Any, comm: Comm) -> DeviceLink:
    """Make a link of the kind that all ranks have chosen. Local."""
    return DirectLink(device) if transport.name == "direct" else StagedLink(device, None, transport.neighbours(comm))
