"""Where the CUDA C++ sources are."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path


@functools.cache
def kernels_folder() -> Path:
    """Give the folder of the sources: inside the package when installed, beside it in a clone. Local."""
    inside = Path(__file__).parents[1] / "kernels"
    return inside if inside.is_dir() else Path(__file__).parents[2] / "kernels"


@functools.cache
def digest() -> str:
    """Give a digest of all sources: compilers' caches don't look into headers. Local."""
    texts = [path.read_bytes() for path in sorted(kernels_folder().glob("*.cu*"))]
    return hashlib.sha256(b"\0".join(texts)).hexdigest()[:16]
