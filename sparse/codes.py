"""What single tokens say of themselves: a few coordinates of each key, in 4 or 8 bits a piece."""

from __future__ import annotations

import torch
from torch import Tensor

from kvcomp.pages import SUMMARY, Field

CODES = f"{SUMMARY}codes"
CLIP = {4: 3.0, 8: 5.0}  # standard deviations that codes reach
BITS = tuple(CLIP)


def step(deviation: Tensor, bits: int) -> Tensor:
    """How far codes of coordinates of that standard deviation lie apart; never 0."""
    tiny = torch.finfo(torch.float32).tiny ** 0.5
    return (deviation * (2 * CLIP[bits] / 2**bits)).clamp_min(tiny)


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
