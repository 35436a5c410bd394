"""Repeating the prompt: what each of its tokens receives, against attention matrices of the whole."""

from __future__ import annotations

import pytest
import tiny_models as models
import torch
from generation import tokens
from letters import Letters
from torch import Tensor

from kvcomp import CompressedCache
from kvcomp.errors import KvcompError, UnsupportedError
from kvcomp.integrations.huggingface import prefill
from kvcomp.integrations.huggingface.attention_module import AttentionModule
from kvcomp.integrations.huggingface.reconstruct import LEAD, REQUEST, REQUEST_FROM, SINKS, received


def encoded(text: str) -> Tensor:
    return Letters()(text, False, "pt").input_ids


@pytest.mark.parametrize("name", ["llama", "qwen3", "gptoss"])
@pytest.mark.parametrize("chunk", [100, 40])
def test_the_most_attention_of_any_query(name: str, chunk: int) -> None:
    """With the whole prompt as one part, and part by part, where a query's attention is shared out among sinks, part
    and repetition only."""
    n = 100
    model, ids = models.make(name, "eager"), tokens(1, n)
    spec = f"kvzip(keep=1, chunk={chunk})"
    caches = [CompressedCache(spec, model)]
    layers: list = []
    with torch.no_grad():
        model(ids, past_key_values=caches[0])
        for layer in caches[0].layers:
            layers.append(tuple(layer.pending[:2]) if getattr(layer, "pending", None) else layer)
        found = received(model, Letters(), ids, layers, chunk)
        caches[0].detach()
        at = 0
        full = [i for i, layer in enumerate(layers) if isinstance(layer, tuple)]
        for start in range(0, n, chunk):
            end = min(start + chunk, n)
            request = encoded(REQUEST)
            if start:
                request = torch.cat([encoded(REQUEST_FROM), ids[:, start - LEAD : start], encoded("\n")], 1)
            whole = torch.cat([ids, request, ids[:, start:end]], 1)
            weights = model(whole, output_attentions=True).attentions
            columns = [*range(min(SINKS, start)), *range(start, end), *range(n, whole.shape[1])]
            for i, got in zip(full, found, strict=True):
                part = weights[i][0, :, n:, columns]
                if name != "gptoss":  # whose sinks take attention as well
                    part = part / part.sum(-1, keepdim=True)
                heads = got.shape[1]
                most = part.unflatten(0, (heads, -1)).amax((1, 2))[:, min(SINKS, start) :][:, : end - start]
                if name == "gptoss":
                    assert bool((got[0, :, start:end] >= most - 1e-5).all())
                else:
                    torch.testing.assert_close(got[0, :, start:end], most, rtol=1e-3, atol=1e-5)
            at = end
        assert at == n


def test_a_padded_batch_keeps_what_its_rows_would_alone() -> None:
    model = models.make("llama")
    ids, lengths = tokens(3, 90), (90, 61, 33)
    mask = (torch.arange(90) >= torch.tensor([[90 - length] for length in lengths])).long()
    spec = "kvzip(keep=0.3, chunk=50) + kivi(bits=4) + window(sinks=2, recent=8)"
    batch = CompressedCache(spec, model)
    prefill(model, ids, [batch], mask, tokenizer=Letters())
    for b, length in enumerate(lengths):
        alone = CompressedCache(spec, model)
        prefill(model, ids[b : b + 1, 90 - length :], [alone], tokenizer=Letters())
        kept = [layer.store.kept.view(-1, 2)[b].tolist() for layer in batch.layers]
        assert kept == [layer.store.kept.tolist() for layer in alone.layers]
        assert sum(map(sum, kept)) == 4 * 2 * max(round(0.3 * length), 10)


def test_one_forward_serves_it_and_others() -> None:
    model, ids = models.make("llama"), tokens(1, 120)
    specs = ("kvzip(keep=0.4)", "snapkv(keep=0.4, window=8)", "kvzip(keep=0.2, layers=uniform) + int(bits=8)")
    together = [CompressedCache(spec, model) for spec in specs]
    filled = prefill(model, ids, together, tokenizer=Letters())
    assert filled[0].dense_s == filled[1].dense_s
    assert filled[0].own_s > filled[1].own_s
    for spec, cache in zip(specs, together, strict=True):
        alone = CompressedCache(spec, model)
        prefill(model, ids, [alone], tokenizer=Letters())
        step = tokens(1, 1, seed=3)
        with torch.no_grad():
            torch.testing.assert_close(
                model(step, past_key_values=cache).logits, model(step, past_key_values=alone).logits
            )
        assert cache.memory().held == alone.memory().held


def test_hybrid_models_repeat_with_their_other_layers() -> None:
    for name in ("gemma3", "qwen3next"):
        model, ids = models.make(name), tokens(1, 60)
        cache, dense = (CompressedCache(spec, model) for spec in ("kvzip(keep=1)", "none"))
        prefill(model, ids, [cache, dense], tokenizer=Letters())
        step = tokens(1, 1, seed=3)
        with torch.no_grad():
            ours, theirs = (model(step, past_key_values=c).logits for c in (cache, dense))
        torch.testing.assert_close(ours, theirs)
        with pytest.raises(UnsupportedError, match="one row at a time"):
            prefill(model, tokens(2, 60), [CompressedCache("kvzip", model)], tokenizer=Letters())


def test_what_it_needs_is_said() -> None:
    model, ids = models.make("llama"), tokens(1, 60)
    with pytest.raises(KvcompError, match="tokenizer=None"):
        prefill(model, ids, [CompressedCache("kvzip", model)])
    with pytest.raises(UnsupportedError, match="chunks of 16"):
        prefill(model, ids, [CompressedCache("kvzip + streaming(chunk=16)", model)], tokenizer=Letters())
    cache = CompressedCache("kvzip", model)
    model(ids, past_key_values=cache)
    with pytest.raises(UnsupportedError, match=r"kvcomp\.prefill"):
        model(ids[:, :1], past_key_values=cache)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "gptoss", "qwen3next"])
def test_queries_are_turned_back_to_what_they_were(name: str) -> None:
    """The projection's output before the rotary embedding, up to YaRN's factor, of every full-attention layer."""
    model, ids = models.make(name, "eager"), tokens(1, 50)
    before: dict[int, Tensor] = {}
    for module in model.modules():
        if hasattr(module, "layer_idx") and hasattr(module, "o_proj"):
            last = getattr(module, "q_norm", None) or module.q_proj

            def keep(_module: object, _inputs: object, out: Tensor, layer: int = module.layer_idx) -> None:
                before[layer] = out

            last.register_forward_hook(keep)
    cache = CompressedCache("expected_attention(keep=0.5)", model)
    seen: dict[int, Tensor] = {}
    for i, layer in enumerate(cache.layers):
        if hasattr(layer, "store"):
            inner = layer.store.write

            def write(k: Tensor, v: Tensor, valid: object, q: Tensor, *rest: object, i: int = i, inner=inner) -> None:
                seen[i] = q
                inner(k, v, valid, q, *rest)

            layer.store.write = write
    with torch.no_grad():
        model(ids, past_key_values=cache)
    assert seen
    for i, q in seen.items():
        part = cache.layers[i].store.model
        assert isinstance(part, AttentionModule)
        plain = before[i]
        plain = plain.view(1, 50, q.shape[1], -1) if plain.dim() == 3 else plain
        plain = (plain.transpose(1, 2) if plain.shape[1] == 50 else plain)[..., : q.shape[-1]]
        back = part.rotate(q, -torch.arange(50))
        factor = (q.norm() / plain.norm()).item()
        torch.testing.assert_close(back / factor, plain, rtol=1e-4, atol=1e-5)
        assert part.output().shape[:2] == (q.shape[1], q.shape[-1])
