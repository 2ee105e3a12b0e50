"""What is asked of a job: the options of `ringmpi attend` as plain values."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, get_type_hints

from ..errors import ShardError
from ..schedules.spec import ORDERS

GRID_EDGES = ("cut", "shifted")
OUTPUT_DRIVERS = ("shards", "mpio")


@dataclass(frozen=True)
class Options:
    """What is asked of a job; the same on every rank."""

    causal: bool = False
    window: tuple[int | None, int | None] | None = None
    documents: bool = False
    prefix: int | None = None
    first: int = 0
    q_offset: int | None = None
    spans: bool = False
    prompts: bool = False
    parents: bool = False
    document_ids: bool = False
    q_documents: bool = False
    keys: int | None = None
    key_mask: bool = False
    grid: str | None = None
    grid_window: str | None = None
    grid_periodic: str | None = None
    grid_edges: str = GRID_EDGES[0]
    scale: float | None = None
    softcap: float | None = None
    alibi: bool = False
    sinks: bool = False
    key_bias: bool = False
    relative: bool = False
    dim_v: int | None = None
    layout: str = "contiguous"
    backend: str = "auto"
    accumulator: str | None = None
    gpu_transport: str = "auto"
    allow_gpu_sharing: bool = False
    bfloat16_products: str = "auto"
    schedule: str = "auto"
    memory_limit: int | None = None
    stream: bool = False
    order: str = ORDERS[0]
    output_driver: str = OUTPUT_DRIVERS[0]
    q: str = "q"
    k: str = "k"
    v: str = "v"
    raw_dtype: str | None = None
    axes: str | None = None
    query_heads: int | None = None
    hdf5plugin: bool = False

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Options:
        """Read back what `asdict` gave, from JSON too; other names in `record` are left out. Local.

        Raises
        ------
        ShardError
            If `asdict` never gives such a value.
        """
        known = {f.name: record[f.name] for f in fields(cls) if f.name in record}
        window = known.pop("window", None)
        hints = get_type_hints(cls)
        for name, value in known.items():
            is_number = isinstance(value, int) and isinstance(0.0, hints[name])       # JSON has 1 for 1.0
            if not isinstance(value, hints[name]) and not is_number:
                raise ShardError(f"expected options that a run can have, got {name} = {value!r}")
        # JSON has a list for the pair.
        if window is not None:
            if not isinstance(window, (list, tuple)) or [type(x) in (int, type(None)) for x in window] != [True, True]:
                raise ShardError(f"expected options that a run can have, got window = {window!r}")
            known["window"] = tuple(window)
        return cls(**known)
