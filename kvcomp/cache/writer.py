"""From tokens to pages: policies select what is kept, full windows give their oldest page away, old pages expire."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from . import eviction, sliding
from .content import LayerContent
from .storage import Storage


def settle(storage: Storage) -> None:
    """Turn the oldest page of tokens of each full window into a page."""
    found = storage.full()
    if found is None:
        return
    streams, due = found
    k, v = storage.window(streams, due)
    ids = storage.new_pages(streams, 1, due)
    storage.records.encode(ids, k, v, streams, due, fit=storage.fresh(streams))
    storage.paged(streams, ids, due)
    storage.shift(streams, k, v, due)


def expire(content: LayerContent) -> None:
    """Let the policies expire old pages."""
    plan, table = content.plan, content.table
    for policy in plan.policies:
        before = None
        if content.prompt is not None and policy.trims and not policy.watches:
            before = torch.tensor(content.prompt[1], dtype=torch.int64, device="cpu")
        watched = table.attention() if policy.watches or before is not None else None
        attention, queries = (None, None) if watched is None else watched
        counts, keys = (content.kept, table.counts), content.page_keys
        held = eviction.held_by(plan, *counts, content.heads, attention, queries, before, keys)
        gone = policy.expired(held) if table.longest else None
        if gone is not None and bool(gone.any()):
            places = torch.arange(1, gone.shape[1] + 1, device="cpu")
            last = (gone * places).amax(1)  # pages up to the newest that goes
            newest = (table.counts - last) * plan.page_size + content.exact.counts - plan.sinks
            content.limit_tail(int(newest[last > 0].min()))
            table.drop(gone)
            content.pool.reclaim()


def write(
    content: LayerContent,
    keys: Tensor,
    values: Tensor,
    valid: Tensor | None,
    queries: Tensor | None = None,
    scale: float = 1.0,
    chosen: Tensor | None = None,
) -> None:
    """Add a chunk: keys [B, Hkv, n, Dk], values [B, Hkv, n, Dv]; `valid` bool [B, n] marks tokens that are no
    padding.

    The policies choose what is kept, with queries [B, Hq, n, Dk] where they need them; chosen bool [B, Hkv, n] is
    what one that `reconstructs` did choose. Only that is encoded.
    """
    n = keys.shape[2]
    if valid is not None and bool(valid.all()):
        valid = None
    past = content.history.counts.tolist()
    if content.prompt is None:
        content.prompt = past, content.kept.tolist()
    elif content.plan.trims:
        content.table.begin_watch()
    before = zip(past, content.prompt[0], strict=True)
    seen = [(count, count - first) for count, first in before]  # tokens in all, and of this prompt
    content.history.append(n, valid)
    if content.plan.sliding is not None:
        sliding.leave(content)
    if valid is None and len(set(seen)) == 1:
        rows = torch.arange(content.rows, device="cpu")
        tails = [_write_rows(content, rows, keys, values, queries, chosen, seen[0], scale)]
    else:
        tails = []
        for b in range(content.rows):
            tokens = slice(None) if valid is None else valid[b].nonzero().flatten()
            row = (slice(b, b + 1), slice(None), tokens)
            q, c = (None if x is None else x[row] for x in (queries, chosen))
            row_alone = torch.tensor([b], dtype=torch.int64, device="cpu")
            tails.append(_write_rows(content, row_alone, keys[row], values[row], q, c, seen[b], scale))
    content.tail = min((t for t in tails if t is not None), default=None)
    if content.plan.sliding is not None:
        sliding.leave(content)
    expire(content)


def _write_rows(
    content: LayerContent,
    rows: Tensor,
    k: Tensor,
    v: Tensor,
    q: Tensor | None,
    chosen: Tensor | None,
    seen: tuple[int, int],
    scale: float,
) -> int | None:
    """Write a chunk of rows with the same past and without padding: k [b, H, n, Dk], v [b, H, n, Dv].

    seen: how many tokens came before, and how many of them belong to the same prompt.
    Returns how many of the newest tokens these rows surely hold (None: all).
    """
    n = k.shape[2]
    streams = (rows[:, None] * content.heads + torch.arange(content.heads, device="cpu")).flatten()
    tail = None if content.tail is None else content.tail + n
    if q is not None and n:
        content.records.observe(streams, rearrange(q, "b (h g) n d -> (b h) (g n) d", h=content.heads))
    if not content.plan.policies or n == 0:
        if n:
            _extend(content, streams, k.flatten(0, 1), v.flatten(0, 1))
        return tail
    chunk = eviction.chunk_of(content.plan, q, k, v, scale, seen[0], seen[1], content.model, chosen)
    kept = eviction.select(content.plan, chunk).flatten(0, 1)  # [s, n]
    k, v = k.flatten(0, 1), v.flatten(0, 1)
    lost = (~kept).any(0).nonzero().flatten()
    if len(lost):
        tail = n - 1 - int(lost[-1])
    counts = kept.sum(-1).cpu()
    for count in counts.unique().tolist():
        same = (counts == count).nonzero().flatten()
        on = same.to(k.device)
        _extend(content, streams[same], *eviction.taken(kept[on], k[on], v[on])[1:])
    return tail


def _extend(content: LayerContent, streams: Tensor, k: Tensor, v: Tensor) -> None:
    """Add kept tokens k [s, n, Dk], v [s, n, Dv] to `streams`: to the sinks, then pages, then the window."""
    held = content.exact.counts[streams]
    count = int(held[0])
    if bool((held != count).any()):
        for amount in held.unique().tolist():
            same = (held == amount).nonzero().flatten()
            on = same.to(k.device)
            _extend(content, streams[same], k[on], v[on])
        return
    plan = content.plan
    taken = min(max(plan.sinks - count, 0), k.shape[1])
    if taken:
        content.exact.put(streams, count, k[:, :taken], v[:, :taken])
        k, v, count = k[:, taken:], v[:, taken:], count + taken
    if count > plan.sinks:  # less than the window and a page comes back out of the buffer
        old_k, old_v = content.exact.window(streams, count)
        k, v, count = torch.cat([old_k, k], 1), torch.cat([old_v, v], 1), plan.sinks
    paged = max(k.shape[1] - plan.recent, 0) // plan.page_size * plan.page_size
    first = 0 if plan.sliding is None or not paged else sliding.unseen(content, streams, paged // plan.page_size)
    if paged > (at := first * plan.page_size):
        ids = content.storage.new_pages(streams, paged // plan.page_size - first)
        content.records.encode(ids, k[:, at:], v[:, at:], streams, look=True)
        content.storage.paged(streams, ids)
    content.exact.put(streams, count, k[:, paged:], v[:, paged:])
