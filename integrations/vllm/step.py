"""A step's batch, as all layers see it: which tokens are new, and where those before them lie."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from kvcomp.stages import Choice

from .pages import Cells
from .setup import Extent, Setup


class Run(NamedTuple):
    """Tokens `past` to `end` of a request (a row of the batch), which lie in the batch from row `start` on."""

    request: int
    start: int
    past: int
    end: int
    prompt: int


@dataclass(frozen=True)
class Group:
    """R requests that bring n new tokens each.

    requests int64 [R]: their rows in the batch. tokens int64 [R, n]: their rows in the step's queries, keys, values.
    pages int32 [R * H, longest] and counts int64 [R * H]: records of the pool that each KV head reads, oldest first.
    exact int64 [R]: tokens behind those pages, newer than them or sinks; held: the same numbers on the host.
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
    held: list[int]

    @property
    def new(self) -> int:
        return self.tokens.shape[1]

    @property
    def longest(self) -> int:
        """The most exact tokens of a request."""
        return self.slots.shape[1]

    @property
    def past(self) -> bool:
        """Whether any of the requests has tokens before these."""
        return self.longest + self.pages.shape[1] > 0


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


@dataclass(frozen=True)
class Keep:
    """A prompt that is in with the new tokens, of which the policy keeps a part.

    group, row: as in `Fill`. request: its row in the batch. old int64 [H, m]: records that hold its first tokens behind
    the sinks. pages int64 [H, m']: those that what is kept goes to, as far as it fills whole pages. slots int64 [w]:
    slots of the window that the rest goes to, sinks first. voters: how many of the last queries came in steps before.
    """

    group: int
    row: int
    request: int
    old: Tensor
    pages: Tensor
    slots: Tensor
    voters: int


@dataclass
class Step:
    """One step's batch: planned on the host out of lengths alone, all tensors on the device of the pool.

    slot_mapping int64 [T]: a token's place in the pool, in tokens; -1 where it has none.
    fills: pages that become full; keeps: prompts that are in and lose tokens. writes and votes int64 [3, w]: (row of
    the step, request, slot of its window) of new tokens that the window keeps, and of queries.
    then: what follows in the same step, of requests that bring tokens from behind such a prompt, too.
    cells: what follows from it, where tokens are written singly, for all layers once one has asked.
    choices: by layer, the pages that it chose and others follow in this step.
    """

    groups: list[Group]
    fills: list[Fill]
    keeps: list[Keep]
    writes: Tensor
    votes: Tensor
    slot_mapping: Tensor
    then: Step | None = None
    cells: Cells | None = None
    choices: dict[int, Choice] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        setup: Setup,
        heads: int,
        starts: list[int],
        lengths: list[int],
        prompts: list[int],
        table: Tensor,
        slot_mapping: Tensor,
    ) -> Step:
        """The step in which request r brings tokens starts[r] to starts[r + 1] of the batch, and has lengths[r] then.

        prompts: how many of a request's tokens are its prompt. table int32 [R, n]: blocks of one page, on the device.

        A request that was thrown out comes back as a prompt with its own words behind: those see, as they did at first,
        what the policy kept of the prompt.
        """
        table = table.long()
        runs, behind = [], []
        for r, (length, prompt) in enumerate(zip(lengths, prompts, strict=True)):
            past, end = length - (starts[r + 1] - starts[r]), length
            if past < prompt < length and setup.kept(prompt) < prompt:
                behind.append(Run(r, starts[r] + prompt - past, prompt, length, prompt))
                end = prompt
            if past < end:
                runs.append(Run(r, starts[r], past, end, prompt))
        then = cls._made(setup, heads, behind, table, slot_mapping) if behind else None
        return cls._made(setup, heads, runs, table, slot_mapping, then)

    @classmethod
    def _made(
        cls,
        setup: Setup,
        heads: int,
        runs: Sequence[Run],
        table: Tensor,
        slot_mapping: Tensor,
        then: Step | None = None,
    ) -> Step:
        by_length: dict[int, list[Run]] = defaultdict(list)
        for run in runs:
            by_length[run.end - run.past].append(run)
        groups: list[Group] = []
        fills: list[Fill] = []
        keeps: list[Keep] = []
        writes, votes = [_nowhere()], [_nowhere()]
        for same in by_length.values():
            befores = [setup.extent(run.past, run.prompt) for run in same]
            for row, (run, before) in enumerate(zip(same, befores, strict=True)):
                if setup.by_token:
                    continue
                after, place = setup.extent(run.end, run.prompt), (len(groups), row)
                if after.held - before.held < run.end - run.past:
                    keeps.append(_keep(setup, heads, *place, run, before, after, table))
                    continue
                if after.end > before.end:
                    records = _records(table[run.request, None, before.end : after.end], heads)
                    fills.append(Fill(*place, min(setup.sinks, run.past), max(setup.sinks - run.past, 0), records))
                held = torch.arange(before.held, after.held)
                kept = held[(held < setup.sinks) | (held >= after.held - setup.ring)]
                writes.append(_moved(run, kept - before.held, _slot(setup, kept)))
                votes.append(_votes(setup, run))
            groups.append(_group(setup, heads, same, befores, table))
        moved, voting = (torch.cat(runs, 1).to(table.device, non_blocking=True) for runs in (writes, votes))
        return cls(groups, fills, keeps, moved, voting, slot_mapping, then)


def _nowhere() -> Tensor:
    return torch.zeros(3, 0, dtype=torch.int64)


def _moved(run: Run, tokens: Tensor, slots: Tensor) -> Tensor:
    """As in `Step.writes`, the run's `tokens` [w], counted from its first, and the slots [w] that they go to."""
    return torch.stack([tokens + run.start, torch.full_like(tokens, run.request), slots])


def _votes(setup: Setup, run: Run) -> Tensor:
    """As in `Step.votes`, queries of a prompt that is not in yet, among the last that it will have."""
    slot = torch.arange(run.past, run.end) - (run.prompt - setup.voters)
    voters = ((slot >= 0) & (run.end < run.prompt)).nonzero().flatten()
    return _moved(run, voters, slot[voters])


def _keep(
    setup: Setup, heads: int, group: int, row: int, run: Run, before: Extent, after: Extent, table: Tensor
) -> Keep:
    old, pages = (_records(table[run.request, None, : extent.pages], heads) for extent in (before, after))
    held = torch.arange(after.held)
    exact = held[(held < setup.sinks) | (held >= after.held - (after.exact - setup.sinks))]
    voters = max(run.past - (run.prompt - setup.voters), 0)
    slots = _slot(setup, exact).to(table.device, non_blocking=True)
    return Keep(group, row, run.request, old, pages, slots, voters)


def _group(setup: Setup, heads: int, runs: Sequence[Run], extents: Sequence[Extent], table: Tensor) -> Group:
    new, device = runs[0].end - runs[0].past, table.device
    pairs = zip(runs, extents, strict=True)
    numbers = torch.tensor([(r.request, r.start, e.held, e.pages, e.exact, e.end, *e.gap) for r, e in pairs])
    rows, starts, held, counts, exact, end, first, last = numbers.to(device, non_blocking=True).T
    page = torch.arange(max(extent.pages for extent in extents), device=device)
    column = page + (last - first)[:, None] * (page >= first[:, None])
    blocks = table[rows[:, None], column.clamp_max(table.shape[1] - 1)]
    blocks = blocks.masked_fill(page >= counts[:, None], 0)
    tail = table[rows, end.clamp_max(table.shape[1] - 1)]
    # Exact tokens in order: the sinks, then what lies behind the pages.
    place = torch.arange(max(extent.exact for extent in extents), device=device)
    position = torch.where(place < setup.sinks, place, place + (held - exact)[:, None])
    return Group(
        rows,
        starts[:, None] + torch.arange(new, device=device),
        _records(blocks, heads).to(torch.int32),
        counts.repeat_interleave(heads),
        exact,
        (tail[:, None] * heads + torch.arange(heads, device=device)).flatten(),
        _slot(setup, position),
        [extent.exact for extent in extents],
    )


def _records(blocks: Tensor, heads: int) -> Tensor:
    """Records [R * H, n] of the pool's cells (block, head) of blocks [R, n]."""
    return (blocks[:, None] * heads + torch.arange(heads, device=blocks.device)[:, None]).flatten(0, 1)


def _slot(setup: Setup, position: Tensor) -> Tensor:
    """The slot of a request's window that the token at a position is kept in."""
    sinks = setup.sinks
    return torch.where(position < sinks, position, sinks + (position - sinks) % setup.ring)
