"""Changes of what is held: tokens are taken back, spans compacted, rows selected."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from kvcomp.errors import KvcompError, UnsupportedError

from . import sliding
from .compaction import Compacted, CompactSpans, match
from .content import LayerContent


def crop(content: LayerContent, tokens: int) -> None:
    """Forget the newest `tokens` tokens of every row.

    Exact or refused: what is to go must be held by all streams, in the window or in pages that decode exactly.

    Raises:
        KvcompError: more tokens than there are.
        UnsupportedError: it would reach into lossy pages or past evicted tokens.
    """
    if tokens > content.history.length:
        raise KvcompError(f"crop({-tokens}): the cache holds {content.history.length} tokens")
    if content.plan.sliding is not None and tokens > (most := sliding.reach(content)):
        raise UnsupportedError(
            f"crop({-tokens}): layer {content.plan.layer} sees a sliding window of {content.plan.sliding} tokens, and "
            f"those before it are gone: crop at most {most}, fork() the cache before, or reset() it and feed all again"
        )
    content.end_prompt()
    _take_back(content, content.history.newest(tokens), f"crop({-tokens})", content.codec.lossless)
    content.history.crop(tokens)


def drop_newest(content: LayerContent, gone: Tensor) -> None:
    """Forget the newest tokens of some rows, whose columns count as padding from now on.

    gone bool [B, length], on the host: in each row the last real tokens. Those that lie in pages are taken out of
    them; what such a page keeps goes on as it decodes.

    Raises:
        UnsupportedError: it would reach past evicted tokens.
    """
    content.end_prompt()
    _take_back(content, gone.sum(-1), "the attention mask hides a row's newest tokens, which", True)
    content.history.hide(gone)


def _take_back(content: LayerContent, gone: Tensor, what: str, unpage: bool) -> None:
    """Remove each row's newest `gone` [B] tokens from what streams hold; out of pages only where `unpage` says."""
    remove, most = gone.repeat_interleave(content.heads), int(gone.max())
    window = (content.exact.counts - content.plan.sinks).clamp_min(0)
    deep = remove > torch.where(content.table.counts > 0, window, content.exact.counts)
    if content.tail is not None and most > content.tail:
        raise UnsupportedError(
            f"{what} reaches {most} tokens back: only the last {content.tail} are held without gaps, older ones were "
            "evicted; crop less, fork() the cache before, or reset() it and feed its tokens again"
        )
    if bool(deep.any()) and not unpage:
        raise UnsupportedError(
            f"{what} reaches into quantized pages: only the last {int(window[deep].min())} tokens are "
            f"still exact. Use a stack with window(recent={most}) or more, or fork() the cache before"
        )
    for stream in deep.nonzero().flatten().tolist():
        _unpage(content, stream, int(remove[stream]))
    content.exact.recount(slice(None), content.exact.counts - remove)
    if content.tail is not None:
        content.tail -= most
    if bool(deep.any()):
        content.pool.reclaim()


def _unpage(content: LayerContent, stream: int, remove: int) -> None:
    """Bring a stream's newest pages back into its buffer, so that `remove` tokens can be taken off its end."""
    plan, at = content.plan, int(content.table.counts[stream])
    window = int(content.exact.counts[stream]) - plan.sinks
    pages = min(-(-(remove - window) // plan.page_size), at)
    k, v = content.storage.decode(content.table.ids()[stream, at - pages : at], stream)
    left = window + pages * plan.page_size - remove  # tokens that stay after the sinks
    back = max(left, 0)
    where = torch.tensor([stream], dtype=torch.int64, device="cpu")
    content.exact.put(where, plan.sinks, k[None, :back], v[None, :back])
    content.exact.recount(stream, plan.sinks + left + remove)
    amount = torch.zeros_like(content.table.counts)
    amount[stream] = pages
    content.table.drop_newest(amount)


def compactable(content: LayerContent, start: int, end: int) -> tuple[int, int]:
    """The tokens (start, end) of all whole pages between tokens `start` and `end`.

    Raises:
        UnsupportedError: tokens were evicted, or rows are padded, so that pages have no certain place.
        KvcompError: no whole page lies there, or part of it is compacted already.
    """
    plan, length = content.plan, content.history.length
    if plan.policies or content.history.valid() is not None:
        why = f"{plan.policies[0].name} may drop tokens" if plan.policies else "some rows are padded"
        raise UnsupportedError(f"compact(span=({start}, {end})): {why}, so that nothing says which pages these are")
    if not 0 <= start < end <= length:
        raise KvcompError(f"compact(span=({start}, {end})): expected 0 <= start < end <= {length}, the tokens held")
    done = () if content.compacted is None else content.compacted.columns
    for old in done:
        if start < old[1] and old[0] < end:
            raise KvcompError(f"compact(span=({start}, {end})): tokens {old[0]} to {old[1]} are compacted already")
    size, sinks = plan.page_size, plan.sinks
    paged = sinks + size * content.table.longest + sum(b - a for a, b in done)
    first = sinks + -(-max(start - sinks, 0) // size) * size
    last = sinks + max(min(end, paged) - sinks, 0) // size * size
    if last <= first:
        raise KvcompError(
            f"compact(span=({start}, {end})): no whole page of {size} tokens lies there; pages hold the tokens "
            f"{sinks} to {paged}, the others stay in full precision"
        )
    return first, last


def compact(
    content: LayerContent, start: int, end: int, queries: Tensor, tokens: int, scale: float, softcap: float | None
) -> Compacted:
    """Replace tokens `start` to `end`, as `compactable` gives them, by `tokens` that attention takes for them.

    queries [B, Hq, m, Dk] post-RoPE, after the span: those that attention is matched for.
    """
    plan = content.plan
    before = sum(b - a for a, b in (() if content.compacted is None else content.compacted.columns) if b <= start)
    first = (start - before - plan.sinks) // plan.page_size
    pages = slice(first, first + (end - start) // plan.page_size)
    ids = content.table.ids()[:, pages]
    decoded = [content.storage.decode(row, stream) for stream, row in enumerate(ids)]
    k, v = (torch.stack([pair[i] for pair in decoded]) for i in (0, 1))
    q = rearrange(queries, "b (h g) n d -> (b h) (n g) d", h=content.heads)
    found = match(q, k, v, scale, tokens, softcap)
    empty = CompactSpans(k[:, :0], found.bias[:, :0], v[:, :0], ())
    content.compacted = (empty if content.compacted is None else content.compacted).extended(found, (start, end))
    gone = torch.zeros(len(ids), content.table.longest, dtype=torch.bool, device="cpu")
    gone[:, pages] = True
    content.limit_tail(content.history.length - end)
    content.table.drop(gone)
    content.pool.reclaim()
    return found


def select_rows(content: LayerContent, rows: Tensor) -> None:
    """Keep, repeat and order rows (beams): int64 [B']. Pages are shared, never copied."""
    rows = rows.cpu()
    streams = (rows[:, None] * content.heads + torch.arange(content.heads, device="cpu")).flatten()
    content.storage.select(streams)
    content.history.select(rows)
    if content.prompt is not None:
        seen, held = content.prompt
        content.prompt = [seen[i] for i in rows.tolist()], [held[i] for i in streams.tolist()]
    content.compacted = None if content.compacted is None else content.compacted.select(streams)
    content.rows = len(rows)
    content.pool.reclaim()
