"""Mean keys that follow from a model's weights, for engines whose blocks must depend on their tokens alone.

Where a model adds a bias b to its keys, its rotary embedding turns it by the position p. Its mean over positions,

    m = 1/n sum_p R(p) b

is most of what keys have in common wherever b is large, and is known before there is a request. What is subtracted from
keys is given back in full to the logits of pages, so that a poor guess costs accuracy and nothing else.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

POSITIONS = 2048  # n
BIAS = re.compile(r"(?:^|\.)layers\.(\d+)\.self_attn\.k_proj\.bias$")
NORM = re.compile(r"\.self_attn\.k_(?:layer)?norm\.weight$")


def mean_keys(model: str, config: Any, layer: int, dim: int) -> Tensor | None:
    """Mean keys [H, dim] float32 of a layer's H heads; None where the model has no biases of keys, or keys are
    normalized after them, or its weights are not at hand as safetensors.

    model: a folder, or a hub id whose files are in the local cache. config: the text model's, with its rotary
    embedding.
    """
    bias = _biases(model).get(layer)
    if bias is None or len(bias) % dim:
        return None
    heads = bias.view(-1, dim)
    frequencies, factor = _rotary(config, dim)
    angles = torch.arange(POSITIONS, dtype=torch.float64, device="cpu")[:, None] * frequencies
    cos, sin = (x.mean(0) * factor for x in (angles.cos(), angles.sin()))
    half = len(frequencies)
    a, b, rest = heads[:, :half], heads[:, half : 2 * half], heads[:, 2 * half :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1).float()


def of_rank(means: Tensor, heads: int, rank: int, ranks: int) -> Tensor:
    """Those of the `heads` heads that a rank has of means [H, D]; heads are repeated where there are more ranks."""
    first = rank * heads if len(means) >= ranks * heads else rank * len(means) // ranks
    return means[first : first + heads]


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
