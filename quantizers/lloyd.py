"""Lloyd-Max: the scalar codebook of least squared error for coordinates of random unit vectors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache

import torch
from torch import Tensor

from kvcomp.layout import Field
from kvcomp.segments import Codebook, SideLayout

from .grid import HUGE, SCALE, TINY
from .packing import code_fields, code_planes, pack_codes, unpack_codes

POINTS = 1 << 17  # of the numeric integrals
FEW = 16  # entries of a codebook that are compared one by one


@cache
def sphere_codebook(dim: int, bits: int, device: torch.device) -> Tensor:
    """float32 [2^bits] ascending: the optimal centroids for one coordinate of a uniformly random unit vector in R^dim.

    The density is proportional to (1 - t^2)^((dim - 3) / 2) on [-1, 1]. Lloyd's iteration (boundaries halfway between
    centroids, centroids at the means of their cells) runs in float64 until it stands still. All layers share it.
    """
    reach = min(1.0, 12 / dim**0.5)  # beyond twelve standard deviations there is nothing
    t = torch.linspace(-reach, reach, POINTS, dtype=torch.float64, device="cpu")
    density = (1 - t * t).clamp_min(0) ** ((dim - 3) / 2)
    mass, moment = density.cumsum(0), (t * density).cumsum(0)
    quantiles = (torch.arange(1 << bits, dtype=torch.float64, device="cpu") + 0.5) / (1 << bits)
    centroids = t[torch.searchsorted(mass, quantiles * mass[-1].clone()).clamp_max(POINTS - 1)]
    for _ in range(10_000):
        edges = torch.searchsorted(t, (centroids[1:] + centroids[:-1]) / 2) - 1
        ends = torch.cat([edges, torch.tensor([POINTS - 1], dtype=torch.int64, device="cpu")])
        weight = torch.diff(mass[ends], prepend=mass.new_zeros(1))
        updated = torch.diff(moment[ends], prepend=moment.new_zeros(1)) / weight
        updated = (updated - updated.flip(0)) / 2  # the density is even
        moved = (updated - centroids).abs().max()
        centroids = updated
        if moved < 1e-9:
            break
    return centroids.float().to(device)


def between(codebook: Tensor) -> Tensor:
    """[n - 1]: the numbers halfway between the neighbours of a codebook [n]."""
    return (codebook[1:] + codebook[:-1]) / 2


def nearest(x: Tensor, codebook: Tensor) -> Tensor:
    """uint8, as x: the nearest entry of the ascending `codebook` [n], n <= 256; the lower one of two equally near."""
    thresholds = between(codebook)
    if len(codebook) > FEW:
        return torch.bucketize(x, thresholds).to(torch.uint8)
    codes = torch.zeros(x.shape, dtype=torch.uint8, device=x.device)
    for middle in thresholds:  # a pass each is several times faster than a search for each number
        codes += (x > middle).view(torch.uint8)
    return codes


@dataclass(frozen=True)
class LloydGrid:
    """K or V of a page as a norm per token and Lloyd-Max codes of the direction: x ~ |x| codebook[code].

    What is stored is |x| / D^(1/2), which float16 can hold wherever it can hold x.

    Meant for coordinates in a random rotation, where each coordinate of x / |x| has the density of the codebook.
    """

    name: str
    page_size: int
    dim: int
    bits: int
    codebook: Tensor  # float32 [2^bits], as of `sphere_codebook`

    @property
    def anchored(self) -> bool:
        """As in `centred.CentrableGrid`: in two bits, the other tokens would have a tenth more error."""
        return self.bits > 2

    @property
    def fields(self) -> tuple[Field, ...]:
        codes = code_fields(self.name, self.bits, self.page_size, self.dim)
        return (*codes, Field(f"{self.name}.norm", (self.page_size, 1), SCALE))

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        """x [M, P, D] -> fields."""
        x = x.float()
        norm = (x.norm(dim=-1, keepdim=True) / self.dim**0.5).nan_to_num(HUGE).clamp_max(HUGE).to(SCALE)
        unit = x / (norm.float() * self.dim**0.5).clamp_min(TINY)
        return pack_codes(self.name, nearest(unit, self.codebook), self.bits) | {f"{self.name}.norm": norm}

    def kernel_input(self, x: Tensor) -> Tensor:
        return x

    def decode(self, page: Mapping[str, Tensor]) -> Tensor:
        """Fields [M, ...] -> x [M, P, D] float32."""
        codes = unpack_codes(self.name, page, self.bits).int()
        x: Tensor = (self.codebook * self.dim**0.5)[codes] * page[f"{self.name}.norm"].float()
        return x

    @cached_property
    def kernel_layout(self) -> SideLayout:
        return _side(self.name, self.bits, self.dim, self.codebook)

    def constants(self) -> list[Tensor]:
        return [self.codebook]


@lru_cache(maxsize=256)
def _side(name: str, bits: int, dim: int, codebook: Tensor) -> SideLayout:
    """The same object for all layers that share this very codebook."""
    scaled = codebook * dim**0.5
    return SideLayout((Codebook(dim, code_planes(name, bits), f"{name}.norm", scaled, between(codebook)),))
