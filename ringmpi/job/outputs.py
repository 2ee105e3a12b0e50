"""The output of a job: each rank writes its shard, rank 0 publishes OUT.h5 over them, or nothing is left."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..dtypes import DTYPES, accumulator
from ..errors import CommError, OptionError, RankLost, RingError, RingTimeout
from ..files.manifest import Shard
from ..files.paths import check_writable
from ..files.record import check_record
from ..files.shards import Output
from ..files.streams import STANDARD_OUTPUT
from ..layout import Contiguous
from .inputs import Sizes
from .run import Run

Array = NDArray[Any]
Rows = tuple[tuple[int, ...], np.dtype[Any]]          # shape and dtype of a row


def check_paths(source: Path, target: Path, json_path: Path | None, force: bool) -> None:
    """Check that input, output and record are different files, and that the outputs can be written. Local.

    Raises
    ------
    OptionError
        If two of them are one file, or HDF5 can't refer to the output's shards.
    OutputError
        If `target` exists and not `force`, or one can't be written.
    """
    if "%" in target.name:
        raise OptionError(f"{target}: expected a name without %: HDF5 takes it for a pattern of files")
    if not target.name.isprintable():
        raise OptionError(f"{str(target)!r}: expected a name of printable UTF-8 text, by which HDF5 finds the shards")

    # Two names may lead to one file.
    named = {"input": source, "output": target}
    if json_path is not None and json_path != STANDARD_OUTPUT:
        named["--json"] = json_path
    seen: dict[Path, str] = {}
    for name, path in named.items():
        other = seen.setdefault(Path(os.path.realpath(path)), name)
        if other != name:
            raise OptionError(f"{path}: expected different files, got the same one as {other} and {name}")

    check_writable(target, force)
    if json_path:
        check_record(json_path)


def write_shard(run: Run, output: Output, n_q: int, out: Array, lse: Array) -> Shard:
    """Write this rank's rows of a result of `n_q` rows. Collective over *comm*.

    Raises
    ------
    OutputError
        If a rank can't write; the same on every rank.
    """
    start = Contiguous.even(n_q, run.comm.size).starts[run.comm.rank]
    with run.timer.phase("write", f"writing {output.path}"), run.raise_on_all():
        return output.write(run.comm.rank, start, out, lse)


def rows_of_results(sizes: Sizes, wanted: str | None) -> dict[str, Rows]:
    """Give shape and dtype of a row of `out` and of `lse`. Local.

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


def publish(run: Run, output: Output, shards: Sequence[Shard], rows: Mapping[str, Rows], record: dict[str, Any]
            ) -> None:
    """Have rank 0 write OUT.h5 over the shards of all ranks. Collective over *comm*.

    Parameters
    ----------
    shards : sequence of Shard
        Of all ranks.
    rows : mapping
        See `rows_of_results`.
    record : dict
        How the result was made.

    Raises
    ------
    OutputError
        If OUT.h5 can't be written; the same on every rank, and what the output may discard is gone.
    """
    try:
        shapes = {name: ((shards[-1].stop if shards else 0, *shape), dtype) for name, (shape, dtype) in rows.items()}
        with run.timer.phase("write", f"writing {output.path}"), run.raise_on_all():
            if run.comm.rank == 0:
                output.publish(shards, shapes, record)
    except RingError as error:
        if not isinstance(error, (RingTimeout, RankLost, CommError)):      # all ranks know that it is not there
            output.discard()
        raise
    if run.comm.rank == 0:
        output.clear_replaced()
