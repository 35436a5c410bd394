"""Centres of pages that follow from a model's weights, for pages that are written token by token.

Such a page is read before its keys are known, so that its centre cannot be their mean. It is what the model adds to all
keys, a bias b, turned by the rotary embedding R as at the page's middle position p:

    c(p) = R(p) b = sum_i f_i(p) W_i,    f = (cos(p w_1), .., sin(p w_1), .., 1)

It depends on the position alone, as no block may depend on a request. A poor guess costs accuracy and nothing else:
what is subtracted from keys is given back to their logits.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

BIAS = re.compile(r"(?:^|\.)layers\.(\d+)\.self_attn\.k_proj\.bias$")
NORM = re.compile(r"\.self_attn\.k_(?:layer)?norm\.weight$")


class Turned(NamedTuple):
    """The biases of a layer's H heads at any position: frequencies w float32 [w], weights W float32 [F, H, dim].

    F = 2 w + 1; or 0 where the model has no biases, and centres are 0.
    """

    frequencies: Tensor
    weights: Tensor

    @classmethod
    def nothing(cls, heads: int, dim: int, device: torch.device) -> Turned:
        kind = {"dtype": torch.float32, "device": device}
        return cls(torch.zeros(0, **kind), torch.zeros(0, heads, dim, **kind))

    def of_rank(self, heads: int, rank: int, ranks: int) -> Turned:
        """Of the `heads` heads that a rank has; heads are repeated where there are more ranks."""
        held = self.weights.shape[1]
        first = rank * heads if held >= ranks * heads else rank * held // ranks
        return self._replace(weights=self.weights[:, first : first + heads])

    def to(self, device: torch.device) -> Turned:
        return Turned(*(x.to(device) for x in self))


def turns(frequencies: Tensor, positions: Tensor) -> Tensor:
    """f float32 [t, F] of positions [t]."""
    if not len(frequencies):
        return frequencies.new_zeros(len(positions), 0)
    angles = positions.to(torch.float32)[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin(), torch.ones_like(angles[:, :1])], -1)


def turned_biases(model: str, config: Any, layer: int, dim: int) -> Turned | None:
    """The biases of a layer's keys; None where the model has none, or keys are normalized after them, or its weights
    are not at hand as safetensors.

    model: a folder, or a hub id whose files are in the local cache. config: the text model's, with its rotary
    embedding.
    """
    biases = _biases(model)
    if not biases or any(len(bias) % dim for bias in biases.values()):
        return None
    some = next(iter(biases.values()))
    heads = biases.get(layer, torch.zeros_like(some)).view(-1, dim)
    return turned(heads, *_rotary(config, dim))


def turned(heads: Tensor, frequencies: Tensor, factor: float) -> Turned:
    """Biases heads [H, dim], of which channels i and w + i turn with frequencies [w] and are multiplied by factor."""
    half = len(frequencies)
    cos, sin = (torch.zeros(half, *heads.shape, dtype=torch.float64, device="cpu") for _ in range(2))
    for i in range(half):
        a, b = heads[:, i] * factor, heads[:, half + i] * factor
        cos[i, :, i], cos[i, :, half + i] = a, b
        sin[i, :, i], sin[i, :, half + i] = -b, a
    rest = heads.double().clone()
    rest[:, : 2 * half] = 0
    return Turned(frequencies.float(), torch.cat([cos, sin, rest[None]]).float())


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
