"""Models with an indexer of their own: its choice is kept, its keys are held, and the latents are compressed."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_models as models
import torch
from generation import greedy, tokens

from kvcomp import CompressedCache, UnsupportedError
from kvcomp.integrations.huggingface.hook import hook

pytestmark = pytest.mark.filterwarnings("ignore:.*as dense tensors")


def test_what_the_indexer_leaves_out_stays_out() -> None:
    """Hooked, the model masks nothing by itself any more: attention does."""
    ids = tokens(2, 80)
    plain, hooked = models.make("deepseek32"), models.make("deepseek32")
    everything = models.make("deepseek32", index_topk=80)
    hook(hooked.config)
    with torch.no_grad():
        expected, got, dense = (m(ids).logits for m in (plain, hooked, everything))
    torch.testing.assert_close(got, expected)
    assert float((dense - expected).abs().max()) > 0.01


def test_latents_are_compressed_and_index_keys_are_not(tmp_path: Path) -> None:
    model = models.make("deepseek32")
    cache = CompressedCache("int(bits=4) + window(recent=16)", model)
    first = greedy(model, tokens(1, 200), cache, new=4)
    memory = cache.memory()
    keys = sum(layer.index_keys.nbytes for layer in cache.layers)
    assert memory.parts["library"] == keys == len(cache.layers) * 203 * 32 * 4
    assert memory.held < 0.75 * memory.dense
    cache.save(tmp_path / "cache.safetensors")
    loaded, twin = CompressedCache.load(tmp_path / "cache.safetensors", model), cache.fork()
    assert loaded.memory().held <= memory.held
    on = [greedy(model, first.sequences, each, new=6).sequences for each in (cache, twin, loaded)]
    assert torch.equal(on[0], on[1])
    assert torch.equal(on[0], on[2])
    cache.crop(-3)
    assert all(layer.index_keys.shape[1] == cache.get_seq_length() for layer in cache.layers)


def test_an_indexer_over_keys_and_values_is_refused() -> None:
    model = models.make("llama")
    cache = CompressedCache("none", model)
    with torch.no_grad(), pytest.raises(UnsupportedError, match="chooses by itself which tokens"):
        model(tokens(1, 8), past_key_values=cache, indices=torch.zeros(1, 8, 4, dtype=torch.int64))
