"""The uniform grid: asymmetric integers with a scale and a zero per block of tokens x channels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kvcomp.errors import SpecError
from kvcomp.pages import Field

from .packing import code_fields, pack_codes, unpack_codes

SCALE = torch.float16
TINY = 2.0**-24  # smallest positive float16: a scale below it would read back as zero
HUGE = torch.finfo(SCALE).max  # larger keys and values saturate


@dataclass(frozen=True)
class UniformSide:
    """K or V of a page on a uniform grid: x ~ code * scale + zero, scale and zero shared by blocks.

    A block is `token_group` x `channel_group` elements: KIVI's keys are (group, 1), per channel; a per-token grid is
    (1, D). zero is the block's minimum, scale its range / (2^bits - 1), both float16; codes are rounded against the
    *stored* scale and zero, so that their rounding costs nothing more.
    """

    name: str
    page_size: int
    dim: int
    bits: int
    token_group: int
    channel_group: int

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
            Field(f"{self.name}.scale", blocks, SCALE),
            Field(f"{self.name}.zero", blocks, SCALE),
        )

    def _blocks(self, x: Tensor) -> Tensor:
        """[M, P, D] -> [M, P / tg, tg, D / cg, cg], a view."""
        return x.unflatten(2, (-1, self.channel_group)).unflatten(1, (-1, self.token_group))

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        """x [M, P, D] -> fields."""
        blocks = self._blocks(x.float())
        low, high = torch.aminmax(blocks, dim=4)
        low, high = low.amin(2), high.amax(2)  # [M, P / tg, D / cg]
        levels = (1 << self.bits) - 1
        zero = low.clamp(-HUGE, HUGE).to(SCALE)
        scale = ((high - zero.float()) / levels).clamp(TINY, HUGE).to(SCALE)
        spread = (slice(None), slice(None), None, slice(None), None)
        codes = ((blocks - zero.float()[spread]) / scale.float()[spread]).round_().clamp_(0, levels)
        fields = pack_codes(self.name, codes.to(torch.uint8).flatten(3).flatten(1, 2), self.bits)
        return fields | {f"{self.name}.scale": scale, f"{self.name}.zero": zero}

    def decode(self, page: Mapping[str, Tensor]) -> Tensor:
        """Fields [M, ...] -> x [M, P, D] float32."""
        codes = self._blocks(unpack_codes(self.name, page, self.bits).float())
        scale = page[f"{self.name}.scale"].float()[:, :, None, :, None]
        zero = page[f"{self.name}.zero"].float()[:, :, None, :, None]
        return torch.addcmul(zero, codes, scale).flatten(3).flatten(1, 2)

    def constants(self) -> list[Tensor]:
        return []
