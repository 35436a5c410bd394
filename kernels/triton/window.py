"""The window of exact tokens: one more token for every stream, at its end.

Grid: (stream). Moved: the token, read and written once.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def put_row(buffer, x, stream, heads, slot, stride, row_stride, head_stride, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """buffer [S, slots, DIM], `stride` from a stream to the next; x [B, H, 1, DIM] with these strides."""
    channel = tl.arange(0, BLOCK)
    from_ = x + stream // heads * row_stride + stream % heads * head_stride + channel
    to = buffer + stream * stride + slot * DIM + channel
    tl.store(to, tl.load(from_, mask=channel < DIM, other=0), mask=channel < DIM)


NUMBERS = ["heads", "k_stride", "v_stride", "slots", "each", "k_row", "k_head", "v_row", "v_head"]  # of any value


@triton.jit(do_not_specialize=NUMBERS)
def append_kernel(
    k, v, counts, keys, values, heads, k_stride, v_stride, k_row, k_head, v_row, v_head, K_DIM: tl.constexpr,
    V_DIM: tl.constexpr, K_BLOCK: tl.constexpr, V_BLOCK: tl.constexpr,
):  # fmt: skip
    """keys [B, H, 1, Dk] and values [B, H, 1, Dv] into slot counts[s] of k [S, slots, Dk] and v [S, slots, Dv]; the
    counts int64 [S] then grow by 1."""
    stream = tl.program_id(0).to(tl.int64)
    slot = tl.load(counts + stream)
    put_row(k, keys, stream, heads, slot, k_stride, k_row, k_head, K_DIM, K_BLOCK)
    if V_DIM > 0:
        put_row(v, values, stream, heads, slot, v_stride, v_row, v_head, V_DIM, V_BLOCK)
    tl.debug_barrier()  # all threads have read the count
    tl.store(counts + stream, slot + 1)


@triton.jit(do_not_specialize=NUMBERS)
def advance_kernel(
    k, v, counts, pages, seen, ids, keys, values, heads, k_stride, v_stride, slots, each, k_row, k_head, v_row, v_head,
    K_DIM: tl.constexpr, V_DIM: tl.constexpr, K_BLOCK: tl.constexpr, V_BLOCK: tl.constexpr,
):  # fmt: skip
    """As `append_kernel`; then ids int64 [S] is the next record of each stream whose `slots` are all full, of `each` a
    stream, pages int64 [S] of which exist; -1 of others. seen int64 [B]: tokens of each row, which grow by 1."""
    stream = tl.program_id(0).to(tl.int64)
    slot = tl.load(counts + stream)
    put_row(k, keys, stream, heads, slot, k_stride, k_row, k_head, K_DIM, K_BLOCK)
    put_row(v, values, stream, heads, slot, v_stride, v_row, v_head, V_DIM, V_BLOCK)
    page = stream * each + tl.load(pages + stream)
    if stream % heads == 0:
        row = seen + stream // heads
        before = tl.load(row)
        tl.debug_barrier()
        tl.store(row, before + 1)
    tl.debug_barrier()  # all threads have read the count
    tl.store(counts + stream, slot + 1)
    tl.store(ids + stream, tl.where(slot + 1 == slots, page, -1))


@triton.jit
def move_page(
    buffer, page, stream, block, stride, SINKS: tl.constexpr, RECENT: tl.constexpr, PAGE: tl.constexpr,
    DIM: tl.constexpr, CLEAN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A block of channels of a stream's buffer [slots, DIM]: its oldest page to page [PAGE, DIM], the others up."""
    channel = block * COLUMNS + tl.arange(0, COLUMNS)
    own = buffer + stream * stride + SINKS * DIM
    for first in range(0, PAGE, ROWS):
        row = first + tl.arange(0, ROWS)
        there = (row < PAGE)[:, None] & (channel < DIM)[None, :]
        x = tl.load(own + row[:, None] * DIM + channel[None, :], mask=there, other=0)
        if CLEAN:
            x = tl.where(tl.abs(x.to(tl.float32)) < float("inf"), x, 0)
        tl.store(page + (stream * PAGE + row[:, None]) * DIM + channel[None, :], x, mask=there)
    for first in range(0, RECENT, ROWS):  # ROWS <= PAGE: no row is written before it was read
        row = first + tl.arange(0, ROWS)
        there = (row < RECENT)[:, None] & (channel < DIM)[None, :]
        x = tl.load(own + (PAGE + row[:, None]) * DIM + channel[None, :], mask=there, other=0)
        tl.debug_barrier()
        tl.store(own + row[:, None] * DIM + channel[None, :], x, mask=there)


@triton.jit(do_not_specialize=NUMBERS)
def shift_kernel(
    k, v, ids, counts, pages, k_page, v_page, k_stride, v_stride, SINKS: tl.constexpr, RECENT: tl.constexpr,
    PAGE: tl.constexpr, K_DIM: tl.constexpr, V_DIM: tl.constexpr, CLEAN: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, K_BLOCKS: tl.constexpr,
):  # fmt: skip
    """Of streams whose ids int64 [S] are not below 0 the oldest page after the sinks of k [S, slots, Dk] and v [S,
    slots, Dv] to k_page [S, P, Dk] and v_page [S, P, Dv], with 0 for what is not finite where CLEAN; the `RECENT`
    tokens after it move up; counts int64 [S] and pages int64 [S] follow. Grid: (stream, block of channels of K, then
    V)."""
    stream = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    if tl.load(ids + stream) < 0:
        return
    if block < K_BLOCKS:
        move_page(k, k_page, stream, block, k_stride, SINKS, RECENT, PAGE, K_DIM, CLEAN, ROWS, COLUMNS)
    else:
        move_page(v, v_page, stream, block - K_BLOCKS, v_stride, SINKS, RECENT, PAGE, V_DIM, CLEAN, ROWS, COLUMNS)
    if block == 0:
        held, written = tl.load(counts + stream), tl.load(pages + stream)
        tl.debug_barrier()
        tl.store(counts + stream, held - PAGE)
        tl.store(pages + stream, written + 1)
