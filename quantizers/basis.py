"""Bases: linear maps applied to K and V on write and, as their dual, to Q and the output on read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class Basis:
    """Coordinates y = (x - mean) W on write, and x ~ y D' + mean on read, so that q . x ~ (q D) . y + q . mean.

    W and D are [D, R], shared by all streams, or [n, D, R] for n heads (or n streams): stream s uses matrix s mod n.
    R < D drops directions.

    matrix: W, float32, or None for the identity.
    dual: D, float32; None where it is W itself (orthonormal columns). It has more columns than W where a grid decodes
        more coordinates than it was given.
    mean: [D] or [n, D] float32, or None for zero.
    """

    matrix: Tensor | None = None
    dual: Tensor | None = None
    mean: Tensor | None = None

    def write(self, x: Tensor, streams: Tensor) -> Tensor:
        """Coordinates float32 [M, P, R] of x [M, P, D], pages of `streams` [M], or [s] that have M / s of them each."""
        x = x.float()
        if self.mean is not None:
            x = x - _of(self.mean[..., None, :], each_page(streams, len(x)))
        return x if self.matrix is None else times(x, self.matrix, streams)

    def read(self, queries: Tensor) -> Tensor:
        """What queries [S, R', D] of all streams are multiplied with coordinates as: [S, R', R] float32."""
        matrix = self.read_matrix
        return queries.float() if matrix is None else queries.float() @ _of_all(matrix, len(queries))

    def offset(self, queries: Tensor) -> Tensor | None:
        """q . mean of queries [S, R', D] of all streams: [S, R']; None without a mean."""
        if self.mean is None:
            return None
        return (queries.float() * _of_all(self.mean[..., None, :], len(queries))).sum(-1)

    def inverse(self, y: Tensor, streams: Tensor) -> Tensor:
        """Original coordinates [M, P, D] of y [M, P, R], which belong to `streams`, as of `write`."""
        matrix = self.read_matrix
        x = y if matrix is None else times(y, matrix.mT, streams)
        return x if self.mean is None else x + _of(self.mean[..., None, :], each_page(streams, len(y)))

    @property
    def is_identity(self) -> bool:
        """Whether coordinates are x itself."""
        return not self.tensors

    @property
    def read_matrix(self) -> Tensor | None:
        """What queries are multiplied with, [D, R] or [n, D, R]; None: the identity."""
        return self.matrix if self.dual is None else self.dual

    @property
    def order(self) -> Tensor | None:
        """int16 [n, D]: the channel of x that each row of W is of; None: they are in order."""
        return None

    @property
    def tensors(self) -> list[Tensor]:
        """Tensors that a layer holds for the basis."""
        return [t for t in (self.matrix, self.dual, self.mean) if t is not None]


def each_page(streams: Tensor, pages: int) -> Tensor:
    """The stream [M] of each of M pages, of `streams` [s] that have as many of them each, in a row."""
    return streams if len(streams) == pages else streams.repeat_interleave(pages // max(len(streams), 1))


def times(x: Tensor, matrix: Tensor, streams: Tensor) -> Tensor:
    """x [M, P, A] of `streams` [s], which have M / s pages each, times matrix [A, B] or [n, A, B]: [M, P, B]. A matrix
    is read once for each of the streams, and not for each of their pages."""
    if matrix.dim() == 2:
        return x @ matrix
    own = matrix[streams % len(matrix)]
    if len(own) == len(x):
        return x @ own
    product: Tensor = x.unflatten(0, (len(own), -1)).flatten(1, 2) @ own
    return product.view(*x.shape[:2], -1)


def _of(tensor: Tensor, streams: Tensor) -> Tensor:
    """The matrices of `streams` [M]: shared [A, B] as it is, or [M, A, B] of [n, A, B]."""
    return tensor if tensor.dim() == 2 else tensor[streams % len(tensor)]


def _of_all(tensor: Tensor, streams: int) -> Tensor:
    """The matrices of all streams in order, without a copy where each has its own or all share one."""
    if tensor.dim() == 2 or len(tensor) == streams:
        return tensor
    return tensor.repeat(streams // len(tensor), 1, 1)


IDENTITY = Basis()


@cache
def hadamard(dim: int, device: torch.device) -> Basis:
    """Orthonormal block-diagonal Hadamard: blocks of the largest power of two that divides `dim` (QuaRot, 2404.00456).

    Spreads outlier channels over a block, so that one scale per token wastes fewer codes. All layers share the matrix.
    """
    size = dim & -dim
    block = torch.ones(1, 1, device=device, dtype=torch.float32)
    while block.shape[0] < size:
        block = torch.cat([torch.cat([block, block], 1), torch.cat([block, -block], 1)], 0)
    return Basis(torch.block_diag(*[block / size**0.5] * (dim // size)))


@cache
def rotation(dim: int, device: torch.device, salt: int = 0) -> Basis:
    """A uniformly random rotation, the same in every process and independent of those of another `salt`.

    Q of a seeded Gaussian, R's diagonal positive.
    """
    generator = torch.Generator().manual_seed(salt + dim)
    gaussian = torch.randn(dim, dim, generator=generator, dtype=torch.float64, device="cpu")
    q, r = torch.linalg.qr(gaussian)
    return Basis((q * r.diagonal().sign()).float().to(device))


BASES: dict[str, Callable[[int, torch.device], Basis]] = {
    "identity": lambda dim, device: IDENTITY,
    "hadamard": hadamard,
    "random": rotation,
}
