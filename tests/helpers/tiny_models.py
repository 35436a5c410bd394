"""Tiny random models of the architectures that the integration has to serve."""

from __future__ import annotations

import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DeepseekV32Config,
    DeepseekV32ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

COMMON = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
MIXED = ["sliding_attention", "full_attention"] * 2


LATENT = dict(
    **MOE,
    num_key_value_heads=4,
    kv_lora_rank=32,
    q_lora_rank=32,
    qk_rope_head_dim=16,
    v_head_dim=16,
    qk_nope_head_dim=16,
    n_routed_experts=4,
    n_group=1,
    topk_group=1,
    first_k_dense_replace=1,
)


def _configs() -> dict:
    return {
        "llama": (LlamaForCausalLM, LlamaConfig, {}),
        "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 32}),
        "mistral": (MistralForCausalLM, MistralConfig, {"head_dim": 32, "sliding_window": 16}),
        "gemma3": (
            Gemma3ForCausalLM,
            Gemma3TextConfig,
            {"head_dim": 32, "sliding_window": 16, "layer_types": MIXED},
        ),
        "gptoss": (
            GptOssForCausalLM,
            GptOssConfig,
            {
                "head_dim": 32,
                "sliding_window": 16,
                "layer_types": MIXED,
                "num_local_experts": 4,
                "num_experts_per_tok": 2,
            },
        ),
        "qwen3next": (
            Qwen3NextForCausalLM,
            Qwen3NextConfig,
            dict(
                **MOE,
                head_dim=32,
                num_experts=4,
                shared_expert_intermediate_size=32,
                linear_num_value_heads=4,
                linear_num_key_heads=2,
                linear_key_head_dim=16,
                linear_value_head_dim=16,
                layer_types=["linear_attention", "full_attention"] * 2,
            ),
        ),
        "deepseek32": (
            DeepseekV32ForCausalLM,
            DeepseekV32Config,
            dict(
                **LATENT,
                index_n_heads=4,
                index_head_dim=32,
                index_topk=24,
            ),
        ),
        "deepseek": (
            DeepseekV3ForCausalLM,
            DeepseekV3Config,
            dict(
                **LATENT,
            ),
        ),
    }


NAMES = tuple(_configs())
EAGER_ONLY = ("gptoss",)  # transformers has no sdpa attention with learned sinks


def make(name: str, implementation: str = "sdpa", **changes: object) -> PreTrainedModel:
    """A model of that architecture, the same at every call, whose greedy choices are clear-cut."""
    torch.manual_seed(0)
    cls, config, own = _configs()[name]
    model = cls(config(**{**COMMON, **own, **changes}, attn_implementation=implementation)).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() >= 2:
                p.normal_(0, 0.08)
            elif p.numel() == model.config.num_attention_heads:  # learned sinks
                p.normal_(0, 1)
    model.generation_config.pad_token_id = 0
    return model
