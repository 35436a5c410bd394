"""Bases: linear maps applied to K and V on write and, as their dual, to Q and the output on read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class Basis:
    """x -> x W on write. For an orthogonal W the dual is W itself, so q . k = (q W) . (k W) and out = out' W'.

    matrix: [D, D] float32, or None for the identity.
    """

    matrix: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Coordinates of x [..., D], float32; also what a query needs."""
        return x.float() if self.matrix is None else x.float() @ self.matrix

    def backward(self, y: Tensor) -> Tensor:
        """Original coordinates of y [..., D]."""
        return y if self.matrix is None else y @ self.matrix.T


IDENTITY = Basis()


@cache
def hadamard(dim: int, device: torch.device) -> Basis:
    """Orthonormal block-diagonal Hadamard: blocks of the largest power of two that divides `dim` (QuaRot, 2404.00456).

    Spreads outlier channels over a block, so that one scale per token wastes fewer codes. All layers share the matrix.
    """
    size = dim & -dim
    block = torch.ones(1, 1, device=device)
    while block.shape[0] < size:
        block = torch.cat([torch.cat([block, block], 1), torch.cat([block, -block], 1)], 0)
    return Basis(torch.block_diag(*[block / size**0.5] * (dim // size)))


@cache
def rotation(dim: int, device: torch.device) -> Basis:
    """A uniformly random rotation, the same in every process: Q of a seeded Gaussian, R's diagonal positive."""
    gaussian = torch.randn(dim, dim, generator=torch.Generator().manual_seed(dim), dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    return Basis((q * r.diagonal().sign()).float().to(device))


BASES: dict[str, Callable[[int, torch.device], Basis]] = {
    "identity": lambda dim, device: IDENTITY,
    "hadamard": hadamard,
    "random": rotation,
}
