"""Small collective exchanges, in which ranks agree that all is well, and gather small arrays and texts.

Each rank brings a header and a payload, in one MPI_Iallgather of a record a rank. Larger payloads, and the texts of
errors, take a second one; and records grow to hold what was too large the last time, so that the same call takes one
message the next time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import CommError, RankLost, RingError, RingTimeout
from .agreement import agreed_failure, differing_calls, differing_options, digest_of, failure_notice, hash_of, shorten
from .library import check_not_finalized, load
from .waiting import Waiter

if TYPE_CHECKING:
    from mpi4py import MPI

CALL, OPTIONS, FAILED, NBYTES = range(4)      # int64 numbers of a header
HEADER_BYTES = 32
RECORD_BYTES = 256                            # of the first message, at least ...
LONGEST_RECORD = 2**15                        # ... and at most: a second message is not what takes time then ...
RECORDS_BYTES = 2**20                         # ... and those of all ranks together
SMALL = 64                                    # exchanges in a row that need no large record, after which it is given up
NOTHING = np.empty(0, np.uint8)
Options = Mapping[str, Any] | Callable[[], Mapping[str, Any]]


class Exchange:
    """Exchanges small messages between all ranks of a communicator, and raises the same error on all of them.

    Parameters
    ----------
    comm : MPI.Intracomm

    Attributes
    ----------
    comm : MPI.Intracomm
    rank, size : int
        This rank, and the number of ranks.
    calls : int
        How many calls have been made on the communicator; the same on all ranks within a call.
    """

    def __init__(self, comm: MPI.Intracomm) -> None:
        self.comm = comm
        self.rank = comm.Get_rank()
        self.size = comm.Get_size()
        self.calls = 0
        self._waiter = Waiter(self.rank, self.size)
        self._byte = load().BYTE
        self._small = 0                                   # exchanges in a row that needed no more than `RECORD_BYTES`
        self._mine: NDArray[np.uint8] = NOTHING
        self._make_records(RECORD_BYTES)

    def exchange(self, call: str, timeout: float, payload: NDArray[np.uint8] = NOTHING, *,
                 failures: Sequence[BaseException] = (), options: Options | None = None,
                 digest: int | None = None) -> list[NDArray[np.uint8]]:
        """Agree with all ranks that all is well, and give what each of them brings. Collective over *comm*.

        Parameters
        ----------
        call : str
            The call that begins with this exchange, the same on every rank; empty within a call.
        timeout : float
            Seconds to wait for the others.
        payload : uint8 array
            Any number of bytes; if they don't fit into the record of some rank, there is a second message.
        failures : sequence of exceptions
            What has failed on this rank; the first is told.
        options : mapping, optional
            What must be the same on every rank; or a callable that gives it, if the digest is known.
        digest : int, optional
            Of the options, if it is known: any int64 that is the same on two ranks if they are.

        Returns
        -------
        list of uint8 array
            The payload of each rank.

        Raises
        ------
        RingError
            The same on all ranks: the error of the lowest rank that brings one, its text with the ranks that failed;
            or an OptionError if ranks are in different calls, or their options differ.
        RingTimeout, RankLost
            If a rank does not come in time, or is gone.
        """
        if call:
            self.calls += 1
            self._waiter.call = f"{call} (call {self.calls} on this communicator)"
            self._waiter.place = ""
        if digest is None:
            digest = 0 if options is None else digest_of(_given(options))
        error = failures[0] if failures else None
        heads, rows = self._meet((hash_of(call), digest, error is not None, payload.size), payload, timeout)
        if error is not None or heads is not None:
            self._check_agreement(heads, call, error, {} if options is None else options, timeout)
        return rows

    def _check_agreement(self, heads: NDArray[np.int64] | None, call: str, error: BaseException | None,
                         options: Options, timeout: float) -> None:
        """Raise the same error on every rank if the headers report a failure, or differ in more than sizes.

        `heads` is None where all bring the same, an error that is.
        """
        if heads is None:
            heads = np.ones((self.size, HEADER_BYTES // 8), np.int64)
        if (heads[:, CALL] != heads[0, CALL]).any():
            raise differing_calls(self._gather_texts(call or "the middle of a call", timeout))
        if heads[:, FAILED].any():
            notices = self._gather_texts(json.dumps(failure_notice(error)), timeout)
            raise agreed_failure([json.loads(notice) for notice in notices]) from error
        if (heads[:, OPTIONS] != heads[0, OPTIONS]).any():
            texts = self._gather_texts(json.dumps(shorten(_given(options))), timeout)
            raise differing_options([json.loads(text) for text in texts])

    def _gather_texts(self, text: str, timeout: float) -> list[str]:
        """Gather texts about an error that all ranks know of already."""
        data = _encode(text)
        return _decode(self._meet((0, 0, 0, data.size), data, timeout)[1])

    def _meet(self, head: tuple[int, ...], payload: NDArray[np.uint8],
              timeout: float) -> tuple[NDArray[np.int64] | None, list[NDArray[np.uint8]]]:
        """Exchange headers and payloads, of whatever size each is; give None for headers that are all the same."""
        check_not_finalized()
        if self._waiter.lost:
            raise CommError(f"this communicator can't be used after an earlier failure ({self._waiter.lost}); make a "
                            "new one")
        if self.size == 1:
            return None, [payload]
        # the header, and the payload if it fits
        nbytes = payload.size
        room = self._mine.size - HEADER_BYTES
        self._mine_head[:] = head
        if nbytes <= room:
            self._mine[HEADER_BYTES:HEADER_BYTES + nbytes] = payload
        self._allgather(self._messages, timeout)
        if self._all_heads.tobytes() == self._mine_head.tobytes() * self.size and nbytes <= room:
            rows = list(self._all[:, HEADER_BYTES:HEADER_BYTES + nbytes].copy())
            self._fit_records(nbytes)
            return None, rows
        heads = self._all_heads.copy()
        sizes = heads[:, NBYTES].tolist()
        largest = max(sizes)
        everyone = self._all[:, HEADER_BYTES:]
        # all payloads, padded to the size of the largest, and so that each begins where numbers may; or copies of those
        # in the records, which are used again
        if largest > room:
            wide = -(-largest // 8) * 8
            padded = payload
            if nbytes < wide:
                padded = np.zeros(wide, np.uint8)
                padded[:nbytes] = payload
            everyone = np.empty((self.size, wide), np.uint8)
            self._allgather(([padded, self._byte], [everyone, self._byte]), timeout)
        else:
            everyone = everyone.copy()
        rows = [row[:nbytes] for row, nbytes in zip(everyone, sizes, strict=True)]
        self._fit_records(largest)
        return None if (heads == heads[0]).all() else heads, rows

    def _fit_records(self, largest: int) -> None:
        """Choose the size of the next records, by the largest payload of this exchange, which all ranks know."""
        here = self._mine.size
        wanted = HEADER_BYTES + -(-largest // 8) * 8
        self._small = 0 if wanted > RECORD_BYTES else self._small + 1
        if wanted > here and wanted <= LONGEST_RECORD and wanted * self.size <= RECORDS_BYTES:
            self._make_records(wanted)
        elif self._small >= SMALL and here > RECORD_BYTES:
            self._make_records(RECORD_BYTES)

    def _make_records(self, nbytes: int) -> None:
        """Make room for a record of each rank, header and payload."""
        self._small = 0
        self._mine = np.zeros(nbytes, np.uint8)
        self._all = np.zeros((self.size, nbytes), np.uint8)
        self._mine_head = self._mine[:HEADER_BYTES].view(np.int64)
        self._all_heads = self._all[:, :HEADER_BYTES].view(np.int64)
        self._messages = [self._mine, self._byte], [self._all, self._byte]

    def _allgather(self, messages: tuple[list[Any], list[Any]], timeout: float) -> None:
        waiter = self._waiter
        request = self.comm.Iallgather(*messages)
        waiter.wait([request], timeout, lambda: f"{waiter.name()} waited for {waiter.others()} to make the same call, "
                                                f"{waiter.call}")

    def allgather(self, record: ArrayLike, timeout: float, call: str = "") -> NDArray[Any]:
        """Gather one small array from every rank on every rank. Collective over *comm*.

        Parameters
        ----------
        record : array of shape (n,)
            The same n and dtype on every rank.
        timeout : float
            Seconds to wait for the others.
        call : str
            See `exchange`.

        Returns
        -------
        array of shape (size, n)

        Raises
        ------
        RingTimeout, RankLost
            If a rank does not come in time, or is gone.
        """
        mine = np.ascontiguousarray(record)
        rows = self.exchange(call, timeout, mine.view(np.uint8))
        return np.concatenate(rows).view(mine.dtype).reshape(self.size, *mine.shape)

    def allgather_text(self, text: str, timeout: float, call: str = "") -> list[str]:
        """Gather a text from every rank on every rank. Collective over *comm*."""
        return _decode(self.exchange(call, timeout, _encode(text)))

    def check_same_options(self, options: Mapping[str, Any], timeout: float, call: str = "") -> None:
        """Raise `OptionError` on every rank unless all bring the same options. Collective over *comm*."""
        self.exchange(call, timeout, options=options)

    @contextmanager
    def raise_on_all(self, timeout: float) -> Iterator[None]:
        """Run a block that may fail on some ranks; at its end all ranks raise, or none. Collective over *comm*.

        All raise the error of the lowest rank that failed; its text says which ranks did.
        """
        with self.noting() as failures:
            yield
        self.exchange("", timeout, failures=failures)

    def noting(self) -> Noting:
        """Note what fails in a block, for the `exchange` that follows to raise on all ranks; see `Noting`. Local."""
        return Noting(self._waiter)

    def telling(self) -> Telling:
        """Give the communicator up if a block ends by an error of this rank alone; see `Telling`. Local."""
        return Telling(self._waiter)


class Telling:
    """Gives the communicator up if a block ends by an error of this rank alone, an interrupt say. Local.

    The other ranks hear of it at once, and need not wait until their time is up. They know of every `RingError`
    already: they have agreed on it, or have been told.
    """

    __slots__ = ("_waiter",)

    def __init__(self, waiter: Waiter) -> None:
        self._waiter = waiter

    def __enter__(self) -> Any:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        _tell(self._waiter, error)


class Noting:
    """Notes what fails in a block, for the exchange that follows to raise on all ranks. Local.

    It gives a list of exceptions: empty, or after the block with the one that ended it. Interrupts, and errors about
    lost ranks, are raised at once: see `Telling`.
    """

    __slots__ = ("_failures", "_waiter")

    def __init__(self, waiter: Waiter) -> None:
        self._waiter = waiter
        self._failures: list[Exception] = []

    def __enter__(self) -> list[Exception]:
        return self._failures

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> bool:
        if isinstance(error, Exception) and not isinstance(error, (RingTimeout, RankLost)):
            self._failures.append(error)      # whatever it is, the other ranks must hear of it
            return True
        _tell(self._waiter, error)
        return False


def _tell(waiter: Waiter, error: BaseException | None) -> None:
    """Give the communicator up if a block ends by an error that only this rank knows of."""
    if error is not None and not isinstance(error, RingError):
        waiter.give_up(error)


def _given(options: Options) -> Mapping[str, Any]:
    return options() if callable(options) else options


def _encode(text: str) -> NDArray[np.uint8]:
    return np.frombuffer(text.encode(errors="backslashreplace"), np.uint8)


def _decode(rows: list[NDArray[np.uint8]]) -> list[str]:
    return [row.tobytes().decode(errors="ignore") for row in rows]
