"""Models with sliding windows and learned sinks: what vLLM writes with a stack is what Hugging Face writes with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

ENGINE = Callable[..., dict[str, Any]]
SHARE = Callable[[list[list[int]], list[list[int]]], float]

TOKENS, WINDOW = 48, 160
LENGTHS = (20, 150, 400, 333)
SIZES = {
    "vocab_size": 512,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "sliding_window": WINDOW,
    "initializer_range": 0.2,
    "max_position_embeddings": 2048,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Gemma 3 with four sliding layers of six, and gpt-oss with two of four, of random weights."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig, GptOssConfig, GptOssForCausalLM

    torch.manual_seed(0)
    kinds = ["sliding_attention", "sliding_attention", "full_attention"] * 2
    gemma = Gemma3ForCausalLM(
        Gemma3TextConfig(
            intermediate_size=256, num_hidden_layers=6, layer_types=kinds, query_pre_attn_scalar=64, **SIZES
        )
    )
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    gpt = GptOssForCausalLM(
        GptOssConfig(
            intermediate_size=128,
            num_hidden_layers=4,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
            **experts,
            **SIZES,
        )
    )
    for layer in gpt.model.layers:
        torch.nn.init.normal_(layer.self_attn.sinks, std=2.0)
    found: dict[str, Any] = {"gemma3": gemma.eval(), "gpt-oss": gpt.eval()}
    for name, model in found.items():
        path = tmp_path_factory.mktemp(name)
        model.save_pretrained(path)
        model.name_or_path = str(path)
    return found


def said(model: Any, stack: str, prompt: list[int]) -> list[int]:
    from kvcomp import CompressedCache

    ids = torch.tensor([prompt])
    options = {"do_sample": False, "max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "eos_token_id": None}
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), past_key_values=CompressedCache(stack, model), **options
    )
    return list(out[0, ids.shape[1] :].tolist())


@pytest.mark.parametrize(
    ("name", "stack", "times"),
    [
        ("gemma3", "int(bits=4)", 6.9),  # of float32
        ("gemma3", "snapkv(budget=128, window=32) + kivi(bits=4, group=32) + window(sinks=4, recent=48)", None),
        ("gpt-oss", "int(bits=4) + window(recent=32)", None),
    ],
)
def test_text_equals_hugging_face(
    engine: ENGINE, models: dict[str, Any], share: SHARE, name: str, stack: str, times: float | None
) -> None:
    """Prompts shorter and longer than the window; sliding layers hold packed pages, and find prefixes where all do."""
    model, seed = models[name], torch.Generator().manual_seed(3)
    prompts = [torch.randint(1, 512, (n,), generator=seed).tolist() for n in LENGTHS]
    asked = [{"prompt": prompt, "tokens": TOKENS} for prompt in prompts]
    options = {"model": model.name_or_path, "skip_tokenizer_init": True, "max_model_len": 1024}
    options |= {"kv_cache_memory_bytes": 64 << 20, "enable_prefix_caching": True}
    result = engine(stack, [asked, asked], **options)
    first, again = result["rounds"]
    expected = [said(model, stack, prompt) for prompt in prompts]
    assert share(first["outputs"], expected) >= 0.95
    assert share(again["outputs"], expected) >= 0.95
    assert again["cached"] == ([(n - 1) // 64 * 64 for n in LENGTHS] if times else [0] * 4)
    assert first["held"][-1] == again["held"][-1] == 0
    if times:
        assert result["capacity"] >= times * engine(None, [], **options)["capacity"]
