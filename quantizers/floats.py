"""Floating-point grids: 8-bit floats with a scale per token, and E2M1 with a scale per block of channels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from kvcomp.layout import Field
from kvcomp.segments import Floats, Plane, SideLayout

from .packing import code_fields, code_planes, pack_codes, unpack_codes

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of codes 0 to 7; bit 3 is the sign
E2M1_MAX = E2M1[-1]
E2M1_EMAX = 2  # 6 = 1.5 * 2^2
E4M3_MAX = torch.finfo(torch.float8_e4m3fn).max
E4M3_LEAST = torch.finfo(torch.float8_e4m3fn).smallest_normal / 8  # smallest positive number
FORMATS = {torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2"}
LEAST = 2.0**-126  # of scales: not zero, and a normal number. Their upper bounds keep scale * code finite.


@cache
def e2m1_values(device: torch.device) -> Tensor:
    """float32 [16]: the numbers that the E2M1 codes stand for. All layers share it."""
    return torch.tensor(E2M1 + tuple(-value for value in E2M1), device=device, dtype=torch.float32)


@cache
def float8_values(format: torch.dtype, device: torch.device) -> Tensor:
    """float32 [256]: the numbers that the codes of a torch 8-bit float stand for. All layers share it."""
    return torch.arange(256, device=device).to(torch.uint8).view(format).float()


def look_up(codebook: Tensor, codes: Tensor) -> Tensor:
    """codebook[codes] of codes of any shape and integer type; on CPUs several times faster than indexing."""
    return codebook.index_select(0, codes.flatten().int()).view(codes.shape)


def to_e2m1(x: Tensor) -> Tensor:
    """uint8 E2M1 codes of float32 x: the nearest numbers, ties to the even mantissa, +-6 beyond."""
    size = x.abs()
    # Steps are 1/2 below 2, 1 below 4 and 2 above. Each rounding is exact and each offset even: even codes win ties.
    codes = torch.minimum((2 * size).round_(), size.round().add_(2))
    codes = torch.minimum(codes, (size / 2).round_().add_(4)).clamp_max_(7)
    return codes.to(torch.uint8) | (x.signbit().to(torch.uint8) << 3)


def e2m1_error(x: Tensor) -> Tensor:
    """Squared error [...] of float32 x [..., n] as E2M1 numbers, n a power of two: summed by halves, so that every
    kernel finds the same."""
    size = x.abs()
    near = size.clamp_max(E2M1_MAX)
    exponent = near.view(torch.int32).bitwise_and(0xFF << 23).clamp_min_(127 << 23)
    rounding = exponent.add_(22 << 23 | 1 << 22).view(torch.float32)  # its last bit is worth a step
    error = near.add_(rounding).sub_(rounding).sub_(size).square_()
    while (half := error.shape[-1] // 2) > 0:
        error = error[..., :half] + error[..., half:]
    return error[..., 0]


@dataclass(frozen=True)
class FloatGrid:
    """K or V of a page as 8-bit floats with a scale per token: x ~ code * scale.

    scale = max |x| / the largest number of `format`, bfloat16: it needs range, not precision. Rounding it moves the
    mean squared error by 0.2 %; float16 cannot hold the scales of small vectors, and costs them 10 % and more.

    format: torch.float8_e4m3fn or torch.float8_e5m2, rounded to the nearest, ties to even.
    """

    name: str
    page_size: int
    dim: int
    format: torch.dtype
    codebook: Tensor  # float32 [256], as of `float8_values`: torch converts E4M3 five times slower than it looks it up
    anchored: ClassVar[bool] = True

    @property
    def fields(self) -> tuple[Field, ...]:
        return (
            Field(f"{self.name}.codes8", (self.page_size, self.dim), self.format),
            Field(f"{self.name}.scale", (self.page_size, 1), torch.bfloat16),
        )

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        """x [M, P, D] -> fields."""
        x = x.float()
        largest = torch.finfo(self.format).max
        scale = (x.abs().amax(-1, keepdim=True) / largest).clamp_(LEAST, 2.0**112).to(torch.bfloat16)
        codes = (x / scale.float()).clamp_(-largest, largest).to(self.format)  # conversion may overflow to inf or nan
        return {f"{self.name}.codes8": codes, f"{self.name}.scale": scale}

    def kernel_input(self, x: Tensor) -> Tensor:
        return x

    @cached_property
    def kernel_layout(self) -> SideLayout:
        planes, format = (Plane(f"{self.name}.codes8", 8),), FORMATS[self.format]
        return SideLayout((Floats(self.dim, planes, format, self.dim, f"{self.name}.scale", "bf16"),))

    def decode(self, page: Mapping[str, Tensor]) -> Tensor:
        """Fields [M, ...] -> x [M, P, D] float32."""
        codes = page[f"{self.name}.codes8"].view(torch.uint8)
        return look_up(self.codebook, codes).mul_(page[f"{self.name}.scale"].float())

    def constants(self) -> list[Tensor]:
        return [self.codebook]


@dataclass(frozen=True)
class BlockGrid:
    """K or V of a page as E2M1 codes with a scale per token and `block` channels: x ~ value(code) * scale.

    Where `block` does not divide the channels, the last block is shorter and has a scale of its own. The format of the
    scales is the subclass's; codes are rounded against the stored scales.
    """

    block: ClassVar[int]
    scale_format: ClassVar[str]
    anchored: ClassVar[bool] = True

    name: str
    page_size: int
    dim: int
    codebook: Tensor  # float32 [16], as of `e2m1_values`

    @property
    def fields(self) -> tuple[Field, ...]:
        return (*code_fields(self.name, 4, self.page_size, self.dim), *self.scale_fields)

    def kernel_input(self, x: Tensor) -> Tensor:
        return x

    @cached_property
    def kernel_layout(self) -> SideLayout:
        page = f"{self.name}.page_scale"
        shared = f"{self.name}.scale", self.scale_format, page if page in [f.name for f in self.scale_fields] else None
        return SideLayout((Floats(self.dim, code_planes(self.name, 4), "e2m1", self.block, *shared),))

    @property
    def blocks(self) -> int:
        """Blocks of a token, B below."""
        return -(-self.dim // self.block)

    @property
    def scale_fields(self) -> tuple[Field, ...]:
        raise NotImplementedError

    def encode_scales(self, x: Tensor) -> dict[str, Tensor]:
        """Blocks [M, P, B, block], float32 -> the fields of `scale_fields`."""
        raise NotImplementedError

    def decode_scales(self, page: Mapping[str, Tensor]) -> Tensor:
        """Fields [M, ...] -> scales [M, P, B], float32 and positive."""
        raise NotImplementedError

    def _blocked(self, x: Tensor) -> Tensor:
        """[M, P, D] -> [M, P, B, block], a view where `block` divides D, otherwise filled up with zeros."""
        missing = self.blocks * self.block - self.dim
        blocks: Tensor = (pad(x, (0, missing)) if missing else x).unflatten(2, (-1, self.block))
        return blocks

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        """x [M, P, D] -> fields."""
        x = self._blocked(x.float())
        stored = self.encode_scales(x)
        codes = to_e2m1(x / self.decode_scales(stored)[..., None]).flatten(2)[..., : self.dim]
        return pack_codes(self.name, codes, 4) | stored

    def decode(self, page: Mapping[str, Tensor]) -> Tensor:
        """Fields [M, ...] -> x [M, P, D] float32."""
        values = look_up(self.codebook, unpack_codes(self.name, page, 4))
        return (self._blocked(values) * self.decode_scales(page)[..., None]).flatten(2)[..., : self.dim]

    def constants(self) -> list[Tensor]:
        return [self.codebook]


@dataclass(frozen=True)
class NVGrid(BlockGrid):
    """Blocks of 16 with E4M3 scales, under a float32 scale per page (NVIDIA's NVFP4, arXiv 2509.25149).

    page = max |x| of the page / (6 * 448); scale = page * E4M3(max |x| of the block / 6 / page). A block scale that
    would round to zero is the smallest E4M3 number instead.
    """

    block: ClassVar[int] = 16
    scale_format: ClassVar[str] = "e4m3"

    @property
    def scale_fields(self) -> tuple[Field, ...]:
        return (
            Field(f"{self.name}.scale", (self.page_size, self.blocks), torch.float8_e4m3fn),
            Field(f"{self.name}.page_scale", (1,), torch.float32),
        )

    def encode_scales(self, x: Tensor) -> dict[str, Tensor]:
        largest = x.abs().amax(-1)
        page = (largest.amax((1, 2)) / (E2M1_MAX * E4M3_MAX)).clamp_(LEAST, 2.0**115)[:, None]
        scale = (largest / E2M1_MAX / page[..., None]).clamp_(E4M3_LEAST, E4M3_MAX)
        return {f"{self.name}.scale": scale.to(torch.float8_e4m3fn), f"{self.name}.page_scale": page}

    def decode_scales(self, page: Mapping[str, Tensor]) -> Tensor:
        return page[f"{self.name}.scale"].float() * page[f"{self.name}.page_scale"][..., None]


@dataclass(frozen=True)
class MXGrid(BlockGrid):
    """Blocks of 32 with E8M0 scales, powers of two (OCP Microscaling Formats 1.0, sections 5.4.1 and 6.3).

    scale = 2^e or 2^(e + 1), e = floor(log2(max |x| of the block)) - 2, from -127 to 125: the one under which the
    block's squared error is less, 2^e where both are equal. The specification's own conversion always takes 2^e, under
    which numbers beyond 6 * 2^e saturate, by up to a quarter. It allows any other; the format is the same.
    """

    block: ClassVar[int] = 32
    scale_format: ClassVar[str] = "e8m0"

    @property
    def scale_fields(self) -> tuple[Field, ...]:
        return (Field(f"{self.name}.scale", (self.page_size, self.blocks), torch.float8_e8m0fnu),)

    def encode_scales(self, x: Tensor) -> dict[str, Tensor]:
        exponent = x.abs().amax(-1).view(torch.int32) >> 23  # of a float32, biased by 127 as in E8M0
        biased = (exponent - E2M1_EMAX).clamp_(0, 254 - E2M1_EMAX).to(torch.uint8)  # 255 is the exponent of infinity
        x = x / biased.view(torch.float8_e8m0fnu).float()[..., None]
        biased += e2m1_error(x / 2) < e2m1_error(x) / 4
        return {f"{self.name}.scale": biased.clamp_max_(254 - E2M1_EMAX).view(torch.float8_e8m0fnu)}

    def decode_scales(self, page: Mapping[str, Tensor]) -> Tensor:
        return page[f"{self.name}.scale"].float()
