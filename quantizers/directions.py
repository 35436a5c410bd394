"""Directions that attention can do without last: weighted Karhunen-Loeve bases of few tokens, outliers among them."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from kvcomp.calibration.statistics import weighted_directions

from .grid import TINY
from .per_stream import weights

RIDGE = 1e-3  # of the mean variance: what is added to a second moment before it is inverted
SETTLED = 16  # tokens per channel from which on a moment is taken as it is
DOUBT = 1.0  # of the mean variance is added to the moment of as few tokens as channels
LOUD = 4.0  # as in `weights`: at 2, the outlier tokens that texts have by themselves cost 10 % of the divergence


def singular(matrices: Tensor) -> Tensor:
    """bool [n]: which of float32 [n, d, d] have no inverse."""
    inverse, info = torch.linalg.inv_ex(matrices)
    singular: Tensor = (info != 0) | ~inverse.isfinite().all(-1).all(-1)
    return singular


def rms(x: Tensor) -> Tensor:
    """Root mean square over the last dimension, kept: a norm that float16 can hold wherever it can hold x."""
    largest = x.abs().amax(-1, keepdim=True).clamp_min(1e-30)
    return (x / largest).square().mean(-1, keepdim=True).sqrt() * largest


def weighted(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [s, d] of x [s, n, d], and its second moment [s, d, d] up to a factor; see `weights`."""
    weight, unit = weights(x, LOUD)
    y = x * (weight / unit)
    mean = y.sum(1) / weight.sum(1).clamp_min(1e-30) * unit[:, 0]
    return mean, (y.mT @ y).double() / weight.square().sum(1, keepdim=True).clamp_min(1e-30)


@cache
def ladder(dim: int, device: torch.device) -> Tensor:
    """float64 [dim]: 0.75 to 1.25. Directions that no token has would be equal otherwise, and rounding would choose."""
    return torch.linspace(0.75, 1.25, dim, dtype=torch.float64, device=device)


def scaled_directions(covariance: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """D [s, d, d] with x ~ z D' + mean, z of variance 1 by falling weighted variance [s, d]; both float32.

    Of all linear maps this one leaves the least E[(x - x^)' weight (x - x^)] at any number of coordinates kept. None is
    the identity.
    """
    dim = covariance.shape[-1]
    level = covariance.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None].clamp_min(TINY)
    covariance = covariance + RIDGE * level * torch.diag(ladder(dim, covariance.device))
    if weight is None:
        write = read = torch.linalg.eigh(covariance).eigenvectors.flip(-1)
    else:
        write, read = weighted_directions(covariance, weight, RIDGE)
    turned = (read * torch.arange(1, dim + 1, device=read.device)[:, None].cos()).sum(1, keepdim=True) < 0
    write, read = (torch.where(turned, -x, x) for x in (write, read))  # which sign they have is a convention
    variance = torch.einsum("sij,sik,skj->sj", write, covariance, write)
    return (read * variance.sqrt()[:, None]).float(), variance.float()


def shrinkage(covariance: Tensor, tokens: int) -> Tensor:
    """What is added to a moment of few tokens whose covariance is [s, d, d]: the same in every direction.

    A few hundred tokens of one passage hardly vary in directions that later tokens do use. Bits that are spread a
    little more evenly cost them little, but protect those.
    """
    dim = covariance.shape[-1]
    level = covariance.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    identity = torch.eye(dim, device=covariance.device, dtype=torch.float32)
    return max(dim / tokens - 1 / SETTLED, 0.0) * DOUBT * level * identity
