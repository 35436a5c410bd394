"""The pass in which a model repeats its prompt, to see which of its tokens it needs (KVzip, arXiv 2505.23416)."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from kvcomp.attention import Part, attend_after
from kvcomp.errors import UnsupportedError
from kvcomp.policies.kvzip import most_received

from .forward import with_cache
from .handles import Call, HandleLayer
from .latent_handles import LatentHandles
from .layer import answered
from .masks import chunk_mask

REQUEST = "\n\nRepeat the previous context exactly.\n"
REQUEST_FROM = "\n\nRepeat the part of the previous context exactly, starting with"
LEAD = 8  # tokens in front of a later part, which say where it starts
SINKS = 4  # first tokens, among which a query's attention is shared out, too


class RepeatLayer(HandleLayer):
    """A full-attention layer after the K and V of a prompt, of which it repeats tokens `start` to `end`.

    keys [1, Hkv, n, Dk], values [1, Hkv, n, Dv]; received [1, Hkv, n] float32: the most attention that a token got,
    among those of its part, the sinks and the repetition. The repetition itself is forgotten.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.prompt = keys, values
        self.received = keys.new_zeros(keys.shape[:3], dtype=torch.float32)
        self.start = self.end = 0

    def get_seq_length(self) -> int:
        return self.prompt[0].shape[2]

    def take(self, keys: Tensor, values: Tensor) -> None:
        self.own = keys, values

    def attention(self, call: Call) -> tuple[Tensor, Tensor | None]:
        self._watch(call)
        if call.latent is not None:
            keys, values = (torch.cat(pair, 2) for pair in zip(self.prompt, self.own, strict=True))
            return call._replace(mask=chunk_mask(call.name, call.query, keys.shape[2], None)).dense(keys, values)
        # without a mask of the repetition x all tokens, and without K and V of the prompt once more
        (rows, heads, n, dim), streams = call.query.shape, self.own[0].shape[1]
        q = call.query.reshape(rows * streams, heads // streams, n, dim)
        scale = dim**-0.5 if call.scaling is None else call.scaling
        keys, values, own_keys, own_values = (x.flatten(0, 1) for x in (*self.prompt, *self.own))
        part = attend_after(q, keys, values, own_keys, own_values, scale, call.kwargs.get("softcap"))
        shaped = part.out.reshape(rows, heads, n, -1), part.lse.reshape(rows, heads, n)
        return answered(Part(*shaped), call), None

    def _watch(self, call: Call) -> None:
        sinks, (keys, _) = min(SINKS, self.start), self.prompt
        keys = torch.cat([keys[:, :, :sinks], keys[:, :, self.start : self.end], self.own[0]], 2)
        scale = call.query.shape[-1] ** -0.5 if call.scaling is None else call.scaling
        most = most_received(call.asked, keys, scale, call.kwargs.get("softcap"))
        part = self.received[..., self.start : self.end]
        torch.maximum(part, most[..., sinks : sinks + part.shape[-1]], out=part)

    def dense(self, which: int) -> Tensor:
        raise UnsupportedError(
            "this model reads keys and values as tensors instead of through its attention function, so that nothing "
            "says what its tokens receive: use a policy that does not let it repeat the prompt"
        )


class RepeatLatents(LatentHandles, RepeatLayer):
    """A `RepeatLayer` after keys [c, r] and values c of latents."""


@torch.no_grad()
def received(
    model: PreTrainedModel,
    tokenizer: Any,
    ids: Tensor,
    layers: Sequence[Any],
    chunk: int,
) -> list[Tensor]:
    """The most attention that each token of a prompt gets while the model repeats it, `chunk` tokens at a time.

    Args:
        model: a hooked model.
        tokenizer: the model's, for the request to repeat.
        ids: [1, n], without padding.
        layers: of all the model's layers, (keys [1, Hkv, n, Dk], values [1, Hkv, n, Dv]) where they are ours, or a
            `RepeatLayer` after those, and the library's cache layer after the prompt where not.

    Returns:
        [1, Hkv, n] float32 of each layer that is ours.
    """

    def encoded(text: str) -> Tensor:
        found = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        return torch.as_tensor(found, dtype=ids.dtype, device=ids.device)

    each = [RepeatLayer(*layer) if isinstance(layer, tuple) else layer for layer in layers]
    ours = {i: layer for i, layer in enumerate(each) if isinstance(layer, RepeatLayer)}
    n = ids.shape[1]
    for start in range(0, n, chunk):
        end = min(start + chunk, n)
        if start == 0:
            request = encoded(REQUEST)
        else:
            request = torch.cat([encoded(REQUEST_FROM), ids[:, start - LEAD : start], encoded("\n")], 1)
        repeated = torch.cat([request, ids[:, start:end]], 1)
        for layer in ours.values():
            layer.start, layer.end = start, end
        model(
            input_ids=repeated,
            position_ids=torch.arange(n, n + repeated.shape[1], device=ids.device)[None],
            **with_cache(model, Cache(layers=[ours.get(i) or deepcopy(layer) for i, layer in enumerate(layers)])),
            use_cache=True,
            logits_to_keep=1,
        )
    return [layer.received for layer in ours.values()]
