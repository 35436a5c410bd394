"""SnapKV: the last queries of the prompt vote for what to keep (arXiv 2404.14469)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from kvcomp.registry import register
from kvcomp.stages import Chunk, Policy, arg

from .budget import keep_best, keep_count

BLOCK = 1 << 24  # elements of attention weights held at once


def window_votes(queries: Tensor, keys: Tensor, scale: float, visible: Tensor | None = None) -> Tensor:
    """Attention weights of a window of last queries, summed over the window: [b, Hq, n] float32.

    queries [b, Hq, w, D] of the last w tokens, keys [b, Hkv, n, D]; causal; visible [b, Hkv, n] hides evicted tokens.
    """
    b, hq, w, _ = queries.shape
    hkv, n = keys.shape[1], keys.shape[2]
    grouped = queries.float().unflatten(1, (hkv, -1))  # [b, Hkv, G, w, D]
    causal = torch.arange(n, device=keys.device) <= torch.arange(n - w, n, device=keys.device)[:, None]
    votes = keys.new_zeros(b, hkv, grouped.shape[2], n, dtype=torch.float32)
    block = max(BLOCK // (b * hq * n), 1)
    for at in range(0, w, block):
        rows = slice(at, at + block)
        logits = torch.einsum("bhgwd,bhnd->bhgwn", grouped[:, :, :, rows], keys.float()) * scale
        seen = causal[rows] if visible is None else causal[rows] & visible[:, :, None, None]
        votes += logits.masked_fill(~seen, -torch.inf).softmax(-1).sum(3)
    return votes.flatten(1, 2)


@register("snapkv")
@dataclass(frozen=True)
class SnapKV(Policy):
    """SnapKV: keeps the prompt tokens that the last `window` queries attend to most, smoothed along the sequence.

    score_j = pool(sum over the window's queries of softmax(q k_j)), averaged over the query heads of a KV head; the
    window itself is always kept. Defaults are the authors' class: window 64, capacity 320, average pooling over 5.
    Each prefilled chunk is scored by its own last queries; tokens generated later are kept.
    """

    paper: ClassVar[str] = "arXiv:2404.14469"
    needs_queries: ClassVar[bool] = True

    keep: float | None = arg(None, "share of the prompt to keep, window included, 0 < keep <= 1")
    budget: int | None = arg(None, "tokens to keep per KV head, window included (320 where neither is given)")
    window: int = arg(64, "last queries that vote; their own tokens are always kept")
    kernel: int = arg(5, "width of the pooling along the sequence, odd")
    pooling: str = arg("avg", "avg or max")

    def __post_init__(self) -> None:
        if self.keep is None and self.budget is None:
            object.__setattr__(self, "budget", 320)
        self.check(self.keep is None or self.budget is None, "budget", "left out where keep is given")
        self.check(self.keep is None or 0 < self.keep <= 1, "keep", "in (0, 1]")
        self.check(self.budget is None or self.budget > 0, "budget", "positive")
        self.check(self.window > 0, "window", "positive")
        self.check(self.kernel > 0 and self.kernel % 2 == 1, "kernel", "odd and positive")
        self.check(self.pooling in ("avg", "max"), "pooling", "avg or max")

    def kept(self, tokens: int, sinks: int, recent: int) -> int:
        protected = min(tokens, sinks) + min(max(self.window, recent), max(tokens - sinks, 0))
        return keep_count(tokens, self.keep, self.budget, protected)

    def scores(self, chunk: Chunk) -> Tensor:
        """float32 [b, Hkv, n]: pooled votes, averaged over the group."""
        assert chunk.queries is not None
        window = min(self.window, chunk.queries.shape[2])
        votes = window_votes(chunk.queries[:, :, -window:], chunk.keys, chunk.scale, chunk.alive)
        prefix = votes[..., : votes.shape[-1] - window]
        pool = F.avg_pool1d if self.pooling == "avg" else F.max_pool1d
        pooled = pool(prefix, self.kernel, 1, self.kernel // 2) if prefix.shape[-1] else prefix
        scores = F.pad(pooled, (0, window))
        return scores.unflatten(1, (chunk.keys.shape[1], -1)).mean(2)

    def select(self, chunk: Chunk) -> Tensor:
        n = chunk.keys.shape[2]
        count = self.kept(n, chunk.sinks, chunk.recent)
        if count >= n:
            return chunk.alive
        last = min(max(self.window, chunk.recent), n - chunk.sinks)
        return keep_best(self.scores(chunk), chunk.alive, count, chunk.sinks, last)
