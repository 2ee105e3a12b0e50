"""What ranks tell each other of failures, options and calls, and the error that all of them raise for it.

Nothing here calls MPI: `exchange` carries the texts.
"""

from __future__ import annotations

import functools
import hashlib
import json
import struct
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

from .. import errors
from ..errors import InternalError, OptionError, ResourceError, RingError

LONGEST_TEXT = 1500               # characters of an error or an option that travel to the other ranks
LONGEST_TRACEBACK = 6000          # characters of the traceback of an error of our own
NAMED = 8                         # further ranks at most that an error names


def digest_of(options: Mapping[str, Any]) -> int:
    """Give a number that tells options apart. Local."""
    return hash_of(json.dumps({name: str(value) for name, value in options.items()}))


@functools.lru_cache(maxsize=256)
def hash_of(text: str) -> int:
    """Give 64 bits of a hash that is the same on every rank, unlike Python's own. Local."""
    data = hashlib.blake2b(text.encode(errors="backslashreplace"), digest_size=8).digest()
    return int.from_bytes(data, "little", signed=True)


def digest_of_numbers(*numbers: int) -> int:
    """Give a number that tells rows of int64 numbers apart, sooner than `digest_of` does. Local."""
    data = hashlib.blake2b(struct.pack(f"<{len(numbers)}q", *numbers), digest_size=8).digest()
    return int.from_bytes(data, "little", signed=True)


def failure_notice(error: BaseException | None) -> tuple[str, str]:
    """Give the class and the text by which the other ranks hear of an error; both empty if there is none. Local."""
    if error is None:
        return "", ""
    if isinstance(error, RingError):
        return type(error).__name__, str(error)[:LONGEST_TEXT]
    if isinstance(error, MemoryError):
        return ResourceError.__name__, f"out of memory: {error}"[:LONGEST_TEXT]
    text = "".join(traceback.format_exception(error))
    return InternalError.__name__, f"{type(error).__name__}: {error}\n{text[-LONGEST_TRACEBACK:]}"


def agreed_failure(notices: Sequence[Sequence[str]]) -> RingError:
    """Give the error of the lowest rank that has one, by the `failure_notice` of each rank. Local."""
    failed = [rank for rank, (kind, _) in enumerate(notices) if kind]
    others = failed[1:]
    kind, text = notices[failed[0]]
    also = ""
    if others:
        also = f" [also on rank {', '.join(map(str, others[:NAMED]))}{' ...' if len(others) > NAMED else ''}]"
    error: RingError = getattr(errors, kind)(f"rank {failed[0]}: {text}{also}")
    return error


def shorten(options: Mapping[str, Any]) -> dict[str, str]:
    """Give the options as short texts, which differ if the options do. Local."""
    texts = {name: str(value) for name, value in options.items()}
    return {name: text if len(text) <= LONGEST_TEXT else
            f"{text[:200]}... (sha256 {hashlib.sha256(text.encode(errors='backslashreplace')).hexdigest()})"
            for name, text in texts.items()}


def differing_options(everyone: Sequence[Mapping[str, str]]) -> RingError:
    """Give the error for options that differ, by those of each rank as `shorten` gives them. Local."""
    for rank, theirs in enumerate(everyone):
        for name in {**everyone[0], **theirs}:
            here, there = theirs.get(name, "not given"), everyone[0].get(name, "not given")
            if here != there:
                return OptionError(f"rank {rank}: expected the same options on every rank, and calls in the same "
                                   f"order; {name} is {here} here and {there} on rank 0")
    return InternalError("the options have different digests, and the same texts")


def differing_calls(everyone: Sequence[str]) -> OptionError:
    """Give the error for ranks that are in different calls, by the name of the call that each is in. Local."""
    rank = next(rank for rank, theirs in enumerate(everyone) if theirs != everyone[0])
    return OptionError(f"rank {rank}: expected the same call on every rank, got {everyone[rank]} here and "
                       f"{everyone[0]} on rank 0; calls on one communicator must come in the same order everywhere")
