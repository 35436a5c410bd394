"""Token-wise integers, plain or in a Hadamard basis (QuaRot, arXiv 2404.00456; SAW-INT4, arXiv 2604.19157)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvcomp.errors import SpecError
from kvcomp.registry import register
from kvcomp.stages import PageShape, Quantizer, arg

from .basis import BASES
from .codecs import GridCodec
from .grid import UniformSide


@register("int")
@dataclass(frozen=True)
class Int(Quantizer):
    """Asymmetric integers per token, with an optional Hadamard basis that spreads outlier channels.

    One float16 scale and zero per token and `group` channels (all channels by default): bits + 32 / group effective
    bits; at D = 128 int4 is 4.25 bits.
    """

    paper: ClassVar[str] = "arXiv:2404.00456, arXiv:2604.19157"

    bits: int = arg(4, "bits per element, 2 to 8")
    basis: str = arg(
        "identity", "identity, hadamard (block-diagonal where D is no power of two) or random (a seeded rotation)"
    )
    group: int | None = arg(None, "channels that share a scale and a zero; None: all of them")

    def __post_init__(self) -> None:
        self.check(2 <= self.bits <= 8, "bits", "2 to 8")
        self.check(self.basis in BASES, "basis", f"one of {', '.join(BASES)}")
        self.check(self.group is None or self.group > 0, "group", "None or a positive number of channels")

    def _side(self, name: str, shape: PageShape, dim: int) -> UniformSide:
        group = self.group or dim
        if dim % group:
            raise SpecError(f"int(group={self.group}): {dim} channels are no multiple of {self.group}")
        return UniformSide(name, shape.page_size, dim, self.bits, 1, group)

    def codec(self, shape: PageShape) -> GridCodec:
        return GridCodec(
            self._side("k", shape, shape.k_dim),
            self._side("v", shape, shape.v_dim),
            BASES[self.basis](shape.k_dim, shape.device),
            BASES[self.basis](shape.v_dim, shape.device),
        )
