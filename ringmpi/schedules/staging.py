"""Blocks that go from GPU to GPU in chunks, through page-locked memory of the host: the transfers of a staged link.

Between nodes the chunks are messages. Ranks of one node share the memory instead: the sender's GPU copies a chunk into
it and the receiver's out of it, and MPI is given a token, which says where the chunk is. A token is sent in synchronous
mode, and the receiver asks for it when it has stored the chunk `AHEAD` before that: so the sender knows what has been
stored by the tokens that have been taken, and sends `AHEAD` more after those of the chunks.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ResourceError
from ..mpi.comm import load
from .links import Array, Peer
from .shared_memory import HANDLE_SHAPE, Handle, LockedMemory

CHUNK_BYTES = 2**23        # of a block that is staged: a copy at full speed, short beside the block
CHUNKS = 4                 # that each direction of a staged link has under way: copied, sent, and two in reserve
AHEAD = 2                  # tokens that a receiver asks for beyond the chunks that it has stored
TOKEN_WORDS = HANDLE_SHAPE[0] + 1       # a handle, and where in its memory the chunk begins

Bytes = NDArray[np.uint8]


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
        Of the last messages, number i in place ``i % len(requests)``.
    depth : int
        Buffers.
    nbytes : int
        Of all buffers.
    """

    def __init__(self, device: Any, sizes: list[int]) -> None:
        self.device = device
        self.stream = device.new_stream()
        self.depth = len(sizes)
        self.nbytes = sum(sizes)
        places = self.depth + AHEAD
        self.requests: list[Any] = [load().REQUEST_NULL] * places
        self._size = max(sizes, default=0)
        self._events: list[Any] = [None] * places
        self._tokens: Handle = np.zeros((places, TOKEN_WORDS), np.uint64)
        self._memory: Bytes = np.empty(0, np.uint8)
        self._user: Any = None

    def take(self, transfer: Any) -> bool:
        """Take the channel for a transfer, or say that another has it. Local."""
        if self._user is None:
            self._user = transfer
        return self._user is transfer

    def leave(self) -> None:
        """Let the next transfer take the channel. Local."""
        self._user = None

    def buffer(self, chunk: int, nbytes: int) -> Bytes:
        """Give the first `nbytes` bytes of the buffer of a chunk. Local."""
        start = self._start(chunk)
        return self._memory[start:start + nbytes]

    def token(self, number: int) -> Bytes:
        """Give the buffer of a token, which is a message of its own. Local."""
        token: Bytes = self._tokens[number % len(self._tokens)].view(np.uint8)
        return token

    def mark(self, chunk: int) -> None:
        """Mark the copy of a chunk, which was put on the stream just now. Local."""
        self._events[chunk % len(self._events)] = self.device.record(self.stream)

    def copied(self, chunk: int) -> bool:
        """Say whether the copy of a chunk is done. Local."""
        return bool(self._events[chunk % len(self._events)].done)

    def start(self, number: int, request: Any) -> None:
        """Put a message into its place. Local."""
        self.requests[number % len(self.requests)] = request

    def delivered(self, number: int) -> bool:
        """Say whether a message is done. Local."""
        return bool(self.requests[number % len(self.requests)].Test())

    def _start(self, chunk: int) -> int:
        return chunk % self.depth * self._size


class OutgoingChannel(StagingChannel):
    """The channel of what goes out; see `StagingChannel`.

    Parameters
    ----------
    device, sizes
        See `StagingChannel`.
    shared : bool
        Whether ranks of this node read the buffers where they are.

    Raises
    ------
    ResourceError
        If there is no memory to share.
    """

    def __init__(self, device: Any, sizes: list[int], shared: bool) -> None:
        super().__init__(device, sizes)
        if not shared:
            self._memory = device.pinned(self.nbytes)
            return
        try:
            segment = LockedMemory.of(device).take(self.nbytes)
        except OSError as error:
            raise ResourceError(f"this rank can't share {self.nbytes} bytes of memory: {error}") from error
        weakref.finalize(self, LockedMemory.of(device).give_back, segment).atexit = False
        self._memory = segment.memory
        self._tokens[:, :-1] = segment.handle()

    def token(self, number: int) -> Bytes:
        """Give the token of a chunk, to be sent. Local."""
        self._tokens[number % len(self._tokens), -1] = self._start(number)
        return super().token(number)


class IncomingChannel(StagingChannel):
    """The channel of what comes in; see `StagingChannel`.

    Parameters
    ----------
    device, sizes
        See `StagingChannel`.
    private : bool
        Whether anything comes from ranks whose memory is not read where it is.
    """

    def __init__(self, device: Any, sizes: list[int], private: bool) -> None:
        super().__init__(device, sizes)
        if private:
            self._memory = device.pinned(self.nbytes)

    def there(self, owner: int, chunk: int, nbytes: int) -> Bytes:
        """Give a chunk where its owner's GPU has put it, by its token, which has come. Local.

        Raises
        ------
        ResourceError
            If the owner's memory can't be opened.
        """
        token = self._tokens[chunk % len(self._tokens)]
        start = int(token[-1])
        try:
            return LockedMemory.of(self.device).there(token[:-1])[start:start + nbytes]
        except OSError as error:
            raise ResourceError(f"this rank can't open the memory of rank {owner}: {error}") from error


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
    shared : bool
        Whether the buffers are in memory that both ends share, and the messages are tokens.
    """

    def __init__(self, channel: Any, block: Iterator[Array], peer: Peer, after: Any = None,
                 shared: bool = False) -> None:
        self.peer = peer
        self._channel = channel
        self._chunks = list(block)
        self._after = after
        self._shared = shared
        self._ahead = AHEAD if shared and self._chunks else 0
        self._messages = len(self._chunks) + self._ahead
        self._begun = False

    @property
    def requests(self) -> list[Any]:
        """The messages under way; none before it is this transfer's turn."""
        under_way: list[Any] = self._channel.requests if self._begun and not self.done() else []
        return under_way

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

    Chunks that have been copied, messages that have been sent, and those of them that are done; chunks whose buffers
    are free again are `_taken`.
    """

    def __init__(self, channel: OutgoingChannel, block: Iterator[Array], peer: Peer, after: Any = None,
                 shared: bool = False) -> None:
        super().__init__(channel, block, peer, after, shared)
        self._copied = 0
        self._sent = 0
        self._delivered = 0

    def done(self) -> bool:
        """Say whether all of it has come about. Local."""
        return self._delivered == self._messages

    def waiting_for(self) -> str:
        """Say what of this rank's GPU it waits for; empty if it waits for the peer alone. Local."""
        waits = self._delivered == self._sent < len(self._chunks)
        return f"({self._sent} of {len(self._chunks)} chunks copied out by this rank's GPU so far)" if waits else ""

    @property
    def _taken(self) -> int:
        return max(self._delivered - self._ahead, 0)

    def _advance(self) -> None:
        channel, block = self._channel, self._chunks
        while self._delivered < self._sent and channel.delivered(self._delivered):
            self._delivered += 1
        while self._copied < len(block) and self._copied - self._taken < channel.depth:
            chunk = block[self._copied]
            channel.device.download(channel.buffer(self._copied, chunk.nbytes), chunk, channel.stream)
            channel.mark(self._copied)
            self._copied += 1
        while self._sent < self._copied and channel.copied(self._sent):
            self._send(self._sent)
        while len(block) <= self._sent < self._messages:
            self._send(self._sent)

    def _send(self, number: int) -> None:
        channel = self._channel
        if self._shared:
            request = self.peer.post(channel.token(number), "Issend")
        else:
            request = self.peer.post(channel.buffer(number, self._chunks[number].nbytes))
        channel.start(number, request)
        self._sent += 1


class StagedReceive(StagedTransfer):
    """A slot on its way in: each chunk is received into a buffer of the channel, and copied from there.

    Messages that have been asked for, and those of them that have come; chunks that have been copied from where they
    came are stored.
    """

    def __init__(self, channel: IncomingChannel, block: Iterator[Array], peer: Peer, after: Any = None,
                 shared: bool = False) -> None:
        super().__init__(channel, block, peer, after, shared)
        self._window = self._ahead if shared else channel.depth
        self._posted = 0
        self._received = 0
        self._stored = 0

    def done(self) -> bool:
        """Say whether all of it has come about. Local."""
        return self._stored == len(self._chunks) and self._received == self._messages

    def waiting_for(self) -> str:
        """Say what of this rank's GPU it waits for; empty if it waits for the peer alone. Local."""
        waits = self._stored < min(self._received, len(self._chunks))
        return f"({self._stored} of {len(self._chunks)} chunks copied in by this rank's GPU so far)" if waits else ""

    def _advance(self) -> None:
        channel, block = self._channel, self._chunks
        while self._received < self._posted and channel.delivered(self._received):
            if self._received < len(block):
                self._store(self._received)
            self._received += 1
        while self._stored < min(self._received, len(block)) and channel.copied(self._stored):
            self._stored += 1
        while self._posted < self._messages and self._posted - self._stored < self._window:
            channel.start(self._posted, self.peer.post(self._message(self._posted)))
            self._posted += 1

    def _store(self, number: int) -> None:
        channel, chunk = self._channel, self._chunks[number]
        source = (channel.there(self.peer.rank, number, chunk.nbytes) if self._shared else
                  channel.buffer(number, chunk.nbytes))
        channel.device.upload(chunk, source, channel.stream)
        channel.mark(number)

    def _message(self, number: int) -> Bytes:
        if self._shared:
            token: Bytes = self._channel.token(number)
            return token
        buffer: Bytes = self._channel.buffer(number, self._chunks[number].nbytes)
        return buffer
