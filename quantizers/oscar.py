"""OSCAR: clipped integers in a calibrated rotation that is aware of attention (arXiv 2605.17757)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvcomp.calibration.stage import FILE, Tensors
from kvcomp.calibration.statistics import Statistics
from kvcomp.layout import Field
from kvcomp.segments import SideLayout
from kvcomp.stages import PageShape, arg
from kvcomp.stages.registry import register
from kvcomp.state import State

from .basis import Basis, hadamard
from .calibrated import CalibratedQuantizer, check_inverse
from .centred import CentrableGrid, CentredGrid, centre, centred
from .codecs import Grid
from .grid import UniformGrid, channel_group
from .int import LEAST_CLIP
from .widths import BITS, WidthQuantizer


@dataclass(frozen=True)
class ClippedGrid:
    """A grid after a clip: coordinates beyond a quantile of their token's magnitudes saturate.

    The limit is the magnitude of rank floor(quantile * D), counted from 0 and upwards, among the D of a token: at 0.96
    and D = 128 the five largest come down to the sixth. Where the grid is centred, magnitudes are about the centre.
    """

    grid: CentredGrid | CentrableGrid
    quantile: float = 1.0

    @property
    def fields(self) -> tuple[Field, ...]:
        return self.grid.fields

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        """x [M, P, D] -> fields."""
        return self.grid.encode(self._clipped(x))

    def kernel_input(self, x: Tensor) -> Tensor | None:
        return self.grid.kernel_input(self._clipped(x.flatten(0, -3)))

    def _clipped(self, x: Tensor) -> Tensor:
        about = centre(x).float() if isinstance(self.grid, CentredGrid) else x.new_zeros(())
        y = x - about
        rank = min(int(self.quantile * self.grid.dim), self.grid.dim - 1)
        limit = y.abs().kthvalue(rank + 1, dim=-1, keepdim=True).values
        return y.clamp(-limit, limit) + about

    def decode(self, page: Mapping[str, Tensor]) -> Tensor:
        return self.grid.decode(page)

    @property
    def kernel_layout(self) -> SideLayout | None:
        return self.grid.kernel_layout

    def constants(self) -> list[Tensor]:
        return self.grid.constants()


@register("oscar")
@dataclass(frozen=True)
class OSCAR(WidthQuantizer, CalibratedQuantizer):
    """OSCAR: clipped integers per token, in a rotation in which every channel matters equally to attention.

    Needs a file of `kvcomp calibrate --method oscar`. K is rotated by the eigenvectors of the mean of q q', V by those
    of the mean of w v v', w = k' (mean of q q') k; both then by a Hadamard matrix with its columns in bit-reversed
    order. Of each token the largest magnitudes, beyond the quantile `k_clip` or `v_clip`, saturate. Group, clips and
    window are the authors'. bits + 32 / group effective bits (a float16 scale and zero per group), 8 / P
    for K's centres, plus the window.

    Paper: arXiv 2605.17757.
    """

    paper: ClassVar[str] = "arXiv:2605.17757"
    widths: ClassVar[tuple[float, ...]] = (2, 3, 4)

    bits: int | float | None = arg(2, f"{BITS}, 2 to 4")
    group: int = arg(128, "channels that share a scale and a zero; all, where there are fewer")
    k_clip: float = arg(0.96, "quantile of a token's |K| beyond which it saturates; 1: nothing does")
    v_clip: float = arg(0.92, "quantile of a token's |V| beyond which it saturates; 1: nothing does")
    calibration: str | None = arg(None, FILE)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(self.group > 0, "group", "a positive number")
        self.check(0 < self.k_clip <= 1, "k_clip", "more than 0 and at most 1")
        self.check(0 < self.v_clip <= 1, "v_clip", "more than 0 and at most 1")
        self.check_share("k_clip", LEAST_CLIP)
        self.check_share("v_clip", LEAST_CLIP)

    @property
    def default_window(self) -> tuple[int, int]:
        return 64, 256

    @classmethod
    def calibrate(cls, seen: Statistics) -> dict[str, Tensor]:
        """k and v [H, D, D]: the rotations."""
        return {"k": spread_rotation(seen.queries), "v": spread_rotation(seen.value_scored)}

    @classmethod
    def check_layer(cls, layer: State) -> None:
        for name in ("k", "v"):
            check_inverse(layer, name, name)

    def sides(self, shape: PageShape) -> tuple[Grid, Grid]:
        k = self._grid("k", shape, shape.k_dim, self.k_bits)
        v = self._grid("v", shape, shape.v_dim, self.v_bits)
        return ClippedGrid(centred(k, shape), self.k_clip), ClippedGrid(v, self.v_clip)

    def _grid(self, name: str, shape: PageShape, dim: int, bits: float) -> UniformGrid:
        return UniformGrid(name, shape.page_size, dim, int(bits), 1, channel_group(self.name, self.group, dim, 8))

    def bases(self, calibration: Tensors, shape: PageShape) -> tuple[Basis, Basis]:
        return (
            Basis(calibration.tensor("k", shape, shape.k_dim, shape.k_dim)),
            Basis(calibration.tensor("v", shape, shape.v_dim, shape.v_dim)),
        )


def spread_rotation(moment: Tensor) -> Tensor:
    """U H P [H, D, D] of second moments [H, D, D]: each of its columns takes an equal share of every eigenvector.

    U: eigenvectors by rising eigenvalue. H: Hadamard, in blocks of the largest power of two that divides D; where there
    are several, they take the eigenvectors in turn. P: columns in falling bit-reversed order, the blocks in turn.
    """
    dim = moment.shape[-1]
    size = dim & -dim
    blocks = dim // size
    in_turn = torch.arange(dim, device="cpu").view(size, blocks).T.flatten()
    vectors = torch.linalg.eigh(moment).eigenvectors[..., in_turn]
    mixing = hadamard(dim, torch.device("cpu")).matrix
    assert mixing is not None
    columns = (torch.arange(blocks, device="cpu") * size + (size - 1 - bit_reversed(size))[:, None]).flatten()
    directions: Tensor = (vectors @ mixing.to(moment.dtype))[..., columns]
    return directions


def bit_reversed(size: int) -> Tensor:
    """int64 [size]: each number below `size`, a power of two, with its bits in reverse."""
    order = torch.zeros(1, dtype=torch.int64, device="cpu")
    while len(order) < size:
        order = torch.cat([2 * order, 2 * order + 1])
    return order
