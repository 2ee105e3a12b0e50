"""The plan of a call that may be left, or that goes on: rows see only what is left for them to meet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from ..backends.base import Backend
from ..errors import InternalError
from ..intervals import stack
from ..mpi.comm import Comm
from ..plan import Columns, Plan
from ..schedules.base import Work
from .folded import Folded, cut_rows
from .moved import Moved

UNSEEN = np.iinfo(np.int64).max


@dataclass
class ResumablePlan(Plan):
    """A plan whose rows see only the keys that they have still to meet.

    Attributes
    ----------
    before : Folded or Moved
        What they had met when the pass began.
    """

    before: Folded | Moved | None = None

    @classmethod
    def of(cls, plan: Plan, before: Folded | Moved) -> ResumablePlan:
        """Make one of a plan, with its route, which is to be agreed on anew if anything has been met. Local."""
        given = {part.name: getattr(plan, part.name) for part in fields(Plan) if part.init}
        if plan.sent is not None:
            raise InternalError("a call that may be left needs blocks that travel as they are")
        given |= {"sections": 1, "ready": set(), "_kept": {}, "_unseen": set()}      # which are not shared
        made = cls(**given, before=before.copy() if isinstance(before, Folded) else before)
        made.route = plan.route
        if all(map(before.is_whole, range(len(plan.parts)))):
            made._survey = plan._survey        # which need not be counted anew
        return made

    def agree_on_route(self, comm: Comm, timeout: float) -> None:
        """Agree on which blocks are still to come to which rank. Collective over *comm*."""
        with comm.noting() as failures:
            needs = self.needs
        bits = comm.exchange("", timeout, np.packbits(needs), failures=failures)
        needed = np.unpackbits(np.stack(bits), axis=1, count=len(needs)).astype(bool)
        self.take_needs(needed[list(self.grid.group("keys", comm.rank).ranks)])

    def comes_apart(self, work: Work, pieces: Sequence[slice]) -> bool:
        """Say whether results have the same bits if pieces of the rows meet a block one after the other. Local.

        Tiles of columns begin where the first row does that sees any: that must be the same for all pieces, whatever
        is left of the block for them.
        """
        if len(pieces) == 1:
            return True
        if not self._all_kept:
            return False
        start, stop, _ = work.columns.indices(self.parts[work.source][-1].columns.stop)
        for which in range(len(self.bounds)):
            for part, intervals in zip(self.parts[work.source], self._whole(which, work.source), strict=True):
                if not intervals:
                    continue
                begin, end = (np.clip(x, start - part.columns.start, stop - part.columns.start)
                              for x in stack(intervals))
                each = np.atleast_2d(np.where(begin < end, begin, UNSEEN))
                for first in (*each, each.min(axis=0)):               # of an interval alone, and of all together
                    if len({first[rows].min(initial=UNSEEN) for rows in pieces} - {UNSEEN}) > 1:
                        return False
        return True

    def _left(self, source: int, rows: slice, columns: Columns) -> Columns:
        """Take away what rows have met of a block before."""
        before = self.before
        if before is None or before.is_whole(source):
            return columns
        return [[before.cut(source, number, part.columns, rows, begin, end) for begin, end in intervals]
                for number, (part, intervals) in enumerate(zip(self.parts[source], columns, strict=True))]


def nothing_folded(plan: Plan, backend: Backend) -> Folded:
    """Say that the rows of a plan have met no key; they are cut if results have the same bits then. Local."""
    group = plan.share.heads // plan.share.kv_heads
    return Folded(cut_rows(plan.rows, group) if backend.rows_apart else [slice(0, plan.rows)], _tokens(plan))


def _tokens(plan: Plan) -> list[int]:
    """Give the tokens of each block."""
    return [parts[-1].columns.stop for parts in plan.parts]
