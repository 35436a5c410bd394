"""Quest: per-channel minima and maxima of a page's keys bound its logits (arXiv 2406.10774)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvcomp.kernels.select import vector_dots
from kvcomp.layout import SUMMARY, Field
from kvcomp.stages import PageShape, arg
from kvcomp.stages.registry import register

from .summaries import SCALE, VectorSelector, encode, vector_fields

MIN, MAX = f"{SUMMARY}min", f"{SUMMARY}max"


@register("quest")
@dataclass(frozen=True)
class Quest(VectorSelector):
    """Quest: a decode query reads only the `pages` pages with the highest bound on its logits.

    The summary is each channel's minimum and maximum over the page's keys, rounded outwards so that it really bounds,
    taken before quantization. The query heads of a KV head choose together: their softmax over the bounds is averaged.
    Defaults as published: pages of 16 tokens, the first 2 layers dense, at least 3 pages; 64 pages is its budget of
    1024 tokens.

    Paper: arXiv 2406.10774.
    """

    paper: ClassVar[str] = "arXiv:2406.10774"

    pages: int | None = arg(None, "pages that a query reads (none of the five: 64)")
    dense_layers: int = arg(2, "first layers that read everything")
    min_pages: int = arg(3, "pages read at least")

    @property
    def default(self) -> tuple[str, float]:
        return "pages", 64

    @property
    def page_multiple(self) -> int:
        return 16

    def summary_fields(self, shape: PageShape) -> tuple[Field, ...]:
        return vector_fields((MIN, MAX), shape.k_dim, self.summary_bits)

    def summarize(self, keys: Tensor, values: Tensor) -> dict[str, Tensor]:
        low, high = torch.aminmax(keys.float(), dim=1)
        return encode({MIN: (low, -1), MAX: (high, 1)}, self.summary_bits)

    def logits(self, queries: Tensor, summary: Mapping[str, Tensor]) -> Tensor:
        """[S, G, n] float32: upper bounds of q . k over a page,

        sum_d max(q_d low_d, q_d high_d) = relu(q) . high - relu(-q) . low."""
        return vector_dots(queries, summary, (MIN, MAX), SCALE)
