"""All that moves bytes in a call on one grid: heads, queries, tokens, and blocks of keys."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import cast

from ..mpi.comm import Comm
from .base import Carrier
from .grid import Grid
from .group import Group
from .head_exchange import HeadExchange
from .links import Array, Link
from .query_exchange import QueryExchange
from .token_exchange import TokenExchange

# Each in the module of its name.
_CLASSES = {"ring": "Ring", "gather": "Gather", "broadcast": "Broadcast", "two-way": "TwoWay", "window": "Window"}


def carrier_class(name: str) -> type[Carrier]:
    """Give the class of a carrier, imported only when it is needed. Local."""
    module = importlib.import_module(f".{name.replace('-', '_')}", __package__)
    return cast("type[Carrier]", getattr(module, _CLASSES[name]))


class Movers:
    """What moves bytes on this rank's place in a grid.

    Parameters
    ----------
    comm : Comm
    grid : Grid
    new_link, clear, add
        See `Carrier`.

    Attributes
    ----------
    heads : HeadExchange
    queries : QueryExchange
    tokens : TokenExchange
        Among all ranks.
    carrier : Carrier
    """

    def __init__(self, comm: Comm, grid: Grid, new_link: Callable[[], Link], clear: Callable[[Array], None],
                 add: Callable[[Array, Array], None]) -> None:
        self.heads = HeadExchange(comm, grid.group("heads", comm.rank), new_link)
        self.queries = QueryExchange(comm, grid.group("queries", comm.rank), new_link)
        self.tokens = TokenExchange(comm, Group.everyone(comm), new_link)
        self.carrier = carrier_class(grid.schedule.carrier)(comm, grid.group("keys", comm.rank), new_link, clear, add)
        self.queries.beside.add(self.carrier)
        self.carrier.beside.add(self.queries)

    def set_timeout(self, timeout: float) -> None:
        """Set after how many seconds a wait for another rank is an error. Local."""
        for mover in (self.heads, self.queries, self.tokens, self.carrier):
            mover.timeout = timeout

    def progress(self) -> None:
        """Let MPI move what is on its way; see `Mover.progress`. Local."""
        self.carrier.progress()
        if any(link.transfers for link in self.queries.links):
            self.queries.progress()

    def abandon(self, error: BaseException) -> None:
        """Leave a call in mid-way because of an error on this rank; the other ranks are told. Local."""
        self.carrier.abandon(error)
        for mover in (self.heads, self.queries, self.tokens):
            mover.cancel()
