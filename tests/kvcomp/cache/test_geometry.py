"""Counts and slots, against the formulas that Hugging Face's stores and vLLM's blocks each had of their own."""

from __future__ import annotations

from itertools import pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcomp.cache.geometry import Extent, Extents
from kvcomp.geometry import Geometry
from kvcomp.stages.stack import Stack

POLICIES = [
    "none",
    "snapkv(budget=96)",
    "snapkv(keep=0.3, window=20)",
    "h2o(budget=128)",
    "h2o(budget=40)",
    "tova(keep=0.1)",
    "tova(budget=40)",
    "knorm(budget=128, hold=true)",
    "snapkv(budget=150, window=20, hold=true)",
    "streaming(sinks=4, recent=64)",
    "streaming(sinks=0, recent=17)",
    "streaming(sinks=4, recent=200) + streaming(sinks=2, recent=64)",
]
geometries = st.builds(
    Geometry, st.sampled_from([16, 64, 96]), st.integers(0, 9), st.integers(0, 200), st.integers(0, 5)
)


def stacks() -> st.SearchStrategy[Stack]:
    def built(policy: str, sinks: int, recent: int) -> Stack:
        return Stack.parse(f"{policy} + int8 + window(sinks={sinks}, recent={recent})")

    return st.builds(built, st.sampled_from(POLICIES[1:]), st.integers(4, 8), st.integers(0, 100))


class Before:
    """As `integrations/vllm/setup.py` had it until 2026-11."""

    def __init__(self, stack: Stack, layers: int, drafts: int) -> None:
        self.page_size, self.sinks, self.recent = stack.page_size, stack.window.sinks, stack.window.recent
        self.layers, self.drafts = layers, drafts
        named = [policy for policy in stack.policies if policy.name == "streaming"]
        self.streaming = min((policy.recent for policy in named), default=None)
        self.policy = next((policy for policy in stack.policies if policy.name != "streaming"), None)

    def kept(self, prompt: int) -> int:
        return prompt if self.policy is None else self.policy.kept(prompt, self.sinks, self.recent, 0, self.layers)

    @property
    def most(self) -> int | None:
        if self.policy is None or self.policy.budget is None or not self.policy.watches:
            return None
        return max(self.policy.budget, self.sinks + self.recent)

    def turns(self, past: int, end: int, prompt: int) -> list[int]:
        turns = []
        most, kept = self.most, self.kept(prompt)
        if past < prompt < end and (kept < prompt or most is not None):
            turns.append(prompt)
        if most is not None:
            phases = {(n + prompt - kept) % self.page_size for n in (self.sinks + self.recent, most)}
            turns += [t for t in range(max(past, prompt) + 1, end) if t % self.page_size in phases]
        return turns

    @property
    def ring(self) -> int:
        return self.recent + self.page_size + self.drafts

    def paged(self, tokens: int) -> int:
        return max(tokens - self.sinks - self.recent, 0) // self.page_size

    def extent(self, tokens: int, prompt: int) -> Extent:
        size = self.page_size
        gone = prompt - self.kept(prompt) if tokens >= prompt else 0
        held = tokens - gone
        paged = self.paged(held)
        exact = held - paged * size
        if self.streaming is not None and tokens >= prompt:
            expired = min(max(tokens - self.sinks - self.streaming, 0) // size, paged)
            return Extent(held, paged - expired, (0, expired), exact, paged)
        if self.most is not None and tokens >= prompt:
            left = max(held - self.most, 0) // size
            room = self.paged(self.most + size)
            return Extent(held, paged - left, (room, max(-(-tokens // size), room)), exact, paged)
        first = self.paged(prompt - gone)
        spare = -(-(gone + self.sinks + self.recent) // size) if gone else 0
        return Extent(held, paged, (first, first + spare), exact, paged)


@settings(max_examples=300, deadline=None)
@given(stacks(), st.integers(1, 40), st.integers(0, 5), st.integers(1, 900), st.integers(0, 1500), st.integers(0, 400))
def test_extents_are_those_of_before(
    stack: Stack, layers: int, drafts: int, prompt: int, tokens: int, more: int
) -> None:
    before = Before(stack, layers, drafts)
    now = Extents(
        stack.page_size, stack.window.sinks, stack.window.recent, drafts, policies=stack.policies, layers=layers
    )
    assert now.kept(prompt) == before.kept(prompt)
    assert now.limit == before.most
    assert now.newest == before.streaming
    assert now.policy == before.policy
    assert now.extent(tokens, prompt) == before.extent(tokens, prompt)
    assert now.split_points(tokens, tokens + more, prompt) == before.turns(tokens, tokens + more, prompt)


@given(geometries, st.lists(st.integers(0, 3000), min_size=1))
def test_slots_are_those_of_before(geometry: Geometry, tokens: list[int]) -> None:
    sinks, ring = geometry.sinks, geometry.recent + geometry.page_size + geometry.drafts
    assert (geometry.ring, geometry.slots) == (ring, sinks + ring)
    position = torch.tensor(tokens)
    before = torch.where(position < sinks, position, sinks + (position - sinks) % ring)
    assert geometry.slot(position).tolist() == before.tolist() == [geometry.slot(token) for token in tokens]


@given(geometries, st.integers(0, 3000))
def test_counts_are_those_of_before(geometry: Geometry, tokens: int) -> None:
    size, sinks, recent = geometry.page_size, geometry.sinks, geometry.recent
    pages = max(tokens - sinks - recent, 0) // size
    assert (geometry.pages(tokens), geometry.exact(tokens)) == (pages, tokens - pages * size)
    assert geometry.exact(tokens) < sinks + recent + size


@given(stacks(), st.integers(1, 40), st.integers(0, 2000))
def test_a_plan_stores_what_it_did(stack: Stack, layers: int, tokens: int) -> None:
    plan = stack.plan(0, layers)
    kept = min([tokens, *(p.kept(tokens, plan.sinks, plan.recent, 0, layers) for p in stack.policies)])
    pages = max(kept - plan.sinks - plan.recent, 0) // plan.page_size
    assert plan.stored(tokens) == (pages, kept - pages * plan.page_size)
    assert plan.slots == plan.sinks + plan.recent + plan.page_size


@settings(deadline=None)
@given(geometries, st.lists(st.integers(1, 300), min_size=1, max_size=12))
def test_a_ring_holds_what_no_page_does(geometry: Geometry, steps: list[int]) -> None:
    """However tokens come: those that are due lie in the ring or are new, and no slot is taken that is still needed."""
    ring: dict[int, int] = {}
    counts = [0]
    for new in steps:
        counts.append(counts[-1] + new)
    paged: list[int] = []
    for before, after in pairwise(counts):
        for token in geometry.due(before, after):
            assert token >= before or ring[geometry.slot(token)] == token
            paged.append(token)
        for token in range(before, after):
            ring[geometry.slot(token)] = token
        exact = [*range(min(geometry.sinks, after)), *range(max(geometry.sinks, after - geometry.ring), after)]
        assert all(ring[geometry.slot(token)] == token for token in exact)
        behind = sorted(set(range(geometry.sinks, after)) - set(paged))
        assert len(behind) < geometry.recent + geometry.page_size
        assert all(ring[geometry.slot(token)] == token for token in behind)
    assert paged == list(range(geometry.sinks, geometry.sinks + geometry.pages(counts[-1]) * geometry.page_size))


@given(geometries, st.integers(0, 1000), st.data())
def test_rejected_drafts_leave_what_was_before_them(geometry: Geometry, tokens: int, data: st.DataObject) -> None:
    """Slots of tokens that are exact without the drafts are none of the drafts'."""
    new = data.draw(st.integers(0, geometry.drafts))
    first = geometry.sinks + geometry.pages(tokens) * geometry.page_size
    exact = {geometry.slot(token) for token in [*range(min(geometry.sinks, tokens)), *range(first, tokens)]}
    assert exact.isdisjoint(geometry.slot(token) for token in range(tokens, tokens + new))
