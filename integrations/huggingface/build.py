"""The layers of a cache: ours where a stack compresses, the library's own elsewhere."""

from __future__ import annotations

import warnings
from collections.abc import Container
from typing import Any

from transformers import PreTrainedConfig

from kvcomp.architecture import LayerKind
from kvcomp.cache.layer import Shared
from kvcomp.errors import KvcompWarning
from kvcomp.stages.stack import Stack

from ..configs import cache_layers, field, layer_fields, layer_kinds, library_layer
from .indexed import IndexedLatentLayer, IndexedLayer
from .joint import JointLayer
from .latent import LatentLayer
from .layer import CompressedLayer
from .preallocated import PreallocatedLayer, check_room
from .sliding import SlidingLayer
from .turns import Turns

OURS: dict[str, type[CompressedLayer]] = {
    "full_attention": CompressedLayer,
    "indexed_attention": IndexedLayer,
    "minimax_m3_sparse": IndexedLayer,
}


def layers_of(
    stack: Stack,
    config: PreTrainedConfig,
    max_tokens: int | None,
    preallocate: int | None,
    dense: Container[int] = (),
) -> list[Any]:
    """A layer for each of a decoder's; arguments as of `CompressedCache`. dense: layers with a sliding window that
    are to be the library's own."""
    types, kwargs = cache_layers(config)
    if preallocate is not None:
        check_room(stack, config, preallocate, max_tokens)
    latent, kinds = layer_fields(config, "kv_lora_rank"), layer_kinds(config)
    scored = [i for i, kind in enumerate(types) if kind in OURS and kinds[i].traits.scored]
    choices: dict[int, Shared] = {}
    layers: list[Any] = []
    for i, (kind, options) in enumerate(zip(types, kwargs, strict=True)):
        window = None
        if kinds[i] is LayerKind.SLIDING and i not in dense:
            window = stack.sliding_plan(i, len(types), options["sliding_window"])
        if kind in OURS:
            plan = stack.plan(i, len(types), scored if i in scored else None)
            if i not in scored:  # a quantizer alone
                plan = plan.quantizer_alone()
            if preallocate is not None:
                layers.append(PreallocatedLayer(plan, preallocate, stack.prefill_chunk, choices))
            else:
                made = OURS[kind]
                if plan.joint is not None:
                    made = JointLayer
                elif latent[i]:
                    made = IndexedLatentLayer if made is IndexedLayer else LatentLayer
                layers.append(made(plan, max_tokens, stack.prefill_chunk, choices))
        elif window is not None:
            layers.append(SlidingLayer(window, max_tokens, stack.prefill_chunk, choices))
        else:
            layers.append(library_layer(kind, options))
    if not any(isinstance(layer, CompressedLayer) for layer in layers):
        warnings.warn(
            f"no layer of this {config.model_type} is one that {stack} compresses ({', '.join(sorted(set(types)))}): "
            "nothing is compressed",
            KvcompWarning,
            stacklevel=3,
        )
    modes = field(config, "kv_sharing_modes") or ()
    for layer, mode in zip(layers, modes, strict=False):
        if isinstance(layer, CompressedLayer):
            layer.lends = mode == "store"
    first = next((layer for layer in layers if isinstance(layer, CompressedLayer)), None)
    if first is not None:
        flat = any(policy.expires for policy in stack.policies)  # memory that does not grow with the text
        first.turns = Turns(record=not flat and preallocate is None)  # whose steps a graph may take
    return layers
