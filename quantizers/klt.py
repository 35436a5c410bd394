"""Transform coding in place: an attention-weighted Karhunen-Loeve basis with bits per channel."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvcomp.calibration.fitting import QueryMoments
from kvcomp.calibration.stage import FILE, Tensors
from kvcomp.calibration.statistics import Statistics
from kvcomp.layout import Field
from kvcomp.segments import KVLayout, ReadMap
from kvcomp.stages import Codec, PageShape, arg
from kvcomp.stages.registry import register
from kvcomp.state import State, described

from .calibrated import CalibratedQuantizer
from .directions import scaled_directions, singular
from .grid import SCALE
from .transform import MEAN, KLTGrid
from .waterfill import allocate
from .widths import BITS, WidthQuantizer


class KLTCodec(Codec):
    """K and V in bases of their own: given per head, or fitted to the first tokens that a stream encodes.

    To fit, the second moment of a stream's queries is gathered until its first page, and dropped then.
    """

    def __init__(self, k_grid: KLTGrid, v_grid: KLTGrid, fitted_heads: bool = False) -> None:
        self.k_grid, self.v_grid, self.fitted_heads = k_grid, v_grid, fitted_heads
        self.queries = QueryMoments(k_grid.dim, k_grid.device)

    @property
    def hosted(self) -> bool:  # type: ignore[override]
        return self.adapts

    @property
    def adapts(self) -> bool:
        return not self.fitted_heads

    @property
    def fields(self) -> tuple[Field, ...]:
        return self.k_grid.fields + self.v_grid.fields

    def observe(self, streams: Tensor, queries: Tensor) -> None:
        if not self.fitted_heads:
            self.queries.add(streams, queries)

    def fit(self, streams: Tensor, keys: Tensor, values: Tensor, due: Tensor | None = None) -> None:
        if self.fitted_heads:
            return
        new = self.queries.missing(streams)
        if not bool(new.any()):
            return
        ours = streams[new]
        self.k_grid.fit(ours, keys[new], self.queries.take(ours))
        self.v_grid.fit(ours, values[new], None)

    def _room(self, streams: int) -> None:
        for side in (self.k_grid, self.v_grid):
            side.reserve(streams)

    def encode(self, keys: Tensor, values: Tensor, streams: Tensor) -> dict[str, Tensor]:
        return self.k_grid.encode(keys, streams) | self.v_grid.encode(values, streams)

    def kernel_input(self, keys: Tensor, values: Tensor, streams: Tensor) -> tuple[Tensor, Tensor]:
        k, v = self.k_grid.coordinates(keys, streams), self.v_grid.coordinates(values, streams)
        return torch.cat(k, -1), torch.cat(v, -1)

    def decode(self, page: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        return self.k_grid.decode(page), self.v_grid.decode(page)

    def kernel_layouts(self) -> KVLayout:
        return self.k_grid.kernel_layout, self.v_grid.kernel_layout

    def read_query(self, queries: Tensor) -> tuple[Tensor, Tensor | None]:
        if not self.fitted_heads:
            self._room(len(queries))
        basis = self.k_grid.basis()
        return basis.read(queries), basis.offset(queries)

    def read_output(self, output: Tensor) -> Tensor:
        return self.v_grid.basis().inverse(output, torch.arange(len(output), device=output.device))

    def read_maps(self, streams: int) -> tuple[ReadMap, ReadMap]:
        if not self.fitted_heads:
            self._room(streams)
        return self.k_grid.map(), self.v_grid.map()

    def read_value_query(self, queries: Tensor) -> tuple[Tensor, Tensor | None]:
        basis = self.v_grid.basis()
        return basis.read(queries), basis.offset(queries)

    def read_key_output(self, output: Tensor) -> Tensor:
        return self.k_grid.basis().inverse(output, torch.arange(len(output), device=output.device))

    def inverse(self, keys: Tensor, values: Tensor, streams: Tensor) -> tuple[Tensor, Tensor]:
        return self.k_grid.basis().inverse(keys, streams), self.v_grid.basis().inverse(values, streams)

    def select(self, streams: Tensor) -> None:
        if self.fitted_heads:
            return
        self._room(int(streams.max()) + 1 if len(streams) else 0)
        self.queries.select(streams)
        for side in (self.k_grid, self.v_grid):
            side.select(streams)

    def fork(self) -> KLTCodec:
        twin = copy(self)
        twin.k_grid, twin.v_grid, twin.queries = copy(self.k_grid), copy(self.v_grid), self.queries.fork()
        return twin

    def constants(self) -> list[Tensor]:
        return [*self.k_grid.constants(), *self.v_grid.constants(), *self.queries.constants()]

    def adapted(self) -> list[Tensor]:
        return [] if self.fitted_heads else [*self.k_grid.constants(), *self.v_grid.constants()]

    def state(self) -> dict[str, Tensor]:
        if self.fitted_heads:
            return {}  # the calibration file says it all
        return self.k_grid.state() | self.v_grid.state() | self.queries.state()

    def restore(self, state: Mapping[str, Tensor]) -> None:
        if self.fitted_heads:
            return
        self.queries.restore(state)
        for side in (self.k_grid, self.v_grid):
            side.restore(state)

    def lacks(self, paged: Tensor) -> str | None:
        if self.fitted_heads:
            return None
        why = self.queries.lacks(paged, *self.k_grid.constants(), *self.v_grid.constants())
        return why or self.k_grid.lacks(paged) or self.v_grid.lacks(paged)


@register("klt")
@dataclass(frozen=True)
class KLT(WidthQuantizer, CalibratedQuantizer):
    """Transform coding: an attention-weighted Karhunen-Loeve basis per head, with bits where the variance is.

    Per KV head, with S the second moment of its queries and C the covariance of its keys, the eigenvectors of
    S^1/2 C S^1/2 give coordinates whose squared error is that of q . k; values take those of the second moment of their
    directions v / |v|. Bits go to units of 8 coordinates by reverse water-filling; a page holds their Lloyd-Max codes
    and a float16 norm per token, and is attended as it is. The basis is fitted to the prompt itself when the first page
    is written, and held in float16: D x D for K and for V of each head and row; or it comes from `calibration`, and
    rows share it.

    `bits` + 16 / D effective bits, plus the basis. Of equal sums, more bits for K than for V find more needles.

    Ours; compare arXiv 2511.01815.
    """

    paper: ClassVar[str] = "kvcomp; cf. arXiv:2511.01815"
    required: ClassVar[bool] = False
    widths: ClassVar[tuple[float, ...]] = tuple(n / 2 for n in range(2, 13))

    bits: int | float | None = arg(2, f"{BITS} on average: 1 to 6 in halves")
    calibration: str | None = arg(None, f"{FILE}; None: fitted to the prompt")

    @property
    def needs_queries(self) -> bool:
        return self.calibration is None

    @property
    def default_window(self) -> tuple[int, int]:
        return 4, 128

    @property
    def default_window_bits(self) -> int | None:
        return 16  # beside errors of codes, those of float16 are none

    @classmethod
    def calibrate(cls, seen: Statistics) -> dict[str, Tensor]:
        """Per side: the basis [H, D, D] and the variances [H, D]; of keys the mean [H, D]."""
        k = scaled_directions(seen.key_covariance, seen.queries)
        v = scaled_directions(seen.value_directions * seen.value_mean.shape[-1], None)
        return {"k.basis": k[0], "k.variance": k[1], "k.mean": seen.key_mean, "v.basis": v[0], "v.variance": v[1]}

    @classmethod
    def check_layer(cls, layer: State) -> None:
        for name in ("k", "v"):
            basis = layer.finite(f"{name}.basis", (None, None, None), torch.float32)
            variance = layer.finite(f"{name}.variance", basis.shape[:2], torch.float32)
            layer.require(
                bool((variance >= 0).all() and (variance.double().sum(-1) > 0).all()), f"{name}.variance is 0"
            )
            layer.require(basis.shape[1] == basis.shape[2], f"{name}.basis is {described(basis)}, no square matrices")
            size = basis.double().square().mean((1, 2), keepdim=True).sqrt()
            stored = (basis / (size if name == "k" else 1)).to(SCALE).float()
            layer.require(not bool(singular(stored).any()), f"{name}.basis has no inverse")
        layer.finite("k.mean", layer["k.variance"].shape, torch.float32)

    def _sides(self, shape: PageShape) -> tuple[KLTGrid, KLTGrid]:
        return (
            KLTGrid("k", shape.page_size, shape.k_dim, self.k_bits, shape.device, centred=True),
            KLTGrid("v", shape.page_size, shape.v_dim, self.v_bits, shape.device, centred=False),
        )

    def fields(self, shape: PageShape) -> tuple[Field, ...]:
        return tuple(field for side in self._sides(shape) for field in side.fields)

    def adapted_bytes(self, shape: PageShape) -> int:
        bases = (shape.k_dim**2 + shape.v_dim**2) * SCALE.itemsize
        return 0 if self.calibration else bases + shape.k_dim * MEAN.itemsize

    def codec(self, shape: PageShape) -> Codec:
        return KLTCodec(*self._sides(shape)) if self.calibration is None else super().codec(shape)

    def made_of(self, calibration: Tensors, shape: PageShape) -> Codec:
        sides, heads = self._sides(shape), torch.arange(shape.heads, device=shape.device)
        for side in sides:
            basis = calibration.tensor(f"{side.name}.basis", shape, side.dim, side.dim)
            variance = calibration.tensor(f"{side.name}.variance", shape, side.dim)
            mean = torch.zeros_like(variance) if side.mean is None else calibration.tensor("k.mean", shape, side.dim)
            side.widths = allocate((variance / variance.sum(-1, keepdim=True)).mean(0), side.total)
            side.take(heads, basis, mean)
        return KLTCodec(*sides, fitted_heads=True)
