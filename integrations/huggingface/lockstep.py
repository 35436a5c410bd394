"""Several caches of one row each, decoded as the rows of one batch: the model's weights are read once for all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from .cache import CompressedCache
from .handles import Call, HandleLayer
from .latent import LatentLayer
from .latent_handles import LatentHandles
from .layer import CompressedLayer
from .masks import dense_mask
from .sliding import SlidingLayer

FOLLOWING = ("dynamic", "longrope")  # kinds of rotary embeddings


class Rows(HandleLayer):
    """The same layer of several caches, one row each; every row keeps to its own.

    Some caches may leave a layer with a sliding window to transformers, and others not.
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        super().__init__()
        self.members = layers
        self.held: list[tuple[Any, Any]] = []  # what each member gave for the token that came last
        self.is_sliding = layers[0].is_sliding

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Give keys [n, H, 1, D] and values [n, H, 1, D] to the n members, a row each."""
        self.lazy_initialization(key_states, value_states)
        rows = zip(self.members, key_states.split(1), value_states.split(1), strict=True)
        held = [self.give(member, *row, *args, **kwargs) for member, *row in rows]
        if any(isinstance(member, CompressedLayer) for member in self.members):
            self.held = held
            return self.handles(key_states.shape, value_states.shape, held[0][0].shape[2])
        k, v = (torch.cat(parts) for parts in zip(*held, strict=True))
        return k, v

    def give(self, member: Any, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Hand a member its row, as a copy: one that keeps it must not keep the batch."""
        held: tuple[Any, Any] = member.update(keys.clone(), values.clone(), *args, **kwargs)
        return held

    def attention(self, call: Call) -> tuple[Tensor, Tensor | None]:
        outs, mask = [], dense_mask(call.mask) if isinstance(call.mask, BlockMask) else call.mask
        if len({int(member.get_seq_length()) for member in self.members}) > 1:
            mask = None  # it is of the first member's tokens, and a single new token sees all of its own
        for i, (member, q, held) in enumerate(zip(self.members, call.query.split(1), self.held, strict=True)):
            own = call._replace(query=q, mask=mask if mask is None or mask.shape[0] == 1 else mask[i : i + 1])
            outs.append(member.attention(own) if isinstance(member, CompressedLayer) else own.dense_behind(*held))
        out, weights = zip(*outs, strict=True)
        return torch.cat(out), None if any(x is None for x in weights) else torch.cat(weights)

    def dense(self, which: int) -> Tensor:
        each = zip(self.members, self.held, strict=True)
        return torch.cat([x.dense(which) if isinstance(x, CompressedLayer) else held[which] for x, held in each])

    def get_seq_length(self) -> int:
        return int(self.members[0].get_seq_length())

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        sizes: tuple[int, int] = self.members[0].get_mask_sizes(query_length)
        return sizes


class LatentRows(LatentHandles, Rows):
    """`Rows` of layers that cache latents."""

    def give(self, member: Any, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        if not self.latent:
            return super().give(member, keys, values, *args, **kwargs)
        latents, rank = keys.clone(), values.shape[-1]
        held: tuple[Any, Any] = member.hold(latents, latents[..., :rank])
        return held


def can_step_together(cache: CompressedCache) -> bool:
    """Whether all layers hold keys and values only, and a row can be taken out of a batch's."""
    served = (CompressedLayer, LatentLayer, SlidingLayer, DynamicLayer, DynamicSlidingWindowLayer)
    return all(type(layer) in served for layer in cache.layers)


def can_step_apart(model: PreTrainedModel, cache: CompressedCache) -> bool:
    """Whether the cache can be a row of a batch whose rows hold different numbers of tokens.

    Not where a layer is left to transformers or sees a window, whose masks are of all rows, and not where rotary
    frequencies follow the longest row.
    """
    following = any(kind in str(getattr(model.config, "rope_parameters", "")) for kind in FOLLOWING)
    return not following and all(type(layer) in (CompressedLayer, LatentLayer) for layer in cache.layers)


def lockstep(caches: Sequence[CompressedCache]) -> Cache:
    """One cache of n rows for n caches that hold a row each.

    Feeds the same model: input_ids [n, 1], row i going on from cache i, which takes the token as if it were alone.
    Where caches hold different numbers of tokens (`can_step_apart`), the model needs position_ids [n, 1], too.
    """
    each = zip(*(cache.layers for cache in caches), strict=True)
    return Cache(layers=[(LatentRows if _latent(at_layer[0]) else Rows)(at_layer) for at_layer in each])


def _latent(layer: Any) -> bool:
    return isinstance(layer, LatentLayer) and layer.latent
