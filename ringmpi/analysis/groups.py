"""Groups of queries or keys: a number for each token, and what of a block belongs to each group."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..arrays import as_host_array
from ..checks import check_integer
from ..errors import DtypeError, OptionError, ShapeError
from ..layout import Integers

MOST = 2**31                  # groups, or keys for each query


class Groups(NamedTuple):
    """Groups of this rank's queries or keys: the number of each token's group, or -1 for none; how many there are."""

    of: str
    numbers: Integers
    total: int


def check_groups(name: str, groups: Any, total: Any, tokens: int) -> Groups:
    """Take the groups of a rank's tokens, or raise an error. Local.

    Parameters
    ----------
    name : str
        Of the tokens: "queries" or "keys".
    groups : int array of shape (tokens,)
    total : int
    tokens : int

    Raises
    ------
    ShapeError, DtypeError, OptionError
        If they are no numbers of groups, one for each token.
    """
    total = check_integer("n_groups", total, 1, MOST)
    numbers = as_host_array(groups, "groups")
    if numbers.dtype.kind not in "iu":
        raise DtypeError(f"groups: expected integers, got {numbers.dtype}")
    if numbers.shape != (tokens,):
        raise ShapeError(f"groups: expected shape ({tokens},), a number for each of this rank's {name}, got "
                         f"{numbers.shape}")
    too_large = numbers >= total                  # as they are: an uint64 may be beyond int64
    wrong = too_large | (numbers.astype(np.int64) < -1)
    if wrong.any():
        raise OptionError(f"groups: expected numbers from 0 to {total - 1}, or -1 for none, got "
                          f"{numbers[wrong.argmax()]}")
    return Groups(name, numbers.astype(np.int64), total)


def members(numbers: Integers) -> Iterator[tuple[int, slice | NDArray[np.int64]]]:
    """Give the groups that there are among some tokens, and the tokens of each: a slice if it is one. Local."""
    if not len(numbers):                      # the rows of a rank that has none
        return
    order = np.argsort(numbers, kind="stable")
    found, starts = np.unique(numbers[order], return_index=True)
    for group, tokens in zip(found.tolist(), np.split(order, starts[1:]), strict=True):
        if group >= 0 and len(tokens):
            first, last = int(tokens[0]), int(tokens[-1])
            yield group, slice(first, last + 1) if last - first + 1 == len(tokens) else tokens
