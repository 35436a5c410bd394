"""Leverage scores: tokens that stand out from the others of a text, without any question (CurDKV, Compactor)."""

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

RIDGE = 5e-3  # what the authors of Compactor add to the diagonal of a Gram matrix
POOL = 3  # neighbouring tokens over which Compactor averages attention


@register("curdkv")
@dataclass(frozen=True)
class CurDKV(ScoredPolicy):
    """CurDKV: keeps tokens with large keys and values, beside those of their neighbours.

    The squared norms of keys and of values are divided by their sums over `local` tokens, and multiplied. The first
    `sinks` tokens are always kept.

    Paper: arXiv 2509.15038.
    """

    paper: ClassVar[str] = "arXiv:2509.15038"
    aliases: ClassVar[Mapping[str, str | Alias]] = {"local_window_size": "local", "num_sinks": "sinks"}
    scores_within: ClassVar[tuple[float, float]] = (0.0, 1.0)

    local: int = arg(16, "tokens of a window within which norms are compared")
    sinks: int = arg(4, "first tokens, which are kept")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(self.local > 0, "local", "positive")
        self.check(self.sinks >= 0, "sinks", "zero or positive")

    def scores(self, chunk: Chunk) -> Tensor:
        scores = self._shares(chunk.keys) * self._shares(chunk.values)
        scores[..., : max(self.sinks - chunk.past, 0)] = 1.0
        return scores

    def _shares(self, x: Tensor) -> Tensor:
        """[b, H, n] of x [b, H, n, D]: |x|^2 as a share of its window."""
        n = x.shape[2]
        squares = F.pad(x.float().square().sum(-1), (0, -n % self.local)).unflatten(2, (-1, self.local))
        shares: Tensor = squares / squares.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        return shares.flatten(2)[..., :n]


@register("compactor")
@dataclass(frozen=True)
class Compactor(ScoredPolicy):
    """Compactor: keeps tokens whose keys stand out, and tokens that their neighbourhood attends to.

    The leverage of a key k_j before its rotary embedding, less the mean key, is k_j' (K' K)^-1 k_j over the prompt. The
    attention is that of all queries of a chunk of `chunk` tokens to all its keys, later ones too, without the softmax
    scale; its sum over the queries is averaged over the query heads of a KV head, multiplied by |v_j| and smoothed over
    3 tokens. Both are standardized over the heads and tokens of a row, and the score is attention + `blend` * leverage.
    The first `sinks` and the last `last` tokens are always kept. Leverages are exact here; the authors approximate them
    by a random sketch of the keys.

    Paper: arXiv 2507.08143.
    """

    paper: ClassVar[str] = "arXiv:2507.08143"
    aliases: ClassVar[Mapping[str, str | Alias]] = {
        "chunk_size": "chunk",
        "blending": "blend",
        "sink_size_start": "sinks",
        "sink_size_end": "last",
    }
    needs_queries: ClassVar[bool] = True

    chunk: int = arg(128, "tokens that attend to each other")
    blend: float = arg(0.5, "weight of the leverage beside the attention, as in the authors' engine")
    sinks: int = arg(8, "first tokens, which are kept")
    last: int = arg(4, "newest tokens, which are kept")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(self.chunk > 0, "chunk", "positive")
        self.check(self.blend >= 0, "blend", "zero or positive")
        self.check(self.sinks >= 0, "sinks", "zero or positive")
        self.check(self.last >= 0, "last", "zero or positive")
        self.check(not self.critical, "critical", "false: this score is no share of attention")

    @property
    def needs_model(self) -> bool:
        return True

    def newest(self, count: int) -> int:
        return self.last

    def scores(self, chunk: Chunk) -> Tensor:
        assert chunk.queries is not None
        assert chunk.model is not None
        n = chunk.keys.shape[2]
        first = min(max(self.sinks - chunk.past, 0), n - 1)
        inner = slice(first, max(n - self.last, first + 1))
        queries, keys, values = (x[:, :, inner].float() for x in (chunk.queries, chunk.keys, chunk.values))
        at = chunk.past + torch.arange(n, device=keys.device)[inner]
        leverage = leverages(chunk.model.rotate(keys, -at))
        received = attended(queries, keys, self.chunk) * values.norm(dim=-1)
        received = F.avg_pool1d(received, POOL, 1, POOL // 2)
        scores = standardized(received) + self.blend * standardized(leverage)
        return F.pad(scores, (first, n - inner.stop), value=float(scores.max()) + 1)


def leverages(x: Tensor) -> Tensor:
    """[b, H, n] of x [b, H, n, D]: how much of each row the other rows cannot make up, 0 to 1."""
    x = (x - x.mean(2, keepdim=True)).double()
    gram = x.mT @ x
    gram.diagonal(dim1=-2, dim2=-1).add_(RIDGE)
    solved = torch.cholesky_solve(x.mT, torch.linalg.cholesky(gram))
    return (x * solved.mT).sum(-1).float()


def attended(queries: Tensor, keys: Tensor, size: int) -> Tensor:
    """[b, Hkv, n]: the attention that each of keys [b, Hkv, n, D] gets from queries [b, Hq, n, D] of its chunk of
    `size` tokens, later ones too: summed over them, averaged over the query heads of a KV head."""
    found = []
    for q, k in zip(queries.split(size, 2), keys.split(size, 2), strict=True):
        weights = (q.unflatten(1, (k.shape[1], -1)) @ k.mT[:, :, None]).softmax(-1)  # [b, Hkv, G, m, m]
        found.append(weights.sum(3).mean(2))
    return torch.cat(found, 2)


def standardized(x: Tensor) -> Tensor:
    """x [b, H, n] less its mean, divided by its standard deviation, both over the heads and tokens of a row."""
    centred = x - x.mean((1, 2), keepdim=True)
    return centred / centred.square().mean((1, 2), keepdim=True).sqrt().clamp_min(1e-6)
