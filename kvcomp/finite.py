"""Numbers that are not finite: quantizers get none, and give none."""

from __future__ import annotations

import warnings
from math import isfinite

import torch
from torch import Tensor

from kvcomp.errors import KvcompWarning


def finite(x: Tensor, name: str) -> Tensor:
    """x with 0 for every nan and infinity, and a warning that says so of `name`; x itself where there are none.

    One of them would spoil what many numbers share: a scale, a norm, a basis.
    """
    if isfinite(x.sum(dtype=torch.float32).item()) or bool(x.isfinite().all()):  # the sum alone is 20 times faster
        return x
    warnings.warn(f"{name} are not finite everywhere: the quantizer takes 0 instead", KvcompWarning, stacklevel=2)
    return x.nan_to_num(0.0, 0.0, 0.0)


def saturated(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in `dtype`, with the largest number of `dtype` where x is beyond: an error of rounding is no infinity."""
    largest = min(torch.finfo(dtype).max, torch.finfo(x.dtype).max)  # float32 holds no limit of float64
    return x.clamp(-largest, largest).to(dtype)
