"""How a block gets from this rank's memory to the next rank's: the only place that knows what memory that is.

A link has slots that take turns: of two, one for the block at hand and one for the block on its way here. `Ring` drives
all links alike: it asks for a block to be received or sent, lets the link advance while it computes or waits, and
settles the step when all is done.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any, Protocol

import numpy as np

from ..mpi.comm import load

MESSAGE_BYTES = 2**28      # Open MPI 5 counts bytes in 32 bits; smaller messages also give finer timeouts
CHUNK_BYTES = 2**23        # of a block that is staged: a copy at full speed, short beside the block
CHUNKS = 4                 # that each direction of a staged block has under way: copied, sent, and two in reserve

Post = Callable[[Any], Any]      # starts a message of a buffer; gives its request
Array = Any                      # of NumPy, or of a device


class Transfer(Protocol):
    """A block on its way, one direction."""

    def advance(self) -> bool:
        """Do what has become possible; say whether nothing but messages that were started is left. Local."""

    def done(self) -> bool:
        """Say whether all of it has come about. Local."""

    def obstacle(self) -> str:
        """Say what of this rank's GPU it waits for; empty if it waits for the neighbour alone. Local."""


class HostLink:
    """Slots in host memory, which MPI is given; and what all links have in common.

    Parameters
    ----------
    slots : int
    written : bool
        Whether the blocks that are sent have been written to where they are, so that a GPU must be done with that.

    Attributes
    ----------
    requests : list of MPI.Request
        The messages of both directions; some may be done.
    incoming, outgoing : Transfer or None
        The blocks on their way in this step.
    """

    def __init__(self, slots: int = 2, written: bool = False) -> None:
        self.requests: list[Any] = []
        self.incoming: Transfer | None = None
        self.outgoing: Transfer | None = None
        self._count, self._always_written = slots, written
        self._slots: list[Array] = []
        self._own: tuple[Array, ...] = ()

    def reserve(self, nbytes: int) -> None:
        """Make the buffers for blocks of up to `nbytes` bytes, unless those there are large enough. Local."""
        if not self._holds(nbytes):
            self._slots = []               # the old ones go first
            self._slots = [self._new_slot(nbytes) for _ in range(self._count)]

    def begin(self) -> None:
        """Begin to move blocks: what the caller has put on the GPU's current stream comes first. Local."""

    def load(self, arrays: Sequence[Array]) -> tuple[Array, ...]:
        """Take this rank's arrays, which stay where they are until they are sent; return them. Local."""
        self._own = tuple(arrays)
        return self._own

    def views(self, number: int, shapes: Sequence[tuple[int, ...]], dtype: np.dtype[Any]) -> tuple[Array, ...]:
        """View the slot of step `number` as arrays of these shapes, one after the other. Local."""
        views, start = [], 0
        for shape in shapes:
            stop = start + math.prod(shape) * dtype.itemsize
            views.append(self._slot(number)[start:stop].view(dtype).reshape(shape))
            start = stop
        return tuple(views)

    def receive(self, number: int, sizes: Sequence[int], post: Post) -> None:
        """Start to receive a block into the slot of step `number`; `sizes` are the bytes of its arrays. Local."""
        self.incoming = Messages(self._cut(number, sizes), post, self.requests)

    def send(self, number: int, sizes: Sequence[int], post: Post) -> None:
        """Start to send the block in the slot of step `number`, or this rank's own. Local."""
        if self._own:
            chunks = itertools.chain.from_iterable(
                pieces(x.reshape(-1).view(np.uint8), x.nbytes, MESSAGE_BYTES) for x in self._own)
            self.outgoing = Messages(chunks, post, self.requests)
        else:
            self.outgoing = Messages(self._cut(number, sizes), post, self.requests)

    def advance(self) -> bool:
        """Do what has become possible; say whether nothing but `requests` is left. Local."""
        return True

    def settle(self) -> None:
        """Forget the transfers of a step, which are done. Local."""
        self.requests.clear()
        self.incoming = self.outgoing = None
        self._own = ()

    def drop(self) -> list[Any]:
        """Give everything up in mid-way; return what MPI or a GPU may still write to. Local."""
        under_way = self.requests or self.incoming or self.outgoing       # requests alone if posting was cut short
        written = [*self.requests, self.incoming, self.outgoing, self._slots, self._own] if under_way else []
        self.requests.clear()
        self.incoming = self.outgoing = None
        self._slots = []
        self._own = ()
        return written

    def _cut(self, number: int, sizes: Sequence[int]) -> Iterator[Array]:
        """Cut a slot into messages, array by array: whoever sends from two arrays cuts them alike."""
        start = 0
        for nbytes in sizes:
            yield from pieces(self._slot(number)[start:start + nbytes], nbytes, MESSAGE_BYTES)
            start += nbytes

    def _holds(self, nbytes: int) -> bool:
        return bool(self._slots) and self._slots[0].nbytes >= nbytes

    def _slot(self, number: int) -> Array:
        return self._slots[number % self._count]

    def _new_slot(self, nbytes: int) -> Array:
        return np.empty(nbytes, np.uint8)


class DeviceLink(HostLink):
    """Slots in a GPU's memory; what the two ways to move them have in common.

    Blocks are loaded, and kernels read them, on the stream that is current when the ring starts; kernels on another
    stream must be done, or followed by that stream, when the next block is asked for. All methods are called with
    the device current.

    Parameters
    ----------
    device : Device
    slots, written
        See `HostLink`.
    """

    def __init__(self, device: Any, slots: int = 2, written: bool = False) -> None:
        super().__init__(slots, written)
        self._device = device
        self._stream: Any = None
        self._loaded: Any = None       # the event of the copy into the first slot
        self._read: Any = None         # the event of the kernels that read the blocks given up so far

    def begin(self) -> None:
        """Begin to move blocks: what the caller has put on the GPU's current stream comes first. Local."""
        self._stream = self._device.caller_stream()
        if self._read is not None:     # on another stream, in the call before this
            self._device.follow(self._stream, self._read)

    def load(self, arrays: Sequence[Array]) -> tuple[Array, ...]:
        """Copy this rank's arrays into the first slot; return the views of it that took them. Local."""
        views = self.views(0, [array.shape for array in arrays], arrays[0].dtype)
        for view, array in zip(views, arrays, strict=True):
            self._device.copy(view, array, self._stream)
        self._loaded = self._device.record(self._stream)
        return views

    def advance(self) -> bool:
        """Do what has become possible; say whether nothing but `requests` is left. Local."""
        nothing_else = [transfer.advance() for transfer in (self.incoming, self.outgoing) if transfer]
        return all(nothing_else)

    def settle(self) -> None:
        """Forget the transfers of a step, which are done; its block has been given up. Local."""
        super().settle()
        if self._stream is not None:   # None on one rank alone
            self._read = self._device.record(self._stream)

    def _written(self, number: int) -> Any:
        """Give the event of what wrote the block of step `number`; None if it was received, and so is there."""
        if self._always_written:
            return self._device.record(self._stream)
        return None if number else self._loaded

    def _new_slot(self, nbytes: int) -> Array:
        return self._device.message_buffer(nbytes)


class DirectLink(DeviceLink):
    """Slots in a GPU's memory, which MPI is given: for an MPI library that is CUDA-aware.

    Neither MPI nor mpi4py waits for a stream, so a message is started only when the GPU has done what comes before.

    Parameters
    ----------
    device : Device
    """

    def receive(self, number: int, sizes: Sequence[int], post: Post) -> None:
        """Start to receive a block into the slot of step `number`; `sizes` are the bytes of its arrays. Local."""
        self.incoming = Messages(self._cut(number, sizes), post, self.requests, self._read,
                                 "(not asked for yet: this rank's GPU still reads the buffer)")

    def send(self, number: int, sizes: Sequence[int], post: Post) -> None:
        """Start to send the block in the slot of step `number`. Local."""
        self.outgoing = Messages(self._cut(number, sizes), post, self.requests,
                                 self._written(number), "(not sent yet: this rank's GPU still writes the buffer)")


class StagedLink(DeviceLink):
    """Slots in a GPU's memory; blocks travel in chunks through page-locked host memory, for any MPI library.

    While one chunk is copied out here, the one before is on the wire, and those before that are copied in there.

    Parameters
    ----------
    device : Device
    slots, written
        See `HostLink`.
    chunk_bytes : int
        The same on all ranks: both sides cut a block alike.
    """

    def __init__(self, device: Any, slots: int = 2, written: bool = False, chunk_bytes: int | None = None) -> None:
        super().__init__(device, slots, written)
        self._chunk_bytes = chunk_bytes or CHUNK_BYTES
        self._lanes: list[Lane] = []

    def reserve(self, nbytes: int) -> None:
        """Make the buffers for blocks of up to `nbytes` bytes, unless those there are large enough. Local."""
        if not self._holds(nbytes):
            sizes = [min(self._chunk_bytes, nbytes)] * min(CHUNKS, math.ceil(nbytes / self._chunk_bytes))
            self._lanes = [Lane(self._device, sizes) for _ in range(2)]
            super().reserve(nbytes)

    def receive(self, number: int, sizes: Sequence[int], post: Post) -> None:
        """Start to receive a block into the slot of step `number`; `sizes` are the bytes of its arrays. Local."""
        if self._read is not None:
            self._device.follow(self._lanes[0].stream, self._read)
        self.incoming = CopyIn(self._lanes[0], pieces(self._slot(number), sum(sizes), self._chunk_bytes), post)
        self.incoming.advance()

    def send(self, number: int, sizes: Sequence[int], post: Post) -> None:
        """Start to send the block in the slot of step `number`. Local."""
        written = self._written(number)
        if written is not None:
            self._device.follow(self._lanes[1].stream, written)
        self.outgoing = CopyOut(self._lanes[1], pieces(self._slot(number), sum(sizes), self._chunk_bytes), post)
        self.outgoing.advance()

    def advance(self) -> bool:
        """Do what has become possible; say whether nothing but `requests` is left. Local."""
        nothing_else = super().advance()
        self.requests[:] = [request for lane in self._lanes for request in lane.requests]
        return nothing_else

    def drop(self) -> list[Any]:
        """Give everything up in mid-way; return what MPI or a GPU may still write to. Local."""
        written, lanes, self._lanes = super().drop(), self._lanes, []
        return [*written, *lanes] if written else []


class Messages:
    """A block that MPI moves by itself, in one message for each piece, all started as soon as `after` is done.

    Parameters
    ----------
    chunks : iterator of buffers
    post : callable
    requests : list
        Takes the requests.
    after : event, optional
    obstacle : str
        Says why `after` is waited for.
    """

    def __init__(self, chunks: Iterator[Array], post: Post, requests: list[Any], after: Any = None,
                 obstacle: str = "") -> None:
        self._chunks, self._post, self._all_requests = chunks, post, requests
        self._after, self._obstacle = after, obstacle
        self._requests: list[Any] = []
        self._started = False
        self.advance()

    def advance(self) -> bool:
        """Start the messages once the event is done; say whether they were started. Local."""
        if not self._started and (self._after is None or self._after.done):
            for chunk in self._chunks:
                self._requests.append(self._post(chunk))
                self._all_requests.append(self._requests[-1])
            self._started = True
        return self._started

    def done(self) -> bool:
        """Say whether all of it has come about. Local."""
        with suppress(load().Exception):
            return self._started and all(request.Get_status() for request in self._requests)
        return False

    def obstacle(self) -> str:
        """Say what of this rank's GPU it waits for; empty if it waits for the neighbour alone. Local."""
        return "" if self._started else self._obstacle


class Lane:
    """What one direction of a staged link owns: a stream, chunk buffers in host memory, and an event for each.

    Chunk i of a block has buffer ``i % depth``.

    Parameters
    ----------
    device : Device
    sizes : list of int
        Bytes of each buffer.

    Attributes
    ----------
    requests : list of MPI.Request
        For each buffer, that of the message last sent from it or received into it.
    """

    def __init__(self, device: Any, sizes: list[int]) -> None:
        self.device = device
        self.stream = device.new_stream()
        self.depth = len(sizes)
        self._buffers = [device.pinned(size) for size in sizes]
        self._events: list[Any] = [None] * self.depth
        self.requests: list[Any] = [load().REQUEST_NULL] * self.depth

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

    def redistribute_with_layouts(self, chunk: int) -> bool:
        """Say whether the message of a chunk is done. Local."""
        return bool(self.requests[chunk % self.depth].Test())


class CopyOut:
    """A slot on its way out: each chunk is copied into a buffer of the lane, and sent from there.

    Three counts, each of the chunks that have got so far: copied >= sent >= taken.
    """

    def __init__(self, lane: Lane, chunks: Iterator[Array], post: Post) -> None:
        self._lane, self._chunks, self._post = lane, list(chunks), post
        self._copied = self._sent = self._taken = 0

    def advance(self) -> bool:
        """Do what has become possible; say whether all chunks were taken. Local."""
        lane, chunks = self._lane, self._chunks
        while self._taken < self._sent and lane.redistribute_with_layouts(self._taken):
            self._taken += 1
        while self._copied < len(chunks) and self._copied - self._taken < lane.depth:
            chunk = chunks[self._copied]
            lane.device.download(lane.buffer(self._copied, chunk.nbytes), chunk, lane.stream)
            lane.mark(self._copied)
            self._copied += 1
        while self._sent < self._copied and lane.copied(self._sent):
            lane.start(self._sent, self._post(lane.buffer(self._sent, chunks[self._sent].nbytes)))
            self._sent += 1
        return self.done()

    def done(self) -> bool:
        """Say whether all of it has come about. Local."""
        return self._taken == len(self._chunks)

    def obstacle(self) -> str:
        """Say what of this rank's GPU it waits for; empty if it waits for the neighbour alone. Local."""
        waits = self._taken == self._sent < len(self._chunks)
        return f"({self._sent} of {len(self._chunks)} chunks copied out by this rank's GPU so far)" if waits else ""


class CopyIn:
    """A slot on its way in: each chunk is received into a buffer of the lane, and copied from there.

    Three counts, each of the chunks that have got so far: posted >= received >= stored.
    """

    def __init__(self, lane: Lane, chunks: Iterator[Array], post: Post) -> None:
        self._lane, self._chunks, self._post = lane, list(chunks), post
        self._posted = self._received = self._stored = 0

    def advance(self) -> bool:
        """Do what has become possible; say whether all chunks are in the slot. Local."""
        lane, chunks = self._lane, self._chunks
        while self._received < self._posted and lane.redistribute_with_layouts(self._received):
            chunk = chunks[self._received]
            lane.device.upload(chunk, lane.buffer(self._received, chunk.nbytes), lane.stream)
            lane.mark(self._received)
            self._received += 1
        while self._stored < self._received and lane.copied(self._stored):
            self._stored += 1
        while self._posted < len(chunks) and self._posted - self._stored < lane.depth:
            lane.start(self._posted, self._post(lane.buffer(self._posted, chunks[self._posted].nbytes)))
            self._posted += 1
        return self.done()

    def done(self) -> bool:
        """Say whether all of it has come about. Local."""
        return self._stored == len(self._chunks)

    def obstacle(self) -> str:
        """Say what of this rank's GPU it waits for; empty if it waits for the neighbour alone. Local."""
        waits = self._stored < self._received
        return f"({self._stored} of {len(self._chunks)} chunks copied in by this rank's GPU so far)" if waits else ""


def pieces(slot: Array, nbytes: int, size: int) -> Iterator[Array]:
    """Cut the first `nbytes` bytes of a slot into pieces of `size` bytes and a rest. Local."""
    return (slot[at:min(at + size, nbytes)] for at in range(0, nbytes, size))
