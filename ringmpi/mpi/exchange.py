"""Small collective exchanges, in which ranks agree that all is well, and gather small arrays and texts.

Each rank brings a header and a payload, in one MPI_Iallgather of `RECORD_BYTES` a rank. Larger payloads, and the texts
of errors, take a second one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
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
RECORD_BYTES = 256                            # of the first message
NOTHING = np.empty(0, np.uint8)


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
        self._mine = np.zeros(RECORD_BYTES, np.uint8)
        self._all = np.zeros((self.size, RECORD_BYTES), np.uint8)

    def exchange(self, call: str, timeout: float, payload: NDArray[np.uint8] = NOTHING, *,
                 failures: Sequence[BaseException] = (), options: Mapping[str, Any] | None = None,
                 digest: int | None = None) -> list[NDArray[np.uint8]]:
        """Agree with all ranks that all is well, and give what each of them brings. Collective over *comm*.

        Parameters
        ----------
        call : str
            The call that begins with this exchange, the same on every rank; empty within a call.
        timeout : float
            Seconds to wait for the others.
        payload : uint8 array
            Any number of bytes; if they don't fit into `RECORD_BYTES` on some rank, there is a second message.
        failures : sequence of exceptions
            What has failed on this rank; the first is told.
        options : mapping, optional
            What must be the same on every rank.
        digest : int, optional
            `digest_of` the options, if it is known.

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
            digest = 0 if options is None else digest_of(options)
        error = failures[0] if failures else None
        mine = np.array((hash_of(call), digest, error is not None, payload.size), np.int64)
        heads, rows = self._meet(mine, payload, timeout)
        if error is not None or (heads != mine).any():
            self._check_agreement(heads, call, error, options or {}, timeout)
        return rows

    def _check_agreement(self, heads: NDArray[np.int64], call: str, error: BaseException | None,
                         options: Mapping[str, Any], timeout: float) -> None:
        """Raise the same error on every rank if the headers report a failure, or differ in more than sizes."""
        if (heads[:, CALL] != heads[0, CALL]).any():
            raise differing_calls(self._gather_texts(call or "the middle of a call", timeout))
        if heads[:, FAILED].any():
            notices = self._gather_texts(json.dumps(failure_notice(error)), timeout)
            raise agreed_failure([json.loads(notice) for notice in notices]) from error
        if (heads[:, OPTIONS] != heads[0, OPTIONS]).any():
            texts = self._gather_texts(json.dumps(shorten(options)), timeout)
            raise differing_options([json.loads(text) for text in texts])

    def _gather_texts(self, text: str, timeout: float) -> list[str]:
        """Gather texts about an error that all ranks know of already."""
        data = _encode(text)
        return _decode(self._meet(np.array((0, 0, 0, data.size), np.int64), data, timeout)[1])

    def _meet(self, head: NDArray[np.int64], payload: NDArray[np.uint8],
              timeout: float) -> tuple[NDArray[np.int64], list[NDArray[np.uint8]]]:
        """Exchange headers and payloads, of whatever size each is."""
        check_not_finalized()
        if self._waiter.lost:
            raise CommError(f"this communicator can't be used after an earlier failure ({self._waiter.lost}); make a "
                            "new one")
        if self.size == 1:
            return head[None], [payload]
        # the header, and the payload if it fits
        self._mine[:HEADER_BYTES] = head.view(np.uint8)
        if payload.size <= RECORD_BYTES - HEADER_BYTES:
            self._mine[HEADER_BYTES:HEADER_BYTES + payload.size] = payload
        self._allgather(self._mine, self._all, timeout)
        heads = self._all[:, :HEADER_BYTES].copy().view(np.int64)
        sizes = heads[:, NBYTES].tolist()
        largest = max(sizes)
        if largest <= RECORD_BYTES - HEADER_BYTES:
            return heads, [row[HEADER_BYTES:HEADER_BYTES + nbytes].copy()
                           for row, nbytes in zip(self._all, sizes, strict=True)]
        # all payloads, padded to the size of the largest
        padded = np.zeros(largest, np.uint8)
        padded[:payload.size] = payload
        everyone = np.empty((self.size, largest), np.uint8)
        self._allgather(padded, everyone, timeout)
        return heads, [row[:nbytes] for row, nbytes in zip(everyone, sizes, strict=True)]

    def _allgather(self, mine: NDArray[np.uint8], everyone: NDArray[np.uint8], timeout: float) -> None:
        waiter = self._waiter
        request = self.comm.Iallgather([mine, self._byte], [everyone, self._byte])
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

    @contextmanager
    def noting(self) -> Iterator[list[Exception]]:
        """Note what fails in a block, for the `exchange` that follows to raise on all ranks. Local.

        Interrupts, and errors about lost ranks, are raised at once: see `telling`.

        Yields
        ------
        list of Exception
            Empty, or after the block with the one that ended it.
        """
        failures: list[Exception] = []
        with self.telling():
            try:
                yield failures
            except (RingTimeout, RankLost):
                raise
            except Exception as failure:      # noqa: BLE001 (whatever it is, the other ranks must hear of it)
                failures.append(failure)

    @contextmanager
    def telling(self) -> Iterator[None]:
        """Give the communicator up if a block ends by an error of this rank alone, an interrupt say. Local.

        The other ranks hear of it at once, and need not wait until their time is up. They know of every `RingError`
        already: they have agreed on it, or have been told.
        """
        try:
            yield
        except RingError:
            raise
        except BaseException as failure:
            self._waiter.give_up(failure)
            raise


def _encode(text: str) -> NDArray[np.uint8]:
    return np.frombuffer(text.encode(errors="backslashreplace"), np.uint8)


def _decode(rows: list[NDArray[np.uint8]]) -> list[str]:
    return [row.tobytes().decode(errors="ignore") for row in rows]
