"""Layers with a sliding window: pages leave once no later query sees them, and a query skips what it does not see.

A query sees the last `plan.sliding` columns, its own and padding included, as transformers' masks have it. Exact tokens
are fewer than those, unless padding came between them: see `shows`.
"""

from __future__ import annotations

from torch import Tensor

from .content import LayerContent


def outside(content: LayerContent, columns: int) -> Tensor | int:
    """Tokens of each row before its last `columns` columns: int64 [B], or one number where no row is padded."""
    history = content.history
    if history.unpadded:
        return max(history.length - columns, 0)
    return history.counts - history.newest(columns)


def by_stream(content: LayerContent, tokens: Tensor | int) -> Tensor | int:
    """Numbers of rows, as of `outside`, for each of their streams: int64 [S]."""
    return tokens if isinstance(tokens, int) else tokens.repeat_interleave(content.heads)


def skipped(content: LayerContent) -> Tensor | None:
    """int64 [S], on the pages' device: tokens of each stream's first page that the newest token does not see; None:
    it sees all pages."""
    plan, table = content.plan, content.table
    assert plan.sliding is not None
    assert table.left is not None
    hidden = by_stream(content, outside(content, plan.sliding))
    if not table.longest or (isinstance(hidden, int) and not hidden):
        return None
    return (hidden - table.left * plan.page_size).to(table.device)


def shows(content: LayerContent) -> bool:
    """Whether the next token, which is no padding, sees all exact tokens: not where padding between them moved some out
    of its window."""
    assert content.plan.sliding is not None
    if content.history.unpadded:
        return True
    seen = content.history.newest(content.plan.sliding - 1).repeat_interleave(content.heads)
    return not bool((content.exact.counts > seen).any())


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
