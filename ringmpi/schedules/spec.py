"""Which schedule is meant: how many ranks share heads, queries and keys, and how blocks of keys are carried."""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from ..checks import check_integer
from ..errors import OptionError

CARRIERS = ("ring", "gather", "broadcast", "two-way", "window")
NAMES = ("auto", "ring", "gather", "queries", "mesh", "heads")
ORDERS = ("fastest", "canonical")


@dataclass(frozen=True)
class Schedule:
    """A grid of heads x queries x keys ranks, and how blocks of keys get to the ranks that need them. Local.

    Parameters
    ----------
    heads : int
        So many ranks exchange tokens for heads: each computes with the tokens of all of them for its share of the heads
        (Jacobs et al. 2023, *DeepSpeed Ulysses*). It must divide the heads.
    queries : int
        So many ranks share their queries: each computes with the queries of all of them, and results are combined where
        they belong.
    keys : int
        So many ranks share their keys: blocks of K and V go from each to the others.
    carrier : {"ring", "gather", "broadcast", "two-way", "window"}
        How they go. ``"ring"``: round a ring, with two buffers however many ranks there are. ``"gather"``: all at once,
        with a buffer for each, which suits small blocks. ``"broadcast"``: one after the other to all ranks, in the
        order of their owners, with two buffers (three on a GPU), so that a query meets the keys in the same order on
        every rank. ``"two-way"``: half of each block either way round, which suits links that are full-duplex.
        ``"window"``: they stay, and the ranks, of one node, read them in memory that they share.

    A rank computes the queries of `queries` ranks with the keys of `keys` ranks: each pair of shards once. As text it
    is ``"1x2x4:ring"``.

    Raises
    ------
    OptionError
        If a number is none, or there is no such carrier.
    """

    heads: int = 1
    queries: int = 1
    keys: int = 1
    carrier: str = "ring"

    def __post_init__(self) -> None:
        for name in ("heads", "queries", "keys"):
            object.__setattr__(self, name, check_integer(f"schedule: {name}", getattr(self, name), 1))
        if self.carrier not in CARRIERS:
            raise OptionError(f"schedule: carrier expects one of {', '.join(CARRIERS)}, got {self.carrier!r}")

    @property
    def ranks(self) -> int:
        """How many ranks it is for."""
        return self.heads * self.queries * self.keys

    def with_carrier(self, carrier: str) -> Schedule:
        """Give the same grid with another carrier."""
        return replace(self, carrier=carrier)

    def __str__(self) -> str:
        return f"{self.heads}x{self.queries}x{self.keys}:{self.carrier}"


def check_schedule(spec: Any) -> str | Schedule:
    """Take what a caller says of the schedule: a name, a grid, or a grid as text ``"1x2x4:ring"``. Local.

    Raises
    ------
    OptionError
        If it is neither.
    """
    if isinstance(spec, Schedule) or (isinstance(spec, str) and spec in NAMES):
        return spec
    grid = re.fullmatch(r"(\d{1,9})x(\d{1,9})x(\d{1,9})(?::([\w-]+))?", spec) if isinstance(spec, str) else None
    if grid is None:
        raise OptionError(f"schedule: expected one of {', '.join(NAMES)}, a Schedule or text like 1x2x4:ring (heads x "
                          f"queries x keys : carrier), got {spec!r}")
    heads, queries, keys = (int(number) for number in grid.groups()[:3])
    return Schedule(heads, queries, keys, grid[4] or CARRIERS[0])


def resolve(spec: str | Schedule, size: int, replicated: bool = False, canonical: bool = False) -> Schedule:
    """Give the grid that is meant on so many ranks. Local.

    Parameters
    ----------
    spec : str or Schedule
    size : int
        Ranks.
    replicated : bool
        Whether all ranks have the same queries.
    canonical : bool
        Whether the order of sums is canonical.

    Raises
    ------
    OptionError
        If it is one of another number of ranks, or not one for queries that all ranks have, or for canonical order.
    """
    if canonical:
        return _resolve_canonical(spec, size, replicated)
    if replicated:
        if spec not in ("auto", "queries", Schedule(queries=size)):
            raise OptionError(f"schedule {spec}: expected \"auto\" or \"queries\" with queries that all ranks have "
                              "(layout=\"replicated\"): each computes with its own keys")
        return Schedule(queries=size)
    if isinstance(spec, Schedule):
        if spec.ranks != size:
            raise OptionError(f"schedule {spec}: expected heads x queries x keys to be the number of ranks, {size}, "
                              f"got {spec.ranks}; {_near(spec, size)} would do")
        return spec
    if spec == "queries":
        return Schedule(queries=size)
    if spec == "heads":
        return Schedule(heads=size)
    if spec == "mesh":
        queries = max(number for number in divisors(size) if number * number <= size)
        return Schedule(queries=queries, keys=size // queries)
    return Schedule(keys=size, carrier="ring" if spec == "auto" else spec)


def _resolve_canonical(spec: str | Schedule, size: int, replicated: bool) -> Schedule:
    """Give the grid that is meant where keys are to come in ascending order, whatever the number of ranks."""
    if replicated:
        raise OptionError('order "canonical": expected queries that the ranks have dealt out, got layout="replicated"; '
                          'take another layout, or order="fastest", which gives all ranks the same bits')
    schedule = Schedule(keys=size, carrier="broadcast") if spec == "auto" else resolve(spec, size)
    if schedule.queries > 1 or (schedule.keys > 1 and schedule.carrier != "broadcast"):
        other = Schedule(schedule.heads, 1, size // schedule.heads, "broadcast")
        raise OptionError(f'order "canonical": expected a schedule that shares no queries, with the carrier broadcast, '
                          f'got {schedule}; {other} would do, or "auto"')
    return schedule.with_carrier("broadcast")


def check_memory_limit(limit: Any) -> int | None:
    """Take a limit in bytes, or as text like ``"2GiB"``; None is no limit. Local.

    Raises
    ------
    OptionError
        If it is neither.
    """
    text = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]i?B|B)?", limit.strip()) if isinstance(limit, str) else None
    if text:
        prefixes = " KMGT".index((text[2] or " ")[0]) if text[2] not in (None, "B") else 0
        limit = int(Fraction(text[1]) * (1024 if "i" in (text[2] or "") else 1000) ** prefixes)
    if limit is None:
        return None
    if isinstance(limit, numbers.Integral) and not isinstance(limit, bool) and int(limit) > 0:
        return int(limit)
    raise OptionError(f"memory_limit: expected bytes, or text like 2GiB or 500MB, got {limit!r}")


def check_heads(schedule: Schedule, heads: int, kv_heads: int = 0) -> None:
    """Raise `OptionError` unless the ranks that share heads can share so many. Local.

    Parameters
    ----------
    schedule : Schedule
    heads : int
    kv_heads : int
        Heads of the keys, where each is to be with one rank: in canonical order. Else 0.
    """
    count, whose = (kv_heads, "heads of the keys, each of which one rank sums up in canonical order") if kv_heads else (
        heads, "heads")
    if count % schedule.heads:
        most = math.gcd(count, schedule.heads)
        rest = schedule.heads // most * schedule.keys
        other = Schedule(most, schedule.queries, rest, schedule.carrier)
        raise OptionError(f"schedule {schedule}: expected the {schedule.heads} ranks that share heads to divide the "
                          f"{count} {whose}; {other} would do")


def divisors(number: int) -> Iterator[int]:
    """Give the divisors of a number, in order. Local."""
    return (divisor for divisor in range(1, number + 1) if number % divisor == 0)


def _near(spec: Schedule, size: int) -> Schedule:
    """Give a grid of another number of ranks that is like one: the same heads and queries if it may be."""
    heads = math.gcd(spec.heads, size)
    queries = math.gcd(spec.queries, size // heads)
    return Schedule(heads, queries, size // heads // queries, spec.carrier)
