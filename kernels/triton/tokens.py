"""What selectors of single tokens need: estimates from codes of their keys, and pages made of those that they choose.

  dots[j, t] = sum_c q[j, c] (code[c, t] + 1/2 - 2^bits / 2)

Codes are exact in float16, and a query is a sum of two float16 numbers, so that products are those of 22 bits at the
speed of 16. Moved: of estimates, every code once, and a float32 for each query and token; of pages, each chosen token's
rows, read and written once.
"""

# mypy: disable-error-code="no-untyped-def, assignment"

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .unpack import chunk, dot


@triton.jit(do_not_specialize=["count", "ids_stride"])
def code_dots_kernel(
    q, pool, ids, counts, out, rows, count, ids_stride, RANK: tl.constexpr, BITS: tl.constexpr, PAGE: tl.constexpr,
    BYTES: tl.constexpr, OFFSET: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """q float32 [S, J, r]; pool uint8 [pages, BYTES], of whose pages ids [S, n] a stream's first counts [S] exist, with
    codes uint8 [r bits / 8, P] at OFFSET: row c of 4-bit codes has channel c in the low bits and channel r / 2 + c in
    the high ones; out float32 [S, J, n P]. Grid: (S, blocks of tokens)."""
    LINES: tl.constexpr = RANK * BITS // 8
    stream = tl.program_id(0).to(tl.int64)
    row = tl.arange(0, ROWS)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    seen = token // PAGE < tl.load(counts + stream)
    page = tl.load(ids + stream * ids_stride + token // PAGE, mask=seen, other=0).to(tl.int64)
    from_ = pool + page * BYTES + (OFFSET + token % PAGE)
    most = tl.full((ROWS,), 1e-30, tl.float32)
    for at in range(0, RANK, BLOCK):
        channel = at + tl.arange(0, BLOCK)
        there = (row < rows)[:, None] & (channel < RANK)[None, :]
        x = tl.load(q + (stream * rows + row[:, None]) * RANK + channel[None, :], mask=there, other=0)
        most = tl.maximum(most, tl.max(tl.abs(x), 1))
    # by a power of two, so that float16 neither overflows nor loses what counts
    norm = (((most.to(tl.int32, bitcast=True) >> 23) + 1) << 23).to(tl.float32, bitcast=True)
    found = tl.zeros((ROWS, TOKENS), tl.float32)
    for at in range(0, RANK, BLOCK):
        channel = at + tl.arange(0, BLOCK)
        there = (row < rows)[:, None] & (channel < RANK)[None, :]
        x = tl.load(q + (stream * rows + row[:, None]) * RANK + channel[None, :], mask=there, other=0) / norm[:, None]
        shown = (channel < RANK)[:, None] & seen[None, :]
        code = tl.load(from_[None, :] + (channel % LINES * PAGE)[:, None], mask=shown, other=0).to(tl.int32)
        if BITS == 4:
            code = (code >> (channel // LINES * 4)[:, None]) & 15
        centred = tl.where(shown, code.to(tl.float32) + (0.5 - (1 << (BITS - 1))), 0).to(tl.float16)
        high = x.to(tl.float16)
        found = dot(high, centred, found, tl.float16)
        found = dot(x - high.to(tl.float32), centred, found, tl.float16)
    at = (stream * rows + row[:, None]) * count + token[None, :]
    tl.store(out + at, found * norm[:, None], mask=(row < rows)[:, None] & (token < count)[None, :])


@triton.constexpr_function
def word(field: Any) -> Any:
    """The widest integer that rows of a field are whole numbers of."""
    _, size = field
    return next(dtype for n, dtype in ((8, tl.int64), (4, tl.int32), (2, tl.int16), (1, tl.uint8)) if size % n == 0)


@triton.constexpr_function
def words(field: Any) -> int:
    """How many of them a row has."""
    _, size = field
    count: int = size // next(n for n in (8, 4, 2, 1) if size % n == 0)
    return count


@triton.constexpr_function
def room(field: Any) -> int:
    power: int = triton.next_power_of_2(words(field))
    return power


@triton.jit
def copy_rows(to, from_, place, inner, there, FIELD: tl.constexpr):
    """Rows `place` [T] of a field in records `from_` [T] become its rows `inner` [T] in records `to` [T]."""
    OFFSET: tl.constexpr = FIELD[0]
    SIZE: tl.constexpr = FIELD[1]
    WORD: tl.constexpr = word(FIELD)
    COUNT: tl.constexpr = words(FIELD)
    ROOM: tl.constexpr = room(FIELD)
    column = tl.arange(0, ROOM)
    mask = there[:, None] & (column < COUNT)[None, :]
    read = (from_ + (OFFSET + place * SIZE)).to(tl.pointer_type(WORD))[:, None] + column[None, :]
    write = (to + (OFFSET + inner * SIZE)).to(tl.pointer_type(WORD))[:, None] + column[None, :]
    tl.store(write, tl.load(read, mask=mask), mask=mask)


@triton.jit(do_not_specialize=["count", "ids_stride"])
def regroup_kernel(
    pool, ids, tokens, records, count, ids_stride, FIELDS: tl.constexpr, PAGE: tl.constexpr, BYTES: tl.constexpr,
    BODY: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Tokens [S, count] of the pages ids [S, n] of a pool uint8 [pages, BYTES], in their order, to records uint8 [S *
    count / P, BODY]. FIELDS: (offset, bytes a token) of each. Grid: (S, blocks of tokens)."""
    stream = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    there = at < count
    token = tl.load(tokens + stream * count + at, mask=there, other=0)
    page = tl.load(ids + stream * ids_stride + token // PAGE, mask=there, other=0).to(tl.int64)
    made = stream * (count // PAGE) + at // PAGE
    for i in tl.static_range(len(FIELDS)):
        copy_rows(records + made * BODY, pool + page * BYTES, token % PAGE, at % PAGE, there, chunk(FIELDS, i))
