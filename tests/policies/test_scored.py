"""Scores against their definitions on materialized attention, and budgets to the token."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_part import Rope
from scored import SCORED, spec_of
from torch import Tensor

from kvcomp import SpecError, Stack
from kvcomp.cache.layer import LayerStore
from kvcomp.policies.budgets import in_spans, pyramid
from kvcomp.stages import Chunk
from kvcomp.stages.plan import held_by_stream
from kvcomp.stages.registry import find

D = 8


def chunk(
    n: int, rows: int = 2, heads: int = 2, group: int = 3, sinks: int = 2, recent: int = 5, seed: int = 0
) -> Chunk:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(rows, h, n, D, generator=generator) for h in (heads * group, heads, heads))
    alive = torch.ones(rows, heads, n, dtype=torch.bool)
    return Chunk(q, k, v, alive, 0, sinks, recent, 0.7, 1, 4, Rope(heads * group, D))


def attention(c: Chunk) -> Tensor:
    """The causal softmax [b, Hkv, G, n, n], all of it, in float64."""
    assert c.queries is not None
    n = c.keys.shape[2]
    q = c.queries.double().unflatten(1, (c.keys.shape[1], -1))
    logits = q @ c.keys.double().mT[:, :, None] * c.scale
    return logits.masked_fill(torch.ones(n, n).triu(1).bool(), -math.inf).softmax(-1)


def lag_definition(x: Tensor, lag: int, first: int) -> Tensor:
    """Scores [parts - 1, lag] of one head's x [n, D], token by token."""
    parts = (len(x) - first) // lag
    rows = []
    for p in range(parts - 1):
        own, behind = (x[first + i * lag : first + (i + 1) * lag].double() for i in (p, p + 1))
        low, high = behind.amin(0), behind.amax(0)
        spread = torch.stack([((token - low) / (high - low)).std() for token in own])
        rows.append(spread.softmax(0))
    return torch.stack(rows)


def definition(name: str, c: Chunk) -> Tensor:
    """Scores [b, Hkv, n] in float64, up to what leaves the order as it is."""
    k = c.keys.double()
    if name == "h2o":
        return attention(c).sum(3).mean(2)
    if name == "tova":
        return attention(c)[:, :, :, -1].mean((1, 2))[:, None].expand(k.shape[:3])
    if name == "knorm":
        return 1 / k.norm(dim=-1)
    if name == "keydiff":
        unit = k / k.norm(dim=-1, keepdim=True)
        mean = unit.mean(2, keepdim=True)
        return -(unit * mean).sum(-1) / mean.norm(dim=-1)
    if name == "expected_attention":
        return expected(c)
    raise AssertionError(name)


def expected(c: Chunk, epsilon: float = 0.0) -> Tensor:
    """E[exp(q . k)] of a Gaussian of queries at the mean of 512 positions, one query head after the other."""
    assert c.queries is not None
    b, heads, n, _ = c.keys.shape
    group = c.queries.shape[1] // heads
    rope = Rope(1, 1)
    turn = torch.stack([rope.matrix(D, n + i) for i in range(512)]).mean(0)
    scores = torch.zeros(b, heads, n, dtype=torch.float64)
    for row, head, member in itertools.product(range(b), range(heads), range(group)):
        q = c.queries[row, head * group + member].double()
        plain = torch.stack([rope.matrix(D, i).T @ q[i] for i in range(n)])[4:]
        mean = turn @ plain.mean(0)
        covariance = turn @ torch.cov(plain.T, correction=0) @ turn.T
        k = c.keys[row, head, 4:].double()
        logits = c.scale * k @ mean + c.scale**2 * torch.einsum("ni,ij,nj->n", k, covariance, k) / 2
        scores[row, head, 4:] += logits.softmax(0) / group
    scores = (scores + epsilon) * c.values.double().norm(dim=-1)
    scores[..., :4] = 1e9
    return scores


@pytest.mark.parametrize("name", ["h2o", "tova", "knorm", "keydiff", "expected_attention"])
@pytest.mark.parametrize(("heads", "group"), [(1, 1), (2, 3), (1, 4), (2, 8)])
@settings(deadline=None, max_examples=8)
@given(n=st.integers(12, 70), keep=st.floats(0.2, 0.9), seed=st.integers(0, 1000))
def test_the_kept_set_is_the_definition(name: str, heads: int, group: int, n: int, keep: float, seed: int) -> None:
    c = chunk(n, 2, heads, group, seed=seed)
    policy = find(name)(keep=keep)
    kept = policy.select(c)
    count = policy.kept(n, c.sinks, c.recent, 1, 4)
    newest = max(policy.newest(round(keep * n)), c.recent)
    scores = definition(name, c).clone()
    scores[..., : c.sinks] = scores[..., n - newest :] = math.inf
    assert kept.sum(-1).unique().tolist() == [count]
    best = scores.sort(-1, descending=True).values
    edge = best[..., count - 1 : count]
    clear = count == n or bool((edge - best[..., count : count + 1] > 1e-6 * edge.abs()).all())
    assert not clear or torch.equal(kept, scores >= edge)


@pytest.mark.parametrize(("heads", "group"), [(1, 1), (2, 3), (1, 8)])
@settings(deadline=None, max_examples=10)
@given(n=st.integers(12, 70), keep=st.floats(0.2, 0.9), seed=st.integers(0, 1000), alike=st.booleans())
def test_critical_takes_half_by_attention_and_half_by_what_values_do(
    heads: int, group: int, n: int, keep: float, seed: int, alike: bool
) -> None:
    c = chunk(n, 2, heads, group, seed=seed)
    assert c.model is not None
    base = find("h2o")(keep=keep, recent=0.0, heads="own" if alike else "adaptive")
    policy = replace(base, critical=True)
    kept, counts = policy.select(c), base.select(c).sum(-1)
    assert torch.equal(kept.sum(-1), counts)
    scores = definition("h2o", c) / n
    for b, h in itertools.product(range(2), range(heads)):
        norms = sum(
            (c.values[b, h].double() @ c.model.output()[h * group + g].double()).abs().sum(-1) for g in range(group)
        )
        guarded = set(range(c.sinks)) | set(range(n - c.recent, n))
        order = sorted(set(range(n)) - guarded, key=lambda t: -float(scores[b, h, t]))
        half = sorted(guarded) + order
        first = set(half[: int(counts[b, h]) // 2]) | guarded
        rest = sorted(set(range(n)) - first, key=lambda t: -float((scores[b, h, t] + 1e-4) * norms[t]))
        wanted = first | set(rest[: int(counts[b, h]) - len(first)])
        assert set(kept[b, h].nonzero().flatten().tolist()) == wanted


@pytest.mark.parametrize("epsilon", [0.001, 0.01, 10.0])
def test_epsilon_lets_large_values_count_without_a_score(epsilon: float) -> None:
    c = chunk(60)
    policy = find("expected_attention")(keep=0.4, epsilon=epsilon)
    torch.testing.assert_close(policy.scores(c)[..., 4:].double(), expected(c, epsilon)[..., 4:], rtol=1e-4, atol=1e-6)
    assert policy.select(c).ne(find("expected_attention")(keep=0.4).select(c)).any()


def test_a_threshold_keeps_what_scores_enough() -> None:
    c = chunk(90)
    scores = definition("h2o", c) / 90
    kept = find("h2o")(threshold=0.01).select(c)
    wanted = scores >= 0.01
    wanted[..., : c.sinks] = wanted[..., -c.recent :] = True
    assert torch.equal(kept, wanted)
    assert 0.1 < float(kept.float().mean()) < 0.9
    assert len(kept.sum(-1).unique()) > 1
    assert find("h2o")(threshold=0.01).kept(90, 2, 5, 0, 4) == 90


@pytest.mark.parametrize(("n", "lag"), [(40, 8), (47, 8), (19, 8), (15, 8), (70, 16)])
def test_lagkv_is_its_definition(n: int, lag: int) -> None:
    c = chunk(n)
    scores = find("lagkv")(lag=lag, first=3).scores(c)
    parts = (n - 3) // lag
    for b in range(2):
        for h in range(2):
            if parts < 2:
                assert bool((scores[b, h, 3:].diff() > 0).all())  # too short to compare: the newest tokens
                continue
            spread = (lag_definition(c.keys[b, h], lag, 3) + lag_definition(c.values[b, h], lag, 3)) / 2
            ranks = torch.empty_like(spread)
            for p in range(parts - 1):
                for rank, token in enumerate(spread[p].argsort().tolist()):
                    ranks[p, token] = rank / lag
            ours = scores[b, h, 3 : 3 + (parts - 1) * lag].view(parts - 1, lag)
            torch.testing.assert_close(ours.double(), ranks)
            assert bool((scores[b, h, 3 + (parts - 1) * lag :] >= 1).all())


@pytest.mark.parametrize("name", SCORED)
def test_a_short_turn_stays_whole(name: str) -> None:
    """A question about what was compressed; a long turn is compressed like a prompt."""
    (policy,) = Stack.parse(spec_of(name, "keep=0.25", D, window=16)).policies
    for n, all_stay in ((1, True), (60, True), (128, True), (129, False)):
        kept = policy.select(replace(chunk(n, sinks=0, recent=0), past=500))
        assert bool(kept.all()) is all_stay


def test_chance_repeats_and_layers_draw_apart() -> None:
    c = chunk(50)
    policy = find("random")(keep=0.5)
    assert torch.equal(policy.select(c), policy.select(c))
    other = policy.select(Chunk(**{**vars(c), "layer": 2}))
    assert not torch.equal(policy.select(c), other)


@pytest.mark.parametrize(
    ("name", "given_"),
    [
        (name, given_)
        for name in SCORED
        for given_ in ("keep=0.4", "budget=37", "keep=0.4, heads=adaptive", "keep=0.4, span=6")
        if (name, given_) != ("criticalkv", "keep=0.4, span=6")  # refused, as below
    ],
)
def test_budgets_are_exact_and_protect(name: str, given_: str) -> None:
    c = chunk(120)
    (policy,) = Stack.parse(spec_of(name, given_, D, window=8)).policies
    kept = policy.select(c)
    count = policy.kept(120, c.sinks, c.recent, c.layer, c.layers)
    if policy.heads == "adaptive":
        assert kept.sum((1, 2)).tolist() == [2 * count] * 2
        protected = c.sinks + max(policy.newest(count), c.recent)
        assert int(kept.sum(-1).min()) >= protected + int(policy.floor * (count - protected))
    else:
        assert kept.sum(-1).unique().tolist() == [count]
    assert bool(kept[..., : c.sinks].all())
    assert bool(kept[..., -c.recent :].all())


def fields(name: str) -> tuple[str, ...]:
    return tuple(find(name).__dataclass_fields__)


@given(
    mean=st.integers(0, 400),
    more=st.integers(0, 2000),
    beta=st.integers(1, 40),
    layers=st.integers(1, 40),
)
@settings(deadline=None, max_examples=200)
def test_a_pyramid_has_the_sum_of_its_mean(mean: int, more: int, beta: int, layers: int) -> None:
    most = mean + more
    sizes = [pyramid(mean, most, beta, layer, layers) for layer in range(layers)]
    assert sum(sizes) == layers * mean
    assert all(0 <= size <= most for size in sizes)
    assert all(a >= b - 1 for a, b in itertools.pairwise(sizes))  # falls, up to rounding
    if layers > 1 and more >= mean and mean >= 2 * beta:
        assert abs(sizes[0] - (2 * mean - mean / beta)) <= 1
        assert abs(sizes[-1] - mean / beta) <= 1


def test_a_stack_has_the_bytes_of_its_pyramid() -> None:
    """What a plan says of each layer is what its store holds."""
    n = 900
    k, v, q = (torch.randn(1, h, n, 64) for h in (2, 2, 4))
    stack = Stack.parse("pyramidkv(keep=0.25, window=16) + kivi(bits=4) + window(sinks=4, recent=32)")
    kept = []
    for layer in range(6):
        plan = stack.plan(layer, 6)
        store = LayerStore(plan)
        store.start(k, v)
        store.write(k, v, None, q, 0.1)
        kept.append(int(store.kept[0]))
        held = store.held(set())
        assert 2 * held_by_stream(plan, 64, 64, n, torch.float32) == sum(held.values()) - held["history"]
    assert sum(kept) == 6 * 225
    assert kept[0] > 2 * kept[-1]


def test_heads_share_a_layer_where_the_scores_are() -> None:
    """A head that attends sharply needs few tokens; one that attends evenly gets the rest, and bytes follow."""
    n = 800
    q, k, v = torch.zeros(1, 2, n, 64), torch.randn(1, 2, n, 64), torch.randn(1, 2, n, 64)
    q[0, 0] = k[0, 0, 300] * 3  # all of head 0 looks at one token
    stores = {}
    for name in ("snapkv", "adakv"):
        spec = f"{name}(keep=0.5, window=8, floor=0.184) + kivi(bits=4) + window(sinks=0, recent=0)"
        store = LayerStore(Stack.parse(spec).plan(0, 1))
        store.start(k, v)
        store.write(k, v, None, q, 0.5)
        stores[name] = store
    assert stores["snapkv"].kept.tolist() == [400, 400]
    ada = stores["adakv"].kept.tolist()
    assert sum(ada) == 800
    assert ada[0] == 8 + int(0.184 * 392) == 80  # the floor: a share of the budget besides the window
    held = {name: sum(store.held(set()).values()) for name, store in stores.items()}
    assert held["adakv"] == pytest.approx(held["snapkv"], rel=0.1)


def test_runs_stay_or_leave_together() -> None:
    c = chunk(200, sinks=3, recent=7)
    (policy,) = Stack.parse("chunkkv(keep=0.3, window=8)").policies
    kept = policy.select(c)
    assert torch.equal(kept[:, :1].expand_as(kept), kept)  # all heads alike
    cut = 0
    for at in range(3, 200 - 8, 10):
        run = kept[0, 0, at : min(at + 10, 192)]
        cut += bool(run.any()) and not bool(run.all())
    assert cut <= 1


@given(seed=st.integers(0, 1000), n=st.integers(5, 60), span=st.integers(2, 9), first=st.integers(0, 5))
@settings(deadline=None, max_examples=40)
def test_spans_are_ordered_by_their_means(seed: int, n: int, span: int, first: int) -> None:
    scores = torch.randn(1, 1, n, generator=torch.Generator().manual_seed(seed))
    order = in_spans(scores, span, first)[0, 0].argsort(descending=True).tolist()
    runs: dict[int, list[int]] = {}
    for token in range(n):
        runs.setdefault((token - first) // span, []).append(token)
    ranked = sorted(runs.values(), key=lambda tokens: -float(scores[0, 0, tokens].mean()))
    assert order == [token for tokens in ranked for token in tokens]


@pytest.mark.parametrize("name", SCORED)
def test_rows_of_a_padded_batch_choose_as_they_would_alone(name: str) -> None:
    lengths = (300, 170, 90, 30)
    k, v, q = (torch.randn(4, h, 300, 16, generator=torch.Generator().manual_seed(h)) for h in (2, 2, 4))
    valid = torch.arange(300) >= torch.tensor([[300 - length] for length in lengths])
    plan = Stack.parse(spec_of(name, "keep=0.4", 16) + " + int(bits=8) + window(sinks=2, recent=8)").plan(1, 4)
    batch = LayerStore(plan)
    batch.model = Rope(4, 16)
    batch.start(k, v)
    batch.write(k, v, valid, q, 0.25)
    for b, length in enumerate(lengths):
        row = (slice(b, b + 1), slice(None), slice(max(lengths) - length, None))
        alone = LayerStore(plan)
        alone.model = batch.model
        alone.start(k[row], v[row])
        alone.write(k[row], v[row], None, q[row], 0.25)
        assert batch.kept.view(4, 2)[b].tolist() == alone.kept.tolist()
        query = torch.randn(1, 4, 1, 16).expand(4, -1, -1, -1)
        together, single = batch.attend(query, 0.25).out[b], alone.attend(query[:1], 0.25).out[0]
        torch.testing.assert_close(together, single, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("spec", "named"),
    [
        ("h2o(keep=0)", "keep"),
        ("h2o(keep=0.1, budget=5)", "budget"),
        ("tova(layers=flat)", "layers"),
        ("adakv(floor=2)", "floor"),
        ("chunkkv(span=0)", "span"),
        ("lagkv(lag=0)", "lag"),
        ("knorm(heads=all)", "heads"),
        ("h2o(recent=1.5)", "recent"),
        ("h2o(threshold=0.1, keep=0.1)", "threshold"),
        ("adakv(threshold=0.1)", "heads"),
        ("knorm(critical=true)", "critical"),
        ("chunkkv(critical=true)", "span"),
        ("criticalkv(span=6)", "span"),
        ("expected_attention(critical=true)", "norms"),
        ("expected_attention(epsilon=-1)", "epsilon"),
        ("expected_attention(epsilon=0.1, norms=false)", "epsilon"),
        ("curdkv(local=0)", "local"),
        ("curdkv(critical=true)", "critical"),
        ("compactor(chunk=0)", "chunk"),
        ("compactor(blend=-1)", "blend"),
        ("compactor(critical=true)", "critical"),
        ("rkv(window=0)", "window"),
        ("rkv(kernel=4)", "kernel"),
        ("rkv(mix=1.1)", "mix"),
        ("rkv(similar=-0.1)", "similar"),
        ("rkv(threshold=1.5)", "threshold"),
        ("rkv(critical=true)", "critical"),
        ("simlayerkv(threshold=1.1)", "threshold"),
        ("simlayerkv(recent=0)", "recent"),
        ("kvzip(keep=0)", "keep"),
        ("kvzip(layers=pyramid)", "layers"),
    ],
)
def test_what_cannot_be_is_refused_by_name(spec: str, named: str) -> None:
    with pytest.raises(SpecError, match=f"{named}="):
        Stack.parse(spec)
