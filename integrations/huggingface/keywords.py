"""Keyword arguments of attention functions: which do nothing, which we serve, and which choose the tokens seen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_flash_attention_utils import FlashAttentionKwargs
from transformers.utils import TransformersKwargs

from kvcomp.errors import UnsupportedError

# what forwards pass on to attention that sdpa and eager attention ignore, or that is about training, losses or outputs
HARMLESS = (
    frozenset(TransformersKwargs.__annotations__)
    | frozenset(FlashAttentionKwargs.__annotations__)
    | {
        "cache_position",
        "deterministic",
        "dropout",
        "input_ids",
        "inputs_embeds",
        "labels",
        "logits_to_keep",
        "mm_token_type_ids",
        "output_router_logits",
        "past_key_values",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "sliding_window",
        "token_type_ids",
        "use_cache",
        "cache",
    }
)
SERVED = frozenset({"softcap", "s_aux", "is_causal"})
VARLEN = frozenset(FlashAttentionKwargs.__annotations__) | {"seq_idx"}  # of packed prompts
CHOICES = frozenset({"indices", "block_indices"})  # of tokens and of blocks of tokens, by a model's own indexer


def given(kwargs: Mapping[str, Any], known: frozenset[str]) -> list[str]:
    """The names of keyword arguments that are not `known` and not None."""
    return [name for name, value in kwargs.items() if name not in known and value is not None]


def refuse(module: torch.nn.Module, names: list[str]) -> UnsupportedError:
    """The error for keyword arguments that cannot be followed."""
    if CHOICES.issuperset(names):
        return UnsupportedError(
            f"{type(module).__name__} chooses by itself which tokens attention sees ({names[0]}=), which compressed "
            "keys and values cannot follow yet: use the model's own cache"
        )
    listed = ", ".join(f"{name}=" for name in names)
    return UnsupportedError(
        f"{type(module).__name__} passes {listed} to its attention, whose meaning kvcomp does not know: call "
        "cache.detach() and use the model's own cache"
    )


def choose(module: torch.nn.Module, mask: Tensor | None, query: Tensor, length: int, choices: Mapping[str, Any]) -> Any:
    """The mask [B, 1 or Hq, n, N] of queries [B, Hq, n, D] over `length` tokens without what the model's indexer leaves
    out: models mask that by themselves only where they know the attention by its name.

    indices: int [B, n, k], tokens that a query sees; -1 for none. block_indices: int [B, H, n, k], blocks of the size
    that the model's indexer has; -1 for none; the mask is additive then, as of these models.
    """
    if (indices := choices.get("indices")) is not None:
        shown = _scattered(indices, length)[:, None]
    else:
        blocks: Tensor = choices["block_indices"]
        size = getattr(getattr(module, "indexer", None), "block_size", None)
        if size is None:
            raise refuse(module, ["block_indices"])
        shown = _scattered(blocks, -(-length // size)).repeat_interleave(size, -1)[..., :length]
        shown = shown.repeat_interleave(query.shape[1] // blocks.shape[1], 1)
        if mask is None or mask.dtype == torch.bool:
            lowest = torch.finfo(query.dtype).min
            hidden = ~shown if mask is None else ~(mask & shown)
            return torch.zeros(hidden.shape, dtype=query.dtype, device=query.device).masked_fill(hidden, lowest)
    if mask is None or mask.dtype == torch.bool:
        return shown if mask is None else mask & shown
    return mask.masked_fill(~shown, torch.finfo(query.dtype).min)


def _scattered(indices: Tensor, length: int) -> Tensor:
    """bool [..., length]: True at indices [..., k]; negative ones are none."""
    places = indices.long().masked_fill(indices < 0, length)
    shown = torch.zeros(*indices.shape[:-1], length + 1, dtype=torch.bool, device=indices.device)
    return shown.scatter(-1, places, True)[..., :length]
