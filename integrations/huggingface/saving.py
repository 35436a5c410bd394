"""What of a transformers cache and its model goes into a file, and how it comes back."""

from __future__ import annotations

import json
from collections.abc import Sequence
from reprlib import repr as short
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicSlidingWindowLayer

from kvcomp.cache.saving import Saved
from kvcomp.errors import KvcompError
from kvcomp.state import FLOATS, DamagedError, State

from ..configs import field
from .fingerprint import ESSENTIALS, fingerprint
from .indexed import IndexedLayer
from .latent import LatentLayer
from .layer import CompressedLayer
from .library import restore_library
from .placing import layer_devices, usable_device
from .preallocated import PreallocatedLayer


def essentials(config: PreTrainedConfig) -> dict[str, Any]:
    """What a file says of the model: those of `ESSENTIALS` that its decoder's config has, as JSON gives them back."""
    own = {name: field(config, name) for name in ESSENTIALS}
    said: dict[str, Any] = json.loads(json.dumps({k: v for k, v in own.items() if v is not None}, default=str))
    return said


def digests(model: Any) -> dict[str, str | None]:
    """What a file says of a model's weights; None for a config, or where they are not available."""
    if not isinstance(model, torch.nn.Module):
        return {"weights": None, "parameters": None}
    found = fingerprint(model)
    return {"weights": found.weights, "parameters": found.parameters}


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
        pairs = [(saved.model.get(name), digest) for name, digest in digests(model).items()]
        if any(None not in pair and pair[0] != pair[1] for pair in pairs):
            found.append("the same architecture with other weights")
    return found


def layer_state(layer: Any) -> dict[str, Any]:
    """The state of a layer, ours or the library's own."""
    return {"kind": _kind(layer), "own": layer.state() if isinstance(layer, CompressedLayer) else vars(layer)}


def _kind(layer: Any) -> str:
    """A layer's class, but for how it decodes, which is not saved; all of them were once one."""
    if isinstance(layer, IndexedLayer):
        return IndexedLayer.__name__
    return (CompressedLayer if isinstance(layer, PreallocatedLayer | LatentLayer) else type(layer)).__name__


def check_kinds(layers: Sequence[Any], saved: Saved) -> None:
    """Raise a KvcompError unless these are layers of the kinds that were saved; its tensors are not looked at."""
    if len(layers) != len(saved.layers):
        raise DamagedError(f"it has {len(saved.layers)} layers, the model {len(layers)}")
    for i, (layer, state) in enumerate(zip(layers, saved.layers, strict=True)):
        kind, here = State(state, f"layer {i}").text("kind"), _kind(layer)
        if kind not in (here, layer.former if isinstance(layer, IndexedLayer) else here):
            raise KvcompError(f"a {short(kind)[1:-1]} was saved where this version of transformers has a {here}")


def dense_windows(saved: Saved) -> set[int]:
    """Layers, by number, that were saved as transformers' own with a sliding window."""
    kinds = (State(state, f"layer {i}").text("kind") for i, state in enumerate(saved.layers))
    return {i for i, kind in enumerate(kinds) if kind == DynamicSlidingWindowLayer.__name__}


def restore_layers(layers: Sequence[Any], saved: Saved, devices: Sequence[torch.device]) -> None:
    """Make new layers those whose `layer_state` was saved, each on its device; the states' tensors lie on the host.

    Raises:
        KvcompError: pages of another layout, or more tokens than the layers can hold.
        DamagedError: the states are none of such layers.
    """
    for i, (layer, state, device) in enumerate(zip(layers, saved.layers, devices, strict=True)):
        both = State(state, f"layer {i}")
        both.only("kind", "own")
        own = both.part("own")
        if isinstance(layer, IndexedLayer) and both["kind"] == layer.former:
            layer.take_over(own, device)
        elif isinstance(layer, CompressedLayer):
            own.only(*layer.state())
            layer.restore(own, device)
        else:
            restore_library(layer, own, device)
    ours = [layer for layer in layers if isinstance(layer, CompressedLayer) and layer.is_initialized]
    for what, found in (
        ("dtypes", {str(layer.dtype).removeprefix("torch.") for layer in ours} | ({saved.dtype} if ours else set())),
        ("numbers of rows", {rows for layer in layers if (rows := _rows(layer)) is not None}),
        ("numbers of tokens", {int(layer.get_seq_length()) for layer in ours}),
    ):
        if len(found) > 1:
            raise DamagedError(f"its layers are of different {what}: {', '.join(map(str, sorted(found)))}")
    rows, tokens = max(ours[0].batch_size, 0) if ours else 0, int(ours[0].get_seq_length()) if ours else 0
    for i, layer in enumerate(layers):
        if isinstance(layer, IndexedLayer):
            _check_index(layer, rows, tokens, f"layer {i}.own")


def _check_index(layer: IndexedLayer, rows: int, tokens: int, where: str) -> None:
    """Of a model's own indexer, keys [B, n, D] and positions [dims, B, n] of all tokens, which a layer may hold without
    any keys and values."""
    own = State({"index_keys": layer.index_keys, "index_positions": layer.indexer_position_ids}, where)
    if own.get("index_keys") is not None:
        own.tensor("index_keys", (rows, tokens, None), *FLOATS)
    if own.get("index_positions") is not None:
        own.tensor("index_positions", (None, rows, tokens), torch.int64)


def _rows(layer: Any) -> int | None:
    """Rows that a layer holds; None where it holds nothing."""
    if isinstance(layer, CompressedLayer):
        return layer.batch_size if layer.is_initialized else None
    conv = vars(layer).get("conv_states")
    tensors = [vars(layer).get("keys"), *(conv.values() if isinstance(conv, dict) else ())]
    return next((len(x) for x in tensors if isinstance(x, Tensor) and x.dim() > 1), None)


def devices_of(asked: str, model_or_config: Any, device: torch.device | str | None, layers: int) -> list[torch.device]:
    """For each layer the device that was asked for, or that of the model's layer, or the CPU.

    Raises:
        KvcompError: there is none of that name, or it cannot hold tensors here.
    """
    on = usable_device(asked, getattr(model_or_config, "device", "cpu") if device is None else device)
    return layer_devices(model_or_config, layers, on) if device is None else [on] * layers
