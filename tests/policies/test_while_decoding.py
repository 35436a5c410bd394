"""Budgets that hold while generating: which pages leave, what is held, and that rows and forks keep to themselves."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import tiny_models as models
import torch
from generation import tokens
from model_part import Rope
from scored import SCORED, spec_of
from torch import Tensor

from kvcomp import CompressedCache, Stack
from kvcomp.cache.layer import LayerStore
from kvcomp.stages.plan import held_by_stream

PAGE, SINKS, RECENT = 16, 2, 8
TAIL = f" + none + window(sinks={SINKS}, recent={RECENT})"


def started(
    spec: str, rows: int = 1, heads: int = 2, prompt: int = 50, seed: int = 0
) -> tuple[LayerStore, Tensor, Tensor]:
    """A store after a prompt, with keys and values [B, H, 400, 8] to go on with; values say where they stood."""
    generator = torch.Generator().manual_seed(seed)
    k = torch.randn(rows, heads, 400, 8, generator=generator)
    v = torch.arange(400.0).view(1, 1, 400, 1).expand(rows, heads, 400, 8).contiguous()
    store = LayerStore(replace(Stack.parse(spec).plan(0, 1), page_size=PAGE))
    store.start(k, v)
    q = torch.randn(rows, 2 * heads, prompt, 8, generator=generator)
    store.write(k[:, :, :prompt], v[:, :, :prompt], None, q, 0.3)
    return store, k, v


def positions(store: LayerStore, stream: int) -> list[int]:
    return store._tokens(stream)[1][:, 0].long().tolist()


@pytest.mark.parametrize("heads_choose", ["own", "common", "adaptive"])
def test_the_pages_that_leave_are_those_that_got_least(heads_choose: str) -> None:
    """Against every weight of a softmax over what is held, kept in plain lists."""
    budget, heads = 70, 2
    store, k, v = started(f"h2o(budget={budget}, heads={heads_choose})" + TAIL)
    size = store.plan.page_size
    held = [positions(store, s) for s in range(heads)]
    got: list[dict[int, list[float]]] = [{}, {}]  # per stream: first token of a page -> attention of each query
    for at in range(50, 400):
        store.append(k[:, :, at : at + 1], v[:, :, at : at + 1])
        q = torch.randn(1, 2 * heads, 1, 8)
        store.attend(q, 0.3)
        for s in range(heads):
            held[s].append(at)
            logits = q[0, 2 * s : 2 * s + 2, 0] @ k[0, s, held[s]].T * 0.3
            weights = logits.softmax(-1).mean(0)
            for page in range(int(store.table.counts[s])):
                first = SINKS + page * size
                got[s].setdefault(held[s][first], []).append(float(weights[first : first + size].sum()))
        before = store.table.counts.clone()
        store.settle()
        pages = {
            s: int(before[s]) + (len(held[s]) - SINKS - int(before[s]) * size == RECENT + size) for s in range(heads)
        }
        worth = {
            (s, p): sum(x) / len(x) if (x := got[s].get(held[s][SINKS + p * size])) else 0.0
            for s in range(heads)
            for p in range(pages[s])
        }
        if heads_choose == "common":
            worth = {(s, p): (worth[0, p] + worth[1, p]) / 2 for s, p in worth}
        asked = {(s, p): len(got[s].get(held[s][SINKS + p * size], [])) for s, p in worth}
        newest = {(s, p) for s, p in worth if SINKS + (p + 1) * size > len(held[s]) - budget // 2}  # h2o's newest half
        worth = {k: 2 * max(size - asked[k], 0) + 2 * (size + 1) * (k in newest) + x for k, x in worth.items()}
        for group in [range(heads)] if heads_choose == "adaptive" else [[s] for s in range(heads)]:
            over = sum(len(held[s]) for s in group) - budget * len(group)
            ranked = sorted((key for key in worth if key[0] in group), key=lambda key: worth[key])
            for s, p in sorted(ranked[: max(over, 0) // size], reverse=True):
                del held[s][SINKS + p * size : SINKS + (p + 1) * size]
        assert [positions(store, s) for s in range(heads)] == held
    assert all(held[s][:SINKS] == [0, 1] and held[s][-RECENT:] == list(range(392, 400)) for s in range(heads))
    assert held[0] != held[1] or heads_choose == "common"


def test_what_is_needed_stays_and_what_is_not_leaves() -> None:
    """Queries look for the tokens 100 to 110: their page outlives all others."""
    store, k, v = started("h2o(budget=80)" + TAIL)
    k[:, :, 100:110] = 4.0
    for at in range(50, 400):
        store.append(k[:, :, at : at + 1], v[:, :, at : at + 1])
        store.attend(torch.full((1, 4, 1, 8), 0.5), 0.3)
        store.settle()
    for s in range(2):
        assert set(range(100, 110)) <= set(positions(store, s))
        assert len(positions(store, s)) < 80 + store.plan.page_size


@pytest.mark.parametrize("heads_choose", ["own", "common", "adaptive"])
@pytest.mark.parametrize("window", ["sinks=0, recent=0", "sinks=4, recent=32"])
@pytest.mark.parametrize("name", SCORED)
def test_new_pages_stay_and_old_ones_leave(name: str, window: str, heads_choose: str) -> None:
    """A page that nobody was asked about yet is young: of what is generated at least a page is held, of any score."""
    budget, prompt, heads = 256, 400, 2
    generator = torch.Generator().manual_seed(1)
    k, q = (torch.randn(1, h, 900, 16, generator=generator) for h in (heads, 2 * heads))
    v = torch.arange(900.0).view(1, 1, 900, 1).expand(1, heads, 900, 16).contiguous()
    policy = spec_of(name, f"budget={budget}, hold=true, heads={heads_choose}", 16)
    spec = f"{policy} + none + window({window})"
    store = LayerStore(Stack.parse(spec).plan(1, 4))
    store.model = Rope(2 * heads, 16)
    store.start(k, v)
    store.write(k[:, :, :prompt], v[:, :, :prompt], None, q[:, :, :prompt], 0.25)

    def of_prompt() -> list[int]:
        return [sum(at < prompt for at in positions(store, s)) for s in range(heads)]

    before, size = of_prompt(), store.plan.page_size
    policy = store.plan.policies[0]  # whose budget differs between layers in a pyramid
    limit = budget if name != "pyramidkv" else policy.kept(1 << 40, store.plan.sinks, 0, 1, 4)
    for at in range(prompt, 900):
        store.append(k[:, :, at : at + 1], v[:, :, at : at + 1])
        store.attend(q[:, :, at : at + 1], 0.25)
        pages = store.table.counts.clone()
        store.settle()
        if not torch.equal(pages, store.table.counts) or at % 50 == 49:
            held = store.kept.tolist()
            generated = [n - old for n, old in zip(held, of_prompt(), strict=True)]
            assert min(generated) >= min(size, at + 1 - prompt)
            assert sum(held) < heads * (limit + size)
    if heads_choose == "adaptive":  # a head may keep all that it has where another keeps less
        assert sum(of_prompt()) <= sum(before) - size
    else:
        assert all(0 <= now <= old - size for now, old in zip(of_prompt(), before, strict=True))


@pytest.mark.parametrize("policy", ["h2o(budget=70)", "rkv(budget=70)"])
def test_rows_and_copies_keep_to_themselves(policy: str) -> None:
    store, k, v = started(policy + TAIL, rows=2)
    alone = LayerStore(store.plan)
    alone.start(k[1:], v[1:])
    q = torch.randn(2, 4, 400, 8)
    both, single = LayerStore(store.plan), alone
    both.start(k, v)
    both.write(k[:, :, :50], v[:, :, :50], None, q[:, :, :50], 0.3)
    single.write(k[1:, :, :50], v[1:, :, :50], None, q[1:, :, :50], 0.3)
    for at in range(50, 300):
        for one, rows in ((both, slice(0, 2)), (single, slice(1, 2))):
            one.append(k[rows, :, at : at + 1], v[rows, :, at : at + 1])
            one.attend(q[rows, :, at : at + 1], 0.3)
            one.settle()
    assert [positions(both, s) for s in (2, 3)] == [positions(single, s) for s in (0, 1)]
    again = LayerStore(store.plan)
    again.restore(copy.deepcopy(both.state()), torch.device("cpu"))
    fork = copy.deepcopy(both)
    fork.select_rows(torch.tensor([1, 1]))
    for one in (again, fork):
        rows = slice(0, 2) if one is again else slice(1, 2)
        for at in range(300, 400):
            expand = (2, -1, -1, -1)
            one.append(k[rows, :, at : at + 1].expand(expand), v[rows, :, at : at + 1].expand(expand))
            one.attend(q[rows, :, at : at + 1].expand(expand), 0.3)
            one.settle()
    for at in range(300, 400):
        both.append(k[:, :, at : at + 1], v[:, :, at : at + 1])
        both.attend(q[:, :, at : at + 1], 0.3)
        both.settle()
    assert [positions(again, s) for s in range(4)] == [positions(both, s) for s in range(4)]
    assert [positions(fork, s) for s in range(4)] == [positions(both, s) for s in (2, 3, 2, 3)]


@pytest.mark.parametrize(
    "spec", ["h2o(budget=128)", "tova(budget=128) + kivi(bits=4)", "rkv(budget=128)", "streaming(recent=128)"]
)
def test_what_is_held_stays_flat(spec: str) -> None:
    """A generation of four times the budget."""
    model = models.make("llama", "sdpa")
    cache = CompressedCache(spec + " + window(sinks=4, recent=32)", model, max_tokens=1000)
    held: list[int] = []
    with torch.no_grad():
        model(tokens(1, 200), past_key_values=cache)
        for step in tokens(1, 500, seed=1).split(1, 1):
            model(step, past_key_values=cache)
            held.append(cache.memory().held)
    page = cache.layers[0].plan.page_size
    kept = [int(layer.store.kept.max()) for layer in cache.layers]
    assert max(kept) <= 128 + 4 + page
    assert max(held[200:]) <= 1.02 * max(held[:200])
    assert cache.get_seq_length() == 700


@pytest.mark.parametrize("spec", ["h2o(keep=0.3)", "snapkv(budget=64, window=8)", "knorm(budget=64)"])
def test_others_keep_what_is_generated(spec: str) -> None:
    store, k, v = started(spec + TAIL)
    before = int(store.kept[0])
    for at in range(50, 300):
        store.append(k[:, :, at : at + 1], v[:, :, at : at + 1])
        store.attend(torch.randn(1, 4, 1, 8), 0.3)
        store.settle()
    assert store.kept.tolist() == [before + 250] * 2
    assert store.table.received is None


def test_a_plan_counts_what_watching_holds() -> None:
    k, v, q = (torch.randn(1, h, 900, 64) for h in (2, 2, 4))
    plan = Stack.parse("h2o(budget=512) + kivi(bits=4)").plan(0, 1)
    store = LayerStore(plan)
    store.start(k, v)
    store.write(k, v, None, q, 0.1)
    held = store.held(set())
    assert store.table.received is not None
    assert 2 * held_by_stream(plan, 64, 64, 900, torch.float32) == sum(held.values()) - held["history"]
