"""A selector of one's own is a summary and its logits: here, pages are known by the key of their first token.

from kvcomp import KIVI, CompressedCache
cache = CompressedCache(FirstKey(keep=0.25) + KIVI(bits=4), model)  # or "first_key(keep=0.25) + kivi(bits=4)"
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kvcomp.stages import SUMMARY, Field, PageShape, RankedSelector, register

KEY = f"{SUMMARY}key"


@register("first_key")
@dataclass(frozen=True)
class FirstKey(RankedSelector):
    """A decode query reads the pages whose first key it attends to most. Ours, an example."""

    @property
    def default(self) -> tuple[str, float]:
        return "keep", 0.25

    def summary_fields(self, shape: PageShape) -> tuple[Field, ...]:
        return (Field(KEY, (shape.k_dim,), torch.float16),)

    def summarize(self, keys: Tensor, values: Tensor) -> dict[str, Tensor]:
        """[M, Dk] of keys [M, P, Dk]."""
        return {KEY: keys[:, 0].to(torch.float16)}

    def logits(self, queries: Tensor, summary: Mapping[str, Tensor]) -> Tensor:
        """[S, G, n] of queries [S, G, Dk] and n pages of each stream."""
        return queries.float() @ summary[KEY].float().mT
