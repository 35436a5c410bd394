"""TurboQuant: a norm, a random rotation and optimal scalar codebooks (arXiv 2504.19874)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvcomp.registry import register
from kvcomp.stages import PageShape, Quantizer, arg

from .basis import rotation
from .codecs import GridCodec
from .lloyd import LloydSide, sphere_codebook


@register("turboquant")
@dataclass(frozen=True)
class TurboQuant(Quantizer):
    """TurboQuant (mse): each vector's norm, and Lloyd-Max codes of its randomly rotated direction.

    After a random rotation every coordinate of a unit vector has a known density, so one optimal codebook serves all
    channels without data. Needs no calibration and no window; bits + 16 / D effective bits (a float16 norm per token).
    """

    paper: ClassVar[str] = "arXiv:2504.19874"

    bits: int = arg(4, "bits per element, 1 to 4")

    def __post_init__(self) -> None:
        self.check(1 <= self.bits <= 4, "bits", "1, 2, 3 or 4")

    def _side(self, name: str, shape: PageShape, dim: int) -> LloydSide:
        return LloydSide(name, shape.page_size, dim, self.bits, sphere_codebook(dim, self.bits, shape.device))

    def codec(self, shape: PageShape) -> GridCodec:
        return GridCodec(
            self._side("k", shape, shape.k_dim),
            self._side("v", shape, shape.v_dim),
            rotation(shape.k_dim, shape.device),
            rotation(shape.v_dim, shape.device),
        )
