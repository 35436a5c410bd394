"""The uniform grid: integers with a scale, and a zero unless symmetric, per block of tokens x channels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from kvcomp.errors import SpecError
from kvcomp.layout import Field
from kvcomp.segments import SideLayout, Uniform, side_of

from .packing import code_fields, code_planes, pack_codes, unpack_codes

SCALE = torch.float16
TINY = 2.0**-24  # smallest positive float16: a scale below it would read back as zero
HUGE = torch.finfo(SCALE).max  # larger keys and values saturate


def channel_group(stage: str, group: int, dim: int, step: int) -> int:
    """How many of `dim` channels share a scale where groups of `group` are asked for: all, where there are fewer.

    step: what the stage wants groups to be multiples of.

    Raises:
        SpecError: the groups do not fill the channels; it names those that do.
    """
    if dim % min(group, dim) == 0:
        return min(group, dim)
    fits = [str(g) for g in range(step, dim + step, step) if dim % min(g, dim) == 0]
    raise SpecError(
        f"{stage}(group={group}): {dim} channels are no multiple of {group}; use a group of {' or '.join(fits)}"
    )


@dataclass(frozen=True)
class UniformGrid:
    """K or V of a page on a uniform grid: x ~ code * scale + zero, scale and zero shared by blocks.

    A block is `token_group` x `channel_group` elements: KIVI's keys are (group, 1), per channel; a per-token grid is
    (1, D). zero is the block's minimum, scale its range / (2^bits - 1), both float16; codes are rounded against the
    *stored* scale and zero, so that their rounding costs nothing more.

    symmetric: no zero is stored; scale = max |x| / (2^(bits - 1) - 1), and one of the 2^bits codes stays unused.
    clip: the share of a block's range, about its middle, that the codes cover; what lies outside saturates.
    """

    name: str
    page_size: int
    dim: int
    bits: int
    token_group: int
    channel_group: int
    symmetric: bool = False
    clip: float = 1.0

    def __post_init__(self) -> None:
        if self.dim % self.channel_group or self.page_size % self.token_group:
            raise SpecError(
                f"{self.name} has {self.dim} channels in pages of {self.page_size} tokens, which blocks of "
                f"{self.token_group} tokens x {self.channel_group} channels do not fill: choose another group"
            )

    @property
    def fields(self) -> tuple[Field, ...]:
        blocks = (self.page_size // self.token_group, self.dim // self.channel_group)
        return (
            *code_fields(self.name, self.bits, self.page_size, self.dim),
            *(Field(f"{self.name}.{what}", blocks, SCALE) for what in self._stored),
        )

    @property
    def anchored(self) -> bool:
        """As in `centred.CentrableGrid`: where tokens are coded one by one, and in two bits or more."""
        return self.token_group == 1 and self.bits > 1

    @property
    def _stored(self) -> tuple[str, ...]:
        return ("scale",) if self.symmetric else ("scale", "zero")

    @property
    def _levels(self) -> int:
        """The highest code."""
        return (1 << self.bits) - (2 if self.symmetric else 1)

    def _blocks(self, x: Tensor) -> Tensor:
        """[M, P, D] -> [M, P / tg, tg, D / cg, cg], a view."""
        blocks: Tensor = x.unflatten(2, (-1, self.channel_group)).unflatten(1, (-1, self.token_group))
        return blocks

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        """x [M, P, D] -> fields."""
        blocks = self._blocks(x.float())
        low, high = torch.aminmax(blocks, dim=4)
        low, high = low.amin(2), high.amax(2)  # [M, P / tg, D / cg]
        levels = self._levels
        if self.symmetric:
            high = torch.maximum(-low, high)
            low = -high
        if self.clip < 1:
            cut = (high - low) * ((1 - self.clip) / 2)
            low, high = low + cut, high - cut
        if self.symmetric:
            scale = (high / (levels // 2)).clamp(TINY, HUGE).to(SCALE)
            zero = -(levels // 2) * scale.float()
        else:
            zero = low.clamp(-HUGE, HUGE).to(SCALE).float()
            scale = ((high - zero) / levels).clamp(TINY, HUGE).to(SCALE)
        spread = (slice(None), slice(None), None, slice(None), None)
        codes = ((blocks - zero[spread]) / scale.float()[spread]).round_().clamp_(0, levels)
        fields = pack_codes(self.name, codes.to(torch.uint8).flatten(3).flatten(1, 2), self.bits)
        stored = {"scale": scale, "zero": zero.to(SCALE)}
        return fields | {f"{self.name}.{what}": stored[what] for what in self._stored}

    def kernel_input(self, x: Tensor) -> Tensor:
        return x

    def decode(self, page: Mapping[str, Tensor]) -> Tensor:
        """Fields [M, ...] -> x [M, P, D] float32."""
        codes = self._blocks(unpack_codes(self.name, page, self.bits).float())
        scale = page[f"{self.name}.scale"].float()[:, :, None, :, None]
        if self.symmetric:
            return ((codes - self._levels // 2) * scale).flatten(3).flatten(1, 2)
        zero = page[f"{self.name}.zero"].float()[:, :, None, :, None]
        return torch.addcmul(zero, codes, scale).flatten(3).flatten(1, 2)

    @cached_property
    def kernel_layout(self) -> SideLayout:
        planes, groups = code_planes(self.name, self.bits), (self.token_group, self.channel_group)
        zero = None if self.symmetric else f"{self.name}.zero"
        middle = self._levels // 2 if self.symmetric else 0
        return side_of(Uniform(self.dim, planes, *groups, f"{self.name}.scale", zero, middle, self.clip))

    def constants(self) -> list[Tensor]:
        return []
