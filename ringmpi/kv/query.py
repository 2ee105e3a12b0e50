"""What is asked of a cache in a step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from numpy.typing import NDArray

from ..call import Array
from ..relative import Relative


class Query(NamedTuple):
    """What is asked of a cache, checked.

    Attributes
    ----------
    q : array of shape (batch, n_q, heads, dim)
        Where it is computed with.
    on_gpu : bool
        Whether the caller's array is on a GPU.
    sinks : array of shape (heads,), accumulator dtype, optional
    first, total : int
        Which of all queries are in q, for the mask: from the first on, of so many.
    relative : Relative, optional
        A bias by distance.
    tables : int
        Its checksum; 0 without.
    """

    q: Array
    on_gpu: bool
    sinks: NDArray[Any] | None
    first: int
    total: int
    relative: Relative | None = None
    tables: int = 0

    def parts(self, rows: int) -> Iterator[Query]:
        """Cut it into parts of so many queries at most; at least one. Local."""
        for start in range(0, max(1, self.total), rows):
            yield self._replace(q=self.q[:, start:start + rows], first=start)
