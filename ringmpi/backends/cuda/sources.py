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
    relative : bool
        Whether it adds a bias by distance to them.
    several : bool
        Whether queries have several intervals.
    """

    plain: bool = True
    canonical: bool = False
    biased: bool = False
    relative: bool = False
    several: bool = False

    @property
    def alone(self) -> bool:
        """Whether it does nothing but to fold what rows see: then tiles are as was measured to be fastest."""
        return not self.narrow and not self.canonical

    @property
    def adds(self) -> bool:
        """Whether it adds a bias of one kind or another to scores."""
        return self.biased or self.relative

    @property
    def crowded(self) -> bool:
        """Whether there are score functions, and more besides."""
        return not self.plain and (self.adds or self.several)

    @property
    def narrow(self) -> bool:
        """Whether more than a product makes a score, which takes registers: tiles have fewer keys then."""
        return not self.plain or self.adds

    def flags(self) -> tuple[str, ...]:
        """Give the last template arguments. Local."""
        return tuple(str(x).lower() for x in (
            not self.plain, self.biased, self.relative, self.several, self.canonical))


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
