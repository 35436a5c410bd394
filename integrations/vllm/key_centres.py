"""Biases of a model's keys, as its weights have them: the centres of pages that are written token by token."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kvcomp.cache.blocks.centres import Turned, turned

BIAS = re.compile(r"(?:^|\.)layers\.(\d+)\.self_attn\.k_proj\.bias$")
NORM = re.compile(r"\.self_attn\.k_(?:layer)?norm\.weight$")


def turned_biases(model: str, config: Any, layer: int, dim: int) -> Turned | None:
    """The biases of a layer's keys; None where the model has none, or keys are normalized after them, or its weights
    are not available as safetensors.

    model: a folder, or a hub id whose files are in the local cache. config: the text model's, with its rotary
    embedding.
    """
    biases = _biases(model)
    if not biases or any(len(bias) % dim for bias in biases.values()):
        return None
    some = next(iter(biases.values()))
    heads = biases.get(layer, torch.zeros_like(some)).view(-1, dim)
    return turned(heads, *_rotary(config, dim))


@cache
def _biases(model: str) -> dict[int, Tensor]:
    """float64 [H * D] by layer."""
    folder = Path(model)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(model, local_files_only=True))
        except (OSError, ValueError):  # it is neither a folder nor in the cache
            return {}
    found: dict[int, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                names = list(file.keys())
                if any(NORM.search(name) for name in names):
                    return {}
                for name in names:
                    if match := BIAS.search(name):
                        found[int(match[1])] = file.get_tensor(name).double()
        except (OSError, SafetensorError):
            return {}
    return found


def _rotary(config: Any, dim: int) -> tuple[Tensor, float]:
    """Frequencies float64 [n] of pairs of channels (i, n + i), and what the embedding multiplies keys by."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope: Any = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kind = rope.get("rope_type", "default")
    if kind in ROPE_INIT_FUNCTIONS:
        frequencies, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
        return frequencies.double(), float(factor)
    theta = float(rope.get("rope_theta") or getattr(config, "rope_theta", 10000.0))
    share = float(rope.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", 1.0))
    rotated = int(dim * share)
    return theta ** -(torch.arange(0, rotated, 2, dtype=torch.float64, device="cpu") / rotated), 1.0
