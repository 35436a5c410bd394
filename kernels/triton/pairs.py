"""Codes of a tile as numbers of 16 bits, two at a time, without a step through 32 bits: what decode spends least on.

Where codes have one plane and a column is a word of 16 bits, or a byte, of whole lanes, `assembly` says how, for triton
has no pairs. Everything else, and triton's interpreter, goes by way of `unpack`.
"""

# Triton reads these functions as a language of its own: without annotations, and with tuples that grow.
# mypy: disable-error-code="no-untyped-def, assignment, no-redef"
# ruff: noqa: SIM300

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .assembly import LESS, RAISED, codebook_asm, constraints, float_asm, uniform_asm
from .unpack import (
    INTERPRETED,
    block_numbers,
    float_grid,
    float_numbers,
    lane_codes,
    lane_numbers,
    page_scale,
    room_of,
    scale_codes,
)


@triton.constexpr_function
def pack_of(chunk: Any) -> int:
    """Columns of a register: 2 words or 4 bytes, each of whole lanes of one plane; 0: of another kind."""
    if INTERPRETED or len(chunk.planes) > 1 or (chunk.planes[0][2] >= 8 and chunk.kind != "floats"):
        return 0
    return {16: 2, 8: 4}.get(chunk.lanes * chunk.planes[0][2], 0)


@triton.constexpr_function
def paired_floats(chunk: Any) -> bool:
    """Whether `float_asm` knows a chunk's numbers and scales."""
    scaled = chunk.format == "e2m1" and chunk.scale_format in ("e4m3", "e8m0")
    return pack_of(chunk) == 2 and (room_of(chunk) == 1 or scaled)


@triton.jit
def lane_halves(planes, C: tl.constexpr, LANE: tl.constexpr, MIDDLE: tl.constexpr, DTYPE: tl.constexpr):
    """As `lane_numbers`, in DTYPE."""
    PACK: tl.constexpr = pack_of(C)
    if PACK > 0 and DTYPE != tl.float32:
        HALF: tl.constexpr = DTYPE == tl.float16
        ASM: tl.constexpr = uniform_asm(PACK, C.planes[0][2], LANE, MIDDLE, HALF)
        IN: tl.constexpr = constraints(PACK // 2, 1)
        if HALF:
            return tl.inline_asm_elementwise(ASM, IN, [planes[0]], dtype=tl.float16, is_pure=True, pack=PACK)
        else:
            return tl.inline_asm_elementwise(ASM, IN, [planes[0]], dtype=tl.bfloat16, is_pure=True, pack=PACK)
    else:
        return lane_numbers(planes, C, LANE, MIDDLE).to(DTYPE)


@triton.jit
def on_grid(x, scale, zero, ADDS: tl.constexpr):
    """x * scale + zero, float16 [T, columns]; scale and zero, where ADDS, [1 or T, columns]."""
    scale = tl.broadcast_to(scale, x.shape)
    if ADDS:
        zero = tl.broadcast_to(zero, x.shape)
    if INTERPRETED:
        x = x.to(tl.float32) * scale.to(tl.float32)
        if ADDS:
            x += zero.to(tl.float32)
        return x.to(tl.float16)
    elif ADDS:
        ASM: tl.constexpr = "fma.rn.f16x2 $0, $1, $2, $3;"
        return tl.inline_asm_elementwise(ASM, "=r,r,r,r", [x, scale, zero], dtype=tl.float16, is_pure=True, pack=2)
    else:
        ASM: tl.constexpr = "mul.rn.f16x2 $0, $1, $2;"
        return tl.inline_asm_elementwise(ASM, "=r,r,r", [x, scale], dtype=tl.float16, is_pure=True, pack=2)


@triton.jit
def of_columns(x, GROUP: tl.constexpr):
    """[T, groups * GROUP] of x [T, groups, 1]."""
    each = tl.broadcast_to(x, (x.shape[0], x.shape[1], GROUP))
    return tl.reshape(each, (x.shape[0], x.shape[1] * GROUP))


@triton.jit
def block_halves(planes, scale, zero, C: tl.constexpr, LANE: tl.constexpr, DTYPE: tl.constexpr):
    """As `block_numbers`, in DTYPE."""
    if DTYPE == tl.float32:
        return block_numbers(planes, scale, zero, C, LANE)
    else:
        GROUP: tl.constexpr = C.channel_group // C.lanes
        x = lane_halves(planes, C, LANE, 0 if C.zero >= 0 else C.middle, DTYPE)
        scale, zero = of_columns(scale.to(tl.float16), GROUP), of_columns(zero.to(tl.float16), GROUP)
        return on_grid(x, scale, zero, C.zero >= 0)


@triton.jit
def lane_row(base, at, C: tl.constexpr, LANE: tl.constexpr):
    """A lane's numbers float16 [columns] of a row at `at` that has one for each channel, by words of a column."""
    EACH: tl.constexpr = min(C.lanes, 4)
    STRIDE: tl.constexpr = C.lanes * 2
    BLOCK: tl.constexpr = C.block
    COLUMNS: tl.constexpr = C.columns
    column = tl.arange(0, BLOCK)
    place = base + (at + LANE // EACH * EACH * 2) + column * STRIDE
    if EACH == 4:
        place = place.to(tl.pointer_type(tl.uint64))
    elif EACH == 2:
        place = place.to(tl.pointer_type(tl.uint32))
    else:
        place = place.to(tl.pointer_type(tl.uint16))
    words = tl.load(place, mask=column < COLUMNS, other=0) >> (LANE % EACH * 16)
    return words.to(tl.uint16).to(tl.float16, bitcast=True)


@triton.jit
def channel_halves(planes, base, first, C: tl.constexpr, LANE: tl.constexpr):
    """Decoded numbers float16 [T, columns] of a lane whose scales and zeros all tokens from `first` on share."""
    TOKENS: tl.constexpr = C.token_group
    ROW: tl.constexpr = C.groups * 2
    SCALE: tl.constexpr = C.scale + C.inner * 2
    ZERO: tl.constexpr = C.zero + C.inner * 2
    ADDS: tl.constexpr = C.zero >= 0
    row = first // TOKENS * ROW
    x = lane_halves(planes, C, LANE, 0 if ADDS else C.middle, tl.float16)
    scale = lane_row(base, row + SCALE, C, LANE)[None, :]
    zero = scale
    if ADDS:
        zero = lane_row(base, row + ZERO, C, LANE)[None, :]
    return on_grid(x, scale, zero, ADDS)


@triton.constexpr_function
def float_dtype(chunk: Any, exact: bool, codes: Any, within: bool) -> Any:
    """What a chunk of floats is multiplied in: `codes` for most of them. Scales that are powers of two have bfloat16's
    range; products of numbers and scales of "e4m3" fit float16, but what all of a page are multiplied with may not,
    which a tile `within` a page leaves out."""
    if exact:
        return tl.float32
    if chunk.kind == "floats" and paired_floats(chunk) and room_of(chunk) > 1:
        return tl.bfloat16 if chunk.scale_format == "e8m0" else tl.float16 if within else codes
    return codes


@triton.jit
def scale_words(base, token, seen, C: tl.constexpr):
    """Codes uint16 [T, groups] of scales, by a word of all that a token has where there is one: what is loaded by bytes
    has the compiler take other tiles by fours."""
    GROUPS: tl.constexpr = C.groups
    SCALE: tl.constexpr = C.scale
    if room_of(C) == GROUPS and (GROUPS == 2 or GROUPS == 4 or GROUPS == 8):
        if GROUPS == 2:
            at = (base + (SCALE + token * GROUPS)).to(tl.pointer_type(tl.uint16))
        elif GROUPS == 4:
            at = (base + (SCALE + token * GROUPS)).to(tl.pointer_type(tl.uint32))
        else:
            at = (base + (SCALE + token * GROUPS)).to(tl.pointer_type(tl.uint64))
        words = tl.load(at, mask=seen, other=0)
        return (words[:, None] >> (tl.arange(0, GROUPS) * 8).to(words.dtype)[None, :]).to(tl.uint16) & 255
    else:
        return scale_codes(base, token, seen, C)[0].to(tl.uint16)


@triton.jit
def float_by(base, token, seen, C: tl.constexpr, DTYPE: tl.constexpr, WITHIN: tl.constexpr):
    """Scales of a chunk for `float_halves` in DTYPE, and what its products are to be multiplied with: [T], or [1] if
    WITHIN and all tokens have it in common."""
    if paired_floats(C) and DTYPE != tl.float32 and room_of(C) > 1:
        scale = scale_words(base, token, seen, C)[:, :, None]
        if C.page_scale >= 0 and WITHIN:
            PAGE: tl.constexpr = C.page_scale
            factor = tl.load((base + PAGE).to(tl.pointer_type(tl.float32))) + tl.zeros((1,), tl.float32)
        elif C.page_scale >= 0:
            factor = page_scale(base, token, seen, C)
        else:
            factor = tl.full((1,), 1, tl.float32)
        if (
            C.scale_format == "e8m0"
        ):  # half of the way to where numbers are, and half by the factor: else one would overflow
            scale = (tl.minimum(scale, 254 - RAISED) + RAISED).to(tl.uint16)
            factor *= 2.0 ** (126 - RAISED)
        if C.scale_format == "e4m3" and DTYPE == tl.float16:
            factor *= 1 << LESS
    else:
        scale, factor = float_grid(base, token, seen, C)
    return scale, factor


@triton.jit
def float_halves(planes, scale, C: tl.constexpr, LANE: tl.constexpr, DTYPE: tl.constexpr):
    """As `float_numbers`, in DTYPE, less what `float_by` says; scale: of `float_by`."""
    if paired_floats(C) and DTYPE != tl.float32:
        HALF: tl.constexpr = DTYPE == tl.float16
        SCALED: tl.constexpr = room_of(C) > 1
        ASM: tl.constexpr = float_asm(C.format, C.scale_format if SCALED else "", LANE, HALF)
        words = planes[0]
        if SCALED:
            by = of_columns(scale, words.shape[1] // scale.shape[1])
            if HALF:
                return tl.inline_asm_elementwise(ASM, "=r,r,r", [words, by], dtype=tl.float16, is_pure=True, pack=2)
            else:
                return tl.inline_asm_elementwise(ASM, "=r,r,r", [words, by], dtype=tl.bfloat16, is_pure=True, pack=2)
        elif HALF:
            return tl.inline_asm_elementwise(ASM, "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2)
        else:
            return tl.inline_asm_elementwise(ASM, "=r,r", [words], dtype=tl.bfloat16, is_pure=True, pack=2)
    else:
        return float_numbers(planes, scale, C, LANE).to(DTYPE)


@triton.jit
def codebook_halves(planes, codebook, C: tl.constexpr, LANE: tl.constexpr, DTYPE: tl.constexpr):
    """The entries [T, columns] of a lane's codes in DTYPE. codebook: the side's entries."""
    PACK: tl.constexpr = pack_of(C)
    if PACK > 0 and len(C.table) > 0 and DTYPE != tl.float32:
        HALF: tl.constexpr = DTYPE == tl.float16
        ASM: tl.constexpr = codebook_asm(PACK, C.planes[0][2], LANE, C.table, HALF)
        IN: tl.constexpr = constraints(PACK // 2, 1)
        if HALF:
            return tl.inline_asm_elementwise(ASM, IN, [planes[0]], dtype=tl.float16, is_pure=True, pack=PACK)
        else:
            return tl.inline_asm_elementwise(ASM, IN, [planes[0]], dtype=tl.bfloat16, is_pure=True, pack=PACK)
    else:
        FIRST: tl.constexpr = C.codebook
        return tl.load(codebook + FIRST + lane_codes(planes, C, LANE))
