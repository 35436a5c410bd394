"""MoBA: the mean key of a page stands for its tokens (arXiv 2502.13189)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kvcomp.kernels.select import vector_dots
from kvcomp.layout import SUMMARY, Field
from kvcomp.stages import Alias, PageShape, arg
from kvcomp.stages.registry import register

from .summaries import SCALE, VectorSelector, encode, vector_fields

MEAN = f"{SUMMARY}mean"


@register("moba")
@dataclass(frozen=True)
class MoBA(VectorSelector):
    """MoBA: a decode query reads the `pages` pages whose mean key it attends to most, the newest one among them.

    Logits are q . mean(keys of the page before quantization), as the authors' gate; there each query head chooses by
    itself, here those of a KV head together. Defaults are the authors' example: 12 blocks, the current one counted. A
    block is the stack's page: 64 tokens, or what another stage asks for, where theirs are 512 to 4096 and models are
    trained for them. At a given share of the cache (`keep`) smaller blocks choose finer and scan more.

    Paper: arXiv 2502.13189.
    """

    paper: ClassVar[str] = "arXiv:2502.13189"
    aliases: ClassVar[Mapping[str, str | Alias]] = {"moba_topk": "pages"}

    pages: int | None = arg(None, "pages that a query reads (none of the five: 12)")
    last: int = arg(1, "newest pages, read in any case")

    @property
    def default(self) -> tuple[str, float]:
        return "pages", 12

    def summary_fields(self, shape: PageShape) -> tuple[Field, ...]:
        return vector_fields((MEAN,), shape.k_dim, self.summary_bits)

    def summarize(self, keys: Tensor, values: Tensor) -> dict[str, Tensor]:
        return encode({MEAN: (keys.float().mean(1), 0)}, self.summary_bits)

    def logits(self, queries: Tensor, summary: Mapping[str, Tensor]) -> Tensor:
        return vector_dots(queries, summary, (MEAN,), SCALE)
