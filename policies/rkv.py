"""R-KV: tokens that are attended to and are not repeated later, for long reasoning (arXiv 2505.24133)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from kvcomp.stages import Alias, Chunk, Held, arg
from kvcomp.stages.registry import register

from .scored import ScoredPolicy

BLOCK = 1 << 22  # elements of similarities or logits held at once: 16 MiB
ROWS = 64  # tokens that are compared with all others at once, at least: memory stays linear in the tokens


@register("rkv")
@dataclass(frozen=True)
class RKV(ScoredPolicy):
    """R-KV: keeps what the last `window` queries attend to, less what other keys resemble; the budget holds while
    generating.

    score_j = mix * importance_j - (1 - mix) * redundancy_j. importance: per query the softmax, over the tokens before
    the window, of the largest logit of a KV head's query heads; averaged over the window and max-pooled over `kernel`
    tokens. redundancy: the softmax, over all tokens, of a key's mean cosine similarity to the others, where each token
    spares the newest one whose similarity to it is above `similar`. The window itself is always kept. Defaults are the
    authors' class, and their paper for mix (0.07 in their scripts). Comparing all keys takes time that grows with the
    square of the prompt, and memory that does not.

    Differs from the paper: a budget is held by whole pages of tokens, not by tokens every 128 steps, since pages are
    never changed once written; a page's importance is the mean attention that it received since it was written, and its
    redundancy is among the keys in pages. A token that resembles none spares none; in the authors' code, the first.

    Paper: arXiv 2505.24133.
    """

    paper: ClassVar[str] = "arXiv:2505.24133"
    aliases: ClassVar[Mapping[str, str | Alias]] = {"mix_lambda": "mix", "kv_budget": "budget"}
    needs_queries: ClassVar[bool] = True
    scores_within: ClassVar[tuple[float, float]] = (-1.0, 1.0)

    hold: bool = arg(True, "keep within an absolute budget while generating, too")
    window: int = arg(8, "last queries that vote; their own tokens are always kept")
    kernel: int = arg(7, "width of the max pooling along the sequence, odd")
    mix: float = arg(0.1, "weight of importance, 0 to 1; the rest of 1 is that of redundancy")
    similar: float = arg(0.5, "cosine above which two keys are similar, 0 to 1")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(self.window > 0, "window", "positive")
        self.check(self.kernel > 0 and self.kernel % 2 == 1, "kernel", "odd and positive")
        self.check(0 <= self.mix <= 1, "mix", "in [0, 1]")
        self.check(0 <= self.similar <= 1, "similar", "in [0, 1]")
        self.check(not self.critical, "critical", "false: this score is no share of attention")

    @property
    def default(self) -> tuple[str, float]:
        return "budget", 128

    def newest(self, count: int) -> int:
        return self.window

    @property
    def voters(self) -> int:
        return self.window

    def scores(self, chunk: Chunk) -> Tensor:
        return self._mixed(self._importance(chunk), redundancy(chunk.keys, chunk.alive, self.similar))

    def page_scores(self, held: Held) -> Tensor:
        """float32 [S, n]: sums over the tokens of a page."""
        assert held.attention is not None
        assert held.keys is not None
        keys = held.keys()  # [S, n, P, Dk]
        there = torch.arange(keys.shape[1], device="cpu") < held.pages[:, None]
        alive = there.to(keys.device)[..., None].expand(keys.shape[:3])
        found = redundancy(keys.flatten(1, 2)[None], alive.flatten(1, 2)[None], self.similar)[0]
        return self._mixed(held.attention, found.unflatten(1, alive.shape[1:]).sum(-1).to(held.attention.device))

    def _mixed(self, importance: Tensor, redundancy: Tensor) -> Tensor:
        return self.mix * importance - (1 - self.mix) * redundancy

    def _importance(self, chunk: Chunk) -> Tensor:
        """[b, Hkv, n] float32; 0 for the tokens of the window."""
        assert chunk.queries is not None
        b, heads, n, _ = chunk.keys.shape
        window = min(self.window, chunk.queries.shape[2])
        before = n - window
        if not before:
            return torch.zeros(b, heads, n, dtype=torch.float32, device=chunk.keys.device)
        q = chunk.queries[:, :, -window:].float().unflatten(1, (heads, -1)) * chunk.scale  # [b, Hkv, G, w, D]
        size = max(BLOCK // q[..., 0].numel(), 1)
        logits = torch.cat(
            [
                (q.flatten(2, 3) @ keys.float().mT).unflatten(2, q.shape[2:4]).amax(2)
                for keys in chunk.keys[:, :, :before].split(size, 2)
            ],
            -1,
        )  # [b, Hkv, w, before]
        hidden = ~chunk.alive[:, :, None, :before]
        votes = logits.masked_fill(hidden, -torch.inf).softmax(-1).nan_to_num(0).mean(2)
        return F.pad(F.max_pool1d(votes, self.kernel, 1, self.kernel // 2), (0, window))


def redundancy(keys: Tensor, alive: Tensor, similar: float) -> Tensor:
    """[b, H, n] float32: how much other keys resemble each of keys [b, H, n, D] of the same head, 1 in all of a head's.

    softmax_j(mean_i s_ij) with s_ij = cos(k_i, k_j) for i != j, but 0 where j is the last of those with s_ij > similar:
    of tokens that resemble each other the newest stays. alive [b, H, n] bool: others do not count, and have 0.
    """
    directions = F.normalize(keys.float(), dim=-1).masked_fill(~alive[..., None], 0)
    last = _last_similar(directions, similar)
    some, last = last >= 0, last.clamp_min(0)
    cosines = (directions * directions.take_along_dim(last[..., None], 2)).sum(-1) * some
    spared = torch.zeros_like(cosines).scatter_add_(-1, last, cosines)
    sums = (directions @ directions.sum(2)[..., None])[..., 0] - directions.square().sum(-1) - spared
    means = sums / alive.sum(-1, keepdim=True).clamp_min(1)
    return means.masked_fill(~alive, -torch.inf).softmax(-1).nan_to_num(0)


def _last_similar(directions: Tensor, similar: float) -> Tensor:
    """int64 [b, H, n]: the last other of unit vectors [b, H, n, D] whose product with each is above `similar`; -1 where
    there is none."""
    b, heads, n, _ = directions.shape
    place = torch.arange(1, n + 1, dtype=torch.int32, device=directions.device)
    rows, found = max(BLOCK // max(b * heads * n, 1), ROWS), []
    for at in range(0, n, rows):
        cosines = directions[:, :, at : at + rows] @ directions.mT  # [b, H, rows, n]
        cosines.diagonal(at, -2, -1).fill_(0)  # none resembles itself
        found.append(((cosines > similar) * place).amax(-1))
    return torch.cat(found, -1).long() - 1
