"""The dense baseline: pages that hold K and V unchanged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvcomp.stages import PageShape, Quantizer
from kvcomp.stages.registry import register

from .codecs import RawCodec


@register("none")
@dataclass(frozen=True)
class NoQuantizer(Quantizer):
    """Full precision: K and V in the model's dtype, through the same pages and code as every other stack.

    Ours: the dense baseline.
    """

    paper: ClassVar[str] = "-"

    def codec(self, shape: PageShape) -> RawCodec:
        return RawCodec(shape)
