"""A job's record, as far as pictures need it: when each rank did what, on one clock."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ShardError

NEEDED = ("ringmpi", "ranks", "grid", "per_rank")


@dataclass
class Span:
    """What a rank did from `start` to `stop`, in seconds since the first rank began.

    `what` is ``setup``, ``compile``, ``compute``, ``wait`` or ``exchange``; `source` the owner of the block, if there
    is one, and `pairs` the visible pairs of it.
    """

    rank: int
    what: str
    start: float
    stop: float
    source: int = -1
    pairs: int = 0
    name: str = ""


@dataclass
class Message:
    """A block on its way: from a rank's work on it to that of the next."""

    source: int
    sender: int
    receiver: int
    start: float
    stop: float
    nbytes: int


@dataclass
class Timeline:
    """A record, on one clock.

    Attributes
    ----------
    ranks : int
    hosts : list of str
    grid : str
        The schedule.
    gflops : float
    spans : list of Span
    messages : list of Message
    """

    ranks: int
    hosts: list[str]
    grid: str
    gflops: float = 0.0
    spans: list[Span] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """From the first begin to the last end."""
        return max((span.stop for span in self.spans), default=0.0)

    def total(self, what: str) -> float:
        """Seconds of one kind of span, on all ranks together."""
        return sum(span.stop - span.start for span in self.spans if span.what == what)

    @property
    def hidden(self) -> float:
        """The share of the seconds of steps in which ranks computed: 1 where nobody ever waited for a block."""
        computing = self.total("compute")
        both = computing + self.total("wait") + self.total("exchange")
        return computing / both if both else 1.0


def read_record(path: Path) -> dict[str, Any]:
    """Read a record. Local.

    Raises
    ------
    ShardError
        If there is none, or it is of another kind or version.
    """
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ShardError(f"{path}: expected the record of a job, as attend --json writes it: {error}") from None
    missing = [name for name in NEEDED if not isinstance(record, dict) or name not in record]
    if missing or not isinstance(record["per_rank"], list) or len(record["per_rank"]) != record["ranks"] or any(
            "steps" not in one or "clock_offset" not in one for one in record["per_rank"]):
        raise ShardError(f"{path}: expected the record of a job, as attend --json of this version writes it, got one "
                         f"{'without ' + ', '.join(missing) if missing else 'of other ranks, or another version'}")
    checked: dict[str, Any] = record
    return checked


def make_timeline(record: dict[str, Any]) -> Timeline:
    """Put what all ranks did on one clock. Local."""
    ranks = record["per_rank"]
    timeline = Timeline(len(ranks), [one["host"] for one in ranks], record["grid"], record.get("gflops", 0.0))
    begins = [one["started"] + one["clock_offset"] for one in ranks]
    first = min(begins)
    held: dict[tuple[int, int], Span] = {}                        # the work on a block, by rank and source
    for rank, (one, begin) in enumerate(zip(ranks, begins, strict=True)):
        shift = begin - first
        setup = one.get("setup_seconds", 0.0)
        timeline.spans.append(Span(rank, "setup", shift, shift + setup))
        if one.get("compile_seconds"):
            timeline.spans.append(Span(rank, "compile", shift + setup, shift + setup + one["compile_seconds"]))
        for exchange in one.get("exchanges", []):
            start = shift + exchange["start"]
            timeline.spans.append(Span(rank, "exchange", start, start + exchange["wait_seconds"],
                                       name=exchange["what"]))
        for step in one["steps"]:
            start = shift + step["compute_start"]
            span = Span(rank, "compute", start, start + step["compute_seconds"], step["source"], step["pairs"])
            held.setdefault((rank, step["source"]), span)
            timeline.spans.append(span)
            start = shift + step["wait_start"]
            timeline.spans.append(Span(rank, "wait", start, start + step["wait_seconds"]))
    timeline.messages = _messages(ranks, held)
    return timeline


def _messages(ranks: list[dict[str, Any]], held: dict[tuple[int, int], Span]) -> list[Message]:
    """Find out which way blocks went: from a rank that had one a step before, or from its owner."""
    messages = []
    for receiver, one in enumerate(ranks):
        for before, step in zip(one["steps"], one["steps"][1:], strict=False):
            source = step["source"]
            if not before["bytes_received"] or source == receiver:
                continue
            sender = next((rank for rank, other in enumerate(ranks) if rank != receiver and any(
                x["step"] == before["step"] and x["source"] == source for x in other["steps"])), source)
            there, here = held.get((sender, source)), held[receiver, source]
            if there is not None:
                messages.append(Message(source, sender, receiver, there.start, here.start, before["bytes_received"]))
    return messages
