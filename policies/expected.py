"""Expected attention: what future queries will look for, judged by those of the prompt (arXiv 2510.00636)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvcomp.stages import Alias, Chunk, arg
from kvcomp.stages.registry import register

from .scored import ScoredPolicy

FARTHEST = 1 << 16  # positions that `future` may look at
BLOCK = 512  # of them at a time: D x D matrices of that many are held at once
ELEMENTS = 1 << 24  # of queries in float32 that are held at once: 64 MiB


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
        n, dim = chunk.keys.shape[2:]
        sinks = min(max(self.sinks - chunk.past, 0), n - 1)
        turn, device = self._turn(chunk), chunk.keys.device
        logits = chunk.values.new_empty(*chunk.queries.shape[:2], n - sinks, dtype=torch.float32, device=device)
        group = chunk.queries.shape[1] // chunk.keys.shape[1]
        block = max(ELEMENTS // (group * dim), 1)
        for head in range(chunk.keys.shape[1]):  # all at once would be copies of the queries in float32
            for row in range(len(logits)):
                ours = slice(head * group, (head + 1) * group)
                mean, spread = self._expected(chunk, row, ours, sinks, block, turn)
                for at in range(sinks, n, block):
                    k = chunk.keys[row, head, at : at + block].float()  # [t, D]
                    found = chunk.scale * (mean @ k.mT)  # [G, t]
                    if spread is not None:
                        found = found + chunk.scale**2 / 2 * ((k @ spread) * k).sum(-1)
                    logits[row, ours, at - sinks : at - sinks + block] = found
        logits = logits.unflatten(1, (-1, group))  # [b, Hkv, G, m]
        logits = logits.masked_fill(~chunk.alive[:, :, None, sinks:], -torch.inf)
        received = logits.softmax(-1).nan_to_num(0).mean(2)
        if self.norms:
            size = torch.linalg.vector_norm(chunk.values[:, :, sinks:], dim=-1, dtype=torch.float32)
            received = (received + self.epsilon) * size
        first = (received.amax() + 1).expand(*received.shape[:2], sinks)
        return torch.cat([first, received], -1)

    def _turn(self, chunk: Chunk) -> Tensor:
        """R' float32 [D, D]: the mean rotation of the positions to come, transposed."""
        assert chunk.model is not None
        n, dim = chunk.keys.shape[2:]
        device = chunk.keys.device
        ahead = chunk.past + n + torch.arange(self.future, device=device)
        unit = torch.eye(dim, device=device, dtype=torch.float32)[:, None]
        turn = torch.zeros((), device=device, dtype=torch.float32)
        for block in ahead.split(BLOCK):
            turned = chunk.model.rotate(unit.expand(-1, len(block), -1), block).mean(1)
            turn = turn + turned * (len(block) / self.future)
        return turn

    def _expected(
        self, chunk: Chunk, row: int, heads: slice, sinks: int, block: int, turn: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """m' [G, D] and C' [G, D, D] (None: not asked for) of some query heads of a row, `block` queries at a time.
        Sums of their differences from the mean of the first ones lose nothing to cancellation."""
        assert chunk.queries is not None
        assert chunk.model is not None
        n = chunk.keys.shape[2]
        near = total = products = None
        for at in range(sinks, n, block):
            queries = chunk.queries[row : row + 1, heads, at : at + block].float()
            positions = chunk.past + torch.arange(at, at + queries.shape[2], device=queries.device)
            plain = chunk.model.rotate(queries, -positions)[0]  # [G, t, D]
            near = plain.mean(1, keepdim=True) if near is None else near
            plain = plain - near
            summed = plain.sum(1, keepdim=True)
            total = summed if total is None else total + summed
            if self.covariance:
                squares = plain.mT @ plain
                products = squares if products is None else products + squares
        assert near is not None
        assert total is not None
        off = total / (n - sinks)
        mean = (near + off)[:, 0] @ turn
        if products is None:
            return mean, None
        return mean, turn.mT @ (products / (n - sinks) - off.mT @ off) @ turn
