"""Attention over the splits of a stream merged, with what came before.

See `attention`, whose grid leaves an lse and an output for each split.
"""

# Triton reads these functions as a language of its own: without annotations, and with tuples that grow.
# mypy: disable-error-code="no-untyped-def, assignment, no-redef"

from __future__ import annotations

import triton
import triton.language as tl

from . import plan
from .unpack import LN2, LOG2E

LEAST = tl.constexpr(plan.LEAST)


# With a stream's length and the number of its queries: one kernel for all of them, which none may compile in a graph.
CHANGING = ["rows", "ids_stride", "bias_stride", "tiles", "split_pages", "splits"]


@triton.jit
def tokens_held(counts, stream, PAGE: tl.constexpr, IN_TOKENS: tl.constexpr):
    held = tl.load(counts + stream).to(tl.int32)
    return held if IN_TOKENS else held * PAGE


@triton.jit
def tokens_of_split(held, splits, split_pages, PAGE: tl.constexpr):
    """Tokens of one of a stream's splits: even shares of what it holds, of `LEAST` tokens or more, at most those that a
    split can hold. A grid made for the longest stream there may be then serves short ones as well."""
    share = tl.maximum(tl.cdiv(tl.cdiv(held, PAGE), splits), tl.cdiv(LEAST, PAGE))
    return tl.minimum(share, split_pages) * PAGE


@triton.jit(do_not_specialize=CHANGING)
def merge_kernel(
    partial, partial_lse, prior, prior_lse, counts, out, lse, other, share, splits, split_pages, rows, wide, v_dim,
    other_dim, PAGE: tl.constexpr, IN_TOKENS: tl.constexpr, TOKENS: tl.constexpr, PRIOR: tl.constexpr,
    SEPARATE: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr, OTHER: tl.constexpr,
):  # fmt: skip
    """sum_i w_i out_i, w_i = exp(lse_i - lse), over splits and what came before. Grid: (stream * rows). partial [S,
    splits, R, wide] with lse in base 2; prior and out [S, R, Dv], their lse [S, R] in base e. Of the splits of pages
    (PAGE = 0: there are none) those are read that were written, by the same counts [S]; TOKENS: the last is the exact
    tokens'.

    SEPARATE: out is of pages alone, whose `share` [S, R] of all weights is given; other [S, R, other_dim]: of the exact
    tokens, which are in another basis, times their share."""
    at = tl.program_id(0).to(tl.int64)
    first = at // rows * splits * rows + at % rows
    channel = tl.arange(0, BLOCK)
    top = tl.full((), float("-inf"), tl.float32)
    mass = tl.zeros((), tl.float32)
    found = tl.zeros((BLOCK,), tl.float32)
    if PRIOR:
        top = tl.load(prior_lse + at) * LOG2E
        if top > float("-inf"):
            mass += 1
            found += tl.load(prior + at * v_dim + channel, mask=channel < v_dim, other=0)
    last = splits - 1 if TOKENS else splits
    live = 0
    if PAGE > 0:
        held = tokens_held(counts, at // rows, PAGE, IN_TOKENS)
        live = tl.cdiv(held, tokens_of_split(held, last, split_pages, PAGE))
    parts = live + 1 if TOKENS and not SEPARATE else live
    for begin in range(0, parts, SPLITS):
        part = begin + tl.arange(0, SPLITS)
        split = tl.where(part < live, part, last)
        logits = tl.load(partial_lse + first + split * rows, mask=part < parts, other=float("-inf"))
        highest = tl.maximum(tl.max(logits, 0), top)
        if highest > float("-inf"):
            weight = tl.exp2(logits - highest)
            there = (logits > float("-inf"))[:, None] & (channel < v_dim)[None, :]
            where = (first + split * rows)[:, None] * wide + channel[None, :]
            keep = tl.exp2(top - highest)
            found = found * keep + tl.sum(tl.load(partial + where, mask=there, other=0) * weight[:, None], 0)
            mass = mass * keep + tl.sum(weight, 0)
            top = highest
    mass = tl.where(top > float("-inf"), mass, 1)
    tl.store(out + at * v_dim + channel, found / mass, mask=channel < v_dim)
    total = top + tl.log2(mass)
    if SEPARATE:
        own = tl.load(partial_lse + first + last * rows)
        highest = tl.maximum(own, total)
        safe = tl.where(highest > float("-inf"), highest, 0)
        a, b = tl.exp2(total - safe), tl.exp2(own - safe)
        both = tl.where(highest > float("-inf"), a + b, 1)
        total = safe + tl.log2(both)
        total = tl.where(highest > float("-inf"), total, float("-inf"))
        tl.store(share + at, a / both)
        place = tl.arange(0, OTHER)
        x = tl.load(partial + (first + last * rows) * wide + place, mask=place < other_dim, other=0)
        x = tl.where(own > float("-inf"), x * (b / both), 0)  # nothing was written there otherwise
        tl.store(other + at * other_dim + place, x, mask=place < other_dim)
    tl.store(lse + at, total * LN2)
