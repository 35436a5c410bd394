"""Sides whose channels have codes of several widths under one norm a token: read a token's row at a time.

Tiles of tensor cores have a token's channels in several threads, each of which would unpack other widths at other
places. Here a thread has whole rows, of which it knows every bit's place: `assembly_units` says how 16 channels, two
units of 8, become numbers of 16 bits; from there they move to where tensor cores take them.
"""

# Triton reads these functions as a language of its own: without annotations, and with tuples that grow.
# mypy: disable-error-code="no-untyped-def, assignment, no-redef"
# ruff: noqa: RUF005, SIM300

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .assembly_units import units_asm, words_of
from .unpack import INTERPRETED, row_word


@triton.constexpr_function
def word(chunk: Any, i: int) -> int:
    """Place of a chunk's word i in a token's row."""
    place: int = words_of(chunk.units)[i]
    return place


@triton.constexpr_function
def count_of(chunk: Any) -> int:
    """Words of a chunk."""
    return len(words_of(chunk.units))


@triton.constexpr_function
def asm_of(chunk: Any, half: bool) -> str:
    text: str = units_asm(chunk.units, half)
    return text


@triton.constexpr_function
def registers_of(chunk: Any) -> str:
    """Constraints of `asm_of`: pairs of numbers, of words."""
    return ",".join(["=r"] * 8 + ["r"] * len(words_of(chunk.units)))


@triton.jit
def unit_channels(C: tl.constexpr):
    """The channels [16] of a chunk, those of a unit in their order."""
    FIRST: tl.constexpr = C.units[0][0]
    SECOND: tl.constexpr = C.units[len(C.units) - 1][0]
    column = tl.arange(0, 16)
    return tl.where(column < 8, FIRST, SECOND) + column % 8


@triton.jit
def to_columns(x):
    """x [R, 16] with the channels of a unit in their order, as columns have them: those of even channels first."""
    return tl.reshape(tl.permute(tl.reshape(x, (x.shape[0], 2, 4, 2)), 0, 1, 3, 2), (x.shape[0], 16))


@triton.jit
def of_columns(x):
    """Inverse of `to_columns`."""
    return tl.reshape(tl.permute(tl.reshape(x, (x.shape[0], 2, 2, 4)), 0, 1, 3, 2), (x.shape[0], 16))


@triton.jit
def first_of(a, b):
    return a


@triton.jit
def lower(x):
    return (x & 0xFFFF).to(tl.uint16)


@triton.jit
def upper(x):
    return (x >> 16).to(tl.uint16)


@triton.jit
def joined(a, b, c, d, e, f, g, h):
    """Eight in this order in three dimensions: the highest bit first, so that neighbours are what is joined last."""
    even = tl.join(tl.join(a, e), tl.join(c, g))
    odd = tl.join(tl.join(b, f), tl.join(d, h))
    return tl.join(even, odd)


@triton.jit
def as_tile(x, DTYPE: tl.constexpr):
    """[T, 16] of bits uint16 [T, 2, 2, 2, 2]. What is joined is taken by the compiler to have been loaded by half as
    many bits, and probabilities would then be shuffled to match; it does not look beyond a reduction."""
    return tl.reduce(tl.reshape(x, (x.shape[0], 16, 1)), 2, first_of).to(DTYPE, bitcast=True)


@triton.jit
def paired_tile(a, b, c, d, e, f, g, h, DTYPE: tl.constexpr):
    """Numbers [T, 16] of eight registers [T], of which i has columns 2 i and 2 i + 1."""
    low = joined(lower(a), lower(b), lower(c), lower(d), lower(e), lower(f), lower(g), lower(h))
    high = joined(upper(a), upper(b), upper(c), upper(d), upper(e), upper(f), upper(g), upper(h))
    return as_tile(tl.join(low, high), DTYPE)


@triton.jit
def unit_halves(base, token, seen, codebook, C: tl.constexpr, DTYPE: tl.constexpr):
    """Numbers [T, 16] of a chunk in DTYPE, less norms."""
    if INTERPRETED or DTYPE == tl.float32:
        return unit_numbers(base, token, seen, codebook, C).to(DTYPE)
    else:
        COUNT: tl.constexpr = count_of(C)
        row = base + (token * C.planes[0][1] + C.planes[0][0])
        words = ()
        for i in tl.static_range(COUNT):
            words = words + (row_word(row, seen, word(C, i), C),)
        ASM: tl.constexpr = asm_of(C, DTYPE == tl.float16)
        WHERE: tl.constexpr = registers_of(C)
        a, b, c, d, e, f, g, h = tl.inline_asm_elementwise(
            ASM, WHERE, words, dtype=(tl.uint32,) * 8, is_pure=True, pack=1
        )  # fmt: skip
        return paired_tile(a, b, c, d, e, f, g, h, DTYPE)


@triton.jit
def unit_codes(row, there, channel, PLANES: tl.constexpr):
    """Codes int32 [T, columns] of a unit; row: of its first plane's token."""
    codes = tl.zeros(there.shape, tl.int32)
    for i in tl.static_range(len(PLANES)):
        bit = channel * PLANES[i][1]
        byte = tl.load(row[:, None] + (PLANES[i][0] + bit // 8)[None, :], mask=there, other=0).to(tl.int32)
        codes = (codes << PLANES[i][1]) | ((byte >> (bit % 8)[None, :]) & ((1 << PLANES[i][1]) - 1))
    return codes


@triton.jit
def unit_numbers(base, token, seen, codebook, C: tl.constexpr):
    """As `unit_halves`, in the codebook's dtype."""
    row = base + (token * C.planes[0][1] + C.planes[0][0])
    column = tl.arange(0, 16)
    channel = (column * 2 & 6) | (column >> 2 & 1)
    entry = tl.zeros((token.shape[0], 16), tl.int32)
    for i in tl.static_range(len(C.units)):
        ours = (column // 8 == i)[None, :]
        codes = unit_codes(row, seen[:, None] & ours, channel, C.units[i][1])
        entry = tl.where(ours, codes + C.units[i][2], entry)
    return tl.load(codebook + entry, mask=seen[:, None] & (column < C.columns)[None, :], other=0)
