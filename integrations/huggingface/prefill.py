"""One dense prefill that fills many caches, and the chunked one of those that need their own."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from kvcomp.errors import KvcompError

from .cache import CompressedCache
from .handles import Call, HandleLayer
from .layer import CompressedLayer
from .timing import Stopwatch, clock


class SharedLayer(HandleLayer):
    """The same layer of several caches during their common prefill: dense attention once, then every stack commits."""

    def __init__(self, layers: Sequence[CompressedLayer], watches: Sequence[Stopwatch]) -> None:
        super().__init__()
        self.members, self.watches = layers, watches

    def take(self, keys: Tensor, values: Tensor) -> None:
        for member in self.members:
            member.update(keys, values)

    def attention(self, call: Call) -> tuple[Tensor, Tensor | None]:
        chunk = self.members[0].pending
        assert chunk is not None
        result = call.dense(chunk.keys, chunk.values)
        given = call._replace(base=lambda *args, **kwargs: result)
        for member, watch in zip(self.members, self.watches, strict=True):
            with watch.span(call.query.device):
                member.attention(given)
        return result

    def dense(self, which: int) -> Tensor:
        return self.members[0].dense(which)


class Prefilled(NamedTuple):
    """What `prefill` did for one cache.

    logits: [B, vocabulary] of the last token.
    dense_s: seconds of the dense forward that the caches shared, without what they added; 0 for one that went alone.
    own_s: seconds that this cache added, to score, evict and encode; its whole prefill where it went alone.
    """

    logits: Tensor
    dense_s: float
    own_s: float


class Prompt(NamedTuple):
    """ids [B, n] int64; mask [B, n], 0 where padding; positions [B, n] int64. None: no padding."""

    ids: Tensor
    mask: Tensor | None
    positions: Tensor | None

    def enter(self, model: PreTrainedModel, cache: Cache, start: int, end: int) -> Tensor:
        """Feed tokens `start` to `end` behind those in the cache; returns logits [B, vocabulary] of the last one."""
        out = model(
            input_ids=self.ids[:, start:end],
            attention_mask=None if self.mask is None else self.mask[:, :end],
            position_ids=None if self.positions is None else self.positions[:, start:end],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: Tensor = out.logits[:, -1]
        return logits


@torch.no_grad()
def prefill(
    model: PreTrainedModel,
    input_ids: Tensor,
    caches: Sequence[CompressedCache],
    attention_mask: Tensor | None = None,
) -> list[Prefilled]:
    """Fill several empty caches with a prompt; each ends up as if it had been filled alone.

    One dense forward serves all caches but those whose stack takes the prompt in chunks (`Stack.prefill_chunk`) and
    less than all of it at once: these go alone, chunk by chunk. Every cache then holds n tokens and continues with
    token n.

    Args:
        model: the model that the caches were made for.
        input_ids: [B, n] int64, n >= 2.
        caches: empty caches.
        attention_mask: [B, n], 0 where padding. Positions count the other tokens, as in `generate`.

    Returns:
        per cache, the logits of the last token and the seconds that it took.

    Raises:
        KvcompError: no caches, one that is not empty, or a prompt of fewer than 2 tokens.
    """
    if not caches:
        raise KvcompError("prefill(caches=[]): pass at least one cache")
    if input_ids.dim() != 2 or input_ids.shape[1] < 2:
        raise KvcompError(f"prefill(input_ids={tuple(input_ids.shape)}): expected [B, n] with at least 2 tokens")
    if any(cache.get_seq_length() for cache in caches):
        raise KvcompError("prefill: every cache must be empty; call reset() on those that are not")
    positions = None if attention_mask is None else (attention_mask.long().cumsum(-1) - 1).clamp_min(0)
    prompt, tokens = Prompt(input_ids, attention_mask, positions), input_ids.shape[1]
    alone = [(cache.stack.prefill_chunk or tokens) < tokens for cache in caches]
    together = [cache for cache, own in zip(caches, alone, strict=True) if not own]
    shared = iter(_together(model, prompt, together) if together else [])
    return [_alone(model, prompt, cache) if own else next(shared) for cache, own in zip(caches, alone, strict=True)]


def _together(model: PreTrainedModel, prompt: Prompt, caches: Sequence[CompressedCache]) -> list[Prefilled]:
    watches = [Stopwatch() for _ in caches]
    layers: list[Any] = []
    for at_layer in zip(*(cache.layers for cache in caches), strict=True):
        ours = isinstance(at_layer[0], CompressedLayer)
        layers.append(SharedLayer(at_layer, watches) if ours else deepcopy(at_layer[0]))
    start = clock(model.device)
    logits = prompt.enter(model, Cache(layers=layers), 0, prompt.ids.shape[1])
    seconds = clock(model.device) - start
    for cache in caches:
        for i, layer in enumerate(layers):
            if not isinstance(layer, SharedLayer):
                cache.layers[i] = deepcopy(layer)
    own = [watch.seconds() for watch in watches]
    return [Prefilled(logits, seconds - sum(own), added) for added in own]


def _alone(model: PreTrainedModel, prompt: Prompt, cache: CompressedCache) -> Prefilled:
    tokens, chunk = prompt.ids.shape[1], cache.stack.prefill_chunk
    assert chunk is not None
    start = clock(model.device)
    for at in range(0, tokens, chunk):
        logits = prompt.enter(model, cache, at, min(at + chunk, tokens))
    return Prefilled(logits, 0.0, clock(model.device) - start)
