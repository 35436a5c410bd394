"""Quest: per-channel minima and maxima of a page's keys bound its logits (arXiv 2406.10774)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvcomp.pages import SUMMARY, Field
from kvcomp.registry import register
from kvcomp.stages import PageShape, Selector, arg

MIN, MAX = f"{SUMMARY}min", f"{SUMMARY}max"


def bounds(queries: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Upper bound of q . k over a page: sum_d max(q_d low_d, q_d high_d) = relu(q) . high - relu(-q) . low.

    queries [S, G, D], low and high [S, n, D] -> [S, G, n] float32.
    """
    q = queries.float()
    return torch.bmm(q.relu(), high.float().transpose(1, 2)) - torch.bmm((-q).relu(), low.float().transpose(1, 2))


@register("quest")
@dataclass(frozen=True)
class Quest(Selector):
    """Quest: a decode query reads only the `pages` pages with the highest bound on its logits.

    The summary is each channel's minimum and maximum over the page's keys (float16, rounded outwards so that it really
    bounds), taken before quantization. The query heads of a KV head choose together: their softmax over the bounds is
    averaged. Defaults as published: pages of 16 tokens, the first 2 layers dense, at least 3 pages; 64 pages is its
    budget of 1024 tokens. Queries that come in chunks (prefill, verification) read every page.
    """

    paper: ClassVar[str] = "arXiv:2406.10774"

    pages: int = arg(64, "pages that a query reads; a page is the stack's (16 tokens, or a quantizer's group)")
    dense_layers: int = arg(2, "first layers that read everything")
    min_pages: int = arg(3, "pages read at least")

    def __post_init__(self) -> None:
        self.check(self.pages > 0, "pages", "positive")
        self.check(self.dense_layers >= 0, "dense_layers", "zero or positive")
        self.check(self.min_pages >= 0, "min_pages", "zero or positive")

    @property
    def page_multiple(self) -> int:
        return 16

    def active(self, layer: int) -> bool:
        return layer >= self.dense_layers

    def summary_fields(self, shape: PageShape) -> tuple[Field, ...]:
        return Field(MIN, (shape.k_dim,), torch.float16), Field(MAX, (shape.k_dim,), torch.float16)

    def summarize(self, keys: Tensor) -> dict[str, Tensor]:
        low, high = torch.aminmax(keys.float(), dim=1)
        # float16 rounds by at most 2^-11 relative, 2^-25 absolute
        low = low - low.abs() * 2**-10 - 2**-24
        high = high + high.abs() * 2**-10 + 2**-24
        huge = torch.finfo(torch.float16).max
        return {MIN: low.clamp(-huge, huge).to(torch.float16), MAX: high.clamp(-huge, huge).to(torch.float16)}

    def reads(self, pages: int) -> int:
        return min(pages, max(self.pages, self.min_pages))

    def select(
        self, queries: Tensor, summary: Mapping[str, Tensor], counts: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        n = summary[MIN].shape[1]
        exists = torch.arange(n, device=counts.device) < counts[:, None]  # [S, n]
        logits = bounds(queries, summary[MIN], summary[MAX]) * scale
        logits = logits.masked_fill(~exists[:, None], -torch.inf)
        mass = logits.softmax(-1).nan_to_num(0).mean(1)  # [S, n]; a stream without pages gives nan
        mass = mass.masked_fill(~exists, -1)
        top = mass.topk(self.reads(n), -1).indices
        chosen = counts.clamp_max(top.shape[1])
        # valid choices first and ascending: entries past a stream's pages sort to the end
        return top.sort(-1).values, chosen
