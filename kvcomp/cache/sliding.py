"""Layers with a sliding window: pages leave once no later query sees them, and a query skips what it does not see.

A query sees the last `plan.sliding` columns, its own and padding included, as transformers' masks have it. Exact tokens
are fewer than those, unless padding came between them: see `shows`. Of several queries, the last one's window is read
as that of one query, and the tokens that only earlier ones see, fewer than there are queries, by themselves.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .content import LayerContent
from .reader import View


def outside(content: LayerContent, columns: int) -> Tensor | int:
    """Tokens of each row before its last `columns` columns: int64 [B], or one number where no row is padded."""
    history = content.history
    if history.unpadded:
        return max(history.length - columns, 0)
    return history.counts - history.newest(columns)


def by_stream(content: LayerContent, tokens: Tensor | int) -> Tensor | int:
    """Numbers of rows, as of `outside`, for each of their streams: int64 [S]."""
    return tokens if isinstance(tokens, int) else tokens.repeat_interleave(content.heads)


class Oldest(NamedTuple):
    """Tokens of each stream's first pages that the first of several queries sees and the last does not: keys [S, N, Dk]
    and values [S, N, Dv], decoded; visible bool [S, n, N]: which of them each query sees. pages: how many were read."""

    keys: Tensor
    values: Tensor
    visible: Tensor
    pages: int


def seen(content: LayerContent, view: View, n: int, new: int) -> tuple[View, Oldest | None]:
    """What all of n queries see of a view, and what some of them see besides; None: that is nothing.

    They are those of the newest n tokens. new: how many tokens are not held yet, theirs among them, or 0. All of them
    see all exact tokens: see `shows`.
    """
    plan, table = content.plan, content.table
    assert plan.sliding is not None
    assert table.left is not None
    columns = plan.sliding - (1 if new else 0) - max(new - n, 0)  # that the first query sees of those held
    hidden = by_stream(content, outside(content, columns - n + 1))
    if not table.longest or (isinstance(hidden, int) and not hidden):
        return view, None
    last = hidden - table.left * plan.page_size  # tokens of pages that the last query does not see
    if not new:
        return view._replace(skipped=last.to(table.device)), None
    oldest = None if n == 1 else _oldest(content, view, columns, last, n)
    pages = last // plan.page_size
    if bool(pages.any()):
        view = _without(view, pages)
    return view._replace(skipped=(last % plan.page_size).to(table.device)), oldest


def _oldest(content: LayerContent, view: View, columns: int, last: Tensor, n: int) -> Oldest | None:
    """The tokens before `last` [S] of each stream's pages, and which of n queries, whose first sees so many columns of
    those held, see them."""
    table, size = content.table, content.plan.page_size
    assert table.left is not None
    first = [by_stream(content, outside(content, columns - i)) - table.left * size for i in range(n)]
    begins = torch.stack(first, 1)  # [S, n]
    if bool((begins[:, 0] >= last).all()):
        return None
    pages = -(-int(last.max()) // size)
    place = torch.arange(pages * size, device="cpu")
    visible = ((place >= begins[..., None]) & (place < last[:, None, None])).to(table.device)
    ids, some = view.ids[:, :pages], visible.any(1)[..., None]
    streams = torch.arange(len(ids), device=ids.device).repeat_interleave(pages)
    decoded = content.records.decode(ids.flatten(), streams)
    keys, values = (x.reshape(len(ids), pages * size, -1).masked_fill(~some, 0) for x in decoded)
    return Oldest(keys, values, visible, ids.numel())


def _without(view: View, pages: Tensor) -> View:
    """A view without the first `pages` [S] of each stream, which has as many."""
    width = max(int((view.held - pages).max()), 0)
    places = (torch.arange(width, device="cpu") + pages[:, None]).clamp_max(view.ids.shape[1] - 1)
    ids = view.ids.gather(1, places.to(view.ids.device))
    held = view.held - pages
    return view._replace(ids=ids, counts=held.to(view.counts.device), held=held, total=view.total - int(pages.sum()))


def shows(content: LayerContent, n: int = 1) -> bool:
    """Whether the next n tokens, none of them padding, see all exact tokens: not where there are too many of them, or
    padding between exact tokens moved some out of the last one's window."""
    assert content.plan.sliding is not None
    columns = content.plan.sliding - n
    if content.history.unpadded:
        return n == 1 or content.exact.bounds[1] <= columns
    if columns < 0:
        return False
    return not bool((content.exact.counts > content.history.newest(columns).repeat_interleave(content.heads)).any())


def visible(content: LayerContent, n: int) -> Tensor:
    """int64 [B, n]: how many of the tokens held each of the next n tokens sees."""
    assert content.plan.sliding is not None
    history, first = content.history, content.plan.sliding - 1
    return torch.stack([history.newest(min(first - i, history.length)) for i in range(n)], 1)


def leave(content: LayerContent) -> None:
    """Let pages leave that no later token sees."""
    plan, table = content.plan, content.table
    assert plan.sliding is not None
    assert table.left is not None
    gone = by_stream(content, outside(content, plan.sliding - 1))
    if isinstance(gone, int) and gone // plan.page_size <= table.fewest_left:
        return
    amount = (gone // plan.page_size - table.left).clamp(min=0).minimum(table.counts)
    if bool(amount.any()):
        table.drop_oldest(amount)
        content.pool.reclaim()


def unseen(content: LayerContent, streams: Tensor, pages: int) -> int:
    """Of the next `pages` pages of `streams` int64 [s], how many no later token sees; they count as left from now on.
    Pages that these streams have then left before: see `leave`."""
    plan, table = content.plan, content.table
    assert plan.sliding is not None
    assert table.left is not None
    gone = by_stream(content, outside(content, plan.sliding - 1))
    own = gone if isinstance(gone, int) else gone[streams]
    amount = int((own // plan.page_size - table.left[streams] - table.counts[streams]).min())
    amount = min(max(amount, 0), pages)
    if amount:
        table.count_left(streams, amount)
    return amount


def reach(content: LayerContent) -> int:
    """How many of the newest columns can be taken back, so that the next token still sees all of its window."""
    plan, table, history = content.plan, content.table, content.history
    assert plan.sliding is not None
    assert table.left is not None
    left = table.left * plan.page_size
    if not bool(left.any()):
        return history.length
    first, columns = plan.sliding - 1, 0
    while columns < history.length:
        after = by_stream(content, outside(content, first + columns + 1))
        if bool((left > after).any()):
            break
        columns += 1
    return columns
