"""Numbers with units on the command line: bandwidths and times."""

from __future__ import annotations

import argparse
import re

SECONDS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0}
PREFIXES = " KMGT"


def bandwidth(text: str) -> float:
    """Read bytes a second: 25GB/s, 23.3GiB/s, or 200Gbit/s."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)(B|bit)/s", text.strip())
    if not match or float(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"expected a bandwidth like 25GB/s, 23GiB/s or 200Gbit/s, got {text!r}")
    number, prefix, binary, unit = match.groups()
    scale = float(1024 if binary else 1000) ** PREFIXES.index(prefix or " ")
    return float(float(number) * scale / (8 if unit == "bit" else 1))


def duration(text: str) -> float:
    """Read a time: 2us, 0.5ms."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(ns|us|µs|ms|s)", text.strip())
    if not match:
        raise argparse.ArgumentTypeError(f"expected a time like 2us, 0.5ms or 1s, got {text!r}")
    return float(match[1]) * SECONDS[match[2]]


def time_text(seconds: float) -> str:
    """Write a time with three digits: 2.13 ms."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= 0.9995 * size:                # 1 s, not 1,000 ms
            return f"{_three(seconds / size)} {unit}"
    return f"{_three(seconds / 1e-9)} ns"


def size_text(nbytes: float) -> str:
    """Write a number of bytes with three digits: 1.25 GiB."""
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20)):
        if nbytes >= size:
            return f"{_three(nbytes / size)} {unit}"
    return f"{_three(nbytes / 2**10)} KiB"


def _three(number: float) -> str:
    """Write a number with three digits, or all that it has before the point."""
    return f"{number:.3g}" if number < 999.5 else f"{number:,.0f}"
