"""A quantizer of one's own is a grid: here, K and V are signs and logarithms of magnitudes, a byte each.

from kvcomp import CompressedCache, SnapKV
cache = CompressedCache(SnapKV(keep=0.5) + Logarithmic(), model)  # or "snapkv(keep=0.5) + logarithmic"
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kvcomp.stages import Codec, Field, Grid, GridCodec, PageShape, Quantizer, arg, register


@dataclass(frozen=True)
class LogGrid(Grid):
    """x ~ +-peak * 2^(-code / steps), code 0 to 127: one float16 peak per token, one byte per channel."""

    name: str  # "k" or "v": what the fields' names begin with
    page_size: int
    dim: int
    steps: int

    @property
    def fields(self) -> tuple[Field, ...]:
        codes = Field(f"{self.name}.codes", (self.page_size, self.dim), torch.int8)
        return codes, Field(f"{self.name}.peak", (self.page_size, 1), torch.float16)

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        peak = x.float().abs().amax(-1, keepdim=True).clamp(2.0**-24, 65504).half()
        codes = (-self.steps * (x.float().abs() / peak.float()).clamp(1e-30, 1).log2()).round().clamp(0, 127)
        return {f"{self.name}.codes": torch.where(x < 0, -1 - codes, codes).to(torch.int8), f"{self.name}.peak": peak}

    def decode(self, page: Mapping[str, Tensor]) -> Tensor:
        codes, peak = page[f"{self.name}.codes"].float(), page[f"{self.name}.peak"].float()
        return torch.where(codes < 0, -peak, peak) * torch.exp2(-torch.where(codes < 0, -1 - codes, codes) / self.steps)


@register("logarithmic")
@dataclass(frozen=True)
class Logarithmic(Quantizer):
    """K and V by sign and logarithm, 8 + 16 / D bits. Ours, an example."""

    steps: int = arg(8, "codes per power of two: 127 / steps powers are covered")

    def codec(self, shape: PageShape) -> Codec:
        k = LogGrid("k", shape.page_size, shape.k_dim, self.steps)
        return GridCodec(k, LogGrid("v", shape.page_size, shape.v_dim, self.steps))
