"""How fast a machine is, in the few numbers that the cost of a schedule goes by; kept in a file by `bench network`."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

from ..errors import OptionError

FORMAT = 1
MOST_BYTES = 2**16          # of a file; a longer one is cut, and so is no JSON
MOST_WHERE = 200            # characters


class LinkRate(NamedTuple):
    """What a message takes: ``latency + bytes / bandwidth`` (Hockney 1994; the alpha-beta model).

    Attributes
    ----------
    latency : float
        Seconds.
    bandwidth : float
        Bytes a second, one way. Between nodes: of one of the links that the ranks of a node share.
    """

    latency: float
    bandwidth: float

    def seconds(self, nbytes: float, messages: float = 1.0) -> float:
        """Say how long some messages of so many bytes in all take, one after the other. Local."""
        return self.latency * messages + nbytes / self.bandwidth


class KernelRate(NamedTuple):
    """What an item of work takes one CPU thread, or a GPU, in a pass.

    Attributes
    ----------
    item : float
        Seconds that it takes whatever its size.
    head : float
        Seconds for each head of the keys.
    row : float
        Seconds for each number of the rows: queries x heads x (dim + dim_v).
    key : float
        Seconds for each number of K and V: they are read, and packed; all that counts where queries are few.
    flops : float
        Floating-point operations a second: on CPUs in float32, on GPUs in 16 bits.
    """

    item: float
    head: float
    row: float
    key: float
    flops: float


@dataclass(frozen=True)
class Rates:
    """How fast a machine is.

    Attributes
    ----------
    inside, between : LinkRate
        Messages between two ranks of a node, and between nodes.
    forward, backward : KernelRate
    exchange : LinkRate
        What an exchange of heads, queries or results takes a rank, and the bytes that it sends, to be packed, unpacked
        and put together; what the messages take comes on top.
    message : float
        Seconds of a rank for a message that it sends, and one that it receives, but for what MPI takes.
    call : float
        Seconds of a call that has nothing to compute and nobody to wait for: checks, agreement, plan.
    step : float
        Seconds of a step of a carrier without work and bytes.
    where : str
        What was measured, for display.
    """

    inside: LinkRate
    between: LinkRate
    forward: KernelRate
    backward: KernelRate
    exchange: LinkRate
    message: float
    call: float
    step: float
    where: str = "defaults"

    def save(self, path: Path) -> None:
        """Write them to a file (JSON), or replace it. Local.

        Raises
        ------
        OSError
            If it can't be written.
        """
        record = {name: value._asdict() if hasattr(value, "_asdict") else value for name, value in vars(self).items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            new.write_text(json.dumps({"ringmpi rates": FORMAT, **record}, indent=2) + "\n")
            new.replace(path)
        finally:
            new.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path) -> Rates:
        """Read such a file. Local.

        Raises
        ------
        OptionError
            If it is none, or damaged.
        OSError
            If it can't be read.
        """
        if path.exists() and not path.is_file():
            raise OptionError(f"{path}: expected a file of the rates of a machine, got a folder, a pipe or a device")
        try:
            with path.open(encoding="utf-8") as file:
                return cls.from_text(file.read(MOST_BYTES))
        except (ValueError, OverflowError, RecursionError) as error:
            raise OptionError(f"{path}: expected the rates of a machine, as `ringmpi bench network` writes them, got "
                              f"{error}; measure again, or remove the file") from error

    def describe(self) -> Iterator[str]:
        """Say them in lines for display. Local."""
        yield f"rates of this machine ({self.where})"
        for name in ("inside", "between", "exchange"):
            link = getattr(self, name)
            yield f"  {name:10}{link.latency * 1e6:9.1f} us {link.bandwidth / 1e9:9.2f} GB/s"
        for name in ("forward", "backward"):
            kernel = getattr(self, name)
            yield f"  {name:10}{kernel.item * 1e6:9.1f} us {kernel.flops / 1e9:9.1f} GFLOP/s, " \
                  f"a row {kernel.row * 1e9:.2f} ns a number, a key {kernel.key * 1e9:.2f} ns a number"
        yield (f"  call      {self.call * 1e6:9.1f} us, a step {self.step * 1e6:.1f} us, "
               f"a message {self.message * 1e6:.1f} us")

    def as_text(self) -> str:
        """Give them as text, which `from_text` reads. Local."""
        return json.dumps(vars(self))

    @classmethod
    def from_text(cls, text: str) -> Rates:
        """Read what `as_text` gave, or what is in a file. Local.

        Raises
        ------
        ValueError
            If it is something else.
        """
        record = json.loads(text)
        if not isinstance(record, dict):
            raise ValueError("no object")
        if record.pop("ringmpi rates", FORMAT) != FORMAT:
            raise ValueError("another format")
        hints = get_type_hints(cls)
        if set(record) != set(hints):
            raise ValueError(f"other names: {', '.join(sorted(set(record) ^ set(hints)))}")
        return cls(**{name: _read(name, kind, record[name]) for name, kind in hints.items()})


def _read(name: str, kind: Any, value: Any) -> Any:
    """Read a field: text, a time, or several numbers."""
    if kind is str:
        if not isinstance(value, str) or not value.isprintable() or len(value) > MOST_WHERE:
            raise ValueError(f"{name} = {value!r}")
        return value
    if kind is float:
        return _number(name, value)
    names = kind._fields
    if isinstance(value, dict) and set(value) == set(names):
        value = [value[part] for part in names]
    if not isinstance(value, list) or len(value) != len(names):
        raise ValueError(f"{name} = {value!r}")
    return kind(*(_number(f"{name}.{part}", x) for part, x in zip(names, value, strict=True)))


def _number(name: str, value: Any) -> float:
    """Read a number: a time may be 0, a speed may not."""
    ok = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
    if not ok or (value == 0 and name.endswith(("bandwidth", "flops"))):
        raise ValueError(f"{name} = {value!r}")
    return float(value)


# A core of a server of 2023 with AVX-512, its memory, and links of 100 Gbit/s; GPUs as an H100 with NVLink.
CPU = Rates(inside=LinkRate(1e-6, 8e9), between=LinkRate(5e-6, 10e9),
            forward=KernelRate(200e-6, 2e-6, 2.5e-9, 1.5e-9, 140e9),
            backward=KernelRate(450e-6, 60e-6, 1.5e-9, 8e-9, 155e9),
            exchange=LinkRate(150e-6, 1e9), message=50e-6, call=300e-6, step=220e-6)
GPU = Rates(inside=LinkRate(10e-6, 200e9), between=LinkRate(15e-6, 40e9),
            forward=KernelRate(30e-6, 0.0, 1e-12, 1e-12, 400e12),
            backward=KernelRate(60e-6, 0.0, 3e-12, 3e-12, 250e12),
            exchange=LinkRate(100e-6, 500e9), message=20e-6, call=400e-6, step=100e-6)
