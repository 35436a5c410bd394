"""Selectors of single tokens: sketch and dsa."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from synthetic import save
from torch import Tensor

from kvcomp import Stack
from kvcomp.cache.layer import LayerStore
from kvcomp.cache.reader import choose
from kvcomp.calibration.file import CalibrationError
from kvcomp.calibration.statistics import Moments
from kvcomp.errors import SpecError
from kvcomp.kernels.select import code_dots, regroup
from kvcomp.sparse.codes import CODES, code_fields, encode, step
from kvcomp.sparse.dsa import CONTEXTS, DSA, Traces
from kvcomp.stages.plan import read_parts

TOKENWISE = ("none", "int(bits=4)", "int8", "fp8", "turboquant(bits=2.5)", "klt(bits=2)", "mxfp4")
BY_PAGES = ("kivi(bits=2)", "nvfp4")


def low_rank(tokens: int, heads: int = 2, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """queries [2, 2 * heads, n, 64], keys and values [2, heads, n, 64], whose products live in ten directions."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(heads, 10, 64, generator=generator)
    mean = 3 * torch.randn(heads, 1, 64, generator=generator)
    draw = [torch.randn(2, n, tokens, 10, generator=generator) for n in (2 * heads, heads)]
    v = torch.randn(2, heads, tokens, 64, generator=generator)
    return 0.5 * draw[0] @ basis.repeat_interleave(2, 0), draw[1] @ basis + mean, v


def written(spec: str, tokens: int = 500) -> tuple[LayerStore, Tensor]:
    """A store that was given a prompt, and the next queries [2, 4, 1, 64]."""
    q, k, v = low_rank(tokens + 1)
    store = LayerStore(Stack.parse(spec).plan(0, 1))
    store.start(k, v)
    store.write(k[:, :, :tokens], v[:, :, :tokens], None, q[:, :, :tokens])
    return store, q[:, :, tokens:]


def shares(q: Tensor, tokens: int) -> Tensor:
    """float32 [4, tokens]: the attention of queries [2, 4, 1, 64] over the tokens of `written`, mean over a group."""
    _, k, _ = low_rank(tokens + 1)
    logits = torch.einsum("bhgd,bhnd->bhgn", q.view(2, 2, 2, 64), k[:, :, :tokens]) * 0.125
    return logits.softmax(-1).mean(2).flatten(0, 1)


@pytest.mark.parametrize("quantizer", TOKENWISE + BY_PAGES)
def test_single_tokens_are_read_where_no_two_share_anything(quantizer: str) -> None:
    store, _ = written(f"sketch(tokens=64) + {quantizer} + window(sinks=2, recent=8)")
    assert store.records.by_tokens == store.layout.tokenwise == (quantizer in TOKENWISE)
    if not store.records.by_tokens:
        return
    ids, size = store.table.ids(), store.layout.page_size
    n = ids.shape[1] * size
    tokens = torch.stack([torch.randperm(n)[: 2 * size] for _ in range(4)])
    pool = store.pool.data.clone()
    for field in store.layout.centres:  # whose tokens get theirs back by `token_bias`
        store.layout.views(pool)[field.name].zero_()
    made = regroup(store.layout, store.pool.data, ids, tokens)
    assert made.shape == (8, store.layout.body_bytes)
    every = store.codec.decode(store.layout.gather(pool, ids.flatten()))
    few = store.codec.decode(store.layout.gather(made, torch.arange(8)))
    for all_of_it, some in zip(every, few, strict=True):
        expected = all_of_it.reshape(4, n, -1).take_along_dim(tokens[..., None], 1)
        assert torch.equal(some.reshape(4, 2 * size, -1), expected)


def test_where_a_policy_watches_pages_they_are_read_whole() -> None:
    with pytest.warns(match="bet on the same redundancy"):
        store, q = written("h2o(budget=200) + sketch(tokens=64)")
    assert store.layout.tokenwise
    assert not store.records.by_tokens
    assert torch.isfinite(store.attend(q, 0.125).out).all()
    attention = store.table.attention()
    assert attention is not None
    assert float(attention[0].sum()) > 0


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_keep_products(bits: int) -> None:
    torch.manual_seed(0)
    keys, queries = torch.randn(3, 5, 16, 8), torch.randn(3, 2, 8)
    steps = step(torch.ones(8), bits)
    fields = encode((keys / steps).flatten(0, 1), bits)
    shapes = {f.name: f.shape for f in code_fields(16, 8, bits)}
    assert {name: tuple(t.shape[1:]) for name, t in fields.items()} == shapes
    got = code_dots(queries * steps, {CODES: fields[CODES].unflatten(0, (3, 5))}, CODES, bits)
    expected = torch.einsum("sjr,snpr->sjnp", queries, keys).flatten(2)
    assert float((got - expected).norm() / expected.norm()) < {4: 0.13, 8: 0.015}[bits]


def sketch_file(folder: Path) -> Path:
    seen = Moments()
    seen.add(*low_rank(600))
    return save(folder / "sketch.safetensors", "sketch", [seen.result(None)])


@pytest.mark.parametrize("fitted", [False, True])
@pytest.mark.parametrize("quantizer", ["none", "turboquant(bits=4)"])
def test_a_sketch_of_enough_directions_finds_the_tokens_that_draw_most(
    quantizer: str, fitted: bool, tmp_path: Path
) -> None:
    """Fitted to the prompt, or to what a calibration saw of the same distribution."""
    more = f", calibration={str(sketch_file(tmp_path))!r}" if fitted else ""
    store, q = written(f"sketch(tokens=32, rank=10, bits=8{more}) + {quantizer} + window(sinks=0, recent=0)", 512)
    choice, _ = choose(store.records, store.storage.view(), q.view(4, 2, 64), 0.125)
    assert choice is not None
    true = shares(q, 512)
    best, read = true.topk(32).values.sum(-1), true.gather(1, choice.positions).sum(-1)
    assert bool((read > 0.97 * best).all())
    coarse, _ = written("moba(tokens=32) + window(sinks=0, recent=0)", 512)
    pages, _ = choose(coarse.records, coarse.storage.view(), q.view(4, 2, 64), 0.125)
    assert pages is not None
    by_page = true.unflatten(-1, (-1, coarse.layout.page_size)).sum(-1).gather(1, pages.positions).sum(-1)
    assert bool((read > by_page).all())


@pytest.mark.parametrize("spec", ["sketch(tokens=48)", "sketch(keep=0.3, rank=4) + klt(bits=3)"])
def test_rows_forks_and_saved_stores_go_on_with_their_directions(spec: str) -> None:
    store, q = written(spec)
    before = store.attend(q, 0.125).out
    twin = LayerStore(store.plan)
    twin.restore(store.state(), torch.device("cpu"))
    assert torch.equal(twin.attend(q, 0.125).out, before)
    fork = store.fork()
    fork.select_rows(torch.tensor([1, 0, 1]))
    torch.testing.assert_close(fork.attend(q[[1, 0, 1]], 0.125).out, before[[1, 0, 1]], rtol=1e-4, atol=1e-5)
    k, v = (torch.randn(3, 2, 100, 64) for _ in range(2))
    for at in range(100):
        fork.append(k[:, :, at : at + 1], v[:, :, at : at + 1])
        fork.settle()
    assert torch.isfinite(fork.attend(q[[1, 0, 1]], 0.125).out).all()
    assert torch.equal(store.attend(q, 0.125).out, before)


def test_a_prompt_shorter_than_a_page_is_fitted_later() -> None:
    q, k, v = low_rank(400)
    store = LayerStore(Stack.parse("sketch(tokens=32) + window(sinks=0, recent=0)").plan(0, 1))
    store.start(k, v)
    store.write(k[:, :, :10], v[:, :, :10], None, q[:, :, :10])
    for at in range(10, 400):
        store.append(k[:, :, at : at + 1], v[:, :, at : at + 1])
        store.attend(q[:, :, at : at + 1], 0.125)
        store.settle()
    assert store.table.longest == 25
    assert store.read["pages"] == 4 * 2 * store.layout.body_bytes


def test_sketch_refuses_more_directions_than_there_are() -> None:
    with pytest.raises(SpecError, match=re.escape("sketch(rank=80): rank must be at most the 64 channels of a key")):
        written("sketch(rank=80)")


# -- dsa --------------------------------------------------------------------------------------------------------------


def traces() -> Traces:
    seen = Traces()
    q, k, v = low_rank(300)
    for row in range(2):
        seen.add(q[row : row + 1], k[row : row + 1], v[row : row + 1])
    return seen


def scores(found: dict[str, Tensor], q: Tensor, k: Tensor) -> Tensor:
    """float32 [H, m, n]: index scores of queries [H, G, m, D] for keys [H, n, D], by definition."""
    keys = torch.einsum("hnd,hdr->hnr", k, found["k"]) - found["mean"][:, None]
    each = torch.einsum("hgmd,hgdr,hnr->hgmn", q, found["q"], keys).relu()
    weight = torch.einsum("hgmd,hgd->hgm", q, found["weight"]) + found["bias"][..., None]
    return torch.einsum("hgm,hgmn->hmn", weight, each)


def test_distillation_brings_the_indexer_near_the_attention() -> None:
    seen, recall = traces(), {}
    shapes = {"k": (2, 64, 16), "mean": (2, 16), "deviation": (2, 16), "q": (2, 2, 64, 16), "weight": (2, 2, 64)}
    for steps in (1, 100):
        found = DSA.calibrate(seen, steps=steps)
        assert {name: tuple(t.shape) for name, t in found.items()} == {**shapes, "bias": (2, 2)}
        at, q, k = (x.float() for x in seen.kept[0])
        past = k[:, : int(at[0])]
        target = (torch.einsum("hgmd,hnd->hgmn", q, past) * 0.125).softmax(-1).mean(1)
        chosen = target.gather(2, scores(found, q, past).topk(20).indices).sum(-1)
        recall[steps] = float((chosen / target.topk(20).values.sum(-1)).mean())
    assert recall[100] > 0.9
    assert recall[100] > recall[1]


def test_the_indexer_of_a_layer_is_what_the_file_says(tmp_path: Path) -> None:
    file = save(tmp_path / "dsa.safetensors", "dsa", [traces()])
    store, q = written(f"dsa(tokens=32, calibration={str(file)!r}, bits=8) + window(sinks=0, recent=0)", 512)
    _, k, _ = low_rank(513)
    found = DSA.calibrate(traces())
    rows = [scores(found, q[b].view(2, 2, 1, 64), k[b, :, :512]).squeeze(1) for b in range(2)]
    expected = torch.cat(rows).topk(32).indices
    choice, _ = choose(store.records, store.storage.view(), q.view(4, 2, 64), 0.125)
    assert choice is not None
    for right, chosen in zip(expected.tolist(), choice.positions.tolist(), strict=True):
        assert len(set(right) & set(chosen)) >= 28  # 8 bits exchange a few of the last ones


def test_traces_are_spread_over_all_contexts() -> None:
    seen = Traces()
    for i in range(40):
        seen.add(torch.full((1, 2, 16, 8), float(i)), torch.full((1, 1, 16, 8), float(i)), torch.zeros(0))
    which = [float(q[0, 0, 0, 0]) for _, q, _ in seen.kept]
    assert 2 <= len(which) <= CONTEXTS
    assert which == [i * which[1] for i in range(len(which))]
    assert which[-1] >= 20


def test_dsa_needs_a_file_for_a_cache_and_none_for_a_plan() -> None:
    plan = Stack.parse("dsa(tokens=64) + int8").plan(0, 1)
    assert read_parts(plan, 64, 64, 1000, torch.bfloat16)["summaries"] > 0
    with pytest.raises(CalibrationError, match=re.escape("dsa needs calibration='FILE'")):
        written("dsa(tokens=64)")
