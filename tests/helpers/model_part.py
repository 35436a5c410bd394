"""A model's rotary embedding and output projection, as policies are given them."""

from __future__ import annotations

import torch
from torch import Tensor


class Rope:
    """Rotary embedding of channel pairs (i, i + D / 2), written out, and a random output projection [Hq, Dv, 24]."""

    def __init__(self, query_heads: int, v_dim: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.weight = torch.randn(query_heads, v_dim, 24, generator=generator)

    def matrix(self, dim: int, position: int) -> Tensor:
        """The rotation R [D, D] float64 of column vectors at a position."""
        half = dim // 2
        rotation = torch.zeros(dim, dim, dtype=torch.float64)
        for i in range(half):
            angle = torch.tensor(position / 100 ** (i / half), dtype=torch.float64)
            rotation[i, i] = rotation[i + half, i + half] = angle.cos()
            rotation[i, i + half], rotation[i + half, i] = -angle.sin(), angle.sin()
        return rotation

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        turns = torch.stack([self.matrix(x.shape[-1], int(p)) for p in positions]).to(x.dtype)
        return (turns @ x[..., None])[..., 0]

    def output(self) -> Tensor:
        return self.weight
