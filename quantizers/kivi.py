"""KIVI: asymmetric integers, keys per channel and values per token (arXiv 2402.02750)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvcomp.stages import PageShape, arg
from kvcomp.stages.registry import register

from .codecs import GridCodec
from .grid import UniformGrid, channel_group
from .widths import BITS, WidthQuantizer


@register("kivi")
@dataclass(frozen=True)
class KIVI(WidthQuantizer):
    """KIVI: asymmetric integers, keys quantized per channel and values per token.

    Keys share a scale and a zero along `group` tokens of a channel, values along `group` channels of a token. Group 32
    is the authors' example, a full-precision residual of 128 tokens their LongBench setting. Effective bits:
    bits + 32 / group (a float16 scale and zero per group), plus the window.

    Paper: arXiv 2402.02750.
    """

    paper: ClassVar[str] = "arXiv:2402.02750"

    widths: ClassVar[tuple[float, ...]] = (2, 4)

    bits: int | float | None = arg(2, f"{BITS}: 2 or 4")
    group: int = arg(32, "elements that share a scale and a zero; a multiple of 16")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(self.group > 0 and self.group % 16 == 0, "group", "a positive multiple of 16")

    @property
    def page_multiple(self) -> int:
        return self.group

    @property
    def default_window(self) -> tuple[int, int]:
        return 0, 128

    def codec(self, shape: PageShape) -> GridCodec:
        channels = channel_group(self.name, self.group, shape.v_dim, 16)
        return GridCodec(
            UniformGrid("k", shape.page_size, shape.k_dim, int(self.k_bits), self.group, 1),
            UniformGrid("v", shape.page_size, shape.v_dim, int(self.v_bits), 1, channels),
        )
