"""The checkpoints of a job: how it attends with them, stops on request, and what goes when the output is there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..attention import RingAttention
from ..call import Inputs
from ..checkpoint.calls import Kept
from ..checkpoint.search import Keeping
from ..checkpoint.watch import Stop
from ..errors import Interrupted
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
    kept : Kept or None
        What goes when the output is there.
    """

    def __init__(self, run: Run, keeping: Keeping | None, stop: Stop | None) -> None:
        self._run = run
        self.keeping = keeping
        self.stop = stop
        self.kept: Kept | None = None

    def options(self) -> dict[str, Any]:
        """Give what must be the same on all ranks. Local."""
        keeping = self.keeping
        return {"checkpoint": keeping and keeping.folder, "checkpoint_every": keeping and keeping.every,
                "resume": keeping and keeping.resume, "stop": self.stop is not None}

    @property
    def folder(self) -> Path | None:
        """Where they are kept, if they are."""
        return self.keeping.folder if self.keeping else None

    def attend(self, attention: RingAttention, arrays: list[Any], extra: Mapping[str, Any], progress: Progress
               ) -> tuple[Any, Any]:
        """Attend to q, k and v; give out and lse. Collective over *comm*.

        `extra` are sinks, key_bias, relative and dim_v.

        Raises
        ------
        Interrupted
            If a rank was asked to stop, the same on every rank: then there is a checkpoint.
        OutputError
            If that can't be written.
        """
        keeping = self.keeping
        if keeping is None:
            out, lse = attention(*arrays, **extra, return_lse=True, keep=False, progress=progress)
            return out, lse
        q, k, *v = arrays
        inputs = Inputs(q, k, v[0] if v else None, **extra)
        result = attention._call_resumable(inputs, True, False, progress, self.stop, keeping)
        if result is None:
            attention.save(keeping.folder)
            share = attention._left.saver.share if attention._left else 0.0
            raise Interrupted(f"stopped on request: {share:.0%} is computed, and in the checkpoint in "
                              f"{keeping.folder}; the same command goes on from there")
        self.kept = attention._kept
        out, lse = result
        return out, lse

    def clear(self) -> None:
        """Remove them, when the output is there. Local; rank 0 does."""
        if self.kept is not None and self._run.comm.rank == 0:
            self.kept.clear()
