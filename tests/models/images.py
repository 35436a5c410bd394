"""Ten tiny models of text and images, each with a prompt that holds an image."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from overrides import SLIDING, SPARSE
from situations import Prompt
from tiny import shrunk, spread
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

IMAGE, START = 9, 11  # token ids
AT, LENGTH, PADDING = 60, 150, 37
TEXT = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
QWEN_VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 64,
}
QWEN_TOKENS = {"image_token_id": IMAGE, "video_token_id": 10, "vision_start_token_id": START, "vision_end_token_id": 12}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}


def pixels(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


def _prompt(image_tokens: int) -> Prompt:
    """Two rows, one of them padded, with the tokens of an image in each."""
    ids = torch.randint(20, 250, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    ids[1, :PADDING] = mask[1, :PADDING] = 0
    ids[:, AT : AT + image_tokens] = IMAGE
    return Prompt(input_ids=ids, attention_mask=mask)


Built = tuple[Any, dict[str, Any], Prompt]  # the config, what the prompt has beside text, the text


def _llava() -> Built:
    vision = hf.CLIPVisionConfig(**VISION, image_size=30, patch_size=15, projection_dim=32)
    config = hf.LlavaConfig(
        text_config=hf.LlamaConfig(**TEXT), vision_config=vision, image_token_index=IMAGE, image_seq_length=4
    )
    return config, {"pixel_values": pixels(2, 3, 30, 30)}, _prompt(4)


def _gemma3() -> Built:
    text = hf.Gemma3TextConfig(**TEXT, head_dim=16, sliding_window=90, layer_types=SLIDING)
    config = hf.Gemma3Config(
        text_config=text.to_dict(),
        vision_config=hf.SiglipVisionConfig(**VISION, image_size=32, patch_size=8).to_dict(),
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        boi_token_index=10,
        eoi_token_index=START,
    )
    prompt = _prompt(4)
    types = (prompt["input_ids"] == IMAGE).long()
    return config, {"token_type_ids": types, "pixel_values": pixels(2, 3, 32, 32)}, prompt


def _patches(prompt: Prompt) -> dict[str, Any]:
    """What Qwen's models take: 16 patches of 4 x 4 pixels in 2 frames for each row."""
    prompt["input_ids"][:, AT - 1] = START
    return {
        "mm_token_type_ids": (prompt["input_ids"] == IMAGE).int(),
        "pixel_values": pixels(32, 3 * 2 * 4 * 4),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * 2),
    }


def _qwen2_5_vl() -> Built:
    vision = {**QWEN_VISION, "depth": 2, "window_size": 16, "fullatt_block_indexes": [1]}
    config = hf.Qwen2_5_VLConfig(text_config={**TEXT, "rope_parameters": MROPE}, vision_config=vision, **QWEN_TOKENS)
    prompt = _prompt(4)
    return config, _patches(prompt), prompt


def _qwen3_vl() -> Built:
    vision = {**QWEN_VISION, "depth": 3, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}
    text = {**TEXT, "head_dim": 16, "rope_parameters": MROPE}
    config = hf.Qwen3VLConfig(text_config=text, vision_config=vision, **QWEN_TOKENS)
    prompt = _prompt(4)
    return config, _patches(prompt), prompt


def _idefics3() -> Built:
    config = hf.Idefics3Config(
        text_config=hf.LlamaConfig(**TEXT),
        vision_config={**VISION, "image_size": 32, "patch_size": 8},
        scale_factor=2,
        image_token_id=IMAGE,
        pad_token_id=0,
    )
    return config, {"pixel_values": pixels(2, 1, 3, 32, 32)}, _prompt(4)


def _mllama() -> Built:
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_global_layers": 1,
        "attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
        "max_num_tiles": 1,
        "intermediate_layers_indices": [0, 1],
        "supported_aspect_ratios": [[1, 1]],
        "vision_output_dim": 96,
    }
    text = {**TEXT, "cross_attention_layers": [1, 3]}
    extra = {
        "pixel_values": pixels(2, 1, 1, 3, 32, 32),
        "aspect_ratio_ids": torch.ones(2, 1, dtype=torch.long),
        "aspect_ratio_mask": torch.ones(2, 1, 1, dtype=torch.long),
        "cross_attention_mask": torch.ones(2, LENGTH, 1, 1, dtype=torch.long),
    }
    return hf.MllamaConfig(text_config=text, vision_config=vision, image_token_index=255), extra, _prompt(0)


def _paligemma() -> Built:
    vision = hf.SiglipVisionConfig(**VISION, image_size=16, patch_size=8, projection_dim=64)
    config = hf.PaliGemmaConfig(
        text_config=hf.GemmaConfig(**TEXT, head_dim=16).to_dict(),
        vision_config=vision.to_dict(),
        image_token_index=IMAGE,
        projection_dim=64,
        hidden_size=64,
    )
    prompt = _prompt(4)
    types = torch.zeros_like(prompt["input_ids"])
    return config, {"token_type_ids": types, "pixel_values": pixels(2, 3, 16, 16)}, prompt


def _llama4() -> Built:
    vision = {
        "hidden_size": 32,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 4,
        "pixel_shuffle_ratio": 0.5,
        "projector_input_dim": 32,
        "projector_output_dim": 32,
        "vision_output_dim": 32,
    }
    config = hf.Llama4Config(
        text_config=shrunk(CONFIG_MAPPING["llama4_text"], {"attention_chunk_size": 16}).to_dict(),
        vision_config=vision,
        image_token_index=IMAGE,
        boi_token_index=10,
        eoi_token_index=START,
    )
    return config, {"pixel_values": pixels(2, 3, 16, 16)}, _prompt(4)


LATENT = {
    "num_key_value_heads": 4,
    "mlp_layer_types": SPARSE,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "index_head_dim": 32,
    "index_n_heads": 4,
}


def _glm5_next() -> Built:
    """Latents without a rotary key, an indexer over pools of keys, and recurrent layers."""
    text = {
        **TEXT,
        **LATENT,
        "layer_types": ["linear_attention", "indexed_attention"] * 2,
        "linear_head_dim": 16,
        "linear_num_heads": 4,
        "index_topk": 32,
        "index_kpool": 4,
        "hc_mult": 2,
    }
    vision = {**QWEN_VISION, "depth": 2, "image_size": 16, "projection_intermediate_size": 64}
    config = hf.Glm5NextConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=10,
        image_start_token_id=START,
        image_end_token_id=12,
        video_start_token_id=13,
        video_end_token_id=14,
    )
    prompt = _prompt(4)
    return config, _patches(prompt), prompt


def _mistral_large4() -> Built:
    """Latents, whose last layer has no rotary key, an indexer, and a layer that shares the latents of another."""
    text = {
        **{name: size for name, size in {**TEXT, **LATENT}.items() if name != "q_lora_rank"},
        "qk_rope_head_dim": 16,
        "index_topk": 24,
        "no_rope_layers": [1, 1, 1, 0],
        "kv_source_layers": [0, 0, 2, 3],
    }
    vision = {**VISION, "image_size": 32, "patch_size": 8, "head_dim": 16}
    config = hf.MistralLarge4Config(
        text_config=text, vision_config={"model_type": "pixtral", **vision}, image_token_index=IMAGE
    )
    extra = {"pixel_values": pixels(2, 3, 32, 32), "image_sizes": torch.tensor([[32, 32]] * 2)}
    return config, extra, _prompt(4)


MODELS: dict[str, Callable[[], Built]] = {
    "gemma3 with images": _gemma3,
    "glm5_next with images": _glm5_next,
    "idefics3": _idefics3,
    "llama4 with images": _llama4,
    "llava": _llava,
    "mistral_large4 with images": _mistral_large4,
    "mllama with images": _mllama,
    "paligemma": _paligemma,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
}


def tiny_model_of_images(name: str) -> tuple[PreTrainedModel, Prompt]:
    """The model, the same at every call, and a prompt with an image."""
    config, extra, prompt = MODELS[name]()
    torch.manual_seed(0)
    model = hf.AutoModelForImageTextToText.from_config(config).float().eval()
    spread(model)
    with torch.no_grad():
        for part, parameter in model.named_parameters():
            if "gate" in part and parameter.dim() <= 1:
                parameter.fill_(0.5)  # Mllama opens its cross-attention by a gate that starts at 0
    return model, Prompt(prompt, **extra)
