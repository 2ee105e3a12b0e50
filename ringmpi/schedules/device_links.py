"""Links between the memories of GPUs: MPI is given GPU memory, or blocks are staged through the host.

Blocks are put in place, and kernels read them, on the stream that is current when the pass begins; kernels on another
stream must be done, or followed by that stream, when the next item of work is asked for. All methods are called with
the device current.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from ..mpi.comm import load
from .links import Array, DirectTransfer, Link, Peer, Transfer, chunks, start

CHUNK_BYTES = 2**23        # of a block that is staged: a copy at full speed, short beside the block
CHUNKS = 4                 # that each direction of a staged link has under way: copied, sent, and two in reserve


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
    """

    def __init__(self, device: Any, chunk_bytes: int | None = None) -> None:
        super().__init__(device)
        self._chunk_bytes = chunk_bytes or CHUNK_BYTES
        self._channels: list[StagingChannel] = []      # in, out

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
            self._channels = []            # the old ones go first
            self._channels = [StagingChannel(self._device, buffers) for _ in range(2)]

    def cancel(self) -> list[Any]:
        """Give everything up in mid-way; return what MPI or a GPU may still write to. Local."""
        still_used, channels, self._channels = super().cancel(), self._channels, []
        return [*still_used, *channels] if still_used else []

    def to_receive(self, number: int, sizes: Sequence[int], peer: Peer) -> StagedReceive:
        """Make the transfer into slot `number`, which begins once kernels no longer read the slot. Local."""
        block = chunks(self._slot(number), sum(sizes), self._chunk_bytes)
        return StagedReceive(self._channels[0], block, peer, self._reads_done)

    def _send(self, number: int, sizes: Sequence[int], peer: Peer, after: Any) -> StagedSend:
        block = chunks(self._slot(number), sum(sizes), self._chunk_bytes)
        return StagedSend(self._channels[1], block, peer, after)


class StagingChannel:
    """What one direction of a staged link owns: a stream, chunk buffers in host memory, and an event for each.

    Its transfers take turns: one begins when the one before is done. Chunk i of a block has buffer ``i % depth``.

    Parameters
    ----------
    device : Device
    sizes : list of int
        Bytes of each buffer.

    Attributes
    ----------
    requests : list of MPI.Request
        For each buffer, that of the message last sent from it or received into it.
    nbytes : int
        Of all buffers.
    """

    def __init__(self, device: Any, sizes: list[int]) -> None:
        self.device = device
        self.stream = device.new_stream()
        self.depth = len(sizes)
        self.nbytes = sum(sizes)
        self._buffers = [device.pinned(size) for size in sizes]
        self._events: list[Any] = [None] * self.depth
        self.requests: list[Any] = [load().REQUEST_NULL] * self.depth
        self._user: Any = None

    def take(self, transfer: Any) -> bool:
        """Take the channel for a transfer, or say that another has it. Local."""
        if self._user is None:
            self._user = transfer
        return self._user is transfer

    def leave(self) -> None:
        """Let the next transfer take the channel. Local."""
        self._user = None

    def buffer(self, chunk: int, nbytes: int) -> Array:
        """Give the first `nbytes` bytes of the buffer of a chunk. Local."""
        return self._buffers[chunk % self.depth][:nbytes]

    def mark(self, chunk: int) -> None:
        """Mark the copy of a chunk, which was put on the stream just now. Local."""
        self._events[chunk % self.depth] = self.device.record(self.stream)

    def copied(self, chunk: int) -> bool:
        """Say whether the copy of a chunk is done. Local."""
        return bool(self._events[chunk % self.depth].done)

    def start(self, chunk: int, request: Any) -> None:
        """Put the message of a chunk into its place. Local."""
        self.requests[chunk % self.depth] = request

    def delivered(self, chunk: int) -> bool:
        """Say whether the message of a chunk is done. Local."""
        return bool(self.requests[chunk % self.depth].Test())


class StagedTransfer:
    """A block that is cut into chunks, each copied and sent, or received and copied.

    Parameters
    ----------
    channel : StagingChannel
    block : iterator of buffers
        Its chunks, in the GPU's memory.
    peer : Peer
    after : event, optional
        Of what must be done on the GPU before the first chunk is copied.
    """

    def __init__(self, channel: StagingChannel, block: Iterator[Array], peer: Peer, after: Any = None) -> None:
        self.peer = peer
        self._channel = channel
        self._chunks = list(block)
        self._after = after
        self._begun = False

    @property
    def requests(self) -> list[Any]:
        """The messages under way; none before it is this transfer's turn."""
        return self._channel.requests if self._begun and not self.done() else []

    def advance(self) -> bool:
        """Do what has become possible; say whether all of it has come about. Local."""
        if not self._begun and not self.done() and self._channel.take(self):
            self._begun = True
            if self._after is not None:
                self._channel.device.follow(self._channel.stream, self._after)
        if self._begun and not self.done():
            self._advance()
            if self.done():
                self._channel.leave()
        return self.done()

    def done(self) -> bool:
        """Say whether all of it has come about. Local."""
        raise NotImplementedError

    def _advance(self) -> None:
        raise NotImplementedError


class StagedSend(StagedTransfer):
    """A slot on its way out: each chunk is copied into a buffer of the channel, and sent from there.

    Three counts, each of the chunks that have got so far: copied >= sent >= taken.
    """

    def __init__(self, channel: StagingChannel, block: Iterator[Array], peer: Peer, after: Any = None) -> None:
        super().__init__(channel, block, peer, after)
        self._copied = 0
        self._sent = 0
        self._taken = 0

    def done(self) -> bool:
        """Say whether all of it has come about. Local."""
        return self._taken == len(self._chunks)

    def waiting_for(self) -> str:
        """Say what of this rank's GPU it waits for; empty if it waits for the peer alone. Local."""
        waits = self._taken == self._sent < len(self._chunks)
        return f"({self._sent} of {len(self._chunks)} chunks copied out by this rank's GPU so far)" if waits else ""

    def _advance(self) -> None:
        channel, block = self._channel, self._chunks
        while self._taken < self._sent and channel.delivered(self._taken):
            self._taken += 1
        while self._copied < len(block) and self._copied - self._taken < channel.depth:
            chunk = block[self._copied]
            channel.device.download(channel.buffer(self._copied, chunk.nbytes), chunk, channel.stream)
            channel.mark(self._copied)
            self._copied += 1
        while self._sent < self._copied and channel.copied(self._sent):
            channel.start(self._sent, self.peer.post(channel.buffer(self._sent, block[self._sent].nbytes)))
            self._sent += 1


class StagedReceive(StagedTransfer):
    """A slot on its way in: each chunk is received into a buffer of the channel, and copied from there.

    Three counts, each of the chunks that have got so far: posted >= received >= stored.
    """

    def __init__(self, channel: StagingChannel, block: Iterator[Array], peer: Peer, after: Any = None) -> None:
        super().__init__(channel, block, peer, after)
        self._posted = 0
        self._received = 0
        self._stored = 0

    def done(self) -> bool:
        """Say whether all of it has come about. Local."""
        return self._stored == len(self._chunks)

    def waiting_for(self) -> str:
        """Say what of this rank's GPU it waits for; empty if it waits for the peer alone. Local."""
        waits = self._stored < self._received
        return f"({self._stored} of {len(self._chunks)} chunks copied in by this rank's GPU so far)" if waits else ""

    def _advance(self) -> None:
        channel, block = self._channel, self._chunks
        while self._received < self._posted and channel.delivered(self._received):
            chunk = block[self._received]
            channel.device.upload(chunk, channel.buffer(self._received, chunk.nbytes), channel.stream)
            channel.mark(self._received)
            self._received += 1
        while self._stored < self._received and channel.copied(self._stored):
            self._stored += 1
        while self._posted < len(block) and self._posted - self._stored < channel.depth:
            channel.start(self._posted, self.peer.post(channel.buffer(self._posted, block[self._posted].nbytes)))
            self._posted += 1
