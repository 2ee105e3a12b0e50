"""Where the CUDA C++ sources are, how they are compiled, and what there is to know of a kernel to launch it."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple


@functools.cache
def kernels_folder() -> Path:
    """Give the folder of the sources: inside the package when installed, beside it in a clone. Local."""
    package = Path(__file__).parents[2]
    inside = package / "kernels"
    return inside if inside.is_dir() else package.parent / "kernels"


@functools.cache
def digest() -> str:
    """Give a digest of all sources: compilers' caches don't look into headers. Local."""
    texts = [path.read_bytes() for path in sorted(kernels_folder().glob("*.cu*"))]
    return hashlib.sha256(b"\0".join(texts)).hexdigest()[:16]


def compiler_options() -> tuple[str, ...]:
    """Give the options that NVRTC needs besides the architecture. Local."""
    return "--std=c++17", f"-I{kernels_folder()}", f"-DRINGMPI_SOURCES=0x{digest()}"


class Kind(NamedTuple):
    """Of which kind a kernel is.

    Attributes
    ----------
    plain : bool
        Whether it has no score functions: softcap, slopes, dropout.
    canonical : bool
        Whether its sums are in canonical order. Then it is the same for any number of rows.
    biased : bool
        Whether it adds a bias of the keys to scores.
    """

    plain: bool = True
    canonical: bool = False
    biased: bool = False

    @property
    def narrow(self) -> bool:
        """Whether more than a product makes a score, which takes registers: tiles have fewer keys then."""
        return not self.plain or self.biased

    def flags(self) -> tuple[str, str, str]:
        """Give the last template arguments. Local."""
        functions, bias, canonical = (str(x).lower() for x in (not self.plain, self.biased, self.canonical))
        return functions, bias, canonical


@dataclass(frozen=True)
class Kernel:
    """An instance of a kernel over tiles, and how to launch it.

    Attributes
    ----------
    file, name : str
        Source, and C++ name with its template arguments.
    rows, keys : int
        Of a tile.
    threads, shared_bytes : int
        Of a block of threads.
    columns : int
        That one launch takes: of V, and of dq, dk or dv in the backward pass.
    blocks : int
        That a multiprocessor is meant to hold at a time.
    """

    file: str
    name: str
    rows: int
    keys: int
    threads: int
    shared_bytes: int
    columns: int
    blocks: int
