"""What tells a transformers model from another, from its config and a few of its weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedConfig, PreTrainedModel

from kvcomp.errors import UnsupportedError
from kvcomp.fingerprint import Fingerprint

from ..configs import decoder_config, field
from .adapters import unwrapped, used_tensors

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
LONGEST = 1 << 16  # of longer vectors as many, of others all


def fingerprint(model_or_config: torch.nn.Module | PreTrainedConfig, name: str | None = None) -> Fingerprint:
    """The fingerprint of a model, or of a config alone: without weights.

    Weights count as bfloat16, so that a checkpoint has one fingerprint whether it is loaded in bfloat16 or in float32.
    Those on the meta device are not available. Adapters count while active: a model whose adapters are disabled
    is the one without them.

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
        *(_digests(unwrapped(model_or_config)) if isinstance(model_or_config, torch.nn.Module) else (None, None)),
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
def _digests(model: torch.nn.Module) -> tuple[str | None, str | None]:
    """Digests of elements of the decoder's tensors: of its matrices, and of all that it computes with."""
    decoder = model.get_decoder() if isinstance(model, PreTrainedModel) else model
    tensors = list(used_tensors(decoder))
    if not tensors or any(tensor.is_meta for _, tensor in tensors):
        return None, None
    samples = {name: _sample(name, tensor) for name, tensor in tensors}
    buffers = {name for name, _ in decoder.named_buffers()}
    matrices = [n for n, x in tensors if n not in buffers and x.dim() >= 2 and x.is_floating_point()]
    return _digest(matrices, samples) if matrices else None, _digest(sorted(samples), samples)


def _digest(names: Sequence[str], samples: Mapping[str, bytes]) -> str:
    digest = hashlib.sha256("\n".join(names).encode())
    for name in names:
        digest.update(samples[name])
    return digest.hexdigest()


def _sample(name: str, tensor: Tensor) -> bytes:
    """Elements spread over a tensor, or all of a short vector; floating-point numbers as bfloat16.

    Quantized weights that are a tensor of tensors, such as those of torchao, give elements of each.

    Raises:
        UnsupportedError: a tensor whose elements cannot be read.
    """
    try:
        packed: Any = tensor
        if is_traceable_wrapper_subclass(packed):
            inner = packed.__tensor_flatten__()[0]
            return b"".join(_sample(f"{name}.{part}", getattr(tensor, part)) for part in inner)
        state, scales = getattr(tensor, "quant_state", None), list[bytes]()
        while state is not None:  # of 4-bit weights of bitsandbytes: scales of blocks, and perhaps those of the scales
            scales.append(_sample(f"{name}.absmax", state.absmax))
            state = state.state2
        flat = tensor.detach().reshape(-1)
        if flat.dtype.itemsize == 1:
            flat = flat.view(torch.uint8)
        if len(flat) and (tensor.dim() > 1 or len(flat) > LONGEST):
            flat = flat[(torch.arange(SAMPLES, device=flat.device) * 2 + 1) * len(flat) // (2 * SAMPLES)]
        flat = flat.to("cpu", torch.bfloat16) if flat.is_floating_point() else flat.cpu()
        return b"".join([flat.contiguous().view(torch.uint8).numpy().tobytes(), *scales])
    except (NotImplementedError, RuntimeError, TypeError, AttributeError) as error:
        raise UnsupportedError(
            f"the elements of {name}, a {type(tensor).__name__}, cannot be read ({error}), so that nothing tells this "
            "model from others: caches cannot be saved, and calibrated stacks not be used"
        ) from error
