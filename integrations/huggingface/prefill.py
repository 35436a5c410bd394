"""One dense prefill that fills many caches, and the chunked one of those that need their own."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from kvcomp.errors import KvcompError, UnsupportedError
from kvcomp.stages import Policy
from kvcomp.state import described
from kvcomp.text import quote

from .arguments import is_count, token_ids
from .cache import CompressedCache
from .forward import with_cache
from .handles import Call, HandleLayer
from .joint import JointLayer, RepeatJoint
from .latent import LatentLayer
from .latent_handles import LatentHandles
from .layer import CompressedLayer
from .reconstruct import RepeatLatents, RepeatLayer, received
from .timing import Stopwatch, clock


class SharedLayer(HandleLayer):
    """The same layer of several caches during their common prefill: dense attention once, then every stack commits.

    library: one of transformers' own for those caches that leave the layer to it, as some may do with a window.
    """

    def __init__(self, layers: Sequence[Any], watches: Sequence[Stopwatch]) -> None:
        super().__init__()
        pairs = [pair for pair in zip(layers, watches, strict=True) if isinstance(pair[0], CompressedLayer)]
        self.members: list[Any] = [layer for layer, _ in pairs]
        self.watches = [watch for _, watch in pairs]
        self.library = next((deepcopy(layer) for layer in layers if not isinstance(layer, CompressedLayer)), None)
        self.is_sliding = self.members[0].is_sliding

    def take(self, keys: Tensor, values: Tensor) -> None:
        for member in self.members:
            member.update(keys, values)
        if self.library is not None:
            self.library.update(keys, values)

    def attention(self, call: Call) -> tuple[Tensor, Tensor | None]:
        result = call.dense(*self.members[0].newest())
        known = None if call.latent is None else call.latent.known()
        given = call._replace(base=lambda *args, **kwargs: result, latent=known)
        for member, watch in zip(self.members, self.watches, strict=True):
            with watch.span(call.query.device):
                member.attention(given)
        return result

    def dense(self, which: int) -> Tensor:
        dense: Tensor = self.members[0].dense(which)
        return dense


class SharedLatents(LatentHandles, SharedLayer):
    """A `SharedLayer` of members that cache latents."""

    def take(self, keys: Tensor, values: Tensor) -> None:
        for member in self.members:
            (member.hold if self.latent else member.update)(keys, values)


class Prefilled(NamedTuple):
    """What `prefill` did for one cache.

    logits: [B, vocabulary] of the last token.
    dense_s: seconds of the dense forward that the caches shared, without what they added; 0 for one that went alone.
    own_s: seconds that this cache added, to score, evict and encode; its whole prefill where it went alone.
    """

    logits: Tensor
    dense_s: float
    own_s: float

    def __repr__(self) -> str:
        return f"Prefilled(logits={described(self.logits)}, dense_s={self.dense_s:.3f}, own_s={self.own_s:.3f})"


def _check_caches(caches: Any) -> None:
    """Raise a KvcompError unless these are different caches of ours."""
    given = list(caches) if isinstance(caches, list | tuple) else [None]
    wrong = next((cache for cache in given if not isinstance(cache, CompressedCache)), given)
    if wrong is not given:
        raise KvcompError(f"prefill(caches={quote(caches)}): expected a list of CompressedCache")
    if len({id(cache) for cache in given}) < len(given):
        raise KvcompError("prefill(caches=...): the same cache came twice: make one for each")


class Prompt(NamedTuple):
    """ids [B, n] int64; mask [B, n], 0 where padding; positions [B, n] int64. None: no padding."""

    ids: Tensor
    mask: Tensor | None
    positions: Tensor | None

    def enter(self, model: PreTrainedModel, cache: Cache, start: int, end: int) -> Tensor:
        """Feed tokens `start` to `end` after those in the cache; returns logits [B, vocabulary] of the last one."""
        out = model(
            input_ids=self.ids[:, start:end],
            attention_mask=None if self.mask is None else self.mask[:, :end],
            position_ids=None if self.positions is None else self.positions[:, start:end],
            **with_cache(model, cache),
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
    tokenizer: Any = None,
    chunk: int | None = None,
) -> list[Prefilled]:
    """Fill several empty caches with a prompt; each ends up as if it had been filled alone.

    One dense forward serves all caches but those that take less than all of the prompt at once: they go alone, chunk by
    chunk, and each chunk attends to what is left of those before it, so that no more than the compressed cache and one
    chunk is ever held. Where a policy `reconstructs` (kvzip), the model then
    repeats the prompt, with all its K and V still in full precision. Every cache then holds n tokens and continues with
    token n.

    Args:
        model: the model that the caches were made for.
        input_ids: [B, n] int64, n >= 2.
        caches: empty caches.
        attention_mask: [B, n], 0 where padding. Positions count the other tokens, as in `generate`.
        chunk: tokens that enter at once, for every cache; by default what the stack asks for (`Stack.prefill_chunk`).
        tokenizer: the model's; needed where a policy reconstructs, which asks the model to repeat its prompt.

    Returns:
        per cache, the logits of the last token and the seconds that it took.

    Raises:
        KvcompError: no caches, one that is not empty, a chunk that is not positive, a prompt of fewer than 2 tokens, or
            no tokenizer where one is needed.
        UnsupportedError: a policy that reconstructs in a stack that takes its prompt in chunks.
    """
    if not caches:
        raise KvcompError("prefill(caches=[]): pass at least one cache")
    _check_caches(caches)
    token_ids("prefill(input_ids=", input_ids, 2)
    if attention_mask is not None and getattr(attention_mask, "shape", None) != input_ids.shape:
        said = tuple(attention_mask.shape) if isinstance(attention_mask, Tensor) else quote(attention_mask)
        raise KvcompError(f"prefill(attention_mask={said}): expected that of input_ids, {list(input_ids.shape)}")
    if any(cache.get_seq_length() for cache in caches):
        raise KvcompError("prefill: every cache must be empty; call reset() on those that are not")
    positions = None if attention_mask is None else (attention_mask.long().cumsum(-1) - 1).clamp_min(0)
    prompt, tokens = Prompt(input_ids, attention_mask, positions), input_ids.shape[1]
    if chunk is not None and not is_count(chunk):
        raise KvcompError(f"prefill(chunk={quote(chunk)}): expected a positive number of tokens")
    chunks = [min(chunk or tokens, cache.stack.prefill_chunk or tokens) for cache in caches]
    alone = [size < tokens for size in chunks]
    for cache, size, own in zip(caches, chunks, alone, strict=True):
        if (policy := _reconstructing(cache)) is not None:
            if not callable(tokenizer):
                raise KvcompError(
                    f"prefill(tokenizer={quote(tokenizer)}): {policy.name} asks the model to repeat its prompt: "
                    "pass the tokenizer"
                )
            if own:
                raise UnsupportedError(
                    f"{policy.name} needs the whole prompt in full precision, but {cache.stack} is to take it in "
                    f"chunks of {size}: do without one of the two"
                )
    together = [cache for cache, own in zip(caches, alone, strict=True) if not own]
    shared = iter(_together(model, prompt, together, tokenizer) if together else [])
    return [
        _alone(model, prompt, cache, size) if own else next(shared)
        for cache, size, own in zip(caches, chunks, alone, strict=True)
    ]


def _reconstructing(cache: CompressedCache) -> Policy | None:
    return next((policy for policy in cache.stack.policies if policy.reconstructs is not None), None)


def _together(
    model: PreTrainedModel, prompt: Prompt, caches: Sequence[CompressedCache], tokenizer: Any
) -> list[Prefilled]:
    watches = [Stopwatch() for _ in caches]
    layers: list[Any] = []
    for at_layer in zip(*(cache.layers for cache in caches), strict=True):
        first = at_layer[0]
        shared = SharedLatents if isinstance(first, LatentLayer) and first.latent else SharedLayer
        ours = any(isinstance(layer, CompressedLayer) for layer in at_layer)
        layers.append(shared(at_layer, watches) if ours else deepcopy(first))
    for cache in caches:
        if (turns := cache._turns()) is not None:
            turns.announce(prompt.ids)
    start = clock(model.device)
    _expect(caches, prompt.ids.shape[1])
    logits = prompt.enter(model, Cache(layers=layers), 0, prompt.ids.shape[1])
    seconds = clock(model.device) - start
    for cache in caches:
        for i, layer in enumerate(layers):
            if not isinstance(cache.layers[i], CompressedLayer):
                cache.layers[i] = deepcopy(layer.library if isinstance(layer, SharedLayer) else layer)
    own = [watch.seconds() for watch in watches]
    dense = seconds - sum(own)
    passes: dict[int, tuple[list[list[Tensor]], float]] = {}  # by tokens repeated at a time: what they saw, and seconds
    for i, cache in enumerate(caches):
        policy = _reconstructing(cache)
        if policy is not None:
            at_a_time = policy.reconstructs or 0
            if at_a_time not in passes:
                start = clock(model.device)
                found = _repeat(model, prompt, cache, tokenizer, at_a_time)
                passes[at_a_time] = found, clock(model.device) - start
            rows, repeated = passes[at_a_time]
            with watches[i].span(model.device):
                _choose(policy, cache, rows)
            own[i] += repeated + watches[i].seconds()
    return [Prefilled(logits, dense, added) for added in own]


def _repeat(
    model: PreTrainedModel, prompt: Prompt, cache: CompressedCache, tokenizer: Any, chunk: int
) -> list[list[Tensor]]:
    """What `received` gives for each row of the prompt that lies in the cache, uncompressed so far."""
    rows, n = prompt.ids.shape
    found = []
    for b in range(rows):
        tokens = torch.arange(n, device="cpu") if prompt.mask is None else prompt.mask[b].nonzero().flatten().cpu()
        layers: list[Any] = []
        for layer in cache.layers:
            if isinstance(layer, CompressedLayer) and not layer.is_sliding:
                assert layer.pending is not None
                keys, values = (x[b : b + 1, :, tokens.to(x.device)] for x in layer.pending[:2])
                if isinstance(layer, JointLayer):
                    layers.append(RepeatJoint(keys, layer.maps))
                else:
                    layers.append((RepeatLatents if layer.plan.latent else RepeatLayer)(keys, values))
            elif rows > 1 or len(tokens) < n:
                raise UnsupportedError(
                    f"{cache.stack}: of a model with other layers than full attention, one row at a time can be "
                    f"repeated, without padding: prefill the {rows} rows in caches of their own"
                )
            else:
                layers.append(layer)
        found.append(received(model, tokenizer, prompt.ids[b : b + 1, tokens.to(prompt.ids.device)], layers, chunk))
    return found


def _choose(policy: Policy, cache: CompressedCache, rows: list[list[Tensor]]) -> None:
    """Let the policy choose by what each row's tokens received, and commit the prompt."""
    ours = [layer for layer in cache.layers if isinstance(layer, CompressedLayer) and not layer.is_sliding]
    plan = ours[0].plan
    masks = [policy.choose([x.to(row[0].device) for x in row], plan.sinks, plan.recent) for row in rows]
    for i, layer in enumerate(ours):
        assert layer.pending is not None
        chosen = torch.zeros(layer.pending.keys.shape[:3], dtype=torch.bool, device=layer.device)
        for b, mask in enumerate(masks):
            tokens = slice(None) if layer.pending.valid is None else layer.pending.valid[b].nonzero().flatten()
            chosen[b, :, tokens] = mask[i][0].to(layer.device)
        layer.pending = layer.pending._replace(chosen=chosen)
        if not layer.record_past:
            layer.commit()


def _expect(caches: Sequence[CompressedCache], tokens: int) -> None:
    for cache in caches:
        for layer in cache.layers:
            if isinstance(layer, CompressedLayer):
                layer.expect(tokens)


def _alone(model: PreTrainedModel, prompt: Prompt, cache: CompressedCache, chunk: int) -> Prefilled:
    tokens = prompt.ids.shape[1]
    _expect([cache], tokens - (tokens % chunk == 1 < chunk))  # as in `generate`, where a last single token is no chunk
    start = clock(model.device)
    for at in range(0, tokens, chunk):
        logits = prompt.enter(model, cache, at, min(at + chunk, tokens))
    return Prefilled(logits, 0.0, clock(model.device) - start)
