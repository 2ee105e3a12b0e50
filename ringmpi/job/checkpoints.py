"""The checkpoints of a job: how it attends with them, stops on request, and what goes when the output is there."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from ..attention import RingAttention
from ..call import Inputs
from ..checkpoint.calls import Keeping, Stop
from ..errors import Interrupted
from ..files.generations import check_folder, remove
from ..forward import Progress
from .run import Run


class Checkpoints:
    """What a job keeps of its work, if it does.

    Parameters
    ----------
    run : Run
    keeping : Keeping, optional
        Where; None: nothing is kept.
    stop : callable, optional
        Asked on this rank whether to stop.

    Attributes
    ----------
    keeping, stop
        As given.
    newest : path or None
        The generation that goes when the output is there.
    """

    def __init__(self, run: Run, keeping: Keeping | None, stop: Stop | None) -> None:
        self._run = run
        self.keeping = keeping
        self.stop = stop
        self.newest: Path | None = None

    def options(self) -> dict[str, Any]:
        """Give what must be the same on all ranks. Local."""
        keeping = self.keeping
        return {"checkpoint": keeping and keeping.folder, "checkpoint_every": keeping and keeping.every,
                "resume": keeping and keeping.resume, "stop": self.stop is not None}

    def check(self) -> None:
        """Raise `OutputError` unless they can be written. One rank."""
        if self.keeping is not None:
            check_folder(self.keeping.folder)

    def attend(self, attention: RingAttention, arrays: list[Any], sinks: Any, progress: Progress) -> tuple[Any, Any]:
        """Attend; give out and lse. Collective over *comm*.

        Raises
        ------
        Interrupted
            If a rank was asked to stop, the same on every rank: then there is a checkpoint.
        OutputError
            If that can't be written.
        """
        keeping = self.keeping
        if keeping is None:
            out, lse = attention(*arrays, sinks=sinks, return_lse=True, keep=False, progress=progress)
            return out, lse
        inputs = Inputs(arrays[0], arrays[1], arrays[2], sinks)
        result = attention._call_resumable(inputs, True, False, progress, self.stop, keeping)
        if result is None:
            attention.save(keeping.folder)
            share = attention._left.saver.share if attention._left else 0.0
            raise Interrupted(f"stopped on request: {share:.0%} is computed, and in the checkpoint in "
                              f"{keeping.folder}; the same command goes on from there")
        self.newest = attention._newest
        out, lse = result
        return out, lse

    def clear(self) -> None:
        """Remove them, when the output is there. Local; rank 0 does."""
        if self.keeping is not None and self.newest is not None and self._run.comm.rank == 0:
            remove(self.newest)
            with suppress(OSError):           # others are there, or something else
                self.keeping.folder.rmdir()
