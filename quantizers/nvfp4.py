"""NVFP4: E2M1 codes, blocks of 16 with E4M3 scales, and a float32 scale above them (arXiv 2509.25149)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvcomp.stages import PageShape, Quantizer
from kvcomp.stages.registry import register

from .centred import centred
from .codecs import GridCodec
from .floats import NVGrid, e2m1_values


@register("nvfp4")
@dataclass(frozen=True)
class NVFP4(Quantizer):
    """NVFP4: E2M1 codes with an E4M3 scale per token and 16 channels, and a float32 scale per page.

    NVIDIA's float32 scale belongs to a whole tensor. A cache grows and its maximum is not known in advance, so each
    page has one for K and one for V: its bytes depend on nothing outside it. Effective bits: 4.5, and 128 / (P * D)
    for the page's scale, which takes 16 bytes where fields are aligned; 4.53 at P = D = 64. Where 16 does not divide
    D, the last block is shorter: 4 + 8 ceil(D / 16) / D. K's centres are 8 / P more.

    Paper: arXiv 2509.25149.
    """

    paper: ClassVar[str] = "arXiv:2509.25149"

    def codec(self, shape: PageShape) -> GridCodec:
        codebook = e2m1_values(shape.device)
        return GridCodec(
            centred(NVGrid("k", shape.page_size, shape.k_dim, codebook), shape),
            NVGrid("v", shape.page_size, shape.v_dim, codebook),
        )
