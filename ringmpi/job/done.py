"""What a job that streams has done, as a checkpoint says it: shards that are there, and how far the next piece is.

Nothing that it says is used before it is checked.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..checkpoint.identity import difference
from ..errors import ShardError
from ..files.manifest import Shard, check_shards
from ..files.shards import folder_of_shards, verify_shard
from ..files.states import Generation, are_counts
from .inputs import Sizes
from .pieces import Pieces
from .stream_plan import Planner


@dataclass(frozen=True)
class Done:
    """What has been done; the same on all ranks but for `pairs`.

    Attributes
    ----------
    shards : list of Shard
        Of pieces that are complete, in the order of their rows.
    block : int
        The block that the piece after them has yet to meet; 0: it has met none.
    pairs : int
        That this rank has computed.
    """

    shards: list[Shard] = field(default_factory=list)
    block: int = 0
    pairs: int = 0

    @property
    def rows(self) -> int:
        """Queries whose results are in shards: the first ones."""
        return self.shards[-1].stop if self.shards else 0


def done_of(found: Generation, planner: Planner, target: Path, placement: Mapping[str, Any], rank: int
            ) -> tuple[Done, Pieces | None]:
    """Say what has been done by a generation, and of which pieces if a job can go on in the middle of one. Local.

    Parameters
    ----------
    found : Generation
        Of the same problem.
    planner : Planner
        Of this job, on as many ranks as there are.
    target : path
        Of OUT.h5.
    placement : mapping
        By whom it is computed, and how, as plain values: else it goes on after the last piece that is complete.
    rank : int
        Checks its part of the shards, and of the states its own.

    Raises
    ------
    ShardError
        If that makes no sense, or something is missing or damaged.
    """
    done, pieces = _read(found, folder_of_shards(target).name, planner.sizes)
    for shard in done.shards[rank::planner.ranks]:
        verify_shard(found.path, Path(os.path.realpath(target.parent)), shard)
    parts = found.content["shards"]
    if difference(found.content["placement"], placement) or not planner.fits(pieces, done.rows):
        return replace(done, block=0, pairs=sum(part["pairs"] for part in parts) * (rank == 0)), None

    # The states of the piece that was left, where one was.
    expected = planner.states_bytes(pieces, done.rows, rank) if done.block else 0
    if (len(parts) != planner.ranks or parts[rank]["size"] != expected
            or done.block > -(-planner.sizes.n_k // pieces.block)):
        raise _strange(found)
    found.verify(rank)
    return replace(done, pairs=parts[rank]["pairs"]), pieces


def _read(found: Generation, folder: str, sizes: Sizes) -> tuple[Done, Pieces]:
    """Read what a generation says, if it makes sense; shards are in this folder."""
    content = found.content
    try:
        shards = [Shard(**shard) for shard in content["output"]]
        pieces = Pieces(**content["pieces"])
        pairs = [part["pairs"] for part in content["shards"]]
        right = (are_counts([content["block"], *pieces.as_dict().values(), *pairs])
                 and check_shards(shards) <= sizes.n_q and sum(pairs) <= sizes.n_q * sizes.n_k
                 and all(shard.file.split("/")[0] == folder for shard in shards))
    except (KeyError, TypeError, ValueError, AttributeError):
        right = False
    if not right:
        raise _strange(found)
    return Done(shards, content["block"]), pieces


def _strange(found: Generation) -> ShardError:
    return ShardError(f"{found.path}: does not say what has been done as this version of ringmpi does")
