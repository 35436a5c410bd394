"""QJL: signs that keep inner products unbiased, for what another grid leaves over (arXiv 2406.03482)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor

from kvcomp.layout import Field
from kvcomp.segments import SideLayout, joined

from .basis import rotation
from .codecs import Grid
from .lloyd import LloydGrid, sphere_codebook


@cache
def sign_codebook(dim: int, device: torch.device) -> Tensor:
    """float32 [2]: -1 and 1 over dim E|u|, where u is a coordinate of a uniformly random unit vector in R^dim.

    As the codebook of a randomly rotated unit vector x it makes E <q, x'> = <q, x> for every q. The centroids -E|u| and
    E|u|, of least squared error, would shrink inner products to dim (E|u|)^2 ~ 2 / pi of themselves. All layers share
    it.
    """
    size = 1 / (dim * sphere_codebook(dim, 1, device)[1])
    return torch.stack([-size, size])


@cache
def projection(dim: int, device: torch.device) -> Tensor:
    """float32 [dim, dim]: a uniformly random rotation that is independent of `basis.rotation`, all layers' same.

    QJL is defined with independent Gaussians; its authors' code orthogonalizes them, as here. Signs of a vector r then
    estimate it with squared error (pi / 2 - 1) |r|^2 instead of pi / 2 |r|^2.
    """
    matrix = rotation(dim, device, salt=2406_03482).matrix
    assert matrix is not None
    return matrix


@dataclass(frozen=True)
class ResidualGrid:
    """K or V of a page on a grid, and the signs of what the grid leaves over: x ~ a + b S'.

    a [M, P, D] is x as the grid has it, b [M, P, D] the signs of (x - a) S, times its norm and the codebook's size.
    Pages decode to [a, b], of 2 D coordinates: a basis with matrix W is read with the dual [D, D S], D being W's own,
    so that q . x ~ (q D) . a + (q D S) . b needs no S per token.
    """

    grid: Grid
    signs: LloydGrid
    projection: Tensor  # S, float32 [D, D]

    @property
    def fields(self) -> tuple[Field, ...]:
        return self.grid.fields + self.signs.fields

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        """x [M, P, D] -> fields."""
        fields = self.grid.encode(x)
        return fields | self.signs.encode(self._left_over(x, fields))

    def kernel_input(self, x: Tensor) -> Tensor | None:
        """[M, P, 2 D], or None: what the signs are of follows from the grid's codes, and is found with them here."""
        x = x.flatten(0, -3)
        coordinates = self.grid.kernel_input(x)
        return None if coordinates is None else torch.cat([coordinates, self._left_over(x, self.grid.encode(x))], -1)

    def _left_over(self, x: Tensor, fields: Mapping[str, Tensor]) -> Tensor:
        """(x - a) S [M, P, D], a as `fields` of the grid have it."""
        return (x - self.grid.decode(fields)) @ self.projection

    def decode(self, page: Mapping[str, Tensor]) -> Tensor:
        """Fields [M, ...] -> [a, b] [M, P, 2 D] float32."""
        return torch.cat([self.grid.decode(page), self.signs.decode(page)], -1)

    @cached_property
    def kernel_layout(self) -> SideLayout | None:
        return joined((self.grid.kernel_layout, self.signs.kernel_layout))

    def constants(self) -> list[Tensor]:
        return [*self.grid.constants(), *self.signs.constants(), self.projection]
