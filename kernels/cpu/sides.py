"""Sides of pages and exact tokens as the C kernel's structures describe them."""

from __future__ import annotations

from collections.abc import Iterator
from ctypes import Structure, addressof, c_float, c_int32, c_int64, c_void_p
from functools import cache

import torch
from torch import Tensor

from kvcomp.kernels.placed import CODEBOOK, NOTHING, UNIFORM, PlacedSegment, placed
from kvcomp.layout import PageLayout
from kvcomp.segments import Codebook, Dense, Floats, KVLayout, SideLayout, Uniform, memo

FEW_BITS = 4  # codebooks of so many bits can hold 16 entries, others for 256
SOURCE = 25  # numbers of the C structure of that name: two sides of 9, ids, counts, 5 sizes
KINDS = {UNIFORM: 0, CODEBOOK: 1, torch.float32: 2, torch.float16: 3, torch.bfloat16: 4}
FLOATS = {"e2m1": 1, "e4m3": 5, "e5m2": 6}  # E2M1 has a codebook
SCALES = {"f16": (0, 2), "bf16": (1, 2), "e4m3": (2, 1), "e8m0": (3, 1)}  # as numbered there, and bytes
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


class _Plane(Structure):
    _fields_ = [("offset", c_int64), ("stride", c_int64), ("width", c_int32), ("bit", c_int32)]


class _Row(Structure):
    _fields_ = [("offset", c_int64), ("stride", c_int64), ("bytes", c_int64), ("at", c_int64)]


class _Segment(Structure):
    _fields_ = [
        ("kind", c_int32),
        ("channels", c_int32),
        ("planes", c_int32),
        ("token_group", c_int32),
        ("channel_group", c_int32),
        ("middle", c_float),
        ("scale", c_int64),
        ("zero", c_int64),
        ("codebook", c_void_p),
        ("bits", c_int32),
        ("plane", _Plane * 4),
        ("centre", c_int64),
        ("scale_stride", c_int64),
        ("page_scale", c_int64),
        ("scale_format", c_int32),
        ("grid", c_int32),
    ]


class Described:
    """One side of a page as the kernel takes it.

    blocked: whether it is read in blocks, as blocks.h does whatever codes are and other functions do for few of them.
    words, grids: 32-bit words of a token, and its scales and zeros, as blocks.h counts them.
    """

    def __init__(self, side: SideLayout, layout: PageLayout) -> None:
        self.codebooks: list[Tensor] = []  # kept alive: the structures point at them
        self._rows: dict[int, _Row] = {}  # by the offset of their field
        self._grids: dict[int, int] = {}  # by the offset of their scales
        self.words = self.grids = 0
        found = [s for at in placed(side, layout) for s in self._segments(at, layout)]
        self.array, self.rows = (_Segment * len(found))(*found), (_Row * len(self._rows))(*self._rows.values())
        self.dim = side.channels
        self.blocked = len(found) > 1 or any(
            isinstance(segment, Floats) or (isinstance(segment, Codebook) and len(segment.planes) > 1)
            for segment in side.segments
        )
        self._place = addressof(self.array), addressof(self.rows)

    def packed(self, base: int, stride: int, blocked: bool) -> tuple[int, ...]:
        """The kernel's structure of the side, of pages at `base`, `stride` bytes from one to the next."""
        segments, rows = self._place
        sizes = len(self.rows), self.words, self.grids, blocked or self.blocked
        return segments, base, stride, len(self.array), rows, *sizes

    def _segments(self, at: PlacedSegment, layout: PageLayout) -> Iterator[_Segment]:
        segment, places = at.segment, {}
        if isinstance(segment, Dense):
            offset, stride, _ = at.planes[0]
            bit = 32 * self._row(offset, stride)
            yield _dense(at.channels, segment.dtype, offset, stride, bit)
            return
        planes = [
            (offset, stride, width, 32 * self._row(layout.offsets[p.field], stride) + 8 * p.start)
            for (offset, stride, width), p in zip(at.planes, segment.planes, strict=True)
        ]
        kind, format, size = KINDS.get(at.kind, 0), *SCALES["f16"]
        if isinstance(segment, Uniform):
            places["middle"] = segment.middle
        elif isinstance(segment, Codebook):
            places["codebook"] = self._codebook(segment.codebook, at.bits)
        else:
            kind, (format, size) = FLOATS[segment.format], SCALES[segment.scale_format]
            if segment.format == "e2m1":
                both = torch.tensor(E2M1 + tuple(-x for x in E2M1), dtype=torch.float32, device="cpu")
                places["codebook"] = self._codebook(both, at.bits)
        groups = -(-at.channels // at.channel_group)
        places |= {"scale_stride": groups * size, "page_scale": at.page_scale, "scale_format": format}
        for first, n in _blocks(at.channels, at.channel_group):
            scale = at.scale + first // at.channel_group * size
            centre = at.centre if at.centre == NOTHING else at.centre + 2 * first
            own = [
                _Plane(offset + first * width // 8, stride, width, bit + first * width)
                for offset, stride, width, bit in planes
            ]
            group = min(at.channel_group, n)
            yield _Segment(
                kind,
                n,
                len(own),
                at.token_group,
                group,
                scale=scale,
                zero=at.zero,
                bits=at.bits,
                plane=tuple(own),
                centre=centre,
                grid=self._grid(scale, n // group, at) if at.token_group == 1 else NOTHING,
                **places,
            )

    def _row(self, offset: int, stride: int) -> int:
        """The first word of a field's row among those of the side."""
        if offset not in self._rows:
            self._rows[offset] = _Row(offset, stride, stride, self.words)
            self.words += -(-stride // 4)
        first: int = self._rows[offset].at
        return first

    def _grid(self, scale: int, groups: int, at: PlacedSegment) -> int:
        """The first of a segment's scales among those of the side; zeros follow them."""
        if scale not in self._grids:
            self._grids[scale] = self.grids
            self.grids += groups * (2 if at.kind == UNIFORM else 1)
        return self._grids[scale]

    def _codebook(self, codebook: Tensor, bits: int) -> int:
        room = 1 << (FEW_BITS if bits <= FEW_BITS else 8)
        self.codebooks.append(codebook.float().repeat(room // len(codebook)))
        return self.codebooks[-1].data_ptr()


def _blocks(channels: int, group: int) -> Iterator[tuple[int, int]]:
    """First channel and number of those whose groups are whole, and of a last group that is shorter."""
    whole = channels // group * group
    if whole:
        yield 0, whole
    if whole < channels:
        yield whole, channels - whole


def described(sides: KVLayout, layout: PageLayout) -> tuple[Described, Described]:
    """K and V in pages of this layout, made once."""
    known, key = memo(sides), (Described, layout)
    found: tuple[Described, Described] | None = known.get(key)
    if found is None:
        found = known.setdefault(key, (Described(sides[0], layout), Described(sides[1], layout)))
    return found


class Rows:
    """Exact tokens of one dtype and stride as the kernel takes them."""

    def __init__(self, dim: int, dtype: torch.dtype, stride: int) -> None:
        size = dtype.itemsize
        self.array, self.words = (_Segment * 1)(_dense(dim, dtype, 0, stride * size, 0)), -(-dim * size // 4)
        self.rows = (_Row * 1)(_Row(0, stride * size, dim * size, 0))
        self._place = addressof(self.array), addressof(self.rows)

    def packed(self, base: int, stride: int, blocked: bool) -> tuple[int, ...]:
        """As of `Described`."""
        segments, rows = self._place
        return segments, base, stride, 1, rows, 1, self.words, 0, blocked


@cache
def row_side(dim: int, dtype: torch.dtype, stride: int) -> Rows:
    """Tokens of `dim` channels, `stride` numbers from one to the next."""
    return Rows(dim, dtype, stride)


def _dense(channels: int, dtype: torch.dtype, offset: int, stride: int, bit: int) -> _Segment:
    plane, width = (_Plane * 4)(_Plane(offset, stride, 0, bit)), 8 * dtype.itemsize
    nothing = {"scale": NOTHING, "zero": NOTHING, "centre": NOTHING, "page_scale": NOTHING, "grid": NOTHING}
    return _Segment(KINDS[dtype], channels, 1, 1, channels, bits=width, plane=plane, **nothing)
