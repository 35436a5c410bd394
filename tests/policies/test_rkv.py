"""R-KV against the paper's formulas, token by token in float64, and what it holds while generating."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from far_device import FAR, Counted
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvcomp import Stack
from kvcomp.cache.layer import LayerStore
from kvcomp.policies import rkv
from kvcomp.policies.rkv import RKV, redundancy
from kvcomp.stages import Chunk, Held

D = 8


def chunk(n: int, rows: int = 2, heads: int = 2, group: int = 3, seed: int = 0, dead: float = 0.0) -> Chunk:
    """Keys that resemble each other in few directions, as those of repeated text."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(rows, heads * group, n, D, generator=generator)
    k = torch.randn(rows, heads, 5, D, generator=generator)[:, :, torch.randint(5, (n,), generator=generator)]
    k = k + 0.4 * torch.randn(k.shape, generator=generator)
    alive = torch.rand(rows, heads, n, generator=generator) >= dead
    return Chunk(q, k, k, alive, 0, 2, 5, 0.7, 1, 4)


def softmax(x: dict[int, float]) -> dict[int, float]:
    top = max(x.values(), default=0.0)
    total = sum(math.exp(v - top) for v in x.values())
    return {j: math.exp(v - top) / total for j, v in x.items()}


def redundancies(keys: Tensor, alive: list[int], similar: float) -> list[float]:
    """The paper's redundancy of one head's keys [n, D], from the whole matrix of similarities."""
    unit = keys.double() / keys.double().norm(dim=-1, keepdim=True)
    cosine = {(i, j): 0.0 if i == j else float(unit[i] @ unit[j]) for i in alive for j in alive}
    for i in alive:
        near = [j for j in alive if cosine[i, j] > similar]
        if near:
            cosine[i, max(near)] = 0.0
    found = softmax({j: sum(cosine[i, j] for i in alive) / len(alive) for j in alive})
    return [found.get(j, 0.0) for j in range(len(keys))]


def definition(c: Chunk, policy: RKV) -> Tensor:
    """Scores [b, Hkv, n] in float64: loops over heads, queries and tokens."""
    assert c.queries is not None
    rows, heads, n, _ = c.keys.shape
    group, window = c.queries.shape[1] // heads, min(policy.window, n)
    scores = torch.zeros(rows, heads, n, dtype=torch.float64)
    for b in range(rows):
        for h in range(heads):
            alive = c.alive[b, h].nonzero().flatten().tolist()
            k, votes = c.keys[b, h].double(), [0.0] * (n - window)
            for i in range(n - window, n):
                q = c.queries[b, h * group : (h + 1) * group, i].double()
                logits = softmax({j: float((q @ k[j] * c.scale).max()) for j in alive if j < n - window})
                for j, weight in logits.items():
                    votes[j] += weight / window
            half = policy.kernel // 2
            pooled = [max(votes[max(j - half, 0) : j + half + 1]) for j in range(n - window)] + [0.0] * window
            redundant = redundancies(c.keys[b, h], alive, policy.similar)
            mixed = [policy.mix * x - (1 - policy.mix) * y for x, y in zip(pooled, redundant, strict=True)]
            scores[b, h] = torch.tensor(mixed, dtype=torch.float64)
    return scores


@pytest.mark.parametrize(("heads", "group"), [(1, 1), (2, 3), (1, 4), (2, 8)])
@settings(deadline=None, max_examples=8)
@given(
    n=st.integers(1, 50),
    window=st.integers(1, 12),
    kernel=st.sampled_from([1, 3, 7]),
    mix=st.sampled_from([0.0, 0.1, 0.6, 1.0]),
    similar=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    dead=st.sampled_from([0.0, 0.3]),
    budget=st.integers(1, 50),
    seed=st.integers(0, 1000),
)
def test_the_kept_set_is_the_definition(
    heads: int,
    group: int,
    n: int,
    window: int,
    kernel: int,
    mix: float,
    similar: float,
    dead: float,
    budget: int,
    seed: int,
) -> None:
    c = chunk(n, 2, heads, group, seed, dead)
    policy = RKV(budget=budget, window=window, kernel=kernel, mix=mix, similar=similar)
    wanted = definition(c, policy)
    torch.testing.assert_close(policy.scores(c).double(), wanted, rtol=1e-4, atol=1e-6)
    kept = policy.select(c)
    assert not bool((kept & ~c.alive).any())
    first = min(2, n)
    last = min(max(window, 5), n - first)
    count = min(max(budget, first + last), n)
    if count == n:
        assert torch.equal(kept, c.alive)
        return
    open_ = wanted.masked_fill(~c.alive, -math.inf)
    open_[..., :first] = open_[..., n - last :] = math.inf
    best = open_.sort(-1, descending=True).values
    edge, after = best[..., count - 1 : count], best[..., count : count + 1]
    clear = (edge - after > 1e-5) & edge.isfinite()  # max pooling makes ties: any choice is right then
    assert torch.equal(kept & clear, (open_ >= edge) & c.alive & clear)
    if not dead:
        assert kept.sum(-1).unique().tolist() == [count]


def test_the_newest_of_similar_tokens_stays() -> None:
    """Of one token that comes again and again among others that resemble nothing."""
    n, again = 60, [5, 12, 20, 33, 41]
    keys = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)))[0][None, None, :n]
    keys[0, 0, again] = keys[0, 0, 5].clone()
    found = redundancy(keys, torch.ones(1, 1, n, dtype=torch.bool), 0.5)[0, 0]
    worst = found.argsort(descending=True).tolist()
    assert set(worst[:4]) == set(again[:-1])
    assert float(found[41]) < float(found[again[:-1]].min())
    assert float(found.sum()) == pytest.approx(1)
    c = Chunk(torch.zeros(1, 2, n, 64), keys, keys, torch.ones(1, 1, n, dtype=torch.bool), 0, 0, 0, 1.0, 0, 1)
    gone = ~RKV(keep=(n - 4) / n).select(c)[0, 0]
    assert gone.nonzero().flatten().tolist() == again[:-1]


@pytest.mark.parametrize("n", [1, 2, 8, 13, 40])
def test_few_tokens_and_equal_ones(n: int) -> None:
    c = chunk(n)
    for keys in (c.keys, torch.zeros_like(c.keys), torch.ones_like(c.keys)):
        policy = RKV(keep=0.5)
        same = replace(c, keys=keys, sinks=0, recent=0)
        assert bool(policy.scores(same).isfinite().all())
        assert policy.select(same).sum(-1).unique().tolist() == [policy.kept(n, 0, 0, 1, 4)]


@pytest.mark.parametrize(("block", "rows"), [(1, 1), (100, 7), (3000, 3), (1 << 22, 64)])
def test_blocks_of_any_size_give_the_same(block: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    c = chunk(90, dead=0.2)
    wanted = definition(c, RKV())
    monkeypatch.setattr(rkv, "BLOCK", block)
    monkeypatch.setattr(rkv, "ROWS", rows)
    torch.testing.assert_close(RKV().scores(c).double(), wanted, rtol=1e-4, atol=1e-6)


def test_memory_is_linear_in_the_tokens() -> None:
    largest = []
    for n in (16384, 32768):
        k, q = (torch.empty(1, heads, n, 64, device=FAR) for heads in (8, 32))
        alive = torch.empty(1, 8, n, dtype=torch.bool, device=FAR)
        with torch.no_grad(), Counted() as counted:
            RKV(keep=0.5).scores(Chunk(q, k, k, alive, 0, 0, 0, 0.1, 0, 1))
        largest.append(counted.largest)
    assert largest[1] <= 2 * largest[0] <= 4 * k.untyped_storage().nbytes()


def test_defaults_are_those_published() -> None:
    """github.com/Zefan-Cai/R-KV: the class of its cache, and lambda of the paper."""
    assert RKV() == RKV(budget=128, window=8, kernel=7, mix=0.1, similar=0.5, hold=True)


# -- while generating ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mix", [0.0, 0.1, 1.0])
def test_pages_score_as_their_tokens(mix: float) -> None:
    """Of streams with different numbers of pages: what lies past them counts for nothing."""
    pages, size = [3, 0, 4], 5
    generator = torch.Generator().manual_seed(2)
    keys = torch.randn(3, 4, size, D, generator=generator)
    attention = torch.rand(3, 4, generator=generator)
    for s, count in enumerate(pages):
        keys[s, count:] = math.nan
    counts = torch.tensor(pages)
    held = Held(counts * size, counts, size, 0, 1, attention, attention, keys=lambda: keys)
    found = RKV(budget=10, mix=mix).page_scores(held)
    for s, count in enumerate(pages):
        redundant = redundancies(keys[s, :count].flatten(0, 1), list(range(count * size)), 0.5)
        for page in range(count):
            lost = sum(redundant[page * size : (page + 1) * size])
            wanted = mix * float(attention[s, page]) - (1 - mix) * lost
            assert float(found[s, page]) == pytest.approx(wanted, abs=1e-5)


def test_repeated_pages_leave_first() -> None:
    """A token that is generated again and again: its older copies leave, and what was said once stays."""
    size, budget = 16, 150
    generator = torch.Generator().manual_seed(3)
    said = torch.randn(1, 2, 5 * size, 32, generator=generator)
    k = torch.cat([said, torch.randn(1, 2, 1, 32, generator=generator).expand(-1, -1, 12 * size, -1)], 2)
    v = torch.arange(float(k.shape[2])).view(1, 1, -1, 1).expand(k.shape).contiguous()
    held = {}
    for spec in ("rkv(budget=150, window=8)", "rkv(budget=150, window=8, mix=1.0)"):
        plan = Stack.parse(spec + " + none + window(sinks=0, recent=0)").plan(0, 1)
        store = LayerStore(replace(plan, page_size=size))
        store.start(k, v)
        store.write(k[:, :, : 5 * size], v[:, :, : 5 * size], None, torch.zeros(1, 4, 5 * size, 32), 0.2)
        for at in range(5 * size, k.shape[2]):
            store.append(k[:, :, at : at + 1], v[:, :, at : at + 1])
            store.attend(k[:, :, at : at + 1].repeat_interleave(2, 1) * 3, 0.2)
            store.settle()
            assert int(store.kept.max()) < budget + size
        held[spec] = [set(store._tokens(s)[1][:, 0].long().tolist()) for s in range(2)]
    by_both, by_attention = held.values()
    for tokens, others in zip(by_both, by_attention, strict=True):
        assert set(range(5 * size)) <= tokens  # with attention alone, the copies that are attended to stay instead
        assert len(set(range(5 * size)) & others) < 3 * size


def test_rows_of_a_padded_batch_generate_as_they_would_alone() -> None:
    lengths, n, steps = (120, 77, 30), 120, 150
    generator = torch.Generator().manual_seed(4)
    k, v, q = (torch.randn(3, h, n + steps, 32, generator=generator) for h in (2, 2, 6))
    v[..., 0] = torch.arange(float(n + steps))
    valid = torch.arange(n) >= torch.tensor([[n - length] for length in lengths])
    spec = "rkv(budget=70) + int(bits=8, group=16) + window(sinks=2, recent=8)"
    plan = replace(Stack.parse(spec).plan(0, 1), page_size=16)

    def run(rows: slice, first: int, mask: Tensor | None) -> LayerStore:
        store = LayerStore(plan)
        store.start(k[rows], v[rows])
        store.write(k[rows, :, first:n], v[rows, :, first:n], mask, q[rows, :, first:n], 0.2)
        for at in range(n, n + steps):
            store.append(k[rows, :, at : at + 1], v[rows, :, at : at + 1])
            store.attend(q[rows, :, at : at + 1], 0.2)
            store.settle()
        return store

    batch = run(slice(0, 3), 0, valid)
    for b, length in enumerate(lengths):
        alone = run(slice(b, b + 1), n - length, None)
        for s in range(2):
            ours, theirs = batch._tokens(2 * b + s), alone._tokens(s)
            assert all(torch.equal(x, y) for x, y in zip(ours, theirs, strict=True))
            assert 70 <= len(ours[0]) < 70 + 16
