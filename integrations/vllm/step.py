"""A step's batch, as all layers see it: which tokens are new, and where those before them lie."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvcomp.stages import Choice

from .setup import Setup


@dataclass(frozen=True)
class Group:
    """R requests that bring n new tokens each.

    requests int64 [R]: their rows in the batch. tokens int64 [R, n]: their rows in the step's queries, keys, values.
    pages int32 [R * H, longest] and counts int64 [R * H]: records of the pool that each KV head reads, oldest first.
    exact int64 [R]: tokens behind those pages, newer than them or sinks.
    tail int64 [R * H]: the record of the page that the next token belongs to (read where tokens are written singly).
    slots int64 [R, longest]: slots of the window that hold the exact tokens, where there is a window.
    """

    requests: Tensor
    tokens: Tensor
    pages: Tensor
    counts: Tensor
    exact: Tensor
    tail: Tensor
    slots: Tensor

    @property
    def new(self) -> int:
        return self.tokens.shape[1]


@dataclass(frozen=True)
class Fill:
    """Pages that a request's new tokens make full.

    row: the request's place in its group; group: that. skip: exact tokens before the window's (sinks), and new tokens
    that become sinks. pages int64 [H, m]: the records to write.
    """

    group: int
    row: int
    sinks: int
    new_sinks: int
    pages: Tensor


@dataclass
class Step:
    """One step's batch.

    slot_mapping int64 [T]: a token's place in the pool, in tokens; -1 where it has none.
    fills: pages that become full; writes int64 [3, w]: (row of the step, request, slot of its window) of new tokens
    that the window keeps.
    choices: by layer, the pages that it chose and others follow in this step.
    """

    groups: list[Group]
    fills: list[Fill]
    writes: Tensor
    slot_mapping: Tensor
    choices: dict[int, Choice] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        setup: Setup,
        heads: int,
        starts: list[int],
        lengths: list[int],
        prefilling: list[bool],
        table: Tensor,
        slot_mapping: Tensor,
    ) -> Step:
        """The step in which request r brings tokens starts[r] to starts[r + 1] of the batch, and has lengths[r] then.

        table int32 [R, n]: blocks of one page; prefilling: whether a request's prompt is not all in yet.
        """
        by_length: dict[int, list[int]] = defaultdict(list)
        for r, length in enumerate(lengths):
            if length and starts[r + 1] > starts[r]:
                by_length[starts[r + 1] - starts[r]].append(r)
        table = table.to("cpu", torch.int64)
        groups: list[Group] = []
        fills, writes = [], []
        for new, requests in by_length.items():
            pasts = [lengths[r] - new for r in requests]
            for row, (r, past) in enumerate(zip(requests, pasts, strict=True)):
                first, end = setup.paged(past), setup.paged(past + new)
                if setup.by_token:
                    continue
                if end > first:
                    records = _records(table[r : r + 1, first:end], heads)
                    sinks = min(setup.sinks, past)
                    fills.append(Fill(len(groups), row, sinks, max(setup.sinks - past, 0), records))
                kept = torch.arange(past, past + new)
                kept = kept[(kept < setup.sinks) | (kept >= past + new - setup.ring)]
                writes.append(torch.stack([kept - past + starts[r], torch.full_like(kept, r), _slot(setup, kept)]))
            expired = [0 if prefilling[r] else setup.expired(p) for r, p in zip(requests, pasts, strict=True)]
            groups.append(_group(setup, heads, new, requests, pasts, expired, starts, table))
        kept_tokens = torch.cat(writes, 1) if writes else torch.zeros(3, 0, dtype=torch.int64)
        return cls(groups, fills, kept_tokens, slot_mapping)


def _group(
    setup: Setup,
    heads: int,
    new: int,
    requests: list[int],
    pasts: list[int],
    expired: list[int],
    starts: list[int],
    table: Tensor,
) -> Group:
    rows = torch.tensor(requests)
    past = torch.tensor(pasts)
    paged = torch.tensor([setup.paged(p) for p in pasts])
    gone = torch.tensor(expired)
    counts = paged - gone
    column = torch.arange(int(counts.max()))
    blocks = table[rows[:, None], (gone[:, None] + column).clamp_max(table.shape[1] - 1)]
    blocks = blocks.masked_fill(column >= counts[:, None], 0)
    exact = past - paged * setup.page_size
    tail = table[rows, paged.clamp_max(table.shape[1] - 1)]
    # Exact tokens in order: the sinks, then what lies behind the pages.
    place = torch.arange(int(exact.max()))
    behind = place + (paged * setup.page_size)[:, None]
    position = torch.where(place < setup.sinks, place, behind)
    return Group(
        rows,
        torch.tensor([starts[r] for r in requests])[:, None] + torch.arange(new),
        _records(blocks, heads).to(torch.int32),
        counts.repeat_interleave(heads),
        exact,
        (tail[:, None] * heads + torch.arange(heads)).flatten(),
        _slot(setup, position),
    )


def _records(blocks: Tensor, heads: int) -> Tensor:
    """Records [R * H, n] of the pool's cells (block, head) of blocks [R, n]."""
    return (blocks[:, None] * heads + torch.arange(heads)[:, None]).flatten(0, 1)


def _slot(setup: Setup, position: Tensor) -> Tensor:
    """The slot of a request's window that the token at a position is kept in."""
    sinks = setup.sinks
    return torch.where(position < sinks, position, sinks + (position - sinks) % setup.ring)
