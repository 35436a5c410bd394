"""Summaries of single tokens: a few coordinates of each key, in 4 or 8 bits a piece."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvcomp.kernels.select import code_dots
from kvcomp.layout import SUMMARY, Field
from kvcomp.stages import PageShape, arg

from .ranked import RankedSelector

CODES = f"{SUMMARY}codes"
CLIP = {4: 3.0, 8: 5.0}  # standard deviations that codes reach


@dataclass(frozen=True)
class TokenSelector(RankedSelector):
    """A selector of single tokens, whose summaries are codes of a few coordinates of each key."""

    by_tokens: ClassVar[bool] = True

    rank: int = arg(16, "coordinates of a key, even")
    bits: int = arg(4, "bits of a coordinate, 4 or 8")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(self.rank > 0 and self.rank % 2 == 0, "rank", "positive and even")
        self.check(self.bits in CLIP, "bits", "4 or 8")

    @property
    def default_window(self) -> tuple[int, int]:
        return 4, 64

    @property
    def page_multiple(self) -> int:
        return 16  # what is not in pages yet is read in full: little

    def summary_fields(self, shape: PageShape) -> tuple[Field, ...]:
        self.check(self.rank <= shape.k_dim, "rank", f"at most the {shape.k_dim} channels of a key")
        return code_fields(shape.page_size, self.rank, self.bits)

    def logits(self, queries: Tensor, summary: Mapping[str, Tensor]) -> Tensor:
        """As `RankedSelector.logits`; queries [S, J, r] are coordinates times steps."""
        return code_dots(queries, summary, CODES, self.bits)


def step(deviation: Tensor, bits: int) -> Tensor:
    """How far codes of coordinates of that standard deviation differ; never 0."""
    tiny = torch.finfo(torch.float32).tiny ** 0.5
    spacing: Tensor = (deviation * (2 * CLIP[bits] / 2**bits)).clamp_min(tiny)
    return spacing


def code_fields(page_size: int, rank: int, bits: int) -> tuple[Field, ...]:
    """Codes of `rank` coordinates of each token, as `kernels.select.code_dots` reads them."""
    return (Field(CODES, (rank * bits // 8, page_size), torch.uint8),)


def encode(x: Tensor, bits: int) -> dict[str, Tensor]:
    """Fields of coordinates [M, P, r] float32 in steps: the code c stands for c + 1/2 - 2^bits / 2."""
    codes = (x.floor() + 2 ** (bits - 1)).clamp(0, 2**bits - 1).to(torch.uint8).transpose(1, 2)
    if bits == 4:
        low, high = codes.chunk(2, 1)
        codes = low | (high << 4)
    return {CODES: codes}
