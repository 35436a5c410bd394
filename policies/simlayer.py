"""SimLayerKV: layers that look at nothing but the first and the newest tokens keep no others (arXiv 2410.13846)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvcomp.kernels.received import received
from kvcomp.stages import Alias, Chunk, Policy, arg
from kvcomp.stages.registry import register


@register("simlayerkv")
@dataclass(frozen=True)
class SimLayerKV(Policy):
    """SimLayerKV: lazy layers keep the first `first` and the newest `recent` tokens of a prompt, others keep all.

    A layer is lazy for a row if the last `window` queries give more than `threshold` of their attention to these
    tokens, averaged over the query heads. The authors' thresholds: Llama 3 0.9, Llama 2 0.65, Mistral 0.8, Qwen 2 0.85.
    A plan counts all tokens. Tokens that come later are kept.

    Paper: arXiv 2410.13846.
    """

    paper: ClassVar[str] = "arXiv:2410.13846"
    aliases: ClassVar[Mapping[str, str | Alias]] = {
        "lazy_threshold": "threshold",
        "n_recent": "recent",
        "n_initial": "first",
        "n_last": "window",
    }
    needs_queries: ClassVar[bool] = True

    threshold: float = arg(0.9, "share of the attention above which a layer is lazy, 0 to 1")
    first: int = arg(4, "first tokens that lazy layers keep")
    recent: int = arg(1024, "newest tokens that lazy layers keep")
    window: int = arg(1, "last queries that are looked at")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(0 <= self.threshold <= 1, "threshold", "in [0, 1]")
        self.check(self.first >= 0, "first", "zero or positive")
        self.check(self.recent > 0, "recent", "positive")
        self.check(self.window > 0, "window", "positive")

    @property
    def voters(self) -> int:
        return self.window

    @property
    def same_tokens(self) -> tuple[str, ...]:
        return ("heads",)

    def gathers(self, sinks: int, recent: int) -> int:
        return self.first + max(self.recent, recent)

    def kept(self, tokens: int, sinks: int, recent: int, layer: int, layers: int) -> int:
        return tokens

    def select(self, chunk: Chunk) -> Tensor:
        assert chunk.queries is not None
        n = chunk.keys.shape[2]
        token = torch.arange(n, device=chunk.keys.device)
        first = max(self.first - chunk.past, chunk.sinks, 0)
        few = (token < first) | (token >= n - max(self.recent, chunk.recent))
        if bool(few.all()):
            return chunk.alive
        queries = chunk.queries[:, :, -self.window :]
        votes = received(queries, chunk.keys, chunk.scale, chunk.alive)  # [b, Hq, n], summed over the queries
        share = (votes * few).sum((1, 2)) / votes.sum((1, 2)).clamp_min(1e-30)
        return chunk.alive & (few | ~(share > self.threshold)[:, None, None])
