"""The output of a job: each rank writes its shard, rank 0 publishes OUT.h5 over them, or nothing is left."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..dtypes import DTYPES, accumulator
from ..errors import CommError, OptionError, RankLost, RingError, RingTimeout
from ..files.generations import check_folder
from ..files.manifest import Shard
from ..files.paths import check_writable
from ..files.record import check_record
from ..files.shards import Output, folder_of_shards
from ..files.streams import STANDARD_OUTPUT
from ..layout import Contiguous
from ..pictures import check_pictures
from .inputs import Sizes
from .report import RecordPaths
from .run import Run

Array = NDArray[Any]
Rows = tuple[tuple[int, ...], np.dtype[Any]]          # shape and dtype of a row


def check_paths(source: Path, target: Path, records: RecordPaths, force: bool, checkpoints: Path | None = None) -> None:
    """Check that input, output, records and checkpoints have places of their own, and can be written. Local.

    Raises
    ------
    OptionError
        If two of them are one file, the folder of checkpoints is that of the output's shards or in it, or HDF5 can't
        refer to the shards.
    OutputError
        If `target` exists and not `force`, or one can't be written.
    BackendError
        If a page is asked for and nothing can draw its pictures.
    """
    if "%" in target.name:
        raise OptionError(f"{target}: expected a name without %: HDF5 takes it for a pattern of files")
    if not target.name.isprintable():
        raise OptionError(f"{str(target)!r}: expected a name of printable UTF-8 text, by which HDF5 finds the shards")

    # Two names may lead to one file.
    named = {"input": source, "output": target}
    if records.json is not None and records.json != STANDARD_OUTPUT:
        named["--json"] = records.json
    if records.page is not None:
        named["--report"] = records.page
    if checkpoints is not None:
        named["--checkpoint"] = checkpoints
    seen: dict[Path, str] = {}
    for name, path in named.items():
        other = seen.setdefault(Path(os.path.realpath(path)), name)
        if other != name:
            raise OptionError(f"{path}: expected different files, got the same one as {other} and {name}")

    # Shards are removed with the outputs that they are of.
    if checkpoints is not None:
        shards = Path(os.path.realpath(folder_of_shards(target)))
        if Path(os.path.realpath(checkpoints)).is_relative_to(shards):
            raise OptionError(f"{checkpoints}: expected another folder for --checkpoint than that of the output's "
                              f"shards, {shards}")
        check_folder(checkpoints)
    check_writable(target, force)
    if records.json:
        check_record(records.json)
    if records.page:
        check_pictures("--report")
        check_record(records.page)


class Result(Protocol):
    """A result in the making, on all ranks: what a job asks of `Shards`, and of `parallel.Together`."""

    @property
    def path(self) -> Path:
        """Of OUT.h5."""

    def prepare(self) -> None:
        """Check that it can be made, on rank 0; for a block in which all raise or none. Local.

        Raises
        ------
        OptionError, OutputError
            If it can't.
        """

    def write(self, n_q: int, rows: Mapping[str, Array], record: dict[str, Any]) -> None:
        """Write this rank's rows; nothing has the name OUT.h5 yet. Collective over *comm*.

        Parameters
        ----------
        n_q : int
            Rows of all ranks.
        rows : mapping of str to array
            This rank's rows of `out` and `lse`.
        record : dict
            How the result was made.

        Raises
        ------
        OutputError
            If a rank can't write; the same on every rank.
        """

    def publish(self) -> None:
        """Let rank 0 give OUT.h5 its name: then the result exists. Collective over *comm*.

        Raises
        ------
        OutputError
            If it can't be given; the same on every rank, and nothing is left.
        """

    def is_published(self) -> bool:
        """Say whether OUT.h5 is there, and shows what this run has written. Local."""

    def discard(self) -> None:
        """Remove what this rank wrote; not once all have, unless all know that nothing appeared. Local."""

    def discard_of_all(self) -> None:
        """Remove what any rank wrote. One rank, when the others do nothing more for this run."""


class Shards:
    """A result that becomes a file for each rank, and OUT.h5 over them; see `Result`.

    Parameters
    ----------
    run : Run

    Attributes
    ----------
    output : Output
        In the making.
    """

    def __init__(self, run: Run, output: Output) -> None:
        self._run = run
        self.output = output
        self._mine: Sequence[Shard] = ()
        self._shapes: dict[str, tuple[tuple[int, ...], np.dtype[Any]]] = {}
        self._record: dict[str, Any] = {}

    def prepare(self) -> None:
        """Make this run's folder."""
        if self._run.comm.rank == 0:
            self.output.prepare()

    def write(self, n_q: int, rows: Mapping[str, Array], record: dict[str, Any]) -> None:
        """Write this rank's shard."""
        run = self._run
        start = Contiguous.even(n_q, run.comm.size).starts[run.comm.rank]
        with run.timer.phase("write", f"writing {self.output.path}"), run.raise_on_all():
            shard = self.output.write(run.comm.rank, start, rows["out"], rows["lse"])
        self.take([shard], n_q, {name: (mine.shape[1:], mine.dtype) for name, mine in rows.items()}, record)

    def take(self, mine: Sequence[Shard], n_q: int, like: Mapping[str, Rows], record: dict[str, Any]) -> None:
        """Take shards that have been written for those of the result. Local.

        Parameters
        ----------
        mine : sequence of Shard
            That this rank brings, and no other.
        n_q : int
            Rows of all ranks.
        like : mapping
            See `rows_of_results`.
        record : dict
            How the result was made.
        """
        self._mine = mine
        self._shapes = {name: ((n_q, *shape), dtype) for name, (shape, dtype) in like.items()}
        self._record = record

    def publish(self) -> None:
        """Gather the shards of all ranks; rank 0 writes OUT.h5 over them. After an error those of a checkpoint stay."""
        run, output = self._run, self.output
        try:
            shards = gather_shards(run, self._mine)
            with run.timer.phase("write", f"writing {output.path}"), run.raise_on_all():
                if run.comm.rank == 0:
                    output.publish(shards, self._shapes, self._record)
        except RingError as error:
            if not isinstance(error, (RingTimeout, RankLost, CommError)):      # all ranks know that it is not there
                self.discard()
            raise
        if run.comm.rank == 0:
            output.clear_replaced()

    @property
    def path(self) -> Path:
        """Of OUT.h5."""
        return self.output.path

    def is_published(self) -> bool:
        """Say whether OUT.h5 is there, and shows what this run has written. Local."""
        return self.output.is_published()

    def discard_of_all(self) -> None:
        """Remove what any rank wrote. One rank, when the others do nothing more for this run."""
        self.output.discard_of_all()

    def discard(self) -> None:
        """Remove what this rank wrote; not once all have, unless all know that nothing appeared. Local."""
        self.output.discard()


def rows_of_results(sizes: Sizes, wanted: str | None) -> dict[str, Rows]:
    """Give shape and dtype of a row of `out` and of `lse`, of an input without a batch axis. Local.

    Parameters
    ----------
    sizes : Sizes
    wanted : str, optional
        Accumulator asked for.
    """
    dtype = DTYPES[sizes.dtype]
    return {"out": ((sizes.heads, sizes.dim_v), dtype), "lse": ((sizes.heads,), accumulator(dtype, wanted))}


def gather_shards(run: Run, mine: Sequence[Shard]) -> list[Shard]:
    """Gather the shards of all ranks, in the order of their rows. Collective over *comm*."""
    texts = run.allgather_text(json.dumps([asdict(shard) for shard in mine]))
    return sorted((Shard(**shard) for text in texts for shard in json.loads(text)),
                  key=lambda shard: (shard.start, shard.stop))
