"""The one table of what the tiny models of `tiny.py` need beside `SIZES`: by architecture, and variants of some.

A new architecture needs an entry only if the sizes that fit all do not fit it. `UNSET` leaves a field at the config's
default where `SIZES` would set it.
"""

from __future__ import annotations

from typing import Any

UNSET = object()

# What tiny models have, where their config has such a field.
SIZES: dict[str, Any] = {
    # width and depth, under every name that configs have for them
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embedding_size", "word_embed_proj_dim", "lru_width"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "intermediate_size_mlp"), 128),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), 4),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 256),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 512),
    "hidden_size_per_layer_input": 16,
    # attention
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "attention_head_dim", "kv_channels", "swa_head_dim", "rope_head_dim"), 16),
    "global_head_dim": 32,
    "attention_hidden_size": 64,
    "rotary_dim": 8,
    "sliding_window": 90,  # more than the exact window and a page, less than the prompts
    **dict.fromkeys(("attention_window", "attention_window_size", "attention_chunk_size"), 16),
    # latents and indexers
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "index_head_dim"), 32),
    **dict.fromkeys(("qk_rope_head_dim", "v_head_dim", "qk_nope_head_dim"), 16),
    "index_n_heads": 4,
    "index_topk": 24,
    # experts
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "zero_expert_num"), 2),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "n_shared_experts", "num_shared_experts"), 1),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size", "expert_intermediate_size"), 32),
    **dict.fromkeys(("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size"), 32),
    "shared_intermediate_size": 64,
    "moe_latent_size": None,
    # recurrent layers
    **dict.fromkeys(("linear_num_value_heads",), 4),
    **dict.fromkeys(("linear_num_key_heads", "n_mamba_heads"), 2),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "mamba_d_state", "ssm_state_size"), 16),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_chunk_size", "chunk_size"), 16),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "mamba_dt_rank"), 8),
    **dict.fromkeys(("mamba_n_groups", "mamba_ngroups"), 1),
    "mamba_headdim": 64,
    # tokens and the rest
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    **dict.fromkeys(("attention_dropout", "dropout"), 0.0),
    "tie_word_embeddings": False,
}

SLIDING = ["sliding_attention", "full_attention"] * 2
LINEAR = ["linear_attention", "full_attention"] * 2
CONVOLUTION = ["conv", "full_attention"] * 2
SPARSE = ["dense"] + ["sparse"] * 3
ROPE = {"rope_type": "default", "rope_theta": 10000.0}

OVERRIDES: dict[str, dict[str, Any]] = {
    **{
        name: {"layer_types": SLIDING}
        for name in (
            *("cohere2", "cohere2_moe", "exaone4", "gemma2", "gemma3_text", "gpt_oss"),
            *("kolibri1", "mellum", "olmo3", "vaultgemma"),
        )
    },
    **{
        name: {"layer_types": LINEAR}
        for name in ("minimax", "olmo_hybrid", "qwen3_5_text", "qwen3_5_moe_text", "qwen3_next")
    },
    "bailing_hybrid": {
        "layer_group_size": 2,
        "layer_types": LINEAR,
        "linear_head_dim": 16,
        "linear_num_heads": 4,
        "num_expert_group": 1,
        "mlp_layer_types": SPARSE,
    },
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "cohere_compass_text": {
        "layer_types": SLIDING,
        "rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE},
    },
    "bamba": {"attn_layer_indices": [1, 3]},
    "deepseek_v2": {"topk_method": "greedy", "num_experts_per_tok": 2},
    "dots1": {"layer_types": SLIDING, "n_routed_experts": 4, "n_shared_experts": 1},
    "dots3_note_text": {
        "layer_types": ["indexed_attention", "sliding_attention"] * 2,
        "mlp_layer_types": SPARSE,
        "head_dim": 32,
        "shared_experts_intermediate_size": 32,
        **dict.fromkeys(("swa_num_attention_heads", "swa_num_key_value_heads"), 4),
        **dict.fromkeys(("swa_q_lora_rank", "swa_head_dim"), 32),
        **dict.fromkeys(("swa_kv_lora_rank", "swa_qk_nope_head_dim", "swa_v_head_dim"), 16),
    },
    "falcon": {"head_dim": UNSET, "multi_query": False, "new_decoder_architecture": True},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4},
    "gemma3n_text": {
        "layer_types": SLIDING,
        "num_kv_shared_layers": 0,
        "intermediate_size": [128] * 4,
        "activation_sparsity_pattern": [0.0] * 4,
        "laurel_rank": 8,
    },
    "gemma4_text": {"layer_types": SLIDING, "num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 16},
    "granitemoehybrid": {"layer_types": LINEAR, "position_embedding_type": "rope"},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16, "moe_topk": 2, "num_experts": 4},
    "inkling_text": {
        "layer_types": ["hybrid_sliding", "hybrid"] * 2,
        "sliding_window_size": 16,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "mlp_layer_types": ["sparse"] * 4,
    },
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "kimi_linear": {
        "layer_types": LINEAR,
        "linear_head_dim": 16,
        "linear_num_heads": 4,
        "mlp_layer_types": SPARSE,
    },
    "laguna": {"layer_types": SLIDING, "num_attention_heads_per_layer": [4] * 4, "mlp_layer_types": SPARSE},
    "lfm2": {"layer_types": CONVOLUTION},
    "lfm2_moe": {"layer_types": CONVOLUTION, "num_dense_layers": 1},
    "llama4_text": {"attention_chunk_size": 16},
    "mamba2": {"num_heads": 8, "head_dim": 16, "expand": 2},
    "ministral": {"layer_types": SLIDING, "head_dim": 16},
    "mistral4": {"head_dim": UNSET},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp_text": {
        "layer_types": ["linear_attention", "indexed_attention"] * 2,
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 24,
        "indexer_compress_ratio": 2,
        "hc_lowrank": 8,
        "ngram_vocab_size_base": 512,
        "split_ngram_parts": 2,
        "eos_token_id": 2,
    },
    "prophetnet": {"num_hidden_layers": UNSET, "num_encoder_layers": 2, "num_decoder_layers": 2},
    "reformer": {"axial_pos_embds": False, "axial_pos_embds_dim": UNSET},
    "xlnet": {"max_position_embeddings": UNSET},
    "zamba": {
        "layers_block_type": UNSET,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "use_mamba_kernels": False,
        "attention_hidden_size": UNSET,
        "attention_head_dim": UNSET,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "hybrid_layer_ids": [1, 3],
        "num_query_groups": 4,
        "use_mamba_kernels": False,
        "attention_hidden_size": UNSET,
        "attention_head_dim": UNSET,
        "kv_channels": UNSET,
    },
    "zaya": {"num_experts_per_tok": 1, "layer_types": ["hybrid"] * 4, "router_hidden_size": 16},
}

# Causal LMs that transformers lists under another task.
MORE = {"mistral4": "Mistral4ForCausalLM"}

# Variants of an architecture: (architecture, what differs).
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "cohere, query-key norm": ("cohere", {"use_qk_norm": True}),
    "deepseek_v3, no query latent": ("deepseek_v3", {"q_lora_rank": None}),
    "falcon, alibi": ("falcon", {"head_dim": UNSET, "multi_query": False, "alibi": True}),
    "falcon, multi-query": ("falcon", {"head_dim": UNSET, "multi_query": True}),
    "gemma2, soft caps": (
        "gemma2",
        {"layer_types": SLIDING, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0},
    ),
    "gemma3n, shared KV": ("gemma3n_text", {**OVERRIDES["gemma3n_text"], "num_kv_shared_layers": 2}),
    "gemma4, K = V": ("gemma4_text", {**OVERRIDES["gemma4_text"], "attention_k_eq_v": True}),
    "gemma4, shared KV": ("gemma4_text", {**OVERRIDES["gemma4_text"], "num_kv_shared_layers": 2}),
    "gpt2, scaled by layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    "gpt2, upcast": ("gpt2", {"reorder_and_upcast_attn": True}),
    "gpt_bigcode, multi-head": ("gpt_bigcode", {"multi_query": False}),
    "granite, multipliers": ("granite", {"attention_multiplier": 0.1, "embedding_multiplier": 3.0}),
    "granitemoehybrid, no positions": ("granitemoehybrid", {"layer_types": LINEAR, "position_embedding_type": None}),
    "llama, head_dim 20": ("llama", {"head_dim": 20}),
    "llama, head_dim 80": ("llama", {"head_dim": 80}),
    "llama, llama3 rope": (
        "llama",
        {
            "rope_parameters": {
                **ROPE,
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "llama, multi-head": ("llama", {"num_key_value_heads": 4}),
    "llama, multi-query": ("llama", {"num_key_value_heads": 1}),
    "llama, yarn": (
        "llama",
        {"rope_parameters": {**ROPE, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}},
    ),
    "minimax_m3, sparse": (
        "minimax_m3_vl_text",
        {
            "layer_types": ["full_attention", "minimax_m3_sparse"] * 2,
            "index_n_heads": 2,  # one for each KV head
            "index_block_size": 16,
            "index_topk_blocks": 3,
            "index_local_blocks": 1,
        },
    ),
    "mistral, no window": ("mistral", {"sliding_window": None}),
    "opt, norm after": ("opt", {"do_layer_norm_before": False}),
    "phi, query-key norm": ("phi", {"qk_layernorm": True}),
    "phi3, no window": ("phi3", {"sliding_window": None}),
    "qwen2, two kinds of layers": ("qwen2", {"use_sliding_window": True, "layer_types": SLIDING}),
    "qwen3_5, full attention": ("qwen3_5_text", {"layer_types": ["full_attention"] * 4}),
    "smollm3, no positions": ("smollm3", {"no_rope_layers": [1, 0, 1, 0]}),
    "stablelm, parallel": ("stablelm", {"use_parallel_residual": True, "qk_layernorm": True}),
}
