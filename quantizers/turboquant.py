"""TurboQuant: a norm, a random rotation and optimal scalar codebooks (arXiv 2504.19874)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvcomp.registry import register
from kvcomp.stages import PageShape, arg

from .basis import rotation
from .codecs import GridCodec
from .lloyd import LloydSide, sphere_codebook
from .widths import BITS, WidthQuantizer


@register("turboquant")
@dataclass(frozen=True)
class TurboQuant(WidthQuantizer):
    """TurboQuant (mse): each vector's norm, and Lloyd-Max codes of its randomly rotated direction.

    After a random rotation every coordinate of a unit vector has a known density, so one optimal codebook serves all
    channels without data. Needs no calibration and no window; bits + 16 / D effective bits (a float16 norm per token).
    """

    paper: ClassVar[str] = "arXiv:2504.19874"

    widths: ClassVar[tuple[float, ...]] = (1, 2, 3, 4)

    bits: int | float | None = arg(4, f"{BITS}, 1 to 4")

    def _side(self, name: str, shape: PageShape, dim: int, bits: int) -> LloydSide:
        return LloydSide(name, shape.page_size, dim, bits, sphere_codebook(dim, bits, shape.device))

    def codec(self, shape: PageShape) -> GridCodec:
        return GridCodec(
            self._side("k", shape, shape.k_dim, int(self.k_bits)),
            self._side("v", shape, shape.v_dim, int(self.v_bits)),
            rotation(shape.k_dim, shape.device),
            rotation(shape.v_dim, shape.device),
        )
