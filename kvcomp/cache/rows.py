"""What a token of the exact buffer is stored as: in the model's dtype, in 16 bits, or in codes of 8."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kvcomp.finite import saturated
from kvcomp.stages.plan import EXACT_GROUP, exact_dtype, exact_width

LEVELS = 127  # of a code, to either side of 0
SMALLEST = 2.0**-24  # positive float16


class Rows:
    """Tokens [..., D] of a model's `dtype` as rows [..., width] of `stored`, and back.

    bits: None for the model's dtype, 16, or 8: a code for each channel, and after all codes a float16 scale for each
    32 channels, x = code * scale. Such rows are int8, and rows of what they decode to are the same ones.
    """

    def __init__(self, bits: int | None, dtype: torch.dtype) -> None:
        self.dtype, self.stored, self.coded = dtype, exact_dtype(bits, dtype), bits == 8
        self.largest = torch.finfo(torch.float16).max

    def width(self, dim: int) -> int:
        return exact_width(8 if self.coded else None, dim)

    def encode(self, x: Tensor) -> Tensor:
        """Rows of x [..., D]; what float16 cannot hold saturates."""
        if not self.coded:
            return x if x.dtype == self.stored else x.clamp(-self.largest, self.largest).to(self.stored)
        dim = x.shape[-1]
        blocks = F.pad(x.float(), (0, -dim % EXACT_GROUP)).unflatten(-1, (-1, EXACT_GROUP))
        scale = saturated((blocks.abs().amax(-1) / LEVELS).clamp_min(SMALLEST), torch.float16)
        codes = (blocks / scale.float()[..., None]).round_().clamp_(-LEVELS, LEVELS).nan_to_num_(0.0)
        codes = codes.to(torch.int8).flatten(-2)[..., :dim]
        return torch.cat([codes, scale.contiguous().view(torch.int8)], -1)

    def decode(self, rows: Tensor, dim: int) -> Tensor:
        """Tokens [..., dim] of `rows`, in the model's dtype."""
        if not self.coded:
            return rows.to(self.dtype)
        blocks = rows[..., :dim].float()
        scale = rows[..., dim:].contiguous().view(torch.float16).float()
        if dim % EXACT_GROUP == 0:
            blocks = (blocks.unflatten(-1, (-1, EXACT_GROUP)) * scale[..., None]).flatten(-2)
        else:
            blocks = blocks * scale.repeat_interleave(EXACT_GROUP, -1)[..., :dim]
        return saturated(blocks, self.dtype) if self.dtype == torch.float16 else blocks.to(self.dtype)
