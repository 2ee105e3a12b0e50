"""Records of runs: JSON for programs, pages for people."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from ..errors import OutputError
from .new_file import new_file, not_what_was_written
from .paths import check_writable, writing
from .streams import STANDARD_OUTPUT, is_stream, write_to_stream


def check_record(path: Path) -> None:
    """Raise `OutputError` unless `write_json` can write to `path`. Local."""
    if path != STANDARD_OUTPUT and not is_stream(path):
        check_writable(path, force=True)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON: ``-`` is standard output, a device or pipe is written into, a file appears whole. Local.

    Raises
    ------
    OutputError
        If it can't be written, or nobody reads the pipe.
    """
    write_text(path, json.dumps(content, indent=1, default=str) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text as `write_json` does. Local."""
    if path == STANDARD_OUTPUT:
        with writing("standard output"):
            sys.stdout.write(text)
            sys.stdout.flush()
    elif is_stream(path):
        write_to_stream(path, text.encode())
    else:
        with new_file(path, force=True) as file:
            file.write(text.encode())
            file.finish()
            if file.temporary.read_bytes() != text.encode():
                raise OutputError(not_what_was_written(path))
