"""What a schedule waits for: transfers together, and the answer of all ranks to what one of them asks for."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from ..mpi.comm import Comm, load
from .links import Link, Peer, Transfer

NAMED = 4                   # transfers that a text says it waits for
LEAVE, PAUSE = 1, 2         # what a rank may ask for after a step, in one number; True asks to leave


class Vote:
    """One exchange of all ranks: what any of them asks for after a step. Like a transfer, to be waited for."""

    peer = Peer(-1, lambda _: None, "for all ranks to say whether to stop")

    def __init__(self, comm: Comm, asked: int) -> None:
        self._mine = np.array([asked], np.uint8)
        self._any = np.zeros(1, np.uint8)
        self.requests = [comm.comm.Iallreduce(self._mine, self._any, load().BOR)]

    def says(self, what: int) -> bool:
        """Say whether a rank has asked for it, once all have answered. Local."""
        return bool(self._any[0] & what)

    def advance(self) -> bool:
        """Say that nothing but `requests` is left. Local."""
        return True

    def done(self) -> bool:
        """Say whether all ranks have answered. Local."""
        with suppress(load().Exception):
            return bool(self.requests[0].Get_status())
        return False

    def waiting_for(self) -> str:
        """Say that no GPU is waited for. Local."""
        return ""


class Joined:
    """Several transfers as one: the messages of those that are waited for, and the links that must advance."""

    def __init__(self, awaited: Sequence[Transfer], links: Sequence[Link] = ()) -> None:
        self._awaited = awaited
        self._links = links
        self.requests: list[Any] = []

    def advance(self) -> bool:
        """Do what has become possible; say whether nothing but `requests` is left. Local."""
        for link in self._links:
            link.advance()
        nothing_else = True
        for transfer in self._awaited:           # every one of them, whatever the others say
            nothing_else &= transfer.advance()
        self.requests[:] = [request for transfer in self._awaited for request in transfer.requests]
        return nothing_else


def describe(where: str, late: Sequence[Transfer]) -> str:
    """Say what is waited for, to be followed by how long. Local."""
    if not late:
        return f"{where}, computing"
    named = [f"{transfer.peer.what} {transfer.waiting_for()}".rstrip() for transfer in late[:NAMED]]
    more = [f"{len(late) - NAMED} more"] if len(late) > NAMED else []
    return f"{where}: waited {' and '.join([*named, *more])}"
