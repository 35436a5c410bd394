"""What of a transformers cache and its model goes into a file, and how it comes back."""

from __future__ import annotations

import json
from reprlib import repr as short
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from transformers import PreTrainedConfig

from kvcomp.errors import KvcompError
from kvcomp.saving import Saved

from ..configs import field
from .fingerprint import ESSENTIALS, fingerprint
from .layer import CompressedLayer
from .preallocated import PreallocatedLayer


def essentials(config: PreTrainedConfig) -> dict[str, Any]:
    """What a file says of the model: those of `ESSENTIALS` that its decoder's config has, as JSON gives them back."""
    own = {name: field(config, name) for name in ESSENTIALS}
    said: dict[str, Any] = json.loads(json.dumps({k: v for k, v in own.items() if v is not None}, default=str))
    return said


def weights(model: Any) -> str | None:
    """The digest of a model's weights; None for a config, or where they are not at hand."""
    return fingerprint(model).weights if isinstance(model, torch.nn.Module) else None


def differences(saved: Saved, own: dict[str, Any], model: Any) -> list[str]:
    """In words, what is not alike: a file's model and this one, or its config, with these `essentials`.

    dtype and weights are compared where both sides know them.
    """
    names = [name for name in ESSENTIALS if saved.model.get(name) != own.get(name)]
    found = [f"{name} {short(saved.model.get(name))} (here {short(own.get(name))})" for name in names]
    dtype = getattr(model, "dtype", None)
    here = str(dtype).removeprefix("torch.")
    if saved.dtype and dtype is not None and saved.dtype != here:
        found.append(f"dtype {saved.dtype} (here {here})")
    if not found:
        digests = saved.model.get("weights"), weights(model)
        if None not in digests and digests[0] != digests[1]:
            found.append("the same architecture with other weights")
    return found


def layer_state(layer: Any) -> dict[str, Any]:
    """The state of a layer, ours or the library's own."""
    return {"kind": _kind(layer), "own": layer.state() if isinstance(layer, CompressedLayer) else vars(layer)}


def _kind(layer: Any) -> str:
    """A layer's class, but for how it decodes, which is not saved."""
    return (CompressedLayer if isinstance(layer, PreallocatedLayer) else type(layer)).__name__


def restore_layer(layer: Any, state: dict[str, Any], device: torch.device) -> None:
    """Make a new layer the one whose `layer_state` this is, on `device`; the state's tensors lie on the host.

    Raises:
        KvcompError: another kind of layer, or pages of another layout.
    """
    kind = _kind(layer)
    if kind != state["kind"]:
        raise KvcompError(f"a {state['kind']} was saved where this version of transformers has a {kind}")
    if isinstance(layer, CompressedLayer):
        layer.restore(state["own"], device)
    else:
        vars(layer).update(tree_map(lambda x: _on(x, device), state["own"]))


def _on(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.device):
        return device
    return value.to(device) if isinstance(value, Tensor) else value
