"""One dense prefill that fills many caches."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from kvcomp.errors import KvcompError

from .cache import CompressedCache
from .layer import Attention, CompressedLayer, Handle


class SharedLayer(CacheLayerMixin):
    """The same layer of several caches during their common prefill: dense attention once, then every stack commits."""

    is_sliding = False

    def __init__(self, layers: Sequence[CompressedLayer]) -> None:
        super().__init__()
        self.members = layers

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(  # type: ignore[override]
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Handle, Handle]:
        self.lazy_initialization(key_states, value_states)
        for member in self.members:
            member.update(key_states, value_states)
        return Handle(self, 0, key_states.shape), Handle(self, 1, value_states.shape)

    def attention(
        self,
        base: Attention,
        module: torch.nn.Module,
        query: Tensor,
        mask: Tensor | None,
        scaling: float | None,
        kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        chunk = self.members[0].pending
        assert chunk is not None
        result = base(module, query, chunk.keys, chunk.values, mask, scaling=scaling, **kwargs)
        for member in self.members:
            member.attention(lambda *a, **k: result, module, query, mask, scaling, kwargs)
        return result

    def dense(self, which: int) -> Tensor:
        return self.members[0].dense(which)

    def get_seq_length(self) -> int:
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_max_length(self) -> int:
        return -1


@torch.no_grad()
def prefill(
    model: PreTrainedModel,
    input_ids: Tensor,
    caches: Sequence[CompressedCache],
    attention_mask: Tensor | None = None,
) -> Tensor:
    """Fill several empty caches from one dense forward over the prompt; each ends up as if it had been filled alone.

    Args:
        model: the model that the caches were made for.
        input_ids: [B, n] int64, n >= 2.
        caches: empty caches.
        attention_mask: [B, n], 0 where padding.

    Returns:
        logits [B, vocabulary] of the last token. Every cache holds n tokens and continues with token n.

    Raises:
        KvcompError: no caches, one that is not empty, or a prompt of fewer than 2 tokens.
    """
    if not caches:
        raise KvcompError("prefill(caches=[]): pass at least one cache")
    if input_ids.dim() != 2 or input_ids.shape[1] < 2:
        raise KvcompError(f"prefill(input_ids={tuple(input_ids.shape)}): expected [B, n] with at least 2 tokens")
    if any(cache.get_seq_length() for cache in caches):
        raise KvcompError("prefill: every cache must be empty; call reset() on those that are not")
    layers: list[Any] = []
    for at_layer in zip(*(cache.layers for cache in caches), strict=True):
        ours = isinstance(at_layer[0], CompressedLayer)
        layers.append(SharedLayer(at_layer) if ours else deepcopy(at_layer[0]))
    out = model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        past_key_values=Cache(layers=layers),
        use_cache=True,
        logits_to_keep=1,
    )
    for cache in caches:
        for i, layer in enumerate(layers):
            if not isinstance(layer, SharedLayer):
                cache.layers[i] = deepcopy(layer)
    return out.logits[:, -1]
