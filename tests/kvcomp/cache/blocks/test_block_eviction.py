"""Policies in an engine's blocks: what is read is what is held, and blocks that are free are never read."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch

from kvcomp.cache.blocks.setup import Setup
from kvcomp.cache.blocks.step import Step
from kvcomp.stages import Chunk
from kvcomp.stages.stack import Stack

HEADS, DIM = 2, 64
COLUMNS = 24


def setup_of(stack: str, drafts: int = 0) -> Setup:
    return Setup(Stack.parse(stack), layers=4, dim=DIM, dtype=torch.float32, drafts=drafts)


class Ledger:
    """One request whose tokens are numbers, moved as a step says: what each record and each slot of a window holds.

    Of its prompt each head keeps what chance says, the sinks and the recent tokens, as many as the setup; and chance
    says which pages leave later. `received` counts for each record how often it was watched.
    """

    def __init__(self, setup: Setup, prompt: int, seed: int) -> None:
        self.setup, self.prompt, self.chance = setup, prompt, random.Random(seed)
        self.table = torch.tensor(self.chance.sample(range(1, 100), COLUMNS))
        self.records: dict[int, list[int]] = {}
        self.received: dict[int, int] = {}
        self.window: list[dict[int, int]] = [{} for _ in range(HEADS)]
        self.voters: dict[int, int] = {}
        self.held: list[list[int]] = [[] for _ in range(HEADS)]

    def step(self, past: int, end: int) -> None:
        nothing = torch.zeros(end - past, dtype=torch.int64)
        there = torch.arange(COLUMNS) * self.setup.page_size < end  # block 0 is nobody's
        table = (self.table * there)[None]
        step: Step | None = Step.of(self.setup, HEADS, [0, end - past], [end], [self.prompt], table, nothing)
        while step is not None:
            self.run(step, past)
            step = step.then
        assert min(self.records, default=HEADS) >= HEADS
        most = self.setup.geometry.limit
        if most is not None and end >= self.prompt:
            assert all(most <= len(held) < most + self.setup.page_size or len(held) == end for held in self.held)
        first, last = self.setup.geometry.extent(end, self.prompt).gap
        for column in range(first, last):  # another request writes there
            for head in range(HEADS):
                self.records.pop(int(self.table[column]) * HEADS + head, None)

    def run(self, step: Step, past: int) -> None:
        (group,) = step.groups
        new = [past + row for row in group.tokens[0].tolist()]
        moved = [(slot, past + row) for row, _, slot in step.writes.T.tolist()]
        sinks, size = self.setup.geometry.sinks, self.setup.page_size
        for head in range(HEADS):
            exact = [self.window[head][slot] for slot in group.slots[0, : group.exact[0]].tolist()]
            read = group.pages[head, : group.counts[head]].tolist()
            pages = [token for i in read for token in self.records[i]]
            first = min(sinks, len(exact))
            assert exact[:first] + pages + exact[first:] == self.held[head]
            self.held[head] += new
            if group.generating[0] and self.setup.geometry.limit is not None:
                for record in read:
                    self.received[record] += len(new)
            for fill in step.fills:
                behind = exact[fill.old :] + new[fill.new_sinks :]
                for i, record in enumerate(fill.pages[head].tolist()):
                    self.records[record] = behind[i * size : (i + 1) * size]
            for prompt in [*step.scores, *(keep.prompt for keep in step.keeps)]:
                assert (
                    prompt.cells[head].tolist() == (self.table[: -(-(past + len(new)) // size)] * HEADS + head).tolist()
                )
                assert [t for i in prompt.old[head].tolist() for t in self.records[i]] == pages
                assert prompt.past == past
            for keep in step.keeps:
                assert self.held[head] == list(range(self.prompt))
                kept = self.held[head] = self.chosen()
                for i, record in enumerate(keep.pages[head].tolist()):
                    self.records[record] = kept[sinks + i * size : sinks + (i + 1) * size]
                end = sinks + keep.pages.shape[1] * size
                moved = list(zip(keep.slots.tolist(), kept[:sinks] + kept[end:], strict=True))
                asked = [self.voters[slot] for slot in range(keep.voters)] + new
                wanted = len(new) if self.setup.sums else self.setup.voters
                voters = range(self.prompt - wanted, self.prompt)
                assert asked[len(asked) - len(voters) :] == list(voters)
            self.received |= {record: 0 for record in step.fresh.tolist() if record % HEADS == head}
            for leave in step.leaves:
                records = leave.pages[head].tolist()
                assert leave.tokens == len(self.held[head])
                stay = sorted(self.chance.sample(range(len(records)), len(records) - leave.count))
                gone = {token for i in set(range(len(records))) - set(stay) for token in self.records[records[i]]}
                self.held[head] = [token for token in self.held[head] if token not in gone]
                for what in (self.records, self.received):
                    moving = [what.pop(record) for record in records]
                    what |= {to: moving[i] for to, i in zip(records, stay, strict=False)}
            self.window[head] |= dict(moved)
            if not step.keeps and self.setup.geometry.newest is not None and past + len(new) >= self.prompt:
                gone = self.setup.geometry.extent(past + len(new), self.prompt).gap[1] * size
                self.held[head] = self.held[head][:sinks] + list(range(sinks + gone, past + len(new)))
        self.voters |= {slot: past + row for row, _, slot in step.votes.T.tolist()}

    def chosen(self) -> list[int]:
        protected = [*range(self.setup.geometry.sinks), *range(self.prompt - self.setup.geometry.recent, self.prompt)]
        rest = sorted(set(range(self.prompt)) - set(protected))
        kept = self.setup.geometry.kept(self.prompt)
        return sorted(protected + self.chance.sample(rest, kept - len(protected)))


@pytest.mark.parametrize(
    "stack",
    [
        "snapkv(budget=96) + int8",
        "snapkv(keep=0.3, window=20) + int8 + window(sinks=4, recent=30)",
        "keydiff(keep=0.5) + kivi(bits=2, group=16) + window(sinks=0, recent=17)",
        "tova(keep=0.1) + none + window(sinks=3, recent=0)",
        "streaming(sinks=4, recent=64) + int8",
        "h2o(budget=128) + int8",
        "h2o(keep=0.4) + int8 + window(sinks=4, recent=30)",
        "snapkv(budget=150, window=20, hold=true) + none + window(sinks=4, recent=30)",
        "tova(budget=40) + kivi(bits=2, group=16) + window(sinks=0, recent=70)",
        "snapkv(budget=40, window=200, hold=true) + int8 + window(sinks=2, recent=8)",
    ],
)
def test_what_a_step_reads_is_what_is_held(stack: str) -> None:
    """However a prompt and what follows it are cut, also within one step: the blocks that are free are never read."""
    setup = setup_of(stack, drafts=3)
    for seed in range(20):
        chance = random.Random(seed)
        prompt = chance.choice([1, 64, 65, 100, 150, 320, 500])
        ledger = Ledger(setup, prompt, seed)
        most = chance.choice([1, 7, 70, 900])
        at = [0]
        while at[-1] < prompt + 200:
            at.append(at[-1] + chance.randint(1, most))
        for past, end in pairwise(at):
            if end > COLUMNS * setup.page_size:
                break
            ledger.step(past, end)


@pytest.mark.parametrize(
    "stack", ["h2o(budget=128) + int8", "snapkv(budget=150, hold=true) + none + window(recent=30)"]
)
def test_pages_that_leave_are_those_of_single_tokens(stack: str) -> None:
    """Computed again in any parts, a request holds what it held, and its pages were watched by the same queries."""
    setup = setup_of(stack)
    for seed in range(20):
        chance = random.Random(seed)
        prompt, end = chance.randint(1, 400), chance.randint(500, COLUMNS * setup.page_size)
        single, again = Ledger(setup, prompt, seed), Ledger(setup, prompt, seed)
        for past, now in pairwise([0, *range(prompt, end + 1)]):
            single.step(past, now)
        for past, now in pairwise([0, *sorted(chance.sample(range(1, end), chance.randint(0, 3))), end]):
            again.step(past, now)
        assert again.held == single.held
        pages = setup.geometry.extent(end, prompt).pages
        records = [int(block) * HEADS + head for block in single.table[:pages] for head in range(HEADS)]
        assert pages > 0
        for what in ("records", "received"):
            one, other = getattr(single, what), getattr(again, what)
            assert [one[record] for record in records] == [other[record] for record in records]


@pytest.mark.parametrize("stack", ["snapkv(budget=96) + int8", "keydiff(keep=0.25) + kivi(bits=2)"])
def test_extent(stack: str) -> None:
    """After the prompt every page but those of what is kept is free, and pages to come have columns by then."""
    setup = setup_of(stack)
    size = setup.page_size
    for prompt in range(1, 800, 37):
        kept = setup.geometry.kept(prompt)
        for tokens in range(prompt, prompt + 3 * size):
            extent, after = setup.geometry.extent(tokens, prompt), setup.geometry.extent(tokens + 1, prompt)
            assert extent.held == extent.pages * size + extent.exact == kept + tokens - prompt
            columns, free = -(-tokens // size), extent.gap[1] - extent.gap[0]
            end = extent.column(extent.pages)
            assert after.column(after.pages) == end or end < -(-(tokens + 1) // size)
            if kept == prompt:
                assert free == 0
            else:
                assert columns - free <= setup.geometry.pages(kept) + 1 + -(-(tokens - prompt) // size)


@pytest.mark.parametrize(
    "policy",
    [
        "snapkv(budget=50, window=20)",
        "chunkkv(keep=0.4, window=8)",
        "tova(budget=40, hold=false)",
        "knorm(keep=0.5)",
        "keydiff(budget=33)",
        "lagkv(keep=0.3, lag=16)",
        "random(keep=0.2)",
    ],
)
def test_the_last_queries_are_all_that_a_policy_asks_for(policy: str) -> None:
    """And every head keeps as many tokens as the setup says, so that vLLM's manager knows."""
    setup = setup_of(f"{policy} + int8 + window(sinks=2, recent=5)")
    assert setup.policy is not None
    assert setup.policy.uniform
    keys, values = torch.randn(2, 1, HEADS, 130, DIM)
    queries = torch.randn(1, 2 * HEADS, 130, DIM)
    alive = torch.ones(1, HEADS, 130, dtype=torch.bool)
    whole, last = (
        setup.policy.select(Chunk(seen, keys, values, alive, 0, 2, 5, DIM**-0.5, 1, 4))
        for seen in (queries, queries[:, :, 130 - setup.voters :])
    )
    assert torch.equal(whole, last)
    assert whole.sum(-1).tolist() == [[setup.geometry.kept(130)] * HEADS]
