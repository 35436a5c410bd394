"""Assembly that makes numbers of 16 bits of codes, two in a register, for `pairs`.

A register has two columns that are words of 16 bits, or four that are bytes; each column has several lanes of codes.

  uniform   the code's bits are put into the significand of a float that counts in ones, and one fused multiplication
            shifts them and takes off what the float began with: exact
  floats    sign, exponent and significand are moved to where the wider format has them, and the exponent is mended by
            a multiplication with a power of two, or with the scale, which is one anyway: exact
  codebook  byte permutes look up both bytes of an entry: no gather, so that loads of later tiles can be started
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

RAISED = tl.constexpr(64)  # exponents of scales, which end at 2^63 then
LESS = tl.constexpr(7)  # so that numbers and scales are small enough


@triton.constexpr_function
def uniform_asm(pack: int, width: int, lane: int, middle: int, half: bool) -> str:
    """Lane `lane` of codes as numbers less `middle`."""
    magic, at, room = (0x64, 1024.0, 10) if half else (0x43, 128.0, 7)
    kind = "f16x2" if half else "bf16x2"
    code = (1 << width) - 1
    if pack == 4:  # bytes go into the low ones of pairs
        base = 0 if half else lane * width
        within = lane * width - base
    else:  # as far down as the significand has room
        base = lane * width // (room // width * width) * (room // width * width)
        within = lane * width - base
    unit = 1 / (1 << within)
    by, less = (bits_of(x, half) * 0x10001 for x in (unit, -(at * unit + middle)))
    lines = [".reg .b32 t, u, m;", f"mov.b32 u, {by:#x};", f"mov.b32 m, {less:#x};"]
    word = f"${pack // 2}"
    if base:
        lines.append(f"shr.b32 t, {word}, {base};")
        word = "t"
    if pack == 4:
        lines.append(f"and.b32 t, {word}, {(code << within) * 0x01010101:#x};")
        lines += [f"prmt.b32 ${i}, t, {magic * 0x01010101:#x}, {how};" for i, how in enumerate(("0x5140", "0x7362"))]
    else:
        lines.append(f"lop3.b32 $0, {word}, {(code << within) * 0x10001:#x}, {(magic << 8) * 0x10001:#x}, 0xEA;")
    lines += [f"fma.rn.{kind} ${i}, ${i}, u, m;" for i in range(pack // 2)]
    return "{ " + " ".join(lines) + " }"


@triton.constexpr_function
def float_asm(form: str, scale: str, lane: int, half: bool) -> str:
    """Lane `lane` of two words of numbers of a format; times the second operand, codes of scales of the format `scale`,
    if that is not empty. What comes of it is too small by 2^`LESS` where scales of "e4m3" meet float16, and by
    2^(126 - `RAISED`) where they are exponents."""
    n, fraction = {"e4m3": (8, 3), "e5m2": (8, 2), "e2m1": (4, 1)}[form]
    bias = {"e4m3": 7, "e5m2": 15, "e2m1": 1}[form]
    to = (10 if half else 7) - fraction
    multiply, end = ("mul.rn.f16x2", ";") if half else ("fma.rn.bf16x2", ", z;")  # less 0: as of sm_80
    unit = 2.0 ** ((15 if half else 127) - bias)
    at = lane * n
    lines = [".reg .b32 t, s, b, u, z;", "mov.b32 z, 0x80008000;"]
    for name, by, mask in (("t", to - at, (1 << n - 1) - 1 << to), ("s", 16 - n - at, 1 << 15)):
        lines.append(f"{'shl' if by > 0 else 'shr'}.b32 {name}, $1, {abs(by)};" if by else f"mov.b32 {name}, $1;")
        if name == "t":
            lines.append(f"and.b32 t, t, {mask * 0x10001:#x};")
    lines.append("lop3.b32 t, s, 0x80008000, t, 0xEA;")
    if scale == "e4m3":  # as numbers above, times what is left to make of it
        lines.append(f"shl.b32 b, $2, {7 if half else 4};")
        lines += [constant("u", 2.0 ** (8 + 14 - LESS.value) if half else 2.0**120, half), f"{multiply} b, b, u{end}"]
    elif scale == "e8m0":  # exponents of bfloat16, `RAISED`
        lines.append("shl.b32 b, $2, 7;")
    if unit != 1 and not (scale == "e8m0" or (half and scale)):
        lines += [constant("u", unit, half), f"{multiply} t, t, u{end}"]
    lines.append(f"{multiply} $0, t, b{end}" if scale else "mov.b32 $0, t;")
    return "{ " + " ".join(lines) + " }"


@triton.constexpr_function
def constant(name: str, x: float, half: bool) -> str:
    return f"mov.b32 {name}, {bits_of(x, half) * 0x10001:#x};"


@triton.constexpr_function
def codebook_asm(pack: int, width: int, lane: int, entries: Any, half: bool) -> str:
    """Lane `lane` of codes of 2 bits, or of 4 whose entries are symmetric. Lanes have steps in common, which the
    assembler takes once."""
    word, bits = f"${pack // 2}", [bits_of(x, half) for x in entries]
    if width == 2:
        words = [bits[i] | bits[i + 1] << 16 for i in (0, 2)]
    else:  # of codes 8 to 15, the low bytes and the high ones
        words = [sum((bits[k + i] >> by & 255) << 8 * i for i in range(4)) for by in (0, 8) for k in (8, 12)]
    # A permute takes one constant; the assembler moves others into a register for each, unless it has them in one. So
    # they are made of what it cannot know to be 0: a mask of one bit, less that bit.
    table = [f"t{i}" for i in range(len(words))]
    held = [f".reg .b32 z, y, {', '.join(table)};", "mov.u32 z, %lanemask_eq;", "sub.u32 y, z, 1;", "and.b32 z, z, y;"]
    held += [f"xor.b32 {name}, z, {x:#x};" for name, x in zip(table, words, strict=True)]
    if width == 2:  # selectors of both bytes of an entry: 2 code and 2 code + 1
        lines = [".reg .b32 u, s;", f"mov.b32 u, {word};"]
        if pack == 2:  # the same byte of both columns side by side
            lines.append("prmt.b32 u, u, 0, 0x3120;")
        if lane % 4:
            lines.append(f"shr.b32 u, u, {2 * (lane % 4)};")
        lines += ["and.b32 u, u, 0x03030303;", "mad.lo.u32 s, u, 0x22, 0x10101010;"]
        for side in range(2):
            if side == 1:
                lines.append("shr.b32 s, s, 16;")
            if pack == 4 or side == lane // 4:
                lines.append(f"prmt.b32 ${side if pack == 4 else 0}, {table[0]}, {table[1]}, s;")
        return "{ " + " ".join(held + lines) + " }"
    lines = [
        ".reg .b32 n, t, i, u, x, ll, lh, hl, hh, s, p, q;",
        f"lop3.b32 n, {word}, 0x88888888, 0, 0x0C;",  # 8 where the entry is negative
        "shr.b32 t, n, 3;",
        "sub.u32 x, n, t;",  # 7 there
        f"lop3.b32 i, {word}, x, 0x77777777, 0x28;",  # (word ^ x) & 7: which magnitude
        "shr.b32 u, i, 16;",
        f"prmt.b32 ll, {table[0]}, {table[1]}, i;",
        f"prmt.b32 lh, {table[2]}, {table[3]}, i;",
        f"prmt.b32 hl, {table[0]}, {table[1]}, u;",
        f"prmt.b32 hh, {table[2]}, {table[3]}, u;",
        "prmt.b32 s, 0, 0x80000000, x;",  # the sign
        "or.b32 lh, lh, s;",
        "shr.b32 x, x, 16;",
        "prmt.b32 s, 0, 0x80000000, x;",
        "or.b32 hh, hh, s;",
    ]
    if pack == 4:  # nibbles: of columns 0 and 1 in the low half, of 2 and 3 in the high one
        how = ("0x6240", "0x7351")[lane]
        lines += [f"prmt.b32 $0, ll, lh, {how};", f"prmt.b32 $1, hl, hh, {how};"]
    else:
        how = ("0x5140", "0x7362")[lane // 2]
        lines += [f"prmt.b32 p, ll, lh, {how};", f"prmt.b32 q, hl, hh, {how};"]
        lines.append(f"prmt.b32 $0, p, q, {('0x5410', '0x7632')[lane % 2]};")
    return "{ " + " ".join(held + lines) + " }"


@triton.constexpr_function
def constraints(outputs: int, inputs: int) -> str:
    return ",".join(["=r"] * outputs + ["r"] * inputs)


@triton.constexpr_function
def bits_of(x: float, half: bool) -> int:
    """The bits of the float16 or bfloat16 number nearest to x."""
    import struct  # triton looks at what functions of constants refer to, and knows only modules of its own

    if half:
        return int.from_bytes(struct.pack("<e", x), "little")
    bits = int.from_bytes(struct.pack("<f", x), "little")
    return bits + 0x7FFF + (bits >> 16 & 1) >> 16
