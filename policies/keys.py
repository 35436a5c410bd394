"""Scores from keys and values alone, without any query: norm, difference, lag, and chance as the floor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from kvcomp.stages import Alias, Chunk, arg
from kvcomp.stages.registry import register

from .scored import ScoredPolicy


@register("knorm")
@dataclass(frozen=True)
class KNorm(ScoredPolicy):
    """L2 norm: keeps the keys of least norm, which many queries attend to.

    Paper: arXiv 2406.11430.
    """

    paper: ClassVar[str] = "arXiv:2406.11430"
    scores_within: ClassVar[tuple[float, float]] = (-1e30, 0.0)

    def scores(self, chunk: Chunk) -> Tensor:
        norms: Tensor = chunk.keys.float().norm(dim=-1)
        return -norms


@register("keydiff")
@dataclass(frozen=True)
class KeyDiff(ScoredPolicy):
    """KeyDiff: keeps the keys that differ most from the mean direction of all keys, by cosine.

    Paper: arXiv 2504.15364.
    """

    paper: ClassVar[str] = "arXiv:2504.15364"
    scores_within: ClassVar[tuple[float, float]] = (-1.0, 1.0)

    def scores(self, chunk: Chunk) -> Tensor:
        directions = F.normalize(chunk.keys.float(), dim=-1) * chunk.alive[..., None]
        mean = directions.sum(2, keepdim=True) / chunk.alive.sum(-1).clamp_min(1)[..., None, None]
        return -F.cosine_similarity(chunk.keys.float(), mean, dim=-1)


@register("lagkv")
@dataclass(frozen=True)
class LagKV(ScoredPolicy):
    """LagKV: keeps tokens whose keys and values spread most, relative to the range of the partition after theirs.

    After `first` tokens the prompt is cut into partitions of `lag` tokens. With each channel scaled by its minimum and
    maximum over the following partition, a token's score is the softmax, over its partition, of the standard deviation
    over its channels; keys and values count the same. Tokens are ranked within their partition, so that all partitions
    keep alike; the first tokens, the last whole partition and what follows it are kept.

    Paper: arXiv 2504.04704.
    """

    paper: ClassVar[str] = "arXiv:2504.04704"
    aliases: ClassVar[Mapping[str, str | Alias]] = {"lag_size": "lag", "n_sink": "first"}
    scores_within: ClassVar[tuple[float, float]] = (0.0, 3.0)

    lag: int = arg(128, "tokens of a partition")
    first: int = arg(4, "first tokens, which are in no partition")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(self.lag > 0, "lag", "positive")
        self.check(self.first >= 0, "first", "zero or positive")

    def scores(self, chunk: Chunk) -> Tensor:
        n = chunk.keys.shape[2]
        parts = (n - self.first) // self.lag
        scores = torch.arange(n, device=chunk.keys.device) / n + 1.0  # above every rank: the newest come first
        scores = scores.expand(chunk.alive.shape).clone()
        scores[..., : self.first] = 3.0
        if parts >= 2:
            cut = slice(self.first, self.first + parts * self.lag)
            both = [
                self._spread(x[:, :, cut].float().unflatten(2, (parts, self.lag))) for x in (chunk.keys, chunk.values)
            ]
            ranks = torch.stack(both).mean(0).argsort(-1).argsort(-1) / self.lag  # [b, H, parts - 1, lag] in [0, 1)
            scores[..., self.first : self.first + (parts - 1) * self.lag] = ranks.flatten(2)
        return scores

    @staticmethod
    def _spread(x: Tensor) -> Tensor:
        """[b, H, parts - 1, lag] of x [b, H, parts, lag, D]."""
        low, high = x[:, :, 1:].amin(3, keepdim=True), x[:, :, 1:].amax(3, keepdim=True)
        width = (high - low).clamp_min(torch.finfo(x.dtype).tiny)
        return ((x[:, :, :-1] - low) / width).std(-1).softmax(-1)


@register("random")
@dataclass(frozen=True)
class Random(ScoredPolicy):
    """Chance, the same in every run: what any score has to beat.

    Ours: the floor.
    """

    paper: ClassVar[str] = "kvcomp"
    scores_within: ClassVar[tuple[float, float]] = (0.0, 1.0)

    seed: int = arg(0, "of the draw; layers draw apart")

    def scores(self, chunk: Chunk) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1000 + chunk.layer)
        drawn = torch.rand(chunk.alive.shape[1:], generator=generator, dtype=torch.float32, device="cpu")
        return drawn.to(chunk.keys.device).expand(chunk.alive.shape)
