"""TurboQuant: a norm, a random rotation and optimal scalar codebooks (arXiv 2504.19874)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from kvcomp.errors import SpecError
from kvcomp.stages import PageShape, arg
from kvcomp.stages.registry import register

from .basis import Basis, rotation
from .centred import centred
from .codecs import Grid
from .lloyd import LloydGrid, sphere_codebook
from .outliers import ORDER, OutlierBasis, OutlierCodec
from .packing import planes
from .qjl import ResidualGrid, projection, sign_codebook
from .segments import SegmentedGrid
from .widths import BITS, WidthQuantizer

MSE, PROD = "mse", "prod"
SHARE = 4  # one channel of so many is an outlier where bits are fractional
EXTRA = 2  # bits that an outlier channel gets more: EXTRA / SHARE is the half bit


@register("turboquant")
@dataclass(frozen=True)
class TurboQuant(WidthQuantizer):
    """TurboQuant: each vector's norm, and Lloyd-Max codes of its randomly rotated direction.

    After a random rotation every coordinate of a unit vector has a known density, so one optimal codebook serves all
    channels without data. Needs no calibration and no window; bits + 16 / D effective bits (a float16 norm per token),
    and 8 / P for K's centres.

    2.5 and 3.5 bits are two such quantizers with a norm each, so 32 / D: the quarter of a stream's channels that is
    loudest in its first tokens has 2 bits more than the rest. The paper's 32 outliers of 3 bits and 96 channels of 2
    are 2.25 bits, not the 2.5 it states; 32 of 4 bits are.

    prod: one bit of K goes to the signs of the residual, with its norm (16 / D more), which make q . k unbiased. They
    add variance, and attention suffers more from that than from the bias of mse, the default. V needs no inner
    products and is stored as in mse.

    Paper: arXiv 2504.19874.
    """

    paper: ClassVar[str] = "arXiv:2504.19874"

    widths: ClassVar[tuple[float, ...]] = (1, 2, 2.5, 3, 3.5, 4)

    bits: int | float | None = arg(4, f"{BITS}: 1, 2, 3 or 4, or 2.5 or 3.5 with outlier channels")
    variant: str = arg(MSE, "mse: least squared error; prod: unbiased q . k, through one bit of K")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(self.variant in (MSE, PROD), "variant", f"{MSE} or {PROD}")

    def adapted_bytes(self, shape: PageShape) -> int:
        return sum(dim * ORDER.itemsize + 1 for dim, bits in self._sides(shape) if bits != int(bits))

    def _sides(self, shape: PageShape) -> tuple[tuple[int, float], tuple[int, float]]:
        """Channels and bits of K and of V."""
        return (shape.k_dim, self.k_bits), (shape.v_dim, self.v_bits)

    def codec(self, shape: PageShape) -> OutlierCodec:
        k_grid, k_basis = self._part("k", shape, shape.k_dim, self.k_bits, self.variant == PROD)
        v_grid, v_basis = self._part("v", replace(shape, centred=False), shape.v_dim, self.v_bits, False)
        return OutlierCodec(k_grid, v_grid, k_basis, v_basis)

    def _part(self, name: str, shape: PageShape, dim: int, bits: float, unbiased: bool) -> tuple[Grid, Basis]:
        """The grid and the basis of K or of V."""
        device = shape.device
        if not unbiased:
            side, sizes = self._grid(name, shape, dim, bits)
            return side, _basis(sizes, shape)
        if bits == 1:
            signs = LloydGrid(name, shape.page_size, dim, 1, sign_codebook(dim, device))
            return centred(signs, shape), rotation(dim, device)
        side, sizes = self._grid(name, shape, dim, bits - 1)
        signs = LloydGrid(f"{name}.residual", shape.page_size, dim, 1, sign_codebook(dim, device))
        return ResidualGrid(side, signs, projection(dim, device)), _basis(sizes, shape, _with_residual(sizes, device))

    def _grid(self, name: str, shape: PageShape, dim: int, bits: float) -> tuple[Grid, tuple[int, ...]]:
        """Codes of `bits` per element on average, and how many channels each rotation mixes."""
        low = int(bits)
        if bits == low:
            return self._lloyd(name, shape, dim, low), (dim,)
        sizes, widths = (dim // SHARE, dim - dim // SHARE), (low + EXTRA, low)
        if dim % SHARE or any(n * plane % 8 for n, width in zip(sizes, widths, strict=True) for plane in planes(width)):
            given = ", ".join(f"{a}={getattr(self, a)}" for a in ("bits", "k", "v", "variant") if a not in self.implied)
            raise SpecError(
                f"turboquant({given}): {name} has {sizes[0]} of its {dim} channels in {widths[0]} bits and {sizes[1]} "
                f"in {widths[1]}, which do not fill whole bytes: use whole bits"
            )
        parts = zip(("outliers", "rest"), sizes, widths, strict=True)
        return SegmentedGrid(tuple(self._lloyd(f"{name}.{what}", shape, n, w) for what, n, w in parts), sizes), sizes

    def _lloyd(self, name: str, shape: PageShape, dim: int, bits: int) -> Grid:
        return centred(LloydGrid(name, shape.page_size, dim, bits, sphere_codebook(dim, bits, shape.device)), shape)


def _basis(sizes: tuple[int, ...], shape: PageShape, dual: Tensor | None = None) -> Basis:
    """A rotation of all channels, or one of each run, with the loudest channels in the first."""
    matrix = _rotations(sizes, shape.device)
    if len(sizes) == 1:
        return Basis(matrix, dual)
    return OutlierBasis.unsettled(matrix, dual, shape.page_size if shape.centred else None)


@cache
def _rotations(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """float32 [D, D]: a random rotation of each run of channels. All layers share it."""
    blocks = [rotation(n, device).matrix for n in sizes]
    matrix: Tensor = torch.block_diag(*blocks)
    return matrix


@cache
def _with_residual(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """float32 [D, 2 D]: what queries are read with where a `ResidualGrid` decodes. All layers share it."""
    matrix = _rotations(sizes, device)
    return torch.cat([matrix, matrix @ projection(len(matrix), device)], 1)
