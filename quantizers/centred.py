"""Centred keys: a page's tokens less what they have in common, which the page holds beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from kvcomp.layout import CENTRE, Field
from kvcomp.segments import Dense, SideLayout, side_of
from kvcomp.stages import PageShape

from .codecs import Grid

DTYPE = torch.float16
HUGE = torch.finfo(DTYPE).max
PART = 4  # tokens that are added in pairs


def centre(x: Tensor) -> Tensor:
    """float16 [M, 1, D]: the mean of x [M, P, D] over the tokens of each page, rounded within +-65504.

    It is taken of the sums of four tokens each, without the least and the greatest one of each channel where there are
    three or more: an outlier token does not move it. The order of all sums is part of the definition: kernels give the
    same bits: four tokens in pairs, then one such sum after another; of each with the least and the greatest before it,
    the middle one counts. Where P is no multiple of 4, zeros follow, and nothing is left out.
    """
    x = x.float()
    tokens = x.shape[1]
    parts = F.pad(x, (0, 0, 0, -tokens % PART)).unflatten(1, (-1, PART))
    while parts.shape[2] > 1:
        parts = parts[:, :, ::2] + parts[:, :, 1::2]
    first, *rest = parts[:, :, 0].nan_to_num(0.0, torch.inf, -torch.inf).unbind(1)
    total = torch.zeros_like(first)
    if tokens % PART or len(rest) < 2:
        for part in (first, *rest):
            total = total + part
    else:
        low, high = torch.minimum(first, rest[0]), torch.maximum(first, rest[0])
        for part in rest[1:]:
            total = total + torch.minimum(torch.maximum(part, low), high)
            low, high = torch.minimum(part, low), torch.maximum(part, high)
        tokens -= 2 * PART
    return (total * (1 / tokens)).nan_to_num(0.0).clamp(-HUGE, HUGE).to(DTYPE)[:, None]


def anchored(c: Tensor, x: Tensor, grid: Grid) -> Tensor:
    """float16 [M, 1, D]: the centres c of pages x [M, P, D], moved so that `grid` has each page's first token exactly.

    Nearly every head of a language model looks at the first token of a text, often with half of its attention, and that
    token opens a page. The error of its logit shifts what all other tokens share; a grid whose steps grow with the
    numbers makes a large one. c + e, where e is the error of the first token under c, makes that error 0, up to the
    rounding of c, and moves the other tokens by a fraction of a step. |e| is at most the largest |x_t - c| of the three
    tokens that follow, channel by channel: an outlier there does not spoil the page.
    """
    c = c.float()
    first = x[:, :1].float() - c
    if x.shape[1] == 1:
        return c.to(DTYPE)
    most = (x[:, 1:4].float() - c).abs().amax(1, keepdim=True)
    error = (first - grid.decode(grid.encode(first))).nan_to_num(0.0)
    return (c + error.clamp(-most, most)).clamp(-HUGE, HUGE).to(DTYPE)


def without_centres(x: Tensor, page_size: int) -> Tensor:
    """x [s, n, D] less the centre of each run of `page_size` tokens, the last perhaps shorter; float32."""
    return torch.cat([run.float() - centre(run).float() for run in x.split(page_size, 1)], 1)


class CentrableGrid(Grid, Protocol):
    """A side that is one segment of `dim` channels."""

    @property
    def name(self) -> str: ...
    @property
    def dim(self) -> int: ...
    @property
    def anchored(self) -> bool:
        """Whether centres are `anchored`. Its tokens are coded one by one then."""


@dataclass(frozen=True)
class CentredGrid:
    """Coordinates of K in a page on a grid, less the page's `centre` c: x ~ c + decode(encode(x - c)).

    Some models (Qwen2 and others with large key biases) have keys that are nearly constant over neighbouring tokens. A
    grid that spans a token, or a norm, then resolves the constant and not what differs. The rotary embedding turns such
    a constant with the position, so that it is one of a page rather than of a text. c takes 16 bits a channel and page.
    Where tokens are coded one by one, c is `anchored`: the first token of each page is exact.
    """

    grid: CentrableGrid

    @property
    def name(self) -> str:
        return self.grid.name

    @property
    def dim(self) -> int:
        return self.grid.dim

    @property
    def field(self) -> str:
        return f"{self.name}{CENTRE}"

    @property
    def fields(self) -> tuple[Field, ...]:
        return (*self.grid.fields, Field(self.field, (1, self.dim), DTYPE))

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        """x [M, P, D] -> fields."""
        c = anchored(centre(x), x, self.grid) if self.grid.anchored else centre(x)
        return self.grid.encode(x.float() - c.float()) | {self.field: c}

    def kernel_input(self, x: Tensor) -> Tensor | None:
        return self.grid.kernel_input(x)

    def decode(self, page: Mapping[str, Tensor]) -> Tensor:
        """Fields [M, ...] -> x [M, P, D] float32."""
        return self.grid.decode(page) + page[self.field].float()

    @cached_property
    def kernel_layout(self) -> SideLayout | None:
        side = self.grid.kernel_layout
        if side is None:
            return None
        (segment,) = side.segments
        assert not isinstance(segment, Dense)
        return side_of(replace(segment, centre=self.field))

    def constants(self) -> list[Tensor]:
        return self.grid.constants()


def centred(grid: CentrableGrid, shape: PageShape) -> CentredGrid | CentrableGrid:
    """The grid, of keys less their page's centre where pages of this shape have one."""
    return CentredGrid(grid) if shape.centred else grid
