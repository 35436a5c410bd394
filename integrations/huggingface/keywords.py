"""Keyword arguments of attention functions: which do nothing, which we serve, and which choose the tokens seen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_flash_attention_utils import FlashAttentionKwargs
from transformers.utils import TransformersKwargs

from kvcomp.errors import UnsupportedError
from kvcomp.stages import Choice

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
        size = _block_size(module)
        shown = _scattered(blocks, -(-length // size)).repeat_interleave(size, -1)[..., :length]
        shown = shown.repeat_interleave(query.shape[1] // blocks.shape[1], 1)
        if mask is None or mask.dtype == torch.bool:
            lowest = torch.finfo(query.dtype).min
            hidden = ~shown if mask is None else ~(mask & shown)
            return torch.zeros(hidden.shape, dtype=query.dtype, device=query.device).masked_fill(hidden, lowest)
    if mask is None or mask.dtype == torch.bool:
        return shown if mask is None else mask & shown
    return mask.masked_fill(~shown, torch.finfo(query.dtype).min)


def chosen(
    module: torch.nn.Module, choices: Mapping[str, Any], shown: Tensor | None, length: int, heads: int
) -> Choice | None:
    """What single queries see of `length` tokens, as the model's indexer chose: places of each stream, of which a row
    has `heads`; None: all. choices: as of `choose`, with n = 1; shown: bool [B, N], what the mask shows; None: all."""
    indices, blocks = choices.get("indices"), choices.get("block_indices")
    if indices is not None:
        places = indices[:, 0].long()
    elif blocks is not None:
        size = _block_size(module)
        places = blocks[:, :, 0, :, None] * size + torch.arange(size, device=blocks.device)
        places = places.flatten(2).repeat_interleave(heads // blocks.shape[1], 1).flatten(0, 1)  # [B * heads, k * size]
        shown = None if shown is None else shown.repeat_interleave(heads, 0)
    elif shown is None or bool(shown.all()):
        return None
    else:
        return _of_streams(Choice(*_places(shown)), heads)
    seen = (places >= 0) & (places < length)
    if shown is not None:
        seen &= shown.gather(1, places.clamp(0, length - 1))
    choice = Choice(places.masked_fill(~seen, length).sort(-1).values, seen.sum(-1))
    return choice if indices is None else _of_streams(choice, heads)


def _of_streams(choice: Choice, heads: int) -> Choice:
    """A choice of rows for all of their KV heads."""
    return Choice(*(x.repeat_interleave(heads, 0) for x in choice)) if heads > 1 else choice


def _places(shown: Tensor) -> tuple[Tensor, Tensor]:
    """Where bool [B, N] is True: int64 [B, k], then N, and how many there are [B]."""
    counts, (row, place) = shown.sum(-1), shown.nonzero(as_tuple=True)
    places = shown.new_full((len(shown), int(counts.max())), shown.shape[1], dtype=torch.int64)
    places[row, torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]] = place
    return places, counts


def _block_size(module: torch.nn.Module) -> int:
    """Tokens of a block that a module's indexer chooses."""
    size = getattr(getattr(module, "indexer", None), "block_size", None)
    if not isinstance(size, int):
        raise refuse(module, ["block_indices"])
    return size


def _scattered(indices: Tensor, length: int) -> Tensor:
    """bool [..., length]: True at indices [..., k]; negative ones are none."""
    places = indices.long().masked_fill(indices < 0, length)
    shown = torch.zeros(*indices.shape[:-1], length + 1, dtype=torch.bool, device=indices.device)
    return shown.scatter(-1, places, True)[..., :length]
