"""What a selector reads: the largest shares of attention that summaries promise, in one launch.

  share[j] = mean_h softmax_h(scale logits[h])[j], + 2 in the pages that are read in any case
  out = the `wanted` largest, ascending

Grid: (stream). A program goes over a stream's logits twice and over its shares six times: for their largest and sums,
for the shares, for a digit of the least one that is read each (a radix of `BINS`), and to write what is read. Moved:
logits twice, shares written once and read from a cache. Of equal shares the first are read.
"""

# mypy: disable-error-code="no-untyped-def, assignment"

from __future__ import annotations

import triton
import triton.language as tl

BINS = tl.constexpr(256)
DIGITS = tl.constexpr(4)  # of a float32, whose bits are ordered as it is where it is no less than 0


@triton.jit
def head_sums(logits, groups, width, held, scale, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """Of each head [G] the largest of `held` logits, the sum of exp(x - largest), and whether all are finite."""
    head = tl.arange(0, GROUP)
    top = tl.full((GROUP,), float("-inf"), tl.float32)
    mass = tl.zeros((GROUP,), tl.float32)
    wrong = tl.zeros((GROUP,), tl.int32)
    for at in range(0, held, BLOCK):
        place = at + tl.arange(0, BLOCK)
        there = (head < groups)[:, None] & (place < held)[None, :]
        x = tl.load(logits + head[:, None] * width + place[None, :], mask=there, other=0) * scale
        finite = tl.abs(x) < float("inf")
        wrong = tl.maximum(wrong, tl.max(tl.where(there & (finite == 0), 1, 0), 1))
        x = tl.where(there & finite, x, float("-inf"))
        highest = tl.maximum(top, tl.max(x, 1))
        safe = tl.where(highest > float("-inf"), highest, 0)
        mass = mass * tl.exp(top - safe) + tl.sum(tl.exp(x - safe[:, None]), 1)
        top = highest
    return tl.where(top > float("-inf"), top, 0), mass, wrong


@triton.jit(do_not_specialize=["places", "width", "first", "last"])
def choose_kernel(
    logits, counts, wanted, shares, out, groups, places, width, first, last, scale, UNIT: tl.constexpr,
    EACH: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """logits float32 [S, G, places * EACH]; counts [S] of pages, of UNIT places each; wanted int64 [S]; shares float32
    [S, places], which are overwritten; out int64 [S, width], whose end is places - 1. The `first` and `last` places of
    a stream are read in any case."""
    stream = tl.program_id(0).to(tl.int64)
    held = (tl.load(counts + stream) * UNIT).to(tl.int32)
    logits += stream * groups * places * EACH
    shares += stream * places
    out += stream * width
    top, mass, wrong = head_sums(logits, groups, places * EACH, held * EACH, scale, GROUP, BLOCK)
    head = tl.arange(0, GROUP)
    weight = tl.where((wrong == 0) & (mass > 0) & (head < groups), 1 / tl.where(mass > 0, mass, 1), 0) / groups
    for at in range(0, held, BLOCK):
        place = at + tl.arange(0, BLOCK)
        there = (head < groups)[:, None] & (place < held)[None, :]
        share = tl.zeros((BLOCK,), tl.float32)
        for i in tl.static_range(EACH):
            from_ = logits + head[:, None] * (places * EACH) + (place * EACH + i)[None, :]
            x = tl.load(from_, mask=there & (wrong == 0)[:, None], other=float("-inf")) * scale
            x = tl.where(there & (wrong == 0)[:, None], x - top[:, None], float("-inf"))
            share += tl.sum(tl.exp(x) * weight[:, None], 0)
        share += tl.where((place < first) | (place >= held - last), 2.0, 0.0)
        tl.store(shares + place, share, mask=place < held)
    tl.debug_barrier()
    left = tl.load(wanted + stream).to(tl.int32)  # of those that are alike in all digits so far
    least = tl.zeros((), tl.int32)  # what the least of the wanted begins with
    bins = tl.arange(0, BINS)
    for i in tl.static_range(DIGITS):
        shift = 24 - 8 * i
        found = tl.zeros((BINS,), tl.int32)
        for at in range(0, held, BLOCK):
            place = at + tl.arange(0, BLOCK)
            key = tl.load(shares + place, mask=place < held, other=0).to(tl.int32, bitcast=True)
            alike = place < held
            if i > 0:
                alike = alike & ((key >> (shift + 8)) == (least >> (shift + 8)))
            value = tl.where(alike, (key >> shift) & (BINS - 1), 0)
            found += tl.histogram(value, BINS) - tl.where(bins == 0, BLOCK - tl.sum(alike.to(tl.int32), 0), 0)
        above = tl.sum(found, 0) - tl.cumsum(found, 0)  # of greater digits
        digit = tl.min(tl.where(above < left, bins, BINS - 1), 0)
        left -= tl.sum(tl.where(bins == digit, above, 0), 0)
        least = least | (digit << shift)
    written = tl.zeros((), tl.int32)
    equal = tl.zeros((), tl.int32)
    for at in range(0, held, BLOCK):
        place = at + tl.arange(0, BLOCK)
        key = tl.load(shares + place, mask=place < held, other=0).to(tl.int32, bitcast=True)
        same = (place < held) & (key == least)
        rank = equal + tl.cumsum(same.to(tl.int32), 0)
        taken = (same & (rank <= left)) | ((place < held) & (key > least))
        to = written + tl.cumsum(taken.to(tl.int32), 0) - 1
        tl.store(out + to, place.to(tl.int64), mask=taken & (to < width))
        written += tl.sum(taken.to(tl.int32), 0)
        equal += tl.sum(same.to(tl.int32), 0)
    for at in range(0, width, BLOCK):
        place = at + tl.arange(0, BLOCK)
        rest = tl.full((BLOCK,), 0, tl.int64) + (places - 1)
        tl.store(out + place, rest, mask=(place >= written) & (place < width))
