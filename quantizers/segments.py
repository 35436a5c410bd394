"""Segments: a grid of its own for each run of channels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from kvcomp.layout import Field
from kvcomp.segments import SideLayout, joined

from .codecs import Grid


@dataclass(frozen=True)
class SegmentedGrid:
    """K or V of a page in runs of channels: `sizes[i]` channels on the grid `sides[i]`, in order."""

    sides: tuple[Grid, ...]
    sizes: tuple[int, ...]

    @property
    def fields(self) -> tuple[Field, ...]:
        return tuple(field for side in self.sides for field in side.fields)

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        """x [M, P, sum of sizes] -> fields."""
        fields: dict[str, Tensor] = {}
        for side, run in zip(self.sides, x.split(self.sizes, -1), strict=True):
            fields |= side.encode(run)
        return fields

    def kernel_input(self, x: Tensor) -> Tensor | None:
        parts = [side.kernel_input(run) for side, run in zip(self.sides, x.split(self.sizes, -1), strict=True)]
        known = [part for part in parts if part is not None]
        return torch.cat(known, -1) if len(known) == len(parts) else None

    def decode(self, page: Mapping[str, Tensor]) -> Tensor:
        """Fields [M, ...] -> x [M, P, sum of sizes] float32."""
        return torch.cat([side.decode(page) for side in self.sides], -1)

    @cached_property
    def kernel_layout(self) -> SideLayout | None:
        return joined(side.kernel_layout for side in self.sides)

    def constants(self) -> list[Tensor]:
        return [tensor for side in self.sides for tensor in side.constants()]
