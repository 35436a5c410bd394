"""Prompts that enter in chunks, each compressed before the next comes: what is held on the way, and at the end."""

from __future__ import annotations

import pytest
import tiny_models as models
import torch
from generation import tokens

from kvcomp import CompressedCache
from kvcomp.errors import KvcompError
from kvcomp.integrations.huggingface import prefill
from kvcomp.integrations.huggingface.layer import CompressedLayer

WINDOW = " + window(sinks=4, recent=32)"


@pytest.mark.parametrize("spec", ["snapkv(keep=0.25, window=16)", "keydiff(keep=0.25)"])
def test_no_more_than_the_budget_and_a_chunk_is_held(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """8192 tokens by 1024: at its fullest, the cache holds a quarter of them and a chunk in full precision."""
    model, ids, chunk = models.make("llama", num_hidden_layers=2), tokens(1, 8192), 1024
    cache = CompressedCache(spec + WINDOW, model)
    seen: list[int] = []
    commit = CompressedLayer.commit

    def watched(self: CompressedLayer) -> None:
        seen.append(cache.memory().held)
        commit(self)
        seen.append(cache.memory().held)

    monkeypatch.setattr(CompressedLayer, "commit", watched)
    prefill(model, ids, [cache], chunk=chunk)
    kept = [int(layer.store.kept.max()) for layer in cache.layers]
    assert kept == [8192 // 4] * 2
    token = 2 * 2 * 16 * 4  # of a layer: heads x (K and V) x channels x bytes
    pending = token * (2 if cache.layers[0].plan.needs_queries else 1)  # as many bytes of queries; a layer at a time
    assert max(seen) <= 1.07 * (2 * token * 8192 // 4 + pending * chunk)  # pools grow by a sixteenth
    assert max(seen) > 2 * token * 8192 // 4


def test_chunks_see_what_was_kept_of_those_before() -> None:
    """With nothing evicted it is the dense prefill; with eviction, the stack's own forward over the same chunks."""
    model, ids = models.make("qwen3"), tokens(2, 200)
    mask = (torch.arange(200) >= torch.tensor([[0], [37]])).long()
    dense, chunked = (CompressedCache("none" + WINDOW, model) for _ in range(2))
    (whole,) = prefill(model, ids, [dense], mask)
    (parts,) = prefill(model, ids, [chunked], mask, chunk=64)
    torch.testing.assert_close(whole.logits, parts.logits, rtol=1e-4, atol=1e-4)
    ours, other = (CompressedCache("snapkv(keep=0.5, window=8)" + WINDOW, model) for _ in range(2))
    (filled,) = prefill(model, ids[:1], [ours], chunk=64)
    with torch.no_grad():
        for at in range(0, 200, 64):
            logits = model(ids[:1, at : at + 64], past_key_values=other).logits[:, -1]
    torch.testing.assert_close(filled.logits, logits)
    assert filled.dense_s == 0
    with pytest.raises(KvcompError, match="chunk=0"):
        prefill(model, ids, [CompressedCache("none", model)], chunk=0)
