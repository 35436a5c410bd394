"""Expected attention: what future queries will look for, judged by those of the prompt (arXiv 2510.00636)."""

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

FARTHEST = 1 << 16  # positions that `future` may look at
BLOCK = 512  # of them at a time: D x D matrices of that many are held at once


@register("expected_attention")
@dataclass(frozen=True)
class ExpectedAttention(ScoredPolicy):
    """ExpectedAttention: keeps the tokens that queries of the next `future` positions are expected to attend to.

    The prompt's queries before their rotary embedding, without the first `sinks`, give mean m and covariance C; with R
    the mean rotation of the positions to come, m' = R m and C' = R C R'. Of a query head,
    score_j = softmax_j(s k_j . m' + s^2 k_j' C' k_j / 2) with the softmax scale s: the expectation of exp(s q . k_j) of
    a Gaussian q. It is averaged over the query heads of a KV head, and (score_j + epsilon) is multiplied by |v_j|: with
    epsilon = 0.01, as the authors use it with adaptive heads, large values count without a score. The first `sinks`
    tokens are always kept.

    Paper: arXiv 2510.00636.
    """

    paper: ClassVar[str] = "arXiv:2510.00636"
    aliases: ClassVar[Mapping[str, str | Alias]] = {
        "n_future_positions": "future",
        "use_covariance": "covariance",
        "use_vnorm": "norms",
    }
    needs_queries: ClassVar[bool] = True
    scores_within: ClassVar[tuple[float, float]] = (0.0, 1e30)

    future: int = arg(512, "positions behind the prompt that are looked at")
    sinks: int = arg(4, "first tokens, which are kept, and whose queries do not count")
    covariance: bool = arg(True, "whether the spread of the queries counts, beside their mean")
    norms: bool = arg(True, "whether scores are multiplied by |v|")
    epsilon: float = arg(0.0, "added to scores before they are multiplied by |v|")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(0 < self.future <= FARTHEST, "future", f"positive, and at most {FARTHEST}")
        self.check(self.sinks >= 0, "sinks", "zero or positive")
        self.check(self.epsilon >= 0, "epsilon", "zero or positive")
        self.check(self.norms or not self.epsilon, "epsilon", "0 where norms is false: it would change nothing")
        self.check(not (self.critical and self.norms), "norms", "false where critical weighs values itself")

    @property
    def needs_model(self) -> bool:
        return True

    @property
    def implied(self) -> tuple[str, ...]:
        return () if self.epsilon else ("epsilon",)  # of old, when there was none: hashes stay

    def scores(self, chunk: Chunk) -> Tensor:
        assert chunk.queries is not None
        assert chunk.model is not None
        queries, keys = chunk.queries.float(), chunk.keys.float()
        n, dim = keys.shape[2:]
        sinks = min(max(self.sinks - chunk.past, 0), n - 1)
        at = chunk.past + torch.arange(n, device=keys.device)
        plain = chunk.model.rotate(queries, -at)[:, :, sinks:]
        ahead = chunk.past + n + torch.arange(self.future, device=keys.device)
        unit = torch.eye(dim, device=keys.device, dtype=torch.float32)[:, None]
        turn = torch.zeros((), device=keys.device, dtype=torch.float32)
        for block in ahead.split(BLOCK):
            turned = chunk.model.rotate(unit.expand(-1, len(block), -1), block).mean(1)
            turn = turn + turned * (len(block) / self.future)  # [D, D], whose transpose is R
        mean = plain.mean(2, keepdim=True)
        keys = keys[:, :, None, sinks:]  # [b, Hkv, 1, m, D]

        def grouped(x: Tensor) -> Tensor:
            heads: Tensor = x.unflatten(1, (keys.shape[1], -1))
            return heads

        logits = chunk.scale * (keys @ grouped(mean @ turn).mT)[..., 0]  # [b, Hkv, G, m]
        if self.covariance:
            spread = (plain - mean) @ turn
            spread = grouped(spread.mT @ spread / spread.shape[2])
            logits = logits + chunk.scale**2 / 2 * ((keys @ spread) * keys).sum(-1)
        logits = logits.masked_fill(~chunk.alive[:, :, None, sinks:], -torch.inf)
        received = logits.softmax(-1).nan_to_num(0).mean(2)
        if self.norms:
            received = (received + self.epsilon) * chunk.values[:, :, sinks:].float().norm(dim=-1)
        return F.pad(received, (sinks, 0), value=float(received.max()) + 1)
