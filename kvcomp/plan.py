"""What a layer will do and hold, known before any run."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvcomp.pages import PageLayout
from kvcomp.stages import Codec, PageShape, Policy, Quantizer, Selector

COUNTER = torch.int64


@dataclass(frozen=True)
class LayerPlan:
    """The stages of one layer."""

    quantizer: Quantizer
    policies: tuple[Policy, ...]
    selector: Selector | None
    sinks: int
    recent: int
    page_size: int
    layer: int
    layers: int

    @property
    def needs_queries(self) -> bool:
        return any(p.needs_queries for p in self.policies)

    @property
    def slots(self) -> int:
        """Tokens that the exact buffer of a stream has room for."""
        return self.sinks + self.recent + self.page_size

    def pages_of(self, tokens: int) -> int:
        """Full pages of a stream that keeps `tokens` tokens after a prefill."""
        return max(tokens - self.sinks - self.recent, 0) // self.page_size

    def build(self, shape: PageShape) -> tuple[Codec, PageLayout]:
        codec = self.quantizer.codec(shape)
        summary = self.selector.summary_fields(shape) if self.selector is not None else ()
        return codec, PageLayout(self.page_size, codec.fields + summary)


def held_by_stream(plan: LayerPlan, k_dim: int, v_dim: int, tokens: int, dtype: torch.dtype) -> int:
    """Bytes that one stream of the layer holds after prefilling `tokens` tokens, without shared constants."""
    shape = PageShape(plan.page_size, k_dim, v_dim, 1, dtype, torch.device("cpu"), plan.layer)
    _, layout = plan.build(shape)
    kept = tokens
    for policy in plan.policies:
        kept = policy.kept(kept, plan.sinks, plan.recent)
    pages = plan.pages_of(kept)
    exact = plan.slots * (k_dim + v_dim) * dtype.itemsize
    return pages * (layout.bytes_per_page + torch.int32.itemsize) + exact + 2 * COUNTER.itemsize
