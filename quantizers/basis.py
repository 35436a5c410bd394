"""Bases: linear maps applied to K and V on write and, as their dual, to Q and the output on read."""

from __future__ import annotations

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


def make_basis(name: str, dim: int, device: torch.device) -> Basis:
    """The basis of that name: `identity` or `hadamard`."""
    return hadamard(dim, device) if name == "hadamard" else IDENTITY
