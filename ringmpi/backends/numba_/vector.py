"""The vector vocabulary: LLVM vector code of the CPU's own width, from Numba.

Numba's vectoriser does not keep a block of accumulators in registers. So the three loops that matter (product,
softmax row, packing) are written as intrinsics in terms of the words below: load, store, splat, fma, exp, ... on
vectors of `Machine.lanes`. LLVM does the rest: which instructions, which registers.

No CPU is named here. The compiler is asked how wide its vectors are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import llvmlite.binding as llvm
import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.registry import cpu_target

from ...score import MULTIPLIER, ROUNDS, WEYL

LOG2E = 1.4426950408889634

# 2^f for |f| <= 1/2 is 1 + f (c1 + f (c2 + ...)): minimax of the relative error with the constant held at 1, so that
# 2^0 is exactly 1. Remez: 9.1e-8 in float32 (5 terms), 3.4e-18 in float64 (11 terms).
EXP2 = {
    types.float32: (6.9314697759899203815e-1, 2.4022242085376709470e-1, 5.5507337434700852738e-2,
                    9.6715126399564551514e-3, 1.3264727140072013320e-3),
    types.float64: (6.9314718055994532581e-1, 2.4022650695910131260e-1, 5.5504108664820083227e-2,
                    9.6181291075941200896e-3, 1.3333558146774620517e-3, 1.5403530457112090690e-4,
                    1.5252733493127489347e-5, 1.3215435282308487999e-6, 1.0178199571842137974e-7,
                    7.0737832485031332991e-9, 4.4347712982003767083e-10),
}
# The same with the relative error of 2^f - 1 in mind, for tanh near 0: 1.1e-8 in float32; float64's terms will do.
LESS_ONE = {
    types.float32: (6.9314718792669183234e-1, 2.4022649794962938619e-1, 5.5503574336367531017e-2,
                    9.6182374943134425760e-3, 1.3390735477450952436e-3, 1.5403512573606848715e-4),
    types.float64: EXP2[types.float64],
}
MANTISSA = {types.float32: 23, types.float64: 52}
BIAS = {types.float32: 127, types.float64: 1023}
I32, I64 = ir.IntType(32), ir.IntType(64)


class BFloat(ir.Type):  # type: ignore[misc]
    """LLVM's bfloat, which llvmlite does not have."""

    def __str__(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BFloat)

    def __hash__(self) -> int:
        return hash(BFloat)


@dataclass(frozen=True)
class Machine:
    """What the kernels need to know of the CPU that Numba compiles for.

    Attributes
    ----------
    vector_bytes : int
        64 (AVX-512), 32 (AVX2) or 16 (NEON, SSE and everything else).
    registers : int
        Vector registers.
    pairs : bool
        Whether there is a product of bfloat16 pairs that sums in float32 (dpbf16ps).
    tiles : bool
        Whether there are tiles that multiply bfloat16 (AMX), and `pairs`; a process must ask for them: `amx.missing`.
    halves : bool
        Whether float16 becomes float32 by an instruction.
    """

    vector_bytes: int
    registers: int
    pairs: bool
    tiles: bool
    halves: bool

    def lanes(self, dtype: Any) -> int:
        """Elements of `dtype` in a vector."""
        return int(self.vector_bytes * 8 // dtype.bitwidth)


@cache
def machine() -> Machine:
    """Ask LLVM what it makes of wide sums and conversions on the CPU that Numba compiles for. Local.

    NUMBA_CPU_NAME alone gives the vectors of that CPU; with NUMBA_CPU_FEATURES, of those features.
    """
    triple, name, features = cpu_target.target_context.codegen().magic_tuple()
    config: Any = numba.config
    named_only = config.CPU_NAME is not None and config.CPU_FEATURES is None
    target = llvm.Target.from_triple(triple).create_target_machine(cpu=name, features="" if named_only else features)
    code = target.emit_assembly(llvm.parse_assembly(f"""
        target triple = "{triple}"
        define <16 x float> @sum(<16 x float> %a, <16 x float> %b) {{
          %c = fadd <16 x float> %a, %b
          ret <16 x float> %c
        }}
        define <16 x float> @widen(<16 x half> %a) {{
          %b = fpext <16 x half> %a to <16 x float>
          ret <16 x float> %b
        }}"""))
    size = 64 if "zmm" in code else 32 if "ymm" in code else 16
    has = set(features.split(","))
    pairs = size == 64 and "+avx512bf16" in has
    return Machine(size, 32 if size == 64 or triple.startswith(("aarch64", "arm64")) else 16, pairs,
                   pairs and has >= {"+amx-tile", "+amx-bf16"}, "extendhf" not in code)


class Vectors:
    """Vector code of one element type, emitted where `builder` stands.

    Parameters
    ----------
    builder : ir.IRBuilder
    dtype : types.float32 or types.float64
    """

    def __init__(self, builder: ir.IRBuilder, dtype: Any) -> None:
        self.builder = builder
        self.dtype = dtype
        self.lanes = machine().lanes(dtype)
        self.element = ir.FloatType() if dtype == types.float32 else ir.DoubleType()
        self.integer = ir.IntType(dtype.bitwidth)
        self.kind = ir.VectorType(self.element, self.lanes)
        self.bits = ir.VectorType(self.integer, self.lanes)

    def number(self, x: float) -> ir.Constant:
        """Splat of a constant."""
        return ir.Constant(self.kind, [x] * self.lanes)

    def integers(self, x: int | Sequence[int]) -> ir.Constant:
        """Vector of integer constants as wide as the elements."""
        return ir.Constant(self.bits, [x] * self.lanes if isinstance(x, int) else list(x))

    def splat(self, x: Any) -> Any:
        """Scalar to every lane."""
        return splat(self.builder, x, self.lanes)

    def load(self, pointer: Any, offset: Any = 0) -> Any:
        """Lanes from element `offset` after `pointer`; any alignment."""
        return load(self.builder, pointer, offset, self.kind)

    def store(self, x: Any, pointer: Any, offset: Any = 0) -> None:
        """Lanes to element `offset` after `pointer`; any alignment."""
        store(self.builder, x, pointer, offset)

    def widen(self, stored: types.Type, pointer: Any, offset: Any) -> Any:
        """Load lanes of a storage type: floats, uint16 (bits of a bfloat16) or int16 (bits of a float16)."""
        raw = load(self.builder, pointer, offset, ir.VectorType(pointer.type.pointee, self.lanes))
        return self.converted(stored, raw)

    def gather(self, stored: types.Type, pointers: Sequence[Any], offset: Any) -> Any:
        """Lane i from element `offset` after pointer i, widened."""
        b = self.builder
        raw = ir.Constant(ir.VectorType(pointers[0].type.pointee, self.lanes), ir.Undefined)
        for i, pointer in enumerate(pointers):
            raw = b.insert_element(raw, b.load(at(b, pointer, offset)), ir.Constant(I32, i))
        return self.converted(stored, raw)

    def look_up(self, table: Any, places: Any) -> Any:
        """Lane i from element places[i] after `table`, an int64 each."""
        b, bits = self.builder, self.dtype.bitwidth
        wide = ir.VectorType(I64, self.lanes)
        first = splat(b, b.ptrtoint(table, I64), self.lanes)
        addresses = b.add(first, b.mul(places, _fill(wide, bits // 8)))
        pointers = b.inttoptr(addresses, ir.VectorType(table.type, self.lanes))
        every = ir.Constant(ir.VectorType(ir.IntType(1), self.lanes), [1] * self.lanes)
        name = f"llvm.masked.gather.v{self.lanes}f{bits}.v{self.lanes}p0"
        return call(b, name, self.kind, [pointers, ir.Constant(I32, bits // 8), every, self.number(0.0)])

    def converted(self, stored: types.Type, raw: Any) -> Any:
        """Vector of a storage type to this type."""
        b = self.builder
        if stored == self.dtype:
            return raw
        if stored == types.float32:
            return b.fpext(raw, self.kind)
        words = ir.VectorType(I32, self.lanes)
        singles = ir.VectorType(ir.FloatType(), self.lanes)
        if stored == types.uint16:
            number = b.bitcast(b.shl(b.zext(raw, words), _fill(words, 16)), singles)
        elif machine().halves:
            number = b.fpext(b.bitcast(raw, ir.VectorType(ir.HalfType(), self.lanes)), singles)
        else:
            number = _half(b, b.zext(raw, words), words, singles)
        return number if self.dtype == types.float32 else b.fpext(number, self.kind)

    def fma(self, x: Any, y: Any, z: Any) -> Any:
        """Give x·y + z, fused where the CPU does that."""
        return self._call("llvm.fmuladd", self.kind, [x, y, z])

    def larger(self, x: Any, y: Any) -> Any:
        """Larger of the two; y where either is NaN. One instruction on x86."""
        return self.builder.select(self.builder.fcmp_ordered(">", x, y), x, y)

    def smaller(self, x: Any, y: Any) -> Any:
        """Smaller of the two; y where either is NaN. One instruction on x86."""
        return self.builder.select(self.builder.fcmp_ordered("<", x, y), x, y)

    def exp(self, x: Any) -> Any:
        """Give e^x for x <= 80, say: exactly 1 at 0, 0 below the normal numbers, NaN for NaN."""
        return self.exps([x])[0]

    def exps(self, x: Sequence[Any]) -> list[Any]:
        """Give `exp` of several vectors, which go side by side: one alone would wait for each of its operations."""
        b, one = self.builder, self.number(1.0)
        power, fraction, p = self._powers(x, EXP2[self.dtype])
        p = [self.fma(*both, one) for both in zip(p, fraction, strict=True)]
        return [b.fmul(*both) for both in zip(p, power, strict=True)]

    def tanh(self, x: Any) -> Any:
        """Give tanh(x) to a few units in the last place, however small; 1 at infinity, NaN for NaN."""
        b = self.builder
        sign = self.integers(1 << self.integer.width - 1)
        bits = b.bitcast(x, self.bits)
        size = b.bitcast(b.and_(bits, b.not_(sign)), self.kind)
        (power,), (fraction,), (p,) = self._powers([b.fmul(size, self.number(-2.0))], LESS_ONE[self.dtype])
        t = self.fma(b.fmul(p, fraction), power, b.fsub(power, self.number(1.0)))        # e^(-2|x|) - 1
        result = b.fdiv(t, b.fsub(self.number(-2.0), t))
        return b.bitcast(b.or_(b.bitcast(result, self.bits), b.and_(bits, sign)), self.kind)

    def _powers(self, x: Sequence[Any], terms: Sequence[float]) -> tuple[list[Any], list[Any], list[Any]]:
        """Give 2^n, f and p of each x such that e^x = 2^n (1 + f p), n an integer, |f| <= 1/2; p has these terms."""
        b = self.builder
        mantissa, bias, log2e = MANTISSA[self.dtype], BIAS[self.dtype], self.number(LOG2E)
        # Adding 1.5·2^mantissa rounds to an integer, which is then in the low bits. The bias goes in with it.
        magic = self.number(1.5 * 2.0**mantissa + bias)
        x = [self.larger(self.number(-bias / LOG2E), y) for y in x]
        shifted = [self.fma(y, log2e, magic) for y in x]
        negative = [b.fsub(magic, y) for y in shifted]
        fraction = [self.fma(y, log2e, n) for y, n in zip(x, negative, strict=True)]
        p = [self.number(terms[-1])] * len(x)
        for term in reversed(terms[:-1]):
            p = [self.fma(y, f, self.number(term)) for y, f in zip(p, fraction, strict=True)]
        power = [b.shl(b.bitcast(y, self.bits), self.integers(mantissa)) for y in shifted]
        return [b.bitcast(y, self.kind) for y in power], fraction, p

    def random_words(self, dropout_key: Any, i: Any, j: Any) -> Any:
        """Give `score.random_words`, lane by lane, for integers as wide as the elements: its 32 bits, zeros above."""
        b = self.builder
        wide = ir.VectorType(I64, self.lanes * self.integer.width // 64)
        mask, factor, half = (_fill(wide, x) for x in (2**32 - 1, MULTIPLIER, 32))
        word = self.integers(2**32 - 1)
        low, high, key = (b.and_(x, word) for x in (j, i, dropout_key))
        for _ in range(ROUNDS):
            x = b.bitcast(low, wide)
            even = b.mul(b.and_(x, mask), factor)
            upper, lower = b.lshr(even, half), b.and_(even, mask)
            if self.integer != I64:             # two words in each of the wide lanes
                odd = b.mul(b.lshr(x, half), factor)
                upper, lower = b.or_(upper, b.and_(odd, b.not_(mask))), b.or_(lower, b.shl(odd, half))
            low, high = b.xor(b.xor(b.bitcast(upper, self.bits), key), high), b.bitcast(lower, self.bits)
            key = b.and_(b.add(key, self.integers(WEYL)), word)
        return low

    def sum(self, x: Any) -> Any:
        """Sum of the lanes, pairwise."""
        b, width = self.builder, self.lanes
        while width > 1:
            width //= 2
            halves = [b.shuffle_vector(x, x, ir.Constant(ir.VectorType(I32, width), list(range(i, i + width))))
                      for i in (0, width)]
            x = b.fadd(*halves)
        return b.extract_element(x, ir.Constant(I32, 0))

    def across(self, rows: Sequence[Any], combine: Callable[[Any, Any], Any], neutral: Any) -> Any:
        """Combine the lanes of each of up to `lanes` vectors; lane i of the result is vector i's.

        A transposition that combines as it goes: about three instructions for a vector, where one alone takes
        2·log2(lanes). Absent vectors count as `neutral`.
        """
        b, half = self.builder, 1
        rows = [*rows, *[neutral] * (self.lanes - len(rows))]
        while len(rows) > 1:
            # Rows i and i + 1 of this step come to share a vector: blocks of `half` lanes, each combined so far.
            first = [t if not t & half else t - half + self.lanes for t in range(self.lanes)]
            second = [t + half if not t & half else t + self.lanes for t in range(self.lanes)]
            masks = [ir.Constant(ir.VectorType(I32, self.lanes), m) for m in (first, second)]
            rows = [combine(*(b.shuffle_vector(rows[i], rows[i + 1], mask) for mask in masks))
                    for i in range(0, len(rows), 2)]
            half *= 2
        return rows[0]

    def store_first(self, x: Any, count: int, pointer: Any) -> None:
        """Store the first `count` lanes; what follows them in memory is read and written back."""
        mask = ir.Constant(ir.VectorType(ir.IntType(1), self.lanes), [i < count for i in range(self.lanes)])
        self.store(self.where(mask, x, self.load(pointer)), pointer)

    def inside(self, index: Any, low: Any, high: Any) -> Any:
        """Mask of the lanes that stand in ``low <= index + lane < high``; the three are scalar int64."""
        b = self.builder
        # As numbers relative to index, clipped to 0..lanes, they fit any integer.
        lanes, zero = ir.Constant(I64, self.lanes), ir.Constant(I64, 0)
        edges = []
        for edge in (low, high):
            x = b.sub(edge, index)
            x = b.select(b.icmp_signed("<", x, zero), zero, x)
            x = b.select(b.icmp_signed(">", x, lanes), lanes, x)
            edges.append(self.splat(x if self.integer == I64 else b.trunc(x, self.integer)))
        lane = self.integers(range(self.lanes))
        return b.and_(b.icmp_unsigned(">=", lane, edges[0]), b.icmp_unsigned("<", lane, edges[1]))

    def any(self, mask: Any) -> Any:
        """Whether a mask holds in some lane."""
        b = self.builder
        kind = ir.IntType(self.lanes)
        return b.icmp_unsigned("!=", b.bitcast(mask, kind), ir.Constant(kind, 0))

    def where(self, mask: Any, x: Any, y: Any) -> Any:
        """X in the lanes of `mask`, else y."""
        return self.builder.select(mask, x, y)

    def transpose(self, rows: Sequence[Any]) -> list[Any]:
        """Turn `lanes` vectors, log2(lanes) steps of exchanging halves."""
        b, rows, half = self.builder, list(rows), self.lanes // 2
        while half:
            upper = [t if not t & half else t - half + self.lanes for t in range(self.lanes)]
            lower = [t + half if not t & half else t + self.lanes for t in range(self.lanes)]
            masks = [ir.Constant(ir.VectorType(I32, self.lanes), m) for m in (upper, lower)]
            for i in range(self.lanes):
                if not i & half:
                    pair = rows[i], rows[i + half]
                    rows[i], rows[i + half] = (b.shuffle_vector(*pair, mask) for mask in masks)
            half //= 2
        return rows

    def _call(self, name: str, result: ir.Type, arguments: list[Any]) -> Any:
        suffix = f"v{self.lanes}f{self.dtype.bitwidth}"
        return call(self.builder, f"{name}.{suffix}", result, arguments)


def call(builder: ir.IRBuilder, name: str, result: ir.Type, arguments: Sequence[Any]) -> Any:
    """Call an LLVM intrinsic by its full name."""
    kind = ir.FunctionType(result, [x.type for x in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)


def splat(builder: ir.IRBuilder, x: Any, lanes: int) -> Any:
    """Scalar to every lane."""
    empty = ir.Constant(ir.VectorType(x.type, lanes), ir.Undefined)
    one = builder.insert_element(empty, x, ir.Constant(I32, 0))
    return builder.shuffle_vector(one, empty, ir.Constant(ir.VectorType(I32, lanes), [0] * lanes))


def load(builder: ir.IRBuilder, pointer: Any, offset: Any, kind: ir.Type) -> Any:
    """Load a vector from element `offset` after `pointer`; any alignment."""
    result = builder.load(builder.bitcast(at(builder, pointer, offset), kind.as_pointer()))
    result.align = 1
    return result


def store(builder: ir.IRBuilder, x: Any, pointer: Any, offset: Any) -> None:
    """Store a vector at element `offset` after `pointer`; any alignment."""
    builder.store(x, builder.bitcast(at(builder, pointer, offset), x.type.as_pointer())).align = 1


def prefetch(builder: ir.IRBuilder, address: Any) -> None:
    """Ask for the line of an address, an int64, to come to the second-level cache; any address is allowed."""
    pointer = builder.inttoptr(address, ir.IntType(8).as_pointer())
    kind = ir.FunctionType(ir.VoidType(), [pointer.type, I32, I32, I32])
    read, locality, data_cache = (ir.Constant(I32, x) for x in (0, 2, 1))
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    builder.call(function, [pointer, read, locality, data_cache])


def at(builder: ir.IRBuilder, pointer: Any, offset: Any) -> Any:
    """Pointer to element `offset` after `pointer`."""
    return builder.gep(pointer, [ir.Constant(I64, offset) if isinstance(offset, int) else offset])


def data(context: Any, builder: ir.IRBuilder, array: types.Type, value: Any) -> Any:
    """Pointer to the first element of an array argument."""
    return cgutils.create_struct_proxy(array)(context, builder, value=value).data


def unpack(context: Any, builder: ir.IRBuilder, kind: Any, value: Any) -> Any:
    """Give a named tuple argument as an instance of its class: pointers to its arrays' first elements, its numbers.

    And named tuples in it in the same way.
    """
    fields = cgutils.unpack_tuple(builder, value, len(kind.types))

    def taken(field_kind: Any, field: Any) -> Any:
        if isinstance(field_kind, types.BaseNamedTuple):
            return unpack(context, builder, field_kind, field)
        return data(context, builder, field_kind, field) if isinstance(field_kind, types.Array) else field

    return kind.instance_class(*map(taken, kind.types, fields))


def dtype_of(kind: Any, name: str) -> Any:
    """Dtype of an array in a named tuple argument."""
    return kind.types[kind.fields.index(name)].dtype


def dot_pairs(builder: ir.IRBuilder, total: Any, x: Any, y: Any) -> Any:
    """Add x0·y0 + x1·y1 to float32 lanes: x and y hold a pair of bfloat16 in each 32-bit lane."""
    pairs = ir.VectorType(BFloat(), 32)
    return call(builder, "llvm.x86.avx512bf16.dpbf16ps.512", total.type,
                [total, builder.bitcast(x, pairs), builder.bitcast(y, pairs)])


def to_bfloat16(builder: ir.IRBuilder, x: Any) -> Any:
    """Round 16 float32 lanes to bfloat16, to nearest even, as 16 int16."""
    half = call(builder, "llvm.x86.avx512bf16.cvtneps2bf16.512", ir.VectorType(BFloat(), 16), [x])
    return builder.bitcast(half, ir.VectorType(ir.IntType(16), 16))


@contextmanager
def loop(builder: ir.IRBuilder, start: Any, stop: Any) -> Iterator[Any]:
    """Emit ``for i in range(start, stop)`` over int64; gives i."""
    with cgutils.for_range_slice(builder, start, stop, ir.Constant(I64, 1), intp=I64) as (index, _):
        yield index


def cases(builder: ir.IRBuilder, value: Any, numbers: Iterable[int]) -> Iterator[int]:
    """Emit a switch over small numbers that `value` may be; gives each where its code goes."""
    done = builder.append_basic_block("done")
    switch = builder.switch(builder.trunc(value, ir.IntType(8)), done)
    for number in numbers:
        case = builder.append_basic_block(f"case{number}")
        switch.add_case(ir.Constant(ir.IntType(8), number), case)
        builder.position_at_end(case)
        yield number
        builder.branch(done)
    builder.position_at_end(done)


def constant(x: int) -> ir.Constant:
    """int64 constant."""
    return ir.Constant(I64, x)


def _fill(kind: ir.VectorType, x: int) -> ir.Constant:
    return ir.Constant(kind, [x] * kind.count)


def _half(builder: ir.IRBuilder, bits: Any, words: ir.VectorType, singles: ir.VectorType) -> Any:
    """float16 bits to float32 with integers alone: 2^112 moves the exponent's bias, subnormals included."""
    b = builder
    rest = b.shl(b.and_(bits, _fill(words, 0x7FFF)), _fill(words, 13))
    moved = b.bitcast(b.fmul(b.bitcast(rest, singles), ir.Constant(singles, [2.0**112] * singles.count)), words)
    special = b.icmp_unsigned(">=", rest, _fill(words, 0x0F800000))       # infinity and NaN keep their exponent
    moved = b.select(special, b.or_(rest, _fill(words, 0x7F800000)), moved)
    sign = b.shl(b.and_(bits, _fill(words, 0x8000)), _fill(words, 16))
    return b.bitcast(b.or_(moved, sign), singles)
