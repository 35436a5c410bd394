"""Attention over pages and exact tokens, and pages written: by the first backend that serves the case."""

from __future__ import annotations

import torch
from torch import Tensor

from kvcomp.attention import Part, Tokens
from kvcomp.layout import PageLayout
from kvcomp.segments import KVLayout

from . import backends
from .backends import REFERENCE, door, reference_only, using
from .contract import MOST_ROWS, Case, PageCodec, PagesView
from .reference import tokens as tokens_reference
from .select import regroup, token_bias

__all__ = [
    "MOST_ROWS",
    "advance",
    "append",
    "attend_chosen",
    "attend_pages",
    "attend_tokens",
    "encode_pages",
    "explain",
    "obstacle",
    "reference_only",
    "runs",
    "shift_windows",
    "using",
    "write_obstacle",
]


def attend_pages(
    queries: Tensor,
    pool: Tensor,
    ids: Tensor,
    counts: Tensor,
    layout: PageLayout,
    codec: PageCodec,
    scale: float,
    softcap: float | None = None,
    lse_of_pages: bool = False,
    tokens: Tokens | None = None,
    in_tokens: bool = False,
    workspace: Tensor | None = None,
    token_bias: Tensor | None = None,
    host: bool = True,
    skipped: Tensor | None = None,
) -> Part:
    """As `reference.attend_pages`, and over exact `tokens` too.

    host: whether PyTorch may look at counts that lie on the host. workspace: float32 that Triton kernels use instead of
    allocating it, as in a CUDA graph; see `triton.attend`.
    """
    pages = PagesView(pool, ids, counts, layout, codec.kernel_layouts(), in_tokens, token_bias, skipped)
    asked = queries.shape[1], queries.dtype, layout, codec.rotates, lse_of_pages, in_tokens, host
    case = Case(pages.sides, pool.device, *asked)
    for backend in backends.able("attend", case):
        joined = tokens if tokens is not None and backend.joins(codec, case, tokens) else None
        part = backend.attend(queries, pages, codec, case, scale, softcap, joined, workspace)
        if part is None:  # declined
            continue
        if tokens is None or joined is not None:
            return part
        return attend_tokens(queries, tokens, scale, softcap, part, workspace, host)._replace(groups=part.groups)
    raise AssertionError("the reference declines nothing")


def attend_chosen(
    queries: Tensor,
    pool: Tensor,
    ids: Tensor,
    positions: Tensor,
    valid: Tensor,
    layout: PageLayout,
    codec: PageCodec,
    scale: float,
    softcap: float | None = None,
    lse_of_pages: bool = False,
    tokens: Tokens | None = None,
    by_tokens: bool = False,
    partial: bool = False,
    host: bool = True,
) -> Part:
    """As `attend_pages`, of those pages alone that lie at positions int64 [S, k] of ids [S, n], the first valid int64
    [S] of them; by_tokens: of the tokens at positions of the n * P in pages, in numbers that fill pages, or any where
    they are `partial`."""
    bias = None
    if by_tokens:
        if partial and (rest := -positions.shape[1] % layout.page_size):
            positions = torch.nn.functional.pad(positions, (0, rest))
        bias = token_bias(queries, codec, layout, pool, ids, positions)
        pool, valid = regroup(layout, pool, ids, positions), valid if partial else valid // layout.page_size
        ids = torch.arange(len(pool), device=pool.device).view(len(ids), -1)
    else:
        ids = ids.gather(1, positions)
    how = layout, codec, scale, softcap, lse_of_pages, tokens
    return attend_pages(queries, pool, ids, valid, *how, partial, token_bias=bias, host=host)


def attend_tokens(
    queries: Tensor,
    tokens: Tokens,
    scale: float,
    softcap: float | None = None,
    prior: Part | None = None,
    workspace: Tensor | None = None,
    host: bool = True,
) -> Part:
    """Attention of queries [S, R, Dk] over exact tokens and what `prior` attended to; host: as in `attend_pages`."""
    if not (tokens.keys.shape[2] and tokens.values.shape[2]):  # no channels
        return REFERENCE.attend_tokens(queries, tokens, scale, softcap, prior, workspace, host)
    for backend in backends.on("attend_tokens", queries.device, queries.shape[1]):
        part = backend.attend_tokens(queries, tokens, scale, softcap, prior, workspace, host)
        if part is not None:
            return part
    raise AssertionError("the reference declines nothing")


def encode_pages(
    pool: Tensor,
    ids: Tensor,
    layout: PageLayout,
    codec: PageCodec,
    keys: Tensor,
    values: Tensor,
    streams: Tensor,
    rows: Tensor | None = None,
) -> bool:
    """Store keys [M, P, Dk] and values [M, P, Dv], or [s, M / s, P, D], of `streams` int64 [M] or [s] as the codec
    encodes them, in one pass, in the records ids int64 [M] of a pool uint8 [records, bytes], those below 0 nowhere;
    summaries are then still to be written. False, and nothing is done, where no kernel can write these pages.

    rows int64 [M]: keys [M, 1, Dk] and values [M, 1, Dv] are single tokens, written where these tokens of a page lie,
    of a layout that is `tokenwise`.
    """
    sides = codec.write_layouts()
    if sides is None:
        return False
    for backend in backends.able("write", Case(sides, pool.device, layout=layout)):
        if codec.rotates:  # bases are applied page by page
            keys, values = keys.flatten(0, -3), values.flatten(0, -3)
        x = codec.kernel_input(keys, values, streams)
        if x is not None:
            backend.write(pool, ids, *x, sides, layout, rows)
            return True
    return False


def append(k: Tensor, v: Tensor, counts: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Write one token of each stream, keys and values [B, H, 1, D], after the counts [S] that k and v [S, N, D] hold,
    and count it; False, and nothing done, where no kernel takes these tensors."""
    return any(b.append(k, v, counts, keys, values) for b in backends.on("append", keys.device))


def advance(
    k: Tensor, v: Tensor, counts: Tensor, pages: Tensor, seen: Tensor, keys: Tensor, values: Tensor, each: int
) -> Tensor | None:
    """As `append`, of a store of `each` records a stream, of which pages int64 [S] exist, and of rows of seen int64 [B]
    tokens, which are counted as well. int64 [S]: the record for the next page of each stream whose slots are all full,
    -1 of others; None, and nothing done, where no kernel takes these tensors."""
    found = (b.advance(k, v, counts, pages, seen, keys, values, each) for b in backends.on("advance", k.device))
    return next((ids for ids in found if ids is not None), None)


def shift_windows(
    k: Tensor, v: Tensor, counts: Tensor, pages: Tensor, ids: Tensor, page: int, sinks: int, recent: int, clean: bool
) -> tuple[Tensor, Tensor] | None:
    """Take the oldest page of tokens, keys [S, page, Dk] and values [S, page, Dv], out of each window that `advance`
    gave a record for; 0 for what is not finite where `clean`. None, and nothing done, where there is no kernel."""
    for backend in backends.on("shift_windows", k.device):
        return backend.shift_windows(k, v, counts, pages, ids, page, sinks, recent, clean)
    return None


runs = door(tokens_reference.runs)


def _reads(codec: PageCodec, layout: PageLayout, device: torch.device, rows: int) -> Case:
    return Case(codec.kernel_layouts(), device, rows, None, layout, codec.rotates)


def obstacle(codec: PageCodec, layout: PageLayout, device: torch.device, rows: int = 1) -> str | None:
    """Why pages are read by the reference, for `rows` queries of a stream; None: they are not."""
    return backends.why_reference("attend", _reads(codec, layout, device, rows))


def write_obstacle(sides: KVLayout, layout: PageLayout, device: torch.device) -> str | None:
    """Why pages are written by their codec; None: by a kernel, from what `Codec.kernel_input` gives."""
    return backends.why_reference("write", Case(sides, device, layout=layout))


def explain(codec: PageCodec, layout: PageLayout, device: torch.device, rows: int = 1) -> str:
    """Which backend `attend_pages` takes for `rows` queries of a stream, and why none that is faster."""
    case = _reads(codec, layout, device, rows)
    if (why := backends.why_reference("attend", case)) is not None:
        return f"{REFERENCE.name}: {why}"
    found = backends.asked("attend", case)
    taken = next(i for i, (_, why) in enumerate(found) if why is None)
    faster = "".join(f"; not {backend.name}: {why}" for backend, why in found[:taken])
    return found[taken][0].told(device) + faster
