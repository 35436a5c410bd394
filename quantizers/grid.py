"""The uniform grid: asymmetric integers with a scale and a zero per block of tokens x channels, bit-packed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kvcomp.errors import SpecError
from kvcomp.pages import Field

SCALE = torch.float16
TINY = 2.0**-24  # smallest positive float16: a scale below it would read back as zero
HUGE = torch.finfo(SCALE).max  # larger keys and values saturate


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [..., n] of `bits` (2, 4 or 8) each -> uint8 [..., n * bits / 8], the first code in the low bits."""
    per = 8 // bits
    if per == 1:
        return codes
    lanes = codes.unflatten(-1, (-1, per))
    packed = lanes[..., 0].clone()
    for i in range(1, per):
        packed |= lanes[..., i] << (bits * i)
    return packed


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Inverse of `pack`: [..., n] codes, int32 or uint8."""
    if bits == 8:
        return packed
    # a 32-bit word at a time where rows allow it: the same order on little-endian machines, and twice as fast
    words = packed.view(torch.int32) if packed.shape[-1] % 4 == 0 else packed
    shifts = torch.arange(0, 8 * words.itemsize, bits, dtype=words.dtype, device=packed.device)
    return ((words[..., None] >> shifts) & ((1 << bits) - 1)).flatten(-2)


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
        if self.dim % self.channel_group or self.page_size % self.token_group or self.dim * self.bits % 8:
            raise SpecError(
                f"{self.name} has {self.dim} channels in pages of {self.page_size} tokens, which {self.bits} bits with "
                f"a scale per {self.token_group} tokens x {self.channel_group} channels do not fill: choose another "
                "group or bits"
            )

    @property
    def fields(self) -> tuple[Field, ...]:
        blocks = (self.page_size // self.token_group, self.dim // self.channel_group)
        return (
            Field(f"{self.name}.codes", (self.page_size, self.dim * self.bits // 8), torch.uint8),
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
        packed = pack(codes.to(torch.uint8).flatten(3).flatten(1, 2), self.bits)
        return {f"{self.name}.codes": packed, f"{self.name}.scale": scale, f"{self.name}.zero": zero}

    def decode(self, page: Mapping[str, Tensor]) -> Tensor:
        """Fields [M, ...] -> x [M, P, D] float32."""
        codes = self._blocks(unpack(page[f"{self.name}.codes"], self.bits).float())
        scale = page[f"{self.name}.scale"].float()[:, :, None, :, None]
        zero = page[f"{self.name}.zero"].float()[:, :, None, :, None]
        return torch.addcmul(zero, codes, scale).flatten(3).flatten(1, 2)
