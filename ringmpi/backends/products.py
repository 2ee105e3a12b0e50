"""How CPUs multiply bfloat16, and float32: a choice by name, the same on all ranks and never made by timing."""

from __future__ import annotations

from collections.abc import Iterable

from ..environment import BFLOAT16_PRODUCTS, bfloat16_products
from ..errors import BackendError, OptionError

# In order of preference. `tiles` multiplies bfloat16 on the CPU's tile unit (AMX), for which the weights are rounded to
# bfloat16 too. `widen` converts to float32 before it multiplies, and works on every CPU. `pairs` multiplies two at a
# time (AVX512_BF16), and rounds the weights as well; on a Xeon with AVX512_BF16 and AMX, dim 64 and 128, it took 1.5 to
# 1.6 times as long as `widen`: its instruction does half of what float32's does.
PRODUCTS = ("tiles", "widen", "pairs")
NEEDS = {"tiles": "AMX that Linux lets this process use (`ringmpi info` says why not)", "pairs": "AVX512_BF16"}
NAMES = ("auto", *PRODUCTS)

# float32 is multiplied on the tile unit too, in three pieces of bfloat16, as exactly as by multiply-adds. Calls of few
# pairs for each row and key take multiply-adds, and so do scores with slopes or dropout.
FLOAT32_PRODUCTS = ("pieces", "fma")


def check_products(name: str, what: str = "bfloat16_products") -> None:
    """Raise `OptionError` unless `name` is one of `NAMES`. Local."""
    if name not in NAMES:
        raise OptionError(f"{what}: expected one of {', '.join(NAMES)}, got {name!r}")


def wish(request: str) -> str:
    """Give what is asked for: by the caller, else by the variable RINGMPI_BFLOAT16_PRODUCTS, else ``"auto"``. Local.

    Raises
    ------
    OptionError
        If one of the two is none of `NAMES`.
    """
    variable = bfloat16_products() or "auto"
    check_products(request)
    check_products(variable, BFLOAT16_PRODUCTS)
    return variable if request == "auto" else request


def bits(names: Iterable[str]) -> int:
    """Give some of `PRODUCTS` as an integer, a bit for each. Local."""
    return sum(1 << PRODUCTS.index(name) for name in names)


def choose_float32(ways: Iterable[int]) -> str:
    """Choose one of `FLOAT32_PRODUCTS`: pieces, where all ranks have tiles. Local."""
    return "pieces" if all(int(way) & bits(["tiles"]) for way in ways) else "fma"


def choose(wished: str, ways: Iterable[int]) -> str:
    """Choose among what all ranks have: what is wished for, with ``"auto"`` the first of `PRODUCTS`. Local.

    Parameters
    ----------
    wished : str
        The same on all ranks.
    ways : iterable of int
        What each rank has; see `Backend.ways`.

    Raises
    ------
    BackendError
        If a rank does not have it.
    """
    ways = [int(way) for way in ways]
    if wished == "auto":
        return next(name for name in PRODUCTS if all(way & bits([name]) for way in ways))
    without = [rank for rank, way in enumerate(ways) if not way & bits([wished])]
    if without:
        raise BackendError(f"bfloat16_products: {wished!r} is not there on rank {without[0]}: expected a CPU with "
                           f"{NEEDS[wished]}, and backend numba; take 'auto' or 'widen'")
    return wished
