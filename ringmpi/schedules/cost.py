"""What a schedule costs: the bytes that travel."""

from __future__ import annotations

from .spec import Schedule


def fewest_bytes(size: int, queries: int, keys: int) -> Schedule:
    """Give the schedule in which fewer bytes travel: pass-KV or pass-Q. Local.

    The rule of Yang et al. 2024, *Context Parallelism for Scalable Million-Token Inference*, where nothing hides what
    travels: keys go round if they are fewer bytes than queries and their states.

    Parameters
    ----------
    size : int
        Ranks.
    queries, keys : int
        Bytes of all queries and their states; of all keys and values.
    """
    return Schedule(queries=size) if queries < keys else Schedule(keys=size)
