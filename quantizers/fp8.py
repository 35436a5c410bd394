"""FP8: 8-bit floats with a scale per token and head (formats of arXiv 2209.05433)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from kvcomp.stages import PageShape, Quantizer, arg
from kvcomp.stages.registry import register

from .centred import centred
from .codecs import GridCodec
from .floats import FloatGrid, float8_values

FORMATS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


@register("fp8")
@dataclass(frozen=True)
class FP8(Quantizer):
    """8-bit floats with a bfloat16 scale per token and head: 8 + 16 / D effective bits, 8.25 at D = 64, and
    8 / P for K's centres.

    The relative error of a number does not depend on the others of its token, as it does with integers: an outlier
    channel costs its neighbours nothing until they are a 2^14th of it (E4M3) or a 2^29th (E5M2).

    Paper: arXiv 2209.05433.
    """

    paper: ClassVar[str] = "arXiv:2209.05433"

    format: str = arg("e4m3", "e4m3 (three mantissa bits) or e5m2 (two, and more range)")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(self.format in FORMATS, "format", " or ".join(FORMATS))

    def codec(self, shape: PageShape) -> GridCodec:
        dtype = FORMATS[self.format]
        codebook = float8_values(dtype, shape.device)
        return GridCodec(
            centred(FloatGrid("k", shape.page_size, shape.k_dim, dtype, codebook), shape),
            FloatGrid("v", shape.page_size, shape.v_dim, dtype, codebook),
        )
