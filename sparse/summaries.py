"""Summaries of pages: vectors of a channel each, kept in 16 or 8 bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd

import torch
from torch import Tensor

from kvcomp.kernels.select import scaled
from kvcomp.layout import SUMMARY, Field
from kvcomp.stages import arg

from .ranked import RankedSelector

SCALE = f"{SUMMARY}scale"
SCALES = 8  # of a page in 8 bits: as many float16 as fill the 16 bytes to which a field is padded
HUGE = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class VectorSelector(RankedSelector):
    """A selector whose summaries are vectors."""

    summary_bits: int = arg(16, "bits per channel of a summary, 16 or 8")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(self.summary_bits in (8, 16), "summary_bits", "8 or 16")


def vector_fields(
    names: tuple[str, ...], dim: int, bits: int, each: tuple[int, ...] = (), scale: str = SCALE
) -> tuple[Field, ...]:
    """Fields of vectors of `dim` channels, [*each, dim]: float16, or int8 codes and the scales that they share."""
    if bits == 16:
        return tuple(Field(name, (*each, dim), torch.float16) for name in names)
    codes = tuple(Field(name, (*each, dim), torch.int8) for name in names)
    return (*codes, Field(scale, (*each, gcd(dim, SCALES)), torch.float16))


def encode(vectors: Mapping[str, tuple[Tensor, int]], bits: int, scale_name: str = SCALE) -> dict[str, Tensor]:
    """Fields of vectors float32 [M, ..., D], each rounded down (-1), to the nearest (0) or up (1), within +-65504.

    In 8 bits, a run of D / 8 channels has one scale: a 127th of the largest magnitude in it, rounded up.
    """
    if bits == 16:  # float16 rounds by at most 2^-11 relative, 2^-25 absolute
        rounded = {name: x + way * (x.abs() * 2**-10 + 2**-24) for name, (x, way) in vectors.items()}
        return {name: x.clamp(-HUGE, HUGE).to(torch.float16) for name, x in rounded.items()}
    clamped = {name: (x.clamp(-HUGE, HUGE), way) for name, (x, way) in vectors.items()}
    largest = torch.stack([x.abs() for x, _ in clamped.values()]).amax(0)  # [M, ..., D]
    largest = largest.unflatten(-1, (gcd(largest.shape[-1], SCALES), -1)).amax(-1)
    scale = (largest / 127 * (1 + 2**-10) + 2**-24).to(torch.float16)
    fields = {scale_name: scale}
    for name, (x, way) in clamped.items():
        step = scaled(torch.ones_like(x), scale)
        codes = (x / step).round()
        codes += way * (way * (codes * step - x) < 0)  # codes * step is exact in float32, hence a bound
        fields[name] = codes.to(torch.int8)
    return fields
