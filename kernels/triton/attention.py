"""Decode attention over compressed pages; `reference.attend_pages` is its specification.

  logit[r, t] = softcap(scale * (q[r] . k[t] + bias[r, t])),  out[r] = sum_t softmax_t(logit[r, t]) v[t]

k and v are read as they are stored. With k = code * s + z, q . k = (q s) . code + q . z: scales and zeros that tokens
share fold into q, those of one token into its logit; on the V side into the outputs and the probabilities. Where a tile
has neither in common (several scales a token), its elements are scaled. Where keys of a page have a centre c, q . c is
added to their logits, in float32. bias: of a row, and of a row and token. Tokens at the start of a stream's first page
may be skipped.

Exact tokens have queries of their own where pages are in another basis than K and V.

V may be some of K's channels (latents): the same bytes, which the second look finds in a cache.

Grid: (stream * blocks of rows, split). A program has all query rows of a stream, up to 64 (of latents 16), and a run of
its pages; the last split is the stream's exact tokens. Splits merge by log-sum-exp in a second kernel. Moved: each
listed page once, less its summaries; and a split's sums in float32, written and read once.
"""

# Triton reads these functions as a language of its own: without annotations, and with tuples that grow.
# mypy: disable-error-code="no-untyped-def, assignment, no-redef"
# ruff: noqa: RUF005

from __future__ import annotations

import triton
import triton.language as tl

from .merge import CHANGING, tokens_held, tokens_of_split
from .products import (
    add_values,
    centre_logits,
    key_logits,
    largest,
    load_queries,
    no_values,
    over,
    share_norm,
    store_values,
)
from .unpack import LN2, LOG2E, chunk, token_grid


@triton.jit
def bias_of(bias, row, rows, scale, BIAS: tl.constexpr, SOFTCAP: tl.constexpr):
    """What is added to all logits [R] of a row."""
    if BIAS:
        shift = tl.load(bias + row, mask=row < rows, other=0) * scale
        return shift if SOFTCAP else shift * LOG2E
    else:
        return tl.zeros(row.shape, tl.float32)


@triton.jit
def level(top, factor, shift, LATE: tl.constexpr):
    """The highest logits [R]."""
    return top * factor + shift if LATE else top


@triton.jit
def powers(logits, top, factor, LATE: tl.constexpr):
    """2 to the logits [R, T] less the highest."""
    if LATE:
        return tl.exp2(logits * factor[:, None] - (top * factor)[:, None])
    else:
        return tl.exp2(logits - top[:, None])


@triton.jit
def run(
    q, bias, token_bias, k_base, v_base, ids, first, last, k_codebook, v_codebook, out, lse, lse_of_tiles, row,
    rows, k_dim, v_dim, bias_stride, tiles, scale, softcap, seen_from, K: tl.constexpr, V: tl.constexpr,
    PAGE: tl.constexpr, BYTES: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr, EXACT: tl.constexpr,
    BIAS: tl.constexpr, TOKEN_BIAS: tl.constexpr, SKIPPED: tl.constexpr, SOFTCAP: tl.constexpr,
    LSE_OF_TILES: tl.constexpr, IN_TOKENS: tl.constexpr,
):  # fmt: skip
    """Attention over tokens first to last of a stream, in pages; PAGE = 0: side by side. Logits are in base 2. SKIPPED:
    tokens before `seen_from`, of the first tile alone, are not seen.

    LATE: what a row's logits are multiplied with, which is not negative, and what is added to all of them wait for the
    exponential and for the end."""
    LATE: tl.constexpr = not (SOFTCAP or TOKEN_BIAS)
    queries = ()
    most = tl.full((ROWS,), 1e-30, tl.float32)
    for i in tl.static_range(len(K)):
        queries = queries + (load_queries(q, row, rows, k_dim, chunk(K, i)),)
        most = largest(most, queries[i])
    if EXACT:
        factor = tl.full((ROWS,), scale, tl.float32)
    else:  # by the next power of two, so that products with scales fit float16
        norm = (((most.to(tl.int32, bitcast=True) >> 23) + 1) << 23).to(tl.float32, bitcast=True)
        normed = ()
        for i in tl.static_range(len(K)):
            normed = normed + (over(queries[i], norm),)
        queries = normed
        factor = norm * scale
    factor = tl.maximum(factor, 1e-37)  # a maximum of products is one of logits
    if not SOFTCAP:
        factor *= LOG2E
    shift = tl.zeros((ROWS,), tl.float32)
    if not LATE or LSE_OF_TILES:
        shift = bias_of(bias, row, rows, scale, BIAS, SOFTCAP)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    mass = tl.zeros((ROWS,), tl.float32)
    sums = ()
    for i in tl.static_range(len(V)):
        sums = sums + (no_values(chunk(V, i), ROWS),)

    for at in range(first, last, TILE):
        token = at + tl.arange(0, TILE)  # [T]
        seen = token < last
        k_page, v_page, inner = k_base, v_base, at
        if PAGE > 0:
            if PAGE % TILE == 0:
                page = tl.load(ids + at // PAGE).to(tl.int64) * BYTES
                inner = at % PAGE
                token = inner + tl.arange(0, TILE)
                if not IN_TOKENS:
                    seen = tl.full((TILE,), True, tl.int1)
            else:
                page = tl.load(ids + token // PAGE, mask=seen, other=0).to(tl.int64) * BYTES
                token = token % PAGE
            k_page, v_page = k_base + page, v_base + page
        WITHIN: tl.constexpr = PAGE > 0 and PAGE % TILE == 0
        logits = tl.zeros((ROWS, TILE), tl.float32)
        for i in tl.static_range(len(K)):
            if share_norm(K):  # norms multiply all of these
                logits = key_logits(
                    logits, queries[i], k_page, inner, token, seen, k_codebook, chunk(K, i), EXACT, WITHIN, True
                )  # fmt: skip
        if share_norm(K):
            logits *= token_grid(k_page, token, seen, chunk(K, 0))[0][None, :]
        for i in tl.static_range(len(K)):
            if chunk(K, i).centre >= 0:  # before a tile is unpacked, whose registers it would share otherwise
                logits = centre_logits(logits, queries[i], k_page, seen, chunk(K, i), EXACT, WITHIN)
            if not share_norm(K):
                logits = key_logits(
                    logits, queries[i], k_page, inner, token, seen, k_codebook, chunk(K, i), EXACT, WITHIN, False
                )  # fmt: skip
        if not LATE:
            logits = logits * factor[:, None] + shift[:, None]
        if TOKEN_BIAS:
            biased = row[:, None] * bias_stride + (at + tl.arange(0, TILE))[None, :]
            there = (row < rows)[:, None] & seen[None, :]
            logits += tl.load(token_bias + biased, mask=there, other=0) * (scale if SOFTCAP else scale * LOG2E)
        if SOFTCAP:  # tanh(x) = 2 sigmoid(2 x) - 1
            logits = (tl.sigmoid(logits * (2 / softcap)) * 2 - 1) * (softcap * LOG2E)
        logits = tl.where(seen[None, :], logits, float("-inf"))
        if SKIPPED:
            logits = tl.where((at + tl.arange(0, TILE) >= seen_from)[None, :], logits, float("-inf"))
        highest = tl.max(logits, 1)
        if LSE_OF_TILES:
            own = tl.log2(tl.sum(powers(logits, highest, factor, LATE), 1)) + level(highest, factor, shift, LATE)
            tl.store(lse_of_tiles + row.to(tl.int64) * tiles + at // TILE, own * LN2, mask=row < rows)
        highest = tl.maximum(highest, top)
        keep = tl.exp2((top - highest) * factor if LATE else top - highest)
        p = powers(logits, highest, factor, LATE)
        mass = mass * keep + tl.sum(p, 1)
        top = highest
        weights = p
        if share_norm(V):
            weights = p * token_grid(v_page, token, seen, chunk(V, 0))[0][None, :]
        added = ()
        for i in tl.static_range(len(V)):
            x = add_values(
                sums[i], weights, keep, v_page, inner, token, seen, v_codebook, chunk(V, i), EXACT, WITHIN,
                share_norm(V),
            )  # fmt: skip
            added = added + (x,)
        sums = added

    if LATE:
        shift = bias_of(bias, row, rows, scale, BIAS, SOFTCAP)
    empty = mass == 0
    mass = tl.where(empty, 1, mass)
    highest = level(top, factor, shift, LATE) + tl.log2(mass)
    tl.store(lse + row, tl.where(empty, float("-inf"), highest), mask=row < rows)
    for i in tl.static_range(len(V)):
        store_values(out, sums[i], mass, row, rows, v_dim, chunk(V, i))


@triton.jit(do_not_specialize=CHANGING)
def attend_kernel(
    q, token_q, bias, token_bias, skipped, pool, ids, counts, k_codebook, v_codebook, keys, values, token_counts, out,
    lse, lse_of_tiles, rows, k_dim, token_dim, v_dim, ids_stride, keys_stride, values_stride, bias_stride, tiles,
    split_pages, scale, softcap, K: tl.constexpr, V: tl.constexpr, TOKENS_K: tl.constexpr, TOKENS_V: tl.constexpr,
    PAGE: tl.constexpr,
    BYTES: tl.constexpr, TILE: tl.constexpr, TOKENS_TILE: tl.constexpr, ROWS: tl.constexpr, EXACT: tl.constexpr,
    BIAS: tl.constexpr, TOKEN_BIAS: tl.constexpr, SKIPPED: tl.constexpr, SOFTCAP: tl.constexpr,
    LSE_OF_TILES: tl.constexpr, IN_TOKENS: tl.constexpr,
):  # fmt: skip
    """One split of one stream. q [S, R, Dk]; token_q [S, R, token_dim]: of exact tokens; bias [S, R], token_bias [S, R,
    n * P], skipped [S], pool uint8 in records of BYTES, ids [S, n], counts [S] of pages or, IN_TOKENS, of tokens; keys,
    values: exact tokens, whose strides are in bytes; out float32 [S, splits, R, Dv], of the widest values; lse (base 2)
    [S, splits, R], lse_of_tiles [S, R, tiles]. Where a stream has no tokens for a split, nothing is written."""
    blocks = tl.cdiv(rows, ROWS)
    stream = (tl.program_id(0) // blocks).to(tl.int64)
    row = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(1)
    splits = tl.num_programs(1)
    if len(TOKENS_K) > 0:
        splits -= 1
    q += stream * rows * k_dim
    bias += stream * rows
    token_bias += stream * rows * bias_stride
    out += (stream * tl.num_programs(1) + split) * rows * v_dim
    lse += (stream * tl.num_programs(1) + split) * rows
    lse_of_tiles += stream * rows * tiles
    if split < splits:
        if len(K) > 0:
            held = tokens_held(counts, stream, PAGE, IN_TOKENS)
            each = tokens_of_split(held, splits, split_pages, PAGE)
            first = split * each
            last = tl.minimum(first + each, held)
            seen_from = 0
            if SKIPPED:  # noqa: SIM102 (known when it is compiled)
                if split == 0:
                    seen_from = tl.load(skipped + stream).to(tl.int32)
                    first = seen_from // TILE * TILE  # no tile without a token that is seen: its maximum is no number
            if first < held:
                run(
                    q, bias, token_bias, pool, pool, ids + stream * ids_stride, first, last,
                    k_codebook, v_codebook, out, lse, lse_of_tiles, row, rows, k_dim, v_dim, bias_stride, tiles,
                    scale, softcap, seen_from, K, V, PAGE, BYTES, TILE, ROWS, EXACT, BIAS, TOKEN_BIAS, SKIPPED, SOFTCAP,
                    LSE_OF_TILES, IN_TOKENS,
                )  # fmt: skip
    elif len(TOKENS_K) > 0:
        k_bytes, v_bytes = keys.to(tl.pointer_type(tl.uint8)), values.to(tl.pointer_type(tl.uint8))
        run(
            token_q + stream * rows * token_dim, bias, token_bias, k_bytes + stream * keys_stride,
            v_bytes + stream * values_stride, ids, 0, tl.load(token_counts + stream).to(tl.int32), k_codebook,
            v_codebook, out, lse, lse_of_tiles, row, rows, token_dim, v_dim, bias_stride, tiles, scale, softcap,
            0, TOKENS_K, TOKENS_V, 0, 0, TOKENS_TILE, ROWS, EXACT, False, False, False, SOFTCAP, False, False,
        )  # fmt: skip
