"""Prompts that are written in several chunks: each has its part of a budget, and what is held is the prompt's."""

from __future__ import annotations

from itertools import pairwise

import pytest
import scored
import torch
from model_part import Rope
from scored import SCORED

from kvcomp import Stack
from kvcomp.cache.layer import LayerStore
from kvcomp.stages.registry import find

HOLDING = [name for name in SCORED if find(name)(budget=1000).limit]  # a budget, unless told otherwise
EDGES = (0, 512, 1024, 1536, 1900)


def written(spec: str, edges: tuple[int, ...], generated: int = 0) -> tuple[LayerStore, list[list[list[int]]]]:
    """A store after a prompt in chunks, with tokens generated after the first one, and what it held after each chunk:
    the positions of each stream's tokens."""
    generator = torch.Generator().manual_seed(0)
    n = edges[-1] + generated
    k, q = (torch.randn(1, heads, n, 16, generator=generator) for heads in (2, 4))
    v = torch.arange(float(n)).view(1, 1, n, 1).expand(1, 2, n, 16).contiguous()
    store, found = LayerStore(Stack.parse(spec).plan(1, 4)), []
    store.model = Rope(4, 16)
    store.start(k, v)
    steps = [*pairwise(edges)]
    at = 0
    for first, last in steps:
        part = slice(at, at + last - first)
        if at:
            store.attend(q[:, :, part], 0.25, None, (k[:, :, part], v[:, :, part], None))
        store.write(k[:, :, part], v[:, :, part], None, q[:, :, part], 0.25)
        at = part.stop
        found.append([store._tokens(s)[1][:, 0].long().tolist() for s in range(2)])
        for _ in range(generated if first == 0 else 0):
            store.append(k[:, :, at : at + 1], v[:, :, at : at + 1])
            store.attend(q[:, :, at : at + 1], 0.25)
            store.settle()
            at += 1
    return store, found


def spec_of(name: str, size: str) -> str:
    return scored.spec_of(name, size, 16, window=16) + " + none"


@pytest.mark.parametrize("hold", ["", ", hold=true"])
@pytest.mark.parametrize("name", SCORED)
def test_a_budget_is_of_the_whole_prompt(name: str, hold: str) -> None:
    store, found = written(spec_of(name, f"budget=320{hold}"), EDGES)
    policy, page = store.plan.policies[0], store.plan.page_size
    for end, now in zip(EDGES[1:], found, strict=True):
        planned = policy.kept(end, 0, 0, 1, 4)
        assert planned - 1 <= sum(map(len, now)) / 2 < planned + page
    for stream in found[-1]:
        of_chunk = [sum(first <= at < last for at in stream) for first, last in pairwise(EDGES)]
        # half of h2o's budget is for the newest; curdkv and kvzap score values, which are positions here
        assert (of_chunk[0] > 0 and of_chunk[-1] > 0) or name in ("curdkv", "h2o", "kvzap")
        assert stream == sorted(stream)
    store.append(*(torch.zeros(1, 2, 1, 16) for _ in range(2)))
    assert (store.table.received is None) is (not hold and name not in HOLDING)  # nothing is watched any more


@pytest.mark.parametrize("name", [name for name in SCORED if name not in HOLDING])
def test_what_came_before_the_prompt_stays(name: str) -> None:
    """A later turn has a budget of its own, and generated tokens have none, unless it is to hold."""
    store, found = written(spec_of(name, "budget=320"), (0, 512, 1024, 1500), generated=100)
    policy, page = store.plan.policies[0], store.plan.page_size
    for first, last in zip(*(found[i] for i in (0, -1)), strict=True):
        old = set(first) | set(range(512, 612))
        assert old <= set(last)
    of_turn = sum(len(x) for x in found[-1]) / 2 - sum(len(x) for x in found[0]) / 2 - 100
    assert policy.kept(976, 0, 0, 1, 4) - 1 <= of_turn < policy.kept(976, 0, 0, 1, 4) + 2 * page


@pytest.mark.parametrize("name", SCORED)
def test_policies_want_enough_to_choose_from(name: str) -> None:
    """With as many tokens as a policy gathers, those that it protects are a part of what it keeps."""
    for keep in (0.01, 0.1, 0.5):
        for sinks, recent in ((0, 0), (4, 128)):
            policy = find(name)(keep=keep)
            n = policy.gathers(sinks, recent)
            assert n >= 512
            assert abs(policy.kept(n, sinks, recent, 1, 4) - keep * n) <= (
                1 if policy.layers == "uniform" else keep * n
            )
