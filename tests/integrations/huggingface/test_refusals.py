"""What cannot work is refused with a message that says what to do; never a wrong answer."""

from __future__ import annotations

import pytest
import tiny_models as models
import torch
from generation import greedy, left_padded, tokens
from transformers import BloomConfig, BloomForCausalLM, T5Config

from kvcomp import CompressedCache, KvcompError, UnsupportedError, prefill


def test_a_model_without_the_attention_interface() -> None:
    model = BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=2))
    with pytest.raises(UnsupportedError, match="BloomAttention does not go through"):
        CompressedCache("none", model)


def test_an_attention_implementation_that_cannot_be_hooked() -> None:
    config = models.make("llama").config
    config._attn_implementation = "somebody/a-kernel-that-was-not-loaded"
    with pytest.raises(UnsupportedError, match=r"is not registered .* attn_implementation='sdpa'"):
        CompressedCache("none", config)


def test_an_encoder_decoder() -> None:
    with pytest.raises(UnsupportedError, match="encoder-decoder"):
        CompressedCache("none", T5Config())


def test_something_that_is_no_model() -> None:
    with pytest.raises(KvcompError, match="model_or_config='gpt'"):
        CompressedCache("none", "gpt")  # type: ignore[arg-type]


def test_static_and_offloaded_requests() -> None:
    model = models.make("llama")
    for implementation in ("static", "offloaded", "quantized"):
        with pytest.raises(ValueError, match="cache_implementation"):
            model.generate(
                tokens(1, 8),
                past_key_values=CompressedCache("none", model),
                cache_implementation=implementation,
                max_new_tokens=2,
            )
    with pytest.raises(TypeError, match="offloading"):
        CompressedCache("none", model, offloading=True)  # type: ignore[call-arg]
    with pytest.raises(UnsupportedError, match="offload"):
        CompressedCache("none", model).layers[0].offload()


def test_a_crop_into_lossy_pages() -> None:
    model = models.make("llama")
    cache = CompressedCache("kivi(bits=2, group=16) + window(recent=16)", model)
    with torch.no_grad():
        model(tokens(1, 100), past_key_values=cache)
    cache.crop(-10)
    assert cache.get_seq_length() == 90
    with pytest.raises(UnsupportedError, match="crop\\(-50\\) reaches into quantized pages"):
        cache.crop(-50)
    with pytest.raises(KvcompError, match="negative"):
        cache.crop(40)
    with pytest.raises(KvcompError, match="holds 90 tokens"):
        cache.crop(-91)


def test_a_crop_past_evicted_tokens() -> None:
    model = models.make("llama")
    cache = CompressedCache("snapkv(budget=40, window=16)", model)
    with torch.no_grad():
        model(tokens(1, 100), past_key_values=cache)
    with pytest.raises(UnsupportedError, match="evicted"):
        cache.crop(-80)


def test_a_crop_is_exact_where_it_is_allowed() -> None:
    model = models.make("llama")
    ids = tokens(1, 200)
    for stack, remove in (("none", 150), ("none", 199), ("kivi(bits=2, group=16) + window(recent=32)", 30)):
        cropped, fresh = CompressedCache(stack, model), CompressedCache("none", model)
        with torch.no_grad():
            model(ids, past_key_values=cropped)
            cropped.crop(-remove)
            if stack == "none":
                model(ids[:, : 200 - remove], past_key_values=fresh)
                a, b = (model(ids[:, :5], past_key_values=c).logits for c in (cropped, fresh))
                torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
            assert cropped.get_seq_length() == 200 - remove + (5 if stack == "none" else 0)


def test_an_empty_prompt() -> None:
    model = models.make("llama")
    with pytest.raises(KvcompError, match="the prompt is empty"):
        greedy(model, tokens(1, 0), CompressedCache("none", model))
    with pytest.raises(KvcompError, match="0 new tokens"):
        CompressedCache("none", model).layers[0].update(torch.zeros(1, 2, 0, 16), torch.zeros(1, 2, 0, 16))


def test_an_over_long_prompt() -> None:
    model = models.make("llama", max_position_embeddings=64)
    with pytest.raises(KvcompError, match="max_position_embeddings=64"):
        greedy(model, tokens(1, 65), CompressedCache("none", model))
    with pytest.raises(KvcompError, match="65 tokens exceed"):
        greedy(model, tokens(1, 60), CompressedCache("none", model), new=10)
    greedy(model, tokens(1, 60), CompressedCache("none", model, max_tokens=128), new=10)


def test_another_batch_size() -> None:
    model = models.make("llama")
    cache = CompressedCache("none", model)
    with torch.no_grad():
        model(tokens(2, 8), past_key_values=cache)
        with pytest.raises(KvcompError, match="holds 2 rows, but the batch has 3"):
            model(tokens(3, 1), past_key_values=cache)


def test_a_mask_that_changes_its_mind() -> None:
    model = models.make("llama")
    cache = CompressedCache("none", model)
    ids, mask = left_padded([8, 12])
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
        hidden = torch.ones(2, 13, dtype=torch.int64)
        hidden[1, :5] = 0
        with pytest.raises(UnsupportedError, match="mask hides or shows"):
            model(tokens(2, 1), attention_mask=hidden, past_key_values=cache)


def test_a_position_bias() -> None:
    model = models.make("llama", "eager")
    cache = CompressedCache("none", model)
    with torch.no_grad():
        model(tokens(1, 8), past_key_values=cache)
        with pytest.raises(UnsupportedError, match="position bias"):
            model(tokens(1, 1), attention_mask=torch.full((1, 1, 1, 9), -0.5), past_key_values=cache)


def test_prefill_refuses_what_it_cannot_do() -> None:
    model = models.make("llama")
    with pytest.raises(KvcompError, match="at least one cache"):
        prefill(model, tokens(1, 8), [])
    with pytest.raises(KvcompError, match="at least 2 tokens"):
        prefill(model, tokens(1, 1), [CompressedCache("none", model)])
    used = CompressedCache("none", model)
    prefill(model, tokens(1, 8), [used])
    with pytest.raises(KvcompError, match="empty"):
        prefill(model, tokens(1, 8), [used])
