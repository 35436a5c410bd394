"""Integers per token or per channel, plain or in a rotated basis (QuaRot, 2404.00456; SAW-INT4, 2604.19157)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from kvcomp.stages import Alias, Codec, PageShape, arg
from kvcomp.stages.registry import register

from .basis import BASES
from .centred import centred
from .codecs import GridCodec
from .grid import UniformGrid, channel_group
from .widths import BITS, WidthQuantizer

TOKEN, CHANNEL = "token", "channel"
LEAST_CLIP = 0.01  # codes of less than a hundredth of a group's range say nothing of the group


@register("int")
@dataclass(frozen=True)
class Int(WidthQuantizer):
    """Integers per token or per channel, with an optional basis that spreads outlier channels.

    One float16 scale and zero per token and `group` channels (all channels by default): bits + 32 / group effective
    bits, half of that overhead where symmetric; at D = 128 int4 is 4.25 bits. Per channel, a group is as many tokens.
    K's centres are 8 / P more, where channels have no zero of their own.

    Papers: arXiv 2404.00456, 2604.19157.
    """

    paper: ClassVar[str] = "arXiv:2404.00456, arXiv:2604.19157"
    aliases: ClassVar[Mapping[str, str | Alias]] = {"clip_ratio": "clip"}
    widths: ClassVar[tuple[float, ...]] = (2, 3, 4, 5, 6, 7, 8)

    bits: int | float | None = arg(4, f"{BITS}, 2 to 8")
    basis: str = arg(
        "identity", "identity, hadamard (block-diagonal where D is no power of two) or random (a seeded rotation)"
    )
    per: str = arg(TOKEN, "token or channel: what shares a scale and a zero")
    group: int | None = arg(
        None, "channels of a token, or tokens of a channel, that share; None: all channels, or a page of tokens"
    )
    symmetric: bool = arg(False, "true: no zero is stored, and one of the codes stays unused")
    clip: float = arg(1.0, "share of a group's range that the codes cover, 0 < clip <= 1")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(self.basis in BASES, "basis", f"one of {', '.join(BASES)}")
        self.check(self.per in (TOKEN, CHANNEL), "per", f"{TOKEN} or {CHANNEL}")
        self.check(self.group is None or self.group > 0, "group", "None or a positive number")
        self.check(0 < self.clip <= 1, "clip", "more than 0 and at most 1")
        self.check_share("clip", LEAST_CLIP)

    @property
    def page_multiple(self) -> int:
        return self.group or 1 if self.per == CHANNEL else 1

    def _side(self, name: str, shape: PageShape, dim: int, bits: float) -> UniformGrid:
        tokens, channels = self.group or shape.page_size, 1
        if self.per == TOKEN:
            tokens, channels = 1, channel_group(self.name, self.group or dim, dim, 8)
        return UniformGrid(
            name, shape.page_size, dim, int(bits), tokens, channels, symmetric=self.symmetric, clip=self.clip
        )

    @property
    def _centres(self) -> bool:
        """Whether a page's keys are worth centring: not where each channel has a zero of its own."""
        return self.symmetric or self.per == TOKEN

    def codec(self, shape: PageShape) -> Codec:
        k_grid = self._side("k", shape, shape.k_dim, self.k_bits)
        return GridCodec(
            centred(k_grid, shape) if self._centres else k_grid,
            self._side("v", shape, shape.v_dim, self.v_bits),
            BASES[self.basis](shape.k_dim, shape.device),
            BASES[self.basis](shape.v_dim, shape.device),
        )
