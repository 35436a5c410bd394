"""Compaction of a span of a conversation: fewer tokens that attention takes for it (arXiv 2602.16284)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvcomp.errors import KvcompError, UnsupportedError
from kvcomp.text import quote

from .arguments import is_count, token_ids
from .forward import with_cache
from .handles import Call
from .layer import CompressedLayer
from .reconstruct import REQUEST

PART = 2048  # tokens of the span that are repeated and fitted at a time


class Compaction(NamedTuple):
    """What `CompressedCache.compact` did.

    span: (start, end) of the tokens that went, whole pages. tokens: how many stand for them, in every stream.
    error, lse_error: per compressed layer, the mean over its streams of the relative error of the attention output over
    the span, and of the error of the logarithm of its weight in nats, both of queries that a trial was not fitted to.
    """

    span: tuple[int, int]
    tokens: int
    error: list[float]
    lse_error: list[float]

    def __repr__(self) -> str:
        worst = f"error<={max(self.error):.2g}, lse_error<={max(self.lse_error):.2g} in {len(self.error)} layers"
        return f"Compaction(span={self.span}, tokens={self.tokens}, {worst})"


def compact(
    cache: Any, model: Any, input_ids: Tensor, span: tuple[int, int], keep: float, tokenizer: Any
) -> Compaction:
    """See `CompressedCache.compact`."""
    if not isinstance(keep, int | float) or not 0 < keep < 1:
        raise KvcompError(f"compact(keep={quote(keep)}): expected a share of the span's tokens between 0 and 1")
    if not isinstance(span, tuple | list) or len(span) != 2 or not all(is_count(at, 0) for at in span):
        raise KvcompError(f"compact(span={quote(span)}): expected (start, end), two numbers of tokens")
    token_ids("compact(input_ids=", input_ids)
    ours = [layer for layer in cache.layers if _compacts(layer)]
    if any(layer.plan.latent for layer in ours):
        raise UnsupportedError(f"compact(span={span}): the model caches latents (MLA), which cannot be compacted yet")
    length = cache.get_seq_length()
    if not ours or not ours[0].is_initialized:
        raise KvcompError(f"compact(span={span}): the cache is empty")
    if tuple(input_ids.shape) < (ours[0].store.rows, length) or input_ids.shape[0] != ours[0].store.rows:
        raise KvcompError(
            f"compact(input_ids={tuple(input_ids.shape)}): expected all tokens that the cache holds, "
            f"[{ours[0].store.rows}, {length}]"
        )
    for layer in ours:
        layer.commit()
    start, end = ours[0].store.compactable(*span)
    step = max(PART // ours[0].plan.page_size, 1) * ours[0].plan.page_size
    total, errors = 0, torch.zeros(2, len(ours), dtype=torch.float32, device="cpu")
    for at in range(start, end, step):
        until = min(at + step, end)
        asked = _questions(cache, model, input_ids[:, at:until], tokenizer)
        tokens = max(round(keep * (until - at)), 1)
        for i, (layer, seen) in enumerate(zip(ours, asked, strict=True)):
            found = layer.store.compact(at, until, torch.cat(seen.queries, 2), tokens, seen.scale, seen.softcap)
            share = (until - at) / (end - start)
            errors[:, i] += share * torch.stack([found.error.mean(), found.lse_error.mean()]).cpu()
        total += tokens
    return Compaction((start, end), total, *errors.tolist())


def _compacts(layer: Any) -> bool:
    """Whether a layer has spans of tokens to compact: those with a window forget them anyway."""
    return isinstance(layer, CompressedLayer) and not layer.is_sliding


@torch.no_grad()
def _questions(cache: Any, model: Any, ids: Tensor, tokenizer: Any) -> list[_Recorder]:
    """What compressed layers are asked while the model repeats `ids` [B, n] after what a fork of the cache holds."""
    fork = cache.fork()
    asked = []
    for layer in fork.layers:
        if isinstance(layer, CompressedLayer):
            layer.max_tokens = None
        if _compacts(layer):
            asked.append(_Recorder(layer.attention))
            layer.attention = asked[-1]
    request = tokenizer(REQUEST, add_special_tokens=False, return_tensors="pt").input_ids
    request = torch.as_tensor(request, dtype=ids.dtype, device=ids.device).expand(len(ids), -1)
    model(input_ids=torch.cat([request, ids], 1), **with_cache(model, fork), use_cache=True, logits_to_keep=1)
    for recorder in asked:
        del recorder.attention  # which holds the fork, and that its pages
        if not recorder.queries:
            raise UnsupportedError(
                "this model does not attend through its attention function: its queries are not seen"
            )
    return asked


class _Recorder:
    """An attention method that keeps the queries [B, Hq, n, Dk] that it is called with."""

    def __init__(self, attention: Callable[[Call], tuple[Tensor, Tensor | None]]) -> None:
        self.attention = attention
        self.queries: list[Tensor] = []
        self.scale, self.softcap = 1.0, None

    def __call__(self, call: Call) -> tuple[Tensor, Tensor | None]:
        self.queries.append(call.query)
        self.scale = call.query.shape[-1] ** -0.5 if call.scaling is None else call.scaling
        self.softcap = call.kwargs.get("softcap")
        return self.attention(call)
