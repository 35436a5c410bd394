"""INT8: symmetric 8-bit integers with a scale per token and head (absmax per vector, arXiv 2208.07339)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvcomp.stages import Codec, PageShape, Quantizer
from kvcomp.stages.registry import register

from .int import Int


@register("int8")
@dataclass(frozen=True)
class Int8(Quantizer):
    """Symmetric 8-bit integers, a float16 scale per token and head: `int(bits=8, symmetric=true)`.

    scale = max |x| / 127; 8 + 16 / D effective bits, 8.25 at D = 64, and 8 / P for K's centres.

    Paper: arXiv 2208.07339.
    """

    paper: ClassVar[str] = "arXiv:2208.07339"

    def codec(self, shape: PageShape) -> Codec:
        return Int(bits=8, symmetric=True).codec(shape)
