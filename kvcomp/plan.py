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

    def room(self, tokens: int) -> int:
        """Slots that a stream's exact buffer has once it held `tokens` tokens: a power of two until it is whole."""
        return min(self.slots, max(16, 1 << (tokens - 1).bit_length())) if tokens else 0

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
    # every policy counts from the prompt, not from what the one before left: the strictest decides
    kept = min([tokens, *(policy.kept(tokens, plan.sinks, plan.recent) for policy in plan.policies)])
    pages = plan.pages_of(kept)
    exact = plan.room(kept - pages * plan.page_size) * (k_dim + v_dim) * dtype.itemsize
    return pages * (layout.bytes_per_page + torch.int32.itemsize) + exact + 2 * COUNTER.itemsize
