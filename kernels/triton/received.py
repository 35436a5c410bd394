"""Attention that keys receive from the last queries, summed over them or at its most, without the attention itself.

  received[j] = sum_i exp(logit[i, j] - lse[i]), or the maximum over i;  lse[i] = log sum_j exp(logit[i, j])
  logit[i, j] = softcap(scale * q[i] . k[j]),  j <= n - w + i

One kernel finds each query's lse, the other goes through the queries for a block of keys. Both compute the logits, and
neither stores them. Grid: (query head * blocks of queries, split of the keys) and (query head, block of keys). Moved:
keys and queries twice, once for each block of the other; an lse for each query and split, and a float32 for each key.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from .unpack import LN2, LOG2E, dot

CHANGING = ["keys", "queries", "split"]


@triton.jit
def logits(
    q, k, visible, head, row, column, queries, keys, scale, softcap, group, D: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr, HIDING: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """[R, C] float32 in base 2 of queries `row` [R] and keys `column` [C], -inf where a query does not see a key."""
    stream = head // group
    found = tl.zeros((ROWS, COLUMNS), tl.float32)
    for at in range(0, D, BLOCK):
        channel = at + tl.arange(0, BLOCK)
        here = (channel < D)[None, :]
        from_q, from_k = (head * queries + row)[:, None] * D + channel, (stream * keys + column)[:, None] * D + channel
        x = tl.load(q + from_q, mask=(row < queries)[:, None] & here, other=0)
        y = tl.load(k + from_k, mask=(column < keys)[:, None] & here, other=0)
        found = dot(x, y.trans(), found, q.dtype.element_ty)
    seen = column[None, :] <= (keys - queries + row)[:, None]
    if HIDING:
        seen = seen & (tl.load(visible + stream * keys + column, mask=column < keys, other=0) != 0)[None, :]
    found *= scale
    if SOFTCAP:  # tanh(x) = 2 sigmoid(2 x) - 1
        found = (tl.sigmoid(found * (2 / softcap)) * 2 - 1) * softcap
    return tl.where(seen, found * LOG2E, float("-inf"))


@triton.jit(do_not_specialize=CHANGING)
def lse_kernel(
    q, k, visible, lse, queries, keys, split, scale, softcap, group, D: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr, HIDING: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """lse [B Hq, w, splits] of q [B Hq, w, D] over `split` keys each of k [B Hkv, n, D]; -inf where it sees none."""
    blocks = tl.cdiv(queries, ROWS)
    head = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    row = block * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * split
    last = tl.minimum(first + split, keys - queries + tl.minimum((block + 1) * ROWS, queries))
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    mass = tl.zeros((ROWS,), tl.float32)
    for at in range(first, last, COLUMNS):
        column = at + tl.arange(0, COLUMNS)
        x = logits(
            q, k, visible, head, row, column, queries, keys, scale, softcap, group,
            D, ROWS, COLUMNS, BLOCK, HIDING, SOFTCAP,
        )  # fmt: skip
        x = tl.where((column < last)[None, :], x, float("-inf"))
        highest = tl.maximum(top, tl.max(x, 1))
        safe = tl.where(highest > float("-inf"), highest, 0)
        mass = mass * tl.exp2(top - safe) + tl.sum(tl.exp2(x - safe[:, None]), 1)
        top = highest
    found = tl.where(mass > 0, (top + tl.log2(tl.where(mass > 0, mass, 1))) * LN2, float("-inf"))
    at = (head * queries + row) * tl.num_programs(1) + tl.program_id(1)
    tl.store(lse + at, found, mask=row < queries)


@triton.jit(do_not_specialize=CHANGING)
def received_kernel(
    q, k, visible, lse, out, queries, keys, scale, softcap, group, D: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr, HIDING: tl.constexpr, SOFTCAP: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """out [B Hq, n]: what keys receive from queries whose lse [B Hq, w] is given: `MOST` of any one, or in all."""
    head = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * COLUMNS
    column = first + tl.arange(0, COLUMNS)
    found = tl.zeros((COLUMNS,), tl.float32)
    start = tl.maximum(first - (keys - queries), 0) // ROWS * ROWS  # of the queries that see the first of these keys
    for at in range(start, queries, ROWS):
        row = at + tl.arange(0, ROWS)
        x = logits(
            q, k, visible, head, row, column, queries, keys, scale, softcap, group,
            D, ROWS, COLUMNS, BLOCK, HIDING, SOFTCAP,
        )  # fmt: skip
        own = tl.load(lse + head * queries + row, mask=row < queries, other=float("-inf"))
        share = tl.exp2(x - tl.where(own > float("-inf"), own, 0)[:, None] * LOG2E)
        share = tl.where((own > float("-inf"))[:, None], share, 0)
        if MOST:
            found = tl.maximum(found, tl.max(share, 0))
        else:
            found += tl.sum(share, 0)
    tl.store(out + head * keys + column, found, mask=column < keys)
