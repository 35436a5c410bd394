"""Compaction of a span: what stands for it, what stays, what is said of its error, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_models as models
import torch
from generation import tokens
from letters import Letters

from kvcomp import CompressedCache
from kvcomp.errors import KvcompError, UnsupportedError
from kvcomp.integrations.huggingface import compact as compact_module

STACK = "none + window(sinks=4, recent=32)"


def filled(spec: str, rows: int = 1, n: int = 700, name: str = "llama", seed: int = 0) -> tuple:
    model, ids = models.make(name), tokens(rows, n, seed=seed)
    cache = CompressedCache(spec, model)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    return model, ids, cache


def next_logits(model: torch.nn.Module, cache: CompressedCache, step: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(step, past_key_values=cache).logits


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
def test_it_takes_whole_pages_and_few_tokens_stand_for_them(name: str) -> None:
    """700 tokens: 4 sinks, pages of 64, so that (100, 600) has those from 132 to 580."""
    model, ids, cache = filled(STACK, rows=2, name=name)
    before, step = cache.memory(), tokens(2, 1, seed=5)
    plain = next_logits(model, cache.fork(), step)
    done = cache.compact((100, 600), ids, Letters(), keep=0.1)
    assert done.span == (132, 580)
    assert done.tokens == 45
    ours = [layer for layer in cache.layers if hasattr(layer, "store")]
    assert len(done.error) == len(done.lse_error) == len(ours)
    assert all(0 < error < 1 for error in done.error)
    after = cache.memory()
    token = 2 * len(ours) * 2 * 2 * ours[0].store.k_dim * 4
    assert after.dense == before.dense
    assert before.held - after.held == pytest.approx(token * (448 - 45), rel=0.03)
    assert after.parts["compacted"] == token * 45 + 2 * len(ours) * 2 * 45 * 4
    assert cache.get_seq_length() == 700
    short = next_logits(model, cache.fork(), step)
    evicted = CompressedCache("streaming(recent=120) + window(sinks=4, recent=32)", model)
    with torch.no_grad():
        model(ids, past_key_values=evicted)
    lost = next_logits(model, evicted, step)
    assert (short - plain).norm() < 0.5 * (lost - plain).norm()
    next_logits(model, cache, step)
    assert cache.traffic().parts["compacted"] == after.parts["compacted"]


def test_a_long_span_goes_part_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compact_module, "PART", 200)  # three pages of 64
    _, ids, cache = filled(STACK)
    done = cache.compact((0, 700), ids, Letters(), keep=0.1)
    assert done.span == (4, 644)
    assert cache.layers[0].store.compacted.columns == ((4, 196), (196, 388), (388, 580), (580, 644))
    assert done.tokens == 19 + 19 + 19 + 6
    assert cache.layers[0].store.kept.tolist() == [60 + done.tokens] * 2


def test_spans_one_by_one_in_any_order() -> None:
    """What stays lies where it lay: the tokens of each page still decode to what they were."""
    _, ids, cache = filled(STACK)
    dense = [layer.store.dense() for layer in cache.fork().layers]
    second = cache.compact((4 + 4 * 64, 4 + 6 * 64), ids, Letters(), keep=0.2)
    first = cache.compact((4 + 64, 4 + 2 * 64), ids, Letters(), keep=0.2)
    assert (first.span, second.span) == ((68, 132), (260, 388))
    assert cache.layers[0].store.compacted.columns == (first.span, second.span)
    left = [*range(4, 68), *range(132, 260), *range(388, 644)]
    for layer, (k, v) in zip(cache.layers, dense, strict=True):
        store = layer.store
        assert store.kept.tolist() == [700 - 192 + 13 + 26] * 2
        for stream in range(2):
            ids_ = store.table.ids()[stream]
            page_k, page_v = store.storage.decode(ids_, stream)
            torch.testing.assert_close(page_k, k[0, stream, left])
            torch.testing.assert_close(page_v, v[0, stream, left])
    with pytest.raises(KvcompError, match="68 to 132 are compacted already"):
        cache.compact((100, 300), ids, Letters())


@pytest.mark.parametrize("spec", [STACK, "kivi(bits=4) + window(sinks=4, recent=32)", "quest(pages=3) + klt(bits=4)"])
def test_it_goes_on_forks_saves_and_repeats(spec: str, tmp_path: Path) -> None:
    model, ids, cache = filled(spec, rows=2)
    cache.compact((0, 500), ids, Letters(), keep=0.2)
    step = tokens(2, 1, seed=5)
    cache.save(tmp_path / "cache.kv")
    loaded = CompressedCache.load(tmp_path / "cache.kv", model)
    assert loaded.memory().parts["compacted"] == cache.memory().parts["compacted"]
    fork = cache.fork()
    fork.reorder_cache(torch.tensor([1, 0]))
    want = next_logits(model, cache.fork(), step)
    torch.testing.assert_close(next_logits(model, loaded, step), want, rtol=0, atol=0)
    torch.testing.assert_close(next_logits(model, fork, step.flip(0)).flip(0), want)
    steps = tokens(2, 150, seed=6)
    for token in steps.split(1, 1):  # pages fill after the compacted span
        next_logits(model, cache, token)
    cache.crop(-3)
    assert cache.get_seq_length() == 700 + 147


def test_what_it_cannot_do_is_said() -> None:
    model, ids, cache = filled(STACK)
    for span, said in (((600, 500), "0 <= start < end <= 700"), ((0, 60), "no whole page"), ((650, 700), "4 to 644")):
        with pytest.raises(KvcompError, match=said):
            cache.compact(span, ids, Letters())
    with pytest.raises(KvcompError, match="keep=1"):
        cache.compact((0, 500), ids, Letters(), keep=1)
    with pytest.raises(KvcompError, match=r"input_ids=\(1, 300\)"):
        cache.compact((0, 500), ids[:, :300], Letters())
    with pytest.raises(KvcompError, match="empty"):
        CompressedCache(STACK, model).compact((0, 500), ids, Letters())
    with pytest.raises(KvcompError, match="pass the model"):
        CompressedCache(STACK, model.config).compact((0, 500), ids, Letters())
    _, ids, evicting = filled("snapkv(keep=0.5) + " + STACK)
    with pytest.raises(UnsupportedError, match="snapkv may drop tokens"):
        evicting.compact((0, 500), ids, Letters())
    cache.compact((0, 500), ids, Letters())
    with pytest.raises(UnsupportedError, match="evicted"):
        cache.crop(-400)
