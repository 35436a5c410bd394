"""What tells a transformers model from another, from its config and a few of its weights."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from kvcomp.fingerprint import Fingerprint

from ..configs import decoder_config, field

ESSENTIALS = (
    "model_type",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_size",
    "vocab_size",
    "layer_types",
    "sliding_window",
    "rope_parameters",
)
SAMPLES = 8  # elements of each matrix


def fingerprint(model_or_config: torch.nn.Module | PreTrainedConfig, name: str | None = None) -> Fingerprint:
    """The fingerprint of a model, or of a config alone: without weights.

    Weights count as bfloat16, so that a checkpoint has one fingerprint whether it is loaded in bfloat16 or in float32.
    Those on the meta device are not at hand.

    name: what to call it; by default what the config says.
    """
    outer: Any = getattr(model_or_config, "config", model_or_config)
    config = decoder_config(outer)
    said = {key: _plain(field(config, key)) for key in ESSENTIALS}
    called = name or outer.name_or_path or config.name_or_path or "a model without a name"
    hidden = said["hidden_size"]
    width = f", hidden size {hidden:g}" if isinstance(hidden, float) else ""
    shape = f"{config.model_type}, {said['num_hidden_layers']:g} layers{width}"
    return Fingerprint(
        f"{called} ({shape})",
        hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest(),
        _weights(model_or_config) if isinstance(model_or_config, torch.nn.Module) else None,
    )


def _plain(value: Any) -> Any:
    """A value of a config, alike whether it was read from JSON, from GGUF, or set in Python."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, bool) or value is None:
        return value
    return float(value) if isinstance(value, int | float) else str(value)


@torch.no_grad()
def _weights(model: torch.nn.Module) -> str | None:
    """Digest of elements spread over every matrix of the decoder."""
    decoder = model.get_decoder() if isinstance(model, PreTrainedModel) else model
    matrices = [(name, p) for name, p in decoder.named_parameters() if p.dim() >= 2 and p.is_floating_point()]
    if not matrices or any(p.is_meta for _, p in matrices):
        return None
    samples = []
    for _, matrix in matrices:
        flat = matrix.reshape(-1)
        at = (torch.arange(SAMPLES, device=flat.device) * 2 + 1) * len(flat) // (2 * SAMPLES)
        samples.append(flat[at].to("cpu", torch.bfloat16))
    digest = hashlib.sha256("\n".join(name for name, _ in matrices).encode())
    digest.update(torch.cat(samples).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()
