"""A step's batch, as all layers see it: which tokens are new, and where those before them lie."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from ..geometry import Extent
from ..reader import Shared
from .batch import Fill, Group, Keep, Leave, Prompt, Run, Sinks
from .pages import Cells
from .setup import Setup


@dataclass
class Step:
    """One step's batch: planned on the host out of lengths alone, all tensors on the device of the pool.

    slot_mapping int64 [T]: a token's place in the pool, in tokens; -1 where it has none. begun int64 [2, b]: where
    tokens are written singly, those that begin a page, and which page of their request.
    fills: pages that become full; keeps: prompts that are in and lose tokens; scores: prompts that are not, whose
    queries score their tokens; leaves: pages that leave. kept_sinks: those that go to blocks for others to find;
    found_sinks: those that come from there. fresh int64 [f]: records that nothing was received by yet.
    writes and votes int64 [3, w]: (row of the step, request, slot of its window) of new tokens that the window keeps,
    and of queries.
    then: what follows in the same step, of requests that bring tokens beyond a split point (`Extents.split_points`).
    cells: what follows from it, where tokens are written singly; starts: where windows have what is written and read.
    Both for all layers, once one has asked.
    choices: by layer, the pages that it chose and others follow in this step.
    """

    groups: list[Group]
    fills: list[Fill]
    keeps: list[Keep]
    scores: list[Prompt]
    leaves: list[Leave]
    kept_sinks: list[Sinks]
    found_sinks: list[Sinks]
    fresh: Tensor
    writes: Tensor
    votes: Tensor
    slot_mapping: Tensor
    begun: Tensor
    then: Step | None = None
    cells: Cells | None = None
    starts: list[Tensor] = field(default_factory=list)
    choices: dict[int, Shared] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        setup: Setup,
        heads: int,
        starts: Sequence[int],
        lengths: Sequence[int],
        prompts: Sequence[int],
        table: Tensor,
        slot_mapping: Tensor,
        found: Sequence[int] | None = None,
    ) -> Step:
        """The step in which request r brings tokens starts[r] to starts[r + 1] of the batch, and has lengths[r] then.

        prompts: how many of a request's tokens are its prompt. found: how many it found in blocks of others, at
        the end of which its first step begins; None: none. table int32 [R, n]: blocks of one page, on the device.

        A preempted request resumes with its generated tokens appended to its prompt. They attend to what the policy
        kept of the prompt, and later of them, as before preemption.
        """
        table, geometry = table.long(), setup.geometry
        begun = _begun(setup, starts, lengths).to(table.device, non_blocking=True)
        levels: list[list[Run]] = [[]]
        found = [0] * len(lengths) if found is None else found
        for r, (length, prompt, hit) in enumerate(zip(lengths, prompts, found, strict=True)):
            past = length - (starts[r + 1] - starts[r])
            edges = [past, *geometry.split_points(past, length, prompt), length] if past < length else []
            levels += [[] for _ in range(len(edges) - 1 - len(levels))]
            for level, (begin, end) in zip(levels, pairwise(edges), strict=False):
                level.append(Run(r, starts[r] + begin - past, begin, end, prompt, hit))
        step = None
        for runs in reversed(levels):
            step = cls._made(setup, heads, runs, table, slot_mapping, begun, step)
        assert step is not None
        return step

    @classmethod
    def _made(
        cls,
        setup: Setup,
        heads: int,
        runs: Sequence[Run],
        table: Tensor,
        slot_mapping: Tensor,
        begun: Tensor,
        then: Step | None,
    ) -> Step:
        by_length: dict[int, list[Run]] = defaultdict(list)
        for run in runs:
            by_length[run.end - run.past].append(run)
        groups: list[Group] = []
        fills: list[Fill] = []
        keeps: list[Keep] = []
        scores: list[Prompt] = []
        leaves: list[Leave] = []
        kept_sinks: list[Sinks] = []
        found_sinks: list[Sinks] = []
        fresh = [torch.zeros(0, dtype=torch.int64, device=table.device)]
        writes, votes = [_nowhere()], [_nowhere()]
        geometry = setup.geometry
        for same in by_length.values():
            befores = [geometry.extent(run.past, run.prompt, run.found) for run in same]
            for row, (run, before) in enumerate(zip(same, befores, strict=True)):
                if setup.by_token:
                    continue
                after, place = geometry.extent(run.end, run.prompt, run.found), (len(groups), row)
                ends, loses = run.past < run.prompt <= run.end, geometry.kept(run.prompt) < run.prompt
                keep = ends and loses
                # Others find the whole prompt, whatever is chosen of it.
                whole = geometry.extent(run.end, run.end + 1, run.found) if keep and geometry.shared else after
                new = whole.written - before.written
                if geometry.limit is not None and run.end >= run.prompt:
                    first = 0 if ends else before.pages
                    pages = before.pages + new  # before any leave
                    fresh.append(_columns(table, run, heads, first, pages - first).flatten())
                    if pages > after.pages:
                        records = _columns(table, run, heads, 0, pages)
                        leaves.append(Leave(records, after.exact + pages * geometry.page_size, pages - after.pages))
                if geometry.shift:
                    if run.past < geometry.sinks <= run.end:
                        kept_sinks.append(_sinks(setup, heads, *place, run, table))
                    if run.past == run.found > 0:
                        found_sinks.append(_sinks(setup, heads, *place, run, table))
                if new > 0 and (geometry.shared or not keep):
                    records = _columns(table, run, heads, before.column(before.pages + before.ahead), new)
                    sinks, old = geometry.sinks, before.ahead * geometry.page_size
                    fills.append(Fill(*place, min(sinks, run.past) + old, max(sinks - run.past, 0), records))
                if keep or (run.end < run.prompt and loses and setup.sums):
                    prompt = _prompt(setup, heads, *place, run, before, table)
                    if keep:
                        keeps.append(_keep(setup, heads, prompt, run, after, table))
                        continue
                    scores.append(prompt)
                held = torch.arange(before.held, after.held, device="cpu")
                kept = held[(held < geometry.sinks) | (held >= after.held - geometry.ring)]
                writes.append(_moved(run, kept - before.held, geometry.slot(kept)))
                votes.append(_votes(setup, run))
            groups.append(_group(setup, heads, same, befores, table))
        moved, voting = (torch.cat(runs, 1).to(table.device, non_blocking=True) for runs in (writes, votes))
        parts = groups, fills, keeps, scores, leaves, kept_sinks, found_sinks
        return cls(*parts, torch.cat(fresh), moved, voting, slot_mapping, begun, then)


def _begun(setup: Setup, starts: Sequence[int], lengths: Sequence[int]) -> Tensor:
    """As `Step.begun`, on the host."""
    if not setup.by_token:
        return _nowhere()[:2]
    first, length = (torch.tensor(x, dtype=torch.int64, device="cpu") for x in (starts, lengths))
    before = (length - first[1:]).repeat_interleave(first.diff())  # position less row, of each token
    position = torch.arange(int(first[-1]), device="cpu") + before
    rows = (position % setup.page_size == 0).nonzero().flatten()
    return torch.stack([rows, position[rows] // setup.page_size])


def _nowhere() -> Tensor:
    return torch.zeros(3, 0, dtype=torch.int64, device="cpu")


def _moved(run: Run, tokens: Tensor, slots: Tensor) -> Tensor:
    """As in `Step.writes`, the run's `tokens` [w], counted from its first, and the slots [w] that they go to."""
    return torch.stack([tokens + run.start, torch.full_like(tokens, run.request), slots])


def _votes(setup: Setup, run: Run) -> Tensor:
    """As in `Step.votes`, queries of a prompt that is not in yet, among the last that it will have."""
    slot = torch.arange(run.past, run.end, device="cpu") - (run.prompt - setup.voters)
    voters = ((slot >= 0) & (run.end < run.prompt)).nonzero().flatten()
    return _moved(run, voters, slot[voters])


def _prompt(setup: Setup, heads: int, group: int, row: int, run: Run, before: Extent, table: Tensor) -> Prompt:
    pages, cells = before.pages, -(-run.end // setup.page_size)
    old, every = (_columns(table, run, heads, first, n) for first, n in ((before.column(0), pages), (0, cells)))
    return Prompt(group, row, run.past, old, every)


def _sinks(setup: Setup, heads: int, group: int, row: int, run: Run, table: Tensor) -> Sinks:
    geometry = setup.geometry
    slots = torch.arange(geometry.sinks, device=table.device)
    return Sinks(group, row, run.request, _columns(table, run, heads, 0, geometry.shift), slots)


def _keep(setup: Setup, heads: int, prompt: Prompt, run: Run, after: Extent, table: Tensor) -> Keep:
    geometry, pages = setup.geometry, _columns(table, run, heads, after.column(0), after.written)
    held = torch.arange(after.held, device="cpu")
    exact = held[(held < geometry.sinks) | (held >= after.held - (after.exact - geometry.sinks))]
    voters = max(run.past - (run.prompt - setup.voters), 0)
    slots = geometry.slot(exact).to(table.device, non_blocking=True)
    return Keep(prompt, run.request, pages, slots, voters)


def _group(setup: Setup, heads: int, runs: Sequence[Run], extents: Sequence[Extent], table: Tensor) -> Group:
    new, size, device = runs[0].end - runs[0].past, setup.page_size, table.device
    if setup.by_token:  # all tokens are in pages
        extents = [e._replace(pages=-(-e.held // size), exact=0) for e in extents]
    unseen = [0 if setup.sliding is None else max(run.past + 1 - setup.sliding, 0) for run in runs]
    if setup.sliding is not None:
        extents = [
            e._replace(pages=e.pages - gone // size, gap=(0, gone // size))
            for e, gone in zip(extents, unseen, strict=True)
        ]
    numbers = torch.tensor(
        [
            (
                *(r.request, r.start, r.past >= r.prompt, e.held),
                e.held - gone // size * size if setup.by_token else e.pages,
                *(e.exact, *e.gap, gone % size),
            )
            for r, e, gone in zip(runs, extents, unseen, strict=True)
        ],
        dtype=torch.int64,
        device="cpu",
    )
    rows, starts, generating, held, counts, exact, first, last, skipped = numbers.to(device, non_blocking=True).T
    page = torch.arange(max(extent.pages for extent in extents), device=device)
    column = page + (last - first)[:, None] * (page >= first[:, None])
    blocks = table[rows[:, None], column.clamp_max(table.shape[1] - 1)]
    blocks = blocks.masked_fill(page * (size if setup.by_token else 1) >= counts[:, None], 0)
    first_row = runs[0].start
    follow = all(run.start == first_row + i * new for i, run in enumerate(runs))
    # Exact tokens in order: the sinks, then what is newer than the pages.
    place = torch.arange(max(extent.exact for extent in extents) + 1, device=device)
    position = torch.where(place < setup.geometry.sinks, place, place + (held - exact)[:, None])
    return Group(
        rows,
        starts[:, None] + torch.arange(new, device=device),
        _records(blocks, heads).to(torch.int32),
        counts.repeat_interleave(heads),
        exact.repeat_interleave(heads),
        setup.geometry.slot(position),
        generating.bool().repeat_interleave(heads),
        [extent.exact for extent in extents],
        slice(first_row, first_row + len(runs) * new) if follow else None,
        None if setup.sliding is None else skipped.repeat_interleave(heads),
    )


def _columns(table: Tensor, run: Run, heads: int, first: int, count: int) -> Tensor:
    """Records [H, count] of a request's columns from `first` on."""
    return _records(table[run.request, None, first : first + count], heads)


def _records(blocks: Tensor, heads: int) -> Tensor:
    """Records [R * H, n] of the pool's cells (block, head) of blocks [R, n]."""
    return (blocks[:, None] * heads + torch.arange(heads, device=blocks.device)[:, None]).flatten(0, 1)
