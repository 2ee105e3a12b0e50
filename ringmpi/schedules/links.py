"""How a block gets from this rank's memory to another rank's: the only place that knows what memory that is.

A link has slots for blocks that are received or written, and any number of transfers under way. Schedules drive all
links alike: they ask for a block to be received or sent, let the link advance while they compute or wait, and end a
step when what it needed is done.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, Protocol

import numpy as np

from ..mpi.comm import load

MESSAGE_BYTES = 2**28      # Open MPI 5 counts bytes in 32 bits; smaller messages also give finer timeouts

Array = Any                # of NumPy, or of a device
Shape = tuple[int, ...]


class Peer(NamedTuple):
    """The other end of a transfer."""

    rank: int
    post: Callable[..., Any]        # starts a message of a buffer to or from there, by "Issend" if told so; its request
    what: str                       # is waited for until the transfer is done: "for 8 bytes from rank 1"


class Transfer(Protocol):
    """A block on its way, one direction."""

    @property
    def peer(self) -> Peer:
        """The other end."""

    @property
    def requests(self) -> list[Any]:
        """The messages that it has started; some may be done."""

    def advance(self) -> bool:
        """Do what has become possible; say whether nothing but `requests` is left. Local."""

    def done(self) -> bool:
        """Say whether all of it has come about. Local."""

    def waiting_for(self) -> str:
        """Say what of this rank's GPU it waits for; empty if it waits for the peer alone. Local."""


class Link:
    """What all links have in common: slots, and the transfers under way.

    Attributes
    ----------
    incoming, outgoing : list of Transfer
        Under way, in the order in which they were asked for.
    """

    own_slots = 0              # that this rank's own block takes

    def __init__(self) -> None:
        self.incoming: list[Transfer] = []
        self.outgoing: list[Transfer] = []
        self._slots: list[Array] = []
        self._own: tuple[Array, ...] = ()

    @property
    def transfers(self) -> list[Transfer]:
        """All transfers under way."""
        return [*self.incoming, *self.outgoing]

    def reserve(self, sizes: Sequence[int]) -> None:
        """Make a slot of so many bytes for each of `sizes`, unless the one there is large enough. Local."""
        self._slots += [None] * (len(sizes) - len(self._slots))
        small = [number for number, nbytes in enumerate(sizes)
                 if self._slots[number] is None or self._slots[number].nbytes < nbytes]
        for number in small:
            self._slots[number] = None     # the old ones go first
        for number in small:
            self._slots[number] = self._new_slot(sizes[number])

    def reserve_exchange(self, incoming: Sequence[int], outgoing: Sequence[int], more: int) -> tuple[Array, Array]:
        """Make slots for one exchange with many ranks, in two pieces of memory. Local.

        Parameters
        ----------
        incoming, outgoing : sequence of int
            Bytes of each slot: first those of what comes in, one after the other in the one piece, and then those of
            what goes out, in the other.
        more : int
            Bytes of the first piece after its slots.

        Returns
        -------
        tuple of two arrays of bytes
            The pieces.
        """
        pieces = self._new_slot(sum(incoming) + more), self._new_slot(sum(outgoing))
        self._slots = [piece[stop - nbytes:stop] for piece, sizes in zip(pieces, (incoming, outgoing), strict=True)
                       for nbytes, stop in zip(sizes, itertools.accumulate(sizes), strict=True)]
        return pieces

    def begin(self) -> None:
        """Begin to move blocks: what the caller has put on the GPU's current stream comes first. Local."""

    def put_own_block(self, arrays: Sequence[Array]) -> tuple[Array, ...]:
        """Take this rank's own block, for `send_own`; return arrays that hold it. Local."""
        raise NotImplementedError

    def views(self, number: int, shapes: Sequence[Shape], dtypes: Sequence[np.dtype[Any]]) -> tuple[Array, ...]:
        """View slot `number` as arrays of these shapes and dtypes, one after the other. Local."""
        return views(self._slot(number), shapes, dtypes)

    def receive(self, number: int, sizes: Sequence[int], peer: Peer) -> None:
        """Start to receive a block into slot `number`; `sizes` are the bytes of its arrays. Local."""
        start(self.to_receive(number, sizes, peer), self.incoming)

    def send(self, number: int, sizes: Sequence[int], peer: Peer, written: bool = False) -> None:
        """Start to send the block in slot `number`; see `to_send`. Local."""
        start(self.to_send(number, sizes, peer, written), self.outgoing)

    def to_receive(self, number: int, sizes: Sequence[int], peer: Peer) -> Transfer:
        """Make the transfer of a block into slot `number`, for somebody else to start; see `receive`. Local."""
        raise NotImplementedError

    def to_send(self, number: int, sizes: Sequence[int], peer: Peer, written: bool = False) -> Transfer:
        """Make the transfer of the block in slot `number`, for somebody else to start. Local.

        Parameters
        ----------
        number : int
            Slots are numbered round and round: 2 is slot 0 of two.
        sizes : sequence of int
            Bytes of the block's arrays.
        peer : Peer
        written : bool
            Whether this rank has written the block, so that a GPU must be done with that.
        """
        raise NotImplementedError

    def send_own(self, peer: Peer) -> None:
        """Start to send this rank's own block. Local."""
        raise NotImplementedError

    def advance(self) -> None:
        """Do what has become possible for all transfers. Local."""
        for transfer in self.transfers:
            transfer.advance()

    def forget(self, transfer: Transfer) -> None:
        """Forget a transfer into a slot that is done. Local."""
        self.incoming.remove(transfer)

    def end_step(self) -> None:
        """Forget the transfers that are done; all kernels that use the step's block have been launched. Local."""
        self.incoming = [transfer for transfer in self.incoming if not transfer.done()]
        self.outgoing = [transfer for transfer in self.outgoing if not transfer.done()]
        if not self.outgoing:
            self._own = ()

    def cancel(self) -> list[Any]:
        """Give everything up in mid-way; return what MPI or a GPU may still write to. Local."""
        still_used = [*self.transfers, self._slots, self._own] if self.transfers else []
        self.incoming, self.outgoing = [], []
        self._slots, self._own = [], ()
        return still_used

    def _slot(self, number: int) -> Array:
        return self._slots[number % len(self._slots)]

    def _messages(self, number: int, sizes: Sequence[int]) -> Iterator[Array]:
        """Cut a slot into messages, array by array: whoever sends from two arrays cuts them alike."""
        start = 0
        for nbytes in sizes:
            yield from chunks(self._slot(number)[start:start + nbytes], nbytes, MESSAGE_BYTES)
            start += nbytes

    def _new_slot(self, nbytes: int) -> Array:
        raise NotImplementedError


class HostLink(Link):
    """Slots in host memory, which MPI is given; this rank's own block is sent from where it is.

    Arrays with gaps are computed with where they are, and packed the first time that another rank is sent them.
    """

    def __init__(self) -> None:
        super().__init__()
        self._packing = np.empty(0, np.uint8)

    def put_own_block(self, arrays: Sequence[Array]) -> tuple[Array, ...]:
        """Take this rank's own block, for `send_own`; return arrays that hold it. Local."""
        self._own = tuple(arrays)
        return self._own

    def to_receive(self, number: int, sizes: Sequence[int], peer: Peer) -> DirectTransfer:
        """Make the transfer of a block into slot `number`; see `Link.to_receive`. Local."""
        return DirectTransfer(self._messages(number, sizes), peer)

    def to_send(self, number: int, sizes: Sequence[int], peer: Peer, written: bool = False) -> DirectTransfer:
        """Make the transfer of the block in slot `number`; see `Link.to_send`. Local."""
        return DirectTransfer(self._messages(number, sizes), peer)

    def send_own(self, peer: Peer) -> None:
        """Start to send this rank's own block. Local."""
        self._own = self._packed(self._own)
        messages = (message for x in self._own for message in chunks(x.reshape(-1).view(np.uint8), x.nbytes,
                                                                     MESSAGE_BYTES))
        start(DirectTransfer(messages, peer), self.outgoing)

    def cancel(self) -> list[Any]:
        """Give everything up in mid-way; return what MPI may still write to. Local."""
        self._packing = np.empty(0, np.uint8)       # the block that is on its way keeps hold of it
        return super().cancel()

    def _packed(self, arrays: tuple[Array, ...]) -> tuple[Array, ...]:
        """Give arrays without gaps: copies in a buffer that stays for the next pass, of those that have some."""
        nbytes = sum(x.nbytes for x in arrays if not x.flags.c_contiguous)
        if self._packing.nbytes < nbytes:
            self._packing = np.empty(0, np.uint8)   # the old one goes first
            self._packing = np.empty(nbytes, np.uint8)
        packed, start = [], 0
        for x in arrays:
            if not x.flags.c_contiguous:
                copy = self._packing[start:start + x.nbytes].view(x.dtype).reshape(x.shape)
                bits = f"u{x.itemsize}"             # copied as such: NumPy copies bfloat16 one by one
                copy.view(bits)[...] = x.view(bits)
                start += x.nbytes
                x = copy
            packed.append(x)
        return tuple(packed)

    def _new_slot(self, nbytes: int) -> Array:
        return np.empty(nbytes, np.uint8)


class DirectTransfer:
    """A block that MPI moves by itself, in some messages, all started as soon as `after` is done.

    Parameters
    ----------
    messages : iterator of buffers
    peer : Peer
    after : event, optional
    waiting_for : str
        Says why `after` is waited for.
    """

    def __init__(self, messages: Iterator[Array], peer: Peer, after: Any = None, waiting_for: str = "") -> None:
        self.peer = peer
        self.requests: list[Any] = []
        self._messages = messages
        self._after = after
        self._waiting_for = waiting_for
        self._started = False

    def advance(self) -> bool:
        """Start the messages once the event is done; say whether they were started. Local."""
        if not self._started and (self._after is None or self._after.done):
            for message in self._messages:
                self.requests.append(self.peer.post(message))
            self._started = True
        return self._started

    def done(self) -> bool:
        """Say whether all of it has come about. Local."""
        with suppress(load().Exception):
            return self._started and all(request.Get_status() for request in self.requests)
        return False

    def waiting_for(self) -> str:
        """Say what of this rank's GPU it waits for; empty if it waits for the peer alone. Local."""
        return "" if self._started else self._waiting_for


def assign(target: Array, source: Array) -> None:
    """Copy an array into another of its shape and dtype, of any strides, as bits: bfloat16 needs no header. Local."""
    bits = f"u{source.dtype.itemsize}"
    target.view(bits)[...] = source.view(bits)


def views(memory: Array, shapes: Sequence[Shape], dtypes: Sequence[np.dtype[Any]]) -> tuple[Array, ...]:
    """View bytes as arrays of these shapes and dtypes, one after the other. Local."""
    arrays, begin = [], 0
    for shape, dtype in zip(shapes, dtypes, strict=True):
        end = begin + math.prod(shape) * dtype.itemsize
        arrays.append(memory[begin:end].view(dtype).reshape(shape))
        begin = end
    return tuple(arrays)


def start(transfer: Transfer, under_way: list[Transfer]) -> None:
    """Start a transfer; it is under way even if that fails half-way. Local."""
    under_way.append(transfer)
    transfer.advance()


def chunks(block: Array, nbytes: int, size: int) -> Iterator[Array]:
    """Cut the first `nbytes` bytes of a block into chunks of `size` bytes and a rest. Local."""
    return (block[at:min(at + size, nbytes)] for at in range(0, nbytes, size))
