"""Codecs: a basis and a grid for K, a basis and a grid for V."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from kvcomp.finite import saturated
from kvcomp.layout import Field
from kvcomp.segments import Dense, KVLayout, SideLayout, side_of
from kvcomp.stages import Codec, PageShape

from .basis import IDENTITY, Basis


class Grid(Protocol):
    """The grid of K or of V: x [M, P, D] in basis coordinates to fields of a page and back.

    A subclass defines `fields`, `encode` and `decode`; where it defines no more, pages are decoded in PyTorch.
    """

    @property
    def fields(self) -> tuple[Field, ...]:
        """Fields of a page, whose names begin with "k" or "v"."""
        raise NotImplementedError

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        """x [M, P, D], finite -> fields [M, *shape] of M pages."""
        raise NotImplementedError

    def decode(self, page: Mapping[str, Tensor]) -> Tensor:
        """Fields [M, *shape] -> x [M, P, D] float32."""
        raise NotImplementedError

    def kernel_input(self, x: Tensor) -> Tensor | None:
        """What kernels write of x [M, P, D] or [s, M / s, P, D], as in `Codec.kernel_input`; None: they cannot."""
        return None

    def constants(self) -> list[Tensor]:
        """Tensors that a layer holds besides pages, such as a codebook."""
        return []

    @property
    def kernel_layout(self) -> SideLayout | None:
        """How kernels can read it, as in `Codec.kernel_layouts`; None: they cannot."""
        return None


@dataclass(frozen=True)
class RawGrid:
    """K or V of a page as coordinates in a dtype, without a grid."""

    name: str
    page_size: int
    dim: int
    dtype: torch.dtype

    @property
    def fields(self) -> tuple[Field, ...]:
        return (Field(self.name, (self.page_size, self.dim), self.dtype),)

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        return {self.name: saturated(x, self.dtype)}

    def kernel_input(self, x: Tensor) -> Tensor:
        return saturated(x, self.dtype)

    def decode(self, page: Mapping[str, Tensor]) -> Tensor:
        return page[self.name].float()

    @cached_property
    def kernel_layout(self) -> SideLayout:
        return side_of(Dense(self.dim, self.name, self.dtype))

    def constants(self) -> list[Tensor]:
        return []


@dataclass(frozen=True)
class GridCodec(Codec):
    """A grid over a basis for K, and one for V."""

    k_grid: Grid
    v_grid: Grid
    k_basis: Basis = IDENTITY
    v_basis: Basis = IDENTITY

    @cached_property
    def rotates(self) -> bool:
        return not (self.k_basis.is_identity and self.v_basis.is_identity)

    @property
    def fields(self) -> tuple[Field, ...]:
        return self.k_grid.fields + self.v_grid.fields

    def encode(self, keys: Tensor, values: Tensor, streams: Tensor) -> dict[str, Tensor]:
        k, v = self.k_basis.write(keys, streams), self.v_basis.write(values, streams)
        return self.k_grid.encode(k) | self.v_grid.encode(v)

    def kernel_input(self, keys: Tensor, values: Tensor, streams: Tensor) -> tuple[Tensor, Tensor] | None:
        sides = ((self.k_grid, self.k_basis, keys), (self.v_grid, self.v_basis, values))
        k, v = (side.kernel_input(x if basis.is_identity else basis.write(x, streams)) for side, basis, x in sides)
        return None if k is None or v is None else (k, v)

    def decode(self, page: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        return self.k_grid.decode(page), self.v_grid.decode(page)

    def read_query(self, queries: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.k_basis.read(queries), self.k_basis.offset(queries)

    def read_output(self, output: Tensor) -> Tensor:
        return _output(self.v_basis, output)

    def read_bases(self) -> tuple[Basis, Basis]:
        return self.k_basis, self.v_basis

    def read_value_query(self, queries: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.v_basis.read(queries), self.v_basis.offset(queries)

    def read_key_output(self, output: Tensor) -> Tensor:
        return _output(self.k_basis, output)

    def inverse(self, keys: Tensor, values: Tensor, streams: Tensor) -> tuple[Tensor, Tensor]:
        return self.k_basis.inverse(keys, streams), self.v_basis.inverse(values, streams)

    def kernel_layouts(self) -> KVLayout | None:
        k, v = self.k_grid.kernel_layout, self.v_grid.kernel_layout
        return None if k is None or v is None else (k, v)

    def constants(self) -> list[Tensor]:
        return [*self.k_basis.tensors, *self.v_basis.tensors, *self.k_grid.constants(), *self.v_grid.constants()]


def _output(basis: Basis, output: Tensor) -> Tensor:
    """Attention output [S, R, D'] of all streams, in the coordinates of a basis, in original ones."""
    return output if basis.is_identity else basis.inverse(output, torch.arange(len(output), device=output.device))


@dataclass(frozen=True)
class RawCodec(Codec):
    """K and V as they are, in the model's dtype: the dense baseline through the same pages."""

    shape: PageShape
    lossless: bool = True

    @property
    def rotates(self) -> bool:
        return False

    @property
    def fields(self) -> tuple[Field, ...]:
        s = self.shape
        return (
            Field("k", (s.page_size, s.k_dim), s.dtype),
            Field("v", (s.page_size, s.v_dim), s.dtype),
        )

    def encode(self, keys: Tensor, values: Tensor, streams: Tensor) -> dict[str, Tensor]:
        return {"k": keys, "v": values}

    def kernel_input(self, keys: Tensor, values: Tensor, streams: Tensor) -> tuple[Tensor, Tensor]:
        return keys, values

    def decode(self, page: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        return page["k"].float(), page["v"].float()

    @cached_property
    def _kernel_layouts(self) -> KVLayout:
        s = self.shape
        k, v = (side_of(Dense(dim, name, s.dtype)) for name, dim in (("k", s.k_dim), ("v", s.v_dim)))
        return k, v

    def kernel_layouts(self) -> KVLayout:
        return self._kernel_layouts
