"""The words of the CPU's tile unit (AMX): what tiles are, how a thread takes and leaves them, and their instructions.

A tile has 16 rows of 64 bytes. `dot_tile` adds A·B to 16 × 16 float32, A a tile of 16 rows of 32 bfloat16, B a tile
of 16 rows of 16 pairs: row i has numbers 2i and 2i + 1 of each of its 16 columns. Numbers are multiplied exactly and
summed in float32; denormals count as 0. See `tile_pack` for how arrays come to be such tiles.

Linux gives a process the tiles on request (`environment.request_tiles`), which `missing` makes. Then each thread
calls `configure` before it uses them and `release` after: a thread that keeps them makes every switch to another one
dearer, and what was in them is nobody else's. So both stand in the same compiled function. Whether this process, a fork
of it or another library used tiles before does not matter.

Like the words of `vector`, those that take a `builder` emit code; tiles are named by their number, 0 to 7.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ...environment import CPU_TILES, cpu_tiles, request_tiles
from .vector import BFloat, call, machine

ROWS = 16                   # of a tile; and columns, of one that sums
DEPTH = 32                  # bfloat16 in a row of A, and of a column of B
TILE = ROWS * DEPTH         # bfloat16 in a tile
TILE_BYTES = 2 * TILE
ROW_BYTES = 2 * DEPTH
NUMBER = 8                  # tiles that there are

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
BYTES = I8.as_pointer()
WORDS = ir.VectorType(I16, 2 * ROWS)
SINGLES = ir.VectorType(ir.FloatType(), ROWS)


@cache
def missing() -> str:
    """Say why there are no tiles here; empty if there are. Local.

    The process asks Linux for them, once. They are missing too where Numba compiles for a CPU that has none.
    """
    if not cpu_tiles():
        return f"{CPU_TILES}=0"
    return request_tiles() if machine().tiles else "the CPU has no amx_bf16"


@intrinsic
def configure(context):  # type: ignore[no-untyped-def]
    """Take the tiles for this thread: all eight, each as large as can be. What they hold is zeros."""
    def emit(context, builder, signature, values):  # type: ignore[no-untyped-def]
        # Palette 1; at byte 16 the bytes of a row of each tile, 16 bits each; at byte 48 the rows.
        content = [1, *[0] * 15, *[ROW_BYTES, 0] * NUMBER, *[0] * (32 - 2 * NUMBER), *[ROWS] * NUMBER,
                   *[0] * (16 - NUMBER)]
        kind = ir.VectorType(I8, len(content))
        with builder.goto_entry_block():
            place = builder.alloca(kind)
        builder.store(ir.Constant(kind, content), place)
        _emit(builder, "ldtilecfg", [builder.bitcast(place, BYTES)])
        return context.get_dummy_value()

    return types.void(), emit


@intrinsic
def release(context):  # type: ignore[no-untyped-def]
    """Leave the tiles: until it configures them again this thread has none."""
    def emit(context, builder, signature, values):  # type: ignore[no-untyped-def]
        _emit(builder, "tilerelease", [])
        return context.get_dummy_value()

    return types.void(), emit


def zero_tile(builder: ir.IRBuilder, tile: int) -> None:
    """Fill a tile with zeros."""
    _emit(builder, "tilezero", [_name(tile)])


def load_tile(builder: ir.IRBuilder, tile: int, pointer: Any, row_bytes: Any = ROW_BYTES) -> None:
    """Load a tile whose rows are `row_bytes` apart, an int or an int64, from a pointer of any type."""
    _emit(builder, "tileloadd64", [_name(tile), builder.bitcast(pointer, BYTES), _bytes(row_bytes)])


def load_passing_tile(builder: ir.IRBuilder, tile: int, pointer: Any) -> None:
    """Load a tile that is not needed again soon, as it should not drive out of the cache what is; see `load_tile`."""
    _emit(builder, "tileloaddt164", [_name(tile), builder.bitcast(pointer, BYTES), _bytes(ROW_BYTES)])


def store_tile(builder: ir.IRBuilder, tile: int, pointer: Any, row_bytes: Any = ROW_BYTES) -> None:
    """Store a tile; see `load_tile`."""
    _emit(builder, "tilestored64", [_name(tile), builder.bitcast(pointer, BYTES), _bytes(row_bytes)])


def dot_tile(builder: ir.IRBuilder, total: int, a: int, b: int) -> None:
    """Add A·B to tile `total`, of float32; tiles `a` and `b` are of bfloat16."""
    _emit(builder, "tdpbf16ps", [_name(total), _name(a), _name(b)])


def to_row(builder: ir.IRBuilder, low: Any, high: Any) -> Any:
    """Round 2 × 16 float32 to bfloat16, nearest even, side by side: half a row of A each, as 32 int16."""
    pairs = call(builder, "llvm.x86.avx512bf16.cvtne2ps2bf16.512", ir.VectorType(BFloat(), 2 * ROWS), [high, low])
    return builder.bitcast(pairs, WORDS)


def to_pairs(builder: ir.IRBuilder, even: Any, odd: Any) -> Any:
    """Round 2 × 16 float32 to bfloat16, nearest even, in turns: a row of B, as 32 int16."""
    row = to_row(builder, even, odd)
    return builder.shuffle_vector(row, row, lanes([i // 2 + ROWS * (i % 2) for i in range(2 * ROWS)]))


def lanes(numbers: list[int]) -> ir.Constant:
    """Give lane numbers for a shuffle."""
    return ir.Constant(ir.VectorType(I32, len(numbers)), numbers)


def _emit(builder: ir.IRBuilder, name: str, arguments: list[Any]) -> None:
    call(builder, f"llvm.x86.{name}", ir.VoidType(), arguments)


def _name(tile: int) -> ir.Constant:
    return ir.Constant(I8, tile)


def _bytes(x: Any) -> Any:
    return ir.Constant(I64, x) if isinstance(x, int) else x
