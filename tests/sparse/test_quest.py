"""Quest: the summary really bounds, and the pages read are the ones with the highest bounds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvcomp import Stack
from kvcomp.cache.layer import LayerStore
from kvcomp.sparse.quest import MAX, MIN, Quest
from kvcomp.stages import PageShape, Summaries

MAGNITUDES = [1e-8, 1e-6, 1e-3, 1.0, 300.0, 5e4]


@given(
    seed=st.integers(0, 2**31),
    dim=st.sampled_from([1, 8, 64, 80]),
    size=st.sampled_from([1, 16, 32]),
    scale=st.sampled_from(MAGNITUDES),
    offset=st.sampled_from([0.0, *MAGNITUDES]),
    query=st.sampled_from([1e-3, 1.0, 100.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
@settings(deadline=None, max_examples=80)
def test_the_bound_holds_after_rounding(
    seed: int, dim: int, size: int, scale: float, offset: float, query: float, dtype: torch.dtype
) -> None:
    torch.manual_seed(seed)
    keys = (scale * torch.rand(5, size, dim) * 2 - scale + offset * torch.randn(5, 1, dim).sign()).clamp(-6e4, 6e4)
    keys = keys.to(dtype)
    summary = Quest().summarize(keys, keys)
    assert {name: (t.dtype, t.shape) for name, t in summary.items()} == {
        f.name: (f.dtype, torch.Size((5, *f.shape)))
        for f in Quest().summary_fields(PageShape(size, dim, dim, 1, dtype, torch.device("cpu"), 2))
    }
    exact = keys.double()
    assert bool((summary[MIN].double() <= exact.amin(1)).all())
    assert bool((summary[MAX].double() >= exact.amax(1)).all())
    q = query * torch.randn(1, 3, dim)
    logits = torch.einsum("gd,mpd->gmp", q[0].double(), exact).amax(-1)  # [G, M]
    bound = Quest().logits(q, {name: x[None] for name, x in summary.items()})[0].double()
    assert bool((bound >= logits - 1e-5 * logits.abs()).all())


def test_the_bound_is_tight() -> None:
    """Of a page that holds one token, it is that token's logit, but for float16."""
    torch.manual_seed(0)
    keys, q = torch.randn(50, 1, 64), torch.randn(1, 4, 64)
    summary = Quest().summarize(keys, keys)
    bound = Quest().logits(q, {name: x[None] for name, x in summary.items()})[0]
    size = torch.einsum("gd,md->gm", q[0].abs(), keys[:, 0].abs())
    assert bool(((bound - torch.einsum("gd,md->gm", q[0], keys[:, 0])).abs() <= 2e-3 * size).all())


def naive_bound(q: Tensor, keys: Tensor) -> float:
    """max over all corners of the page's box: per channel, the better of its minimum and maximum."""
    low, high = keys.amin(0), keys.amax(0)
    return sum(max(float(a * b), float(a * c)) for a, b, c in zip(q, low, high, strict=True))


@given(
    seed=st.integers(0, 2**31),
    counts=st.lists(st.integers(0, 12), min_size=1, max_size=4),
    pages=st.integers(1, 14),
    minimum=st.integers(0, 5),
    group=st.sampled_from([1, 3, 4]),
    size=st.sampled_from([1.0, 300.0]),
    garbage=st.sampled_from([7.0, 6e4]),
)
@settings(deadline=None, max_examples=80)
def test_selection_over_ragged_streams(
    seed: int, counts: list[int], pages: int, minimum: int, group: int, size: float, garbage: float
) -> None:
    torch.manual_seed(seed)
    streams, n, dim, scale = len(counts), max(max(counts), 1), 8, 0.35
    keys = torch.randn(streams, n, 16, dim)
    q = size * torch.randn(streams, group, dim)
    quest = Quest(pages=pages, min_pages=minimum)
    summary = {
        name: t.unflatten(0, (streams, n))
        for name, t in quest.summarize(keys.flatten(0, 1), keys.flatten(0, 1)).items()
    }
    for t in summary.values():  # what no stream owns may be anything
        t[torch.arange(n) >= torch.tensor(counts)[:, None]] = garbage
    chosen, valid = quest.select(q, scale, Summaries(summary, torch.tensor(counts), 1, 16))
    assert chosen.dtype == torch.int64
    assert chosen.shape == (streams, quest.reads(n, 16))
    for s, count in enumerate(counts):
        own = chosen[s, : int(valid[s])].tolist()
        assert len(own) == min(count, max(pages, minimum)) == quest.reads(count, 16)
        assert own == sorted(set(own))
        assert all(0 <= page < count for page in own)
        assert int(chosen[s].max()) < n
        if not count or size > 1:
            continue  # with such logits most pages have no mass at all, but they exist and others do not
        bound = torch.tensor([[naive_bound(q[s, g], keys[s, p]) for p in range(count)] for g in range(group)])
        mass = (bound * scale).softmax(-1).mean(0)
        rest = [p for p in range(count) if p not in own]
        if own and rest:
            assert mass[own].min() >= mass[rest].max() * 0.98  # float16 may swap neighbours


def test_reads_is_what_a_query_reads() -> None:
    for quest in (Quest(), Quest(pages=1), Quest(pages=2, min_pages=5), Quest(pages=10, min_pages=0)):
        for n in range(80):
            assert quest.reads(n, 16) == min(n, max(quest.pages, quest.min_pages))
    assert Quest() == Quest(pages=64, dense_layers=2, min_pages=3)
    assert [Quest().active(layer) for layer in range(4)] == [False, False, True, True]


def store_of(spec: str, k: Tensor, v: Tensor, valid: Tensor | None = None) -> LayerStore:
    store = LayerStore(Stack.parse(spec).plan(0, 1))
    store.start(k, v)
    store.write(k, v, valid)
    return store


@pytest.mark.parametrize("quantizer", ["none", "kivi(bits=4) + window(recent=32)", "int(bits=8, basis=hadamard)"])
def test_enough_pages_are_all_pages(quantizer: str) -> None:
    torch.manual_seed(0)
    k, v, q = torch.randn(2, 2, 333, 64), torch.randn(2, 2, 333, 64), torch.randn(2, 8, 1, 64)
    valid = torch.arange(333) >= torch.tensor([[0], [310]])  # the second row may have no page at all
    window = "" if "window" in quantizer else " + window(recent=32)"
    # quest wants pages of 16 and so makes the layouts of both stacks the same
    most = store_of(f"{quantizer}{window} + quest(pages=21, dense_layers=0)", k, v, valid)
    every = store_of(f"{quantizer}{window} + quest(pages=999, dense_layers=0)", k, v, valid)
    plain = store_of(f"{quantizer}{window}", k, v, valid)
    assert most.table.counts.min() == 0 < most.table.counts.max() <= 21
    ours = most.attend(q, 0.125)
    torch.testing.assert_close(ours, every.attend(q, 0.125), rtol=1e-6, atol=1e-6)
    if "none" in quantizer:
        torch.testing.assert_close(ours, plain.attend(q, 0.125), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("quantizer", ["none", "int", "kivi"])
@pytest.mark.parametrize("needle", [0, 15, 16, 777, 1500])
def test_the_page_with_the_needle_is_read(quantizer: str, needle: int) -> None:
    torch.manual_seed(needle)
    k, v = 0.5 * torch.randn(1, 2, 2000, 64), 0.1 * torch.randn(1, 2, 2000, 64)
    q = torch.randn(1, 8, 1, 64)
    q[0, 4:] = q[0, 4]  # the heads of KV head 1 look for the same
    k[0, 1, needle] = 4 * q[0, 4, 0]
    v[0, 1, needle] = 5.0
    store = store_of(f"{quantizer} + quest(pages=2, min_pages=0, dense_layers=0) + window(recent=0)", k, v)
    out = store.attend(q, 0.125).out
    assert bool((out[0, 4:] > 4).all())
    assert store.read["pages"] == 2 * 2 * store.layout.body_bytes
    assert store.read["summaries"] == store.table.total * 2 * 2 * 64


@given(st.integers(0, 2**31), st.integers(1, 8))
@settings(deadline=None, max_examples=25)
def test_attention_over_selected_pages_is_attention_over_their_tokens(seed: int, pages: int) -> None:
    torch.manual_seed(seed)
    k, v, q = torch.randn(1, 2, 16 * 12, 32), torch.randn(1, 2, 16 * 12, 32), torch.randn(1, 2, 1, 32)
    store = store_of(f"quest(pages={pages}, min_pages=0, dense_layers=0)", k, v)
    out = store.attend(q, 0.2).out
    for h in range(2):
        bound = torch.tensor([naive_bound(q[0, h, 0], k[0, h, 16 * p : 16 * p + 16]) for p in range(12)])
        order = bound.argsort(descending=True).tolist()
        if pages < 12 and bound[order[pages - 1]] - bound[order[pages]] < 0.05:
            continue  # closer than float16 can tell
        tokens = [t for p in order[:pages] for t in range(16 * p, 16 * p + 16)]
        weights = (k[0, h, tokens] @ q[0, h, 0] * 0.2).softmax(0)
        torch.testing.assert_close(out[0, h, 0], weights @ v[0, h, tokens], rtol=1e-5, atol=1e-5)
