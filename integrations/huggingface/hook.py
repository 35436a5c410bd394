"""Routing a model's attention through kvcomp: one registered attention and mask function per base implementation."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedConfig
from transformers.masking_utils import AttentionMaskInterface

from kvcomp.errors import UnsupportedError

from .forward import refuse_misnamed
from .handles import Attention, Call, Handle
from .masks import mask_function

PREFIX = "kvcomp_"
BASES = ("sdpa", "eager")


def _base_attention(base: str) -> Attention:
    def attend(module: torch.nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        if base == "eager":
            function: Attention = sys.modules[type(module).__module__].eager_attention_forward
        else:
            function = AttentionInterface._global_mapping[base]
        return function(module, *args, **kwargs)

    return attend


def _attention_function(base: str) -> Attention:
    function = _base_attention(base)

    def kvcomp_attention(
        module: torch.nn.Module,
        query: Tensor,
        key: Any,
        value: Any,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        indices: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        refuse_misnamed(module, kwargs)
        if isinstance(key, Handle):
            if indices is not None:
                raise UnsupportedError(
                    f"{type(module).__name__} chooses by itself which tokens attention sees, which compressed keys and "
                    "values cannot follow yet: use the model's own cache"
                )
            return key.layer.answer(Call(function, module, query, attention_mask, scaling, kwargs))
        n, length = query.shape[2], key.shape[2]
        if (
            n > 1
            and length > n
            and (attention_mask is None or attention_mask.dim() == 2)
            and getattr(module, "is_causal", True)
        ):
            # a plain cache behind our mask function, which leaves plain causal chunks to the attention
            build: Any = AttentionMaskInterface._global_mapping[base]
            attention_mask = build(
                batch_size=query.shape[0],
                q_length=n,
                kv_length=length,
                q_offset=length - n,
                attention_mask=attention_mask,
                dtype=query.dtype,
                device=query.device,
            )
        if indices is not None:
            attention_mask = _chosen(attention_mask, indices, length, query)
        return function(module, query, key, value, attention_mask, scaling=scaling, **kwargs)

    return kvcomp_attention


def _chosen(mask: Tensor | None, indices: Tensor, length: int, query: Tensor) -> Tensor:
    """The mask [B, 1, n, N] without what the model's indexer leaves out.

    indices [B, n, k] of the tokens that a query sees: models with an indexer mask the others by themselves only where
    they know the attention by its name.
    """
    hidden = torch.ones(*indices.shape[:2], length, dtype=torch.bool, device=query.device)
    hidden = hidden.scatter(-1, indices.long(), False)[:, None]
    if mask is None or mask.dtype == torch.bool:
        return ~hidden if mask is None else mask & ~hidden
    return mask.masked_fill(hidden, torch.finfo(query.dtype).min)


def hook(config: PreTrainedConfig) -> str:
    """Route the config's attention through kvcomp; returns the implementation it had."""
    current = config._attn_implementation or "sdpa"
    if current.startswith(PREFIX):
        return current.removeprefix(PREFIX)
    if current not in BASES:
        raise UnsupportedError(
            f"attn_implementation={current!r} cannot be hooked: "
            "load the model with attn_implementation='sdpa' (or 'eager')"
        )
    name = PREFIX + current
    if name not in AttentionInterface._global_mapping:
        AttentionInterface.register(name, _attention_function(current))
        # without a mask function of the same name transformers would drop the padding silently
        AttentionMaskInterface.register(name, mask_function(current))
    config._attn_implementation = name
    return current
