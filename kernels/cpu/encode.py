"""The C kernel that writes pages: K and V in basis coordinates to records, in one pass."""

from __future__ import annotations

from ctypes import Array, addressof, c_char, create_string_buffer
from struct import Struct
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from kvcomp.errors import KvcompError
from kvcomp.kernel_layout import Codebook, Floats, Numbers, Segment, SideLayout, Sides, Uniform, alone, centre_of
from kvcomp.pages import PageLayout

from . import KINDS, NOTHING, _compiled, error, level
from .memory import given, records

# Structures of the C kernel, as one row of numbers each.
_PIECE = Struct("10q3f4xq12q")
_SIDE = "5q2f"
_PAGES = Struct(2 * _SIDE + "10q")


class _Piece(NamedTuple):
    """A segment, as the kernel's structure of that name has it; planes: (offset, bytes a token, width) of each.
    middles, book: kept alive for the kernel, which gets their addresses."""

    kind: int
    channels: int
    planes: list[tuple[int, int, int]]
    token_group: int = 1
    channel_group: int = 1
    scale: int = NOTHING
    zero: int = NOTHING
    levels: int = 0
    middles: Tensor | None = None
    book: Tensor | None = None
    cut: float = 0.0
    weight: float = 0.0
    centre: int = NOTHING

    def packed(self) -> bytes:
        planes = [number for plane in self.planes for number in plane] + [0] * (12 - 3 * len(self.planes))
        tables = (0 if table is None else table.data_ptr() for table in (self.middles, self.book))
        factors = self.cut, self.channels**0.5, self.weight
        sizes = self.kind, self.channels, len(self.planes), *self[3:8]
        return _PIECE.pack(*sizes, *tables, *factors, self.centre, *planes)


def _piece(segment: Segment, weight: float, layout: PageLayout) -> _Piece:
    offsets, strides = layout.offsets, {f.name: f.nbytes // layout.page_size for f in layout.fields}
    if isinstance(segment, Numbers):
        plane = offsets[segment.field], strides[segment.field], 0
        return _Piece(KINDS[segment.dtype], segment.channels, [plane])
    planes = [(offsets[p.field] + p.start, strides[p.field], p.width) for p in segment.planes]
    name = centre_of(segment)
    centre = NOTHING if name is None else offsets[name]
    if isinstance(segment, Uniform):
        zero, levels = NOTHING, 2 * segment.middle
        if segment.zero is not None:
            zero, levels = offsets[segment.zero], (1 << sum(p.width for p in segment.planes)) - 1
        groups, scale = (segment.token_group, segment.channel_group), offsets[segment.scale]
        cut = (1 - segment.clip) / 2
        return _Piece(KINDS["uniform"], segment.channels, planes, *groups, scale, zero, levels, cut=cut, centre=centre)
    assert isinstance(segment, Codebook)
    book = segment.book.float().contiguous()
    middles = (book[1:] + book[:-1]) / 2 if segment.middles is None else segment.middles.float().contiguous()
    shared = offsets[segment.norm], NOTHING, len(middles), middles, book
    shape = segment.channels, planes, 1, segment.channels
    return _Piece(KINDS["codebook"], *shape, *shared, weight=weight, centre=centre)


class Described(NamedTuple):
    """One side of a page as the kernel takes it: pieces, and all of them in one buffer, which points at their tensors.
    dtype: of what is stored without a grid, which the kernel copies; None where there is nothing of the kind."""

    pieces: list[_Piece]
    buffer: Array[c_char]
    dtype: torch.dtype | None


# By sides, then by layouts. Nothing is replaced: other threads may be reading what an entry points at.
_DESCRIBED: WeakKeyDictionary[SideLayout, dict[PageLayout, Described]] = WeakKeyDictionary()


def described(side: SideLayout, layout: PageLayout) -> Described:
    """K or V of pages of this layout; made once."""
    of_side = _DESCRIBED.get(side)
    if of_side is None:
        of_side = _DESCRIBED.setdefault(side, {})
    known = of_side.get(layout)
    if known is None:
        weights = [0.0] * len(side.segments) if side.gain is None else side.gain.weights
        pieces = [_piece(segment, weight, layout) for segment, weight in zip(side.segments, weights, strict=True)]
        buffer = create_string_buffer(b"".join(piece.packed() for piece in pieces))
        numbers = {segment.dtype for segment in side.segments if isinstance(segment, Numbers)}
        known = of_side.setdefault(layout, Described(pieces, buffer, numbers.pop() if len(numbers) == 1 else None))
    return known


def obstacle(sides: Sides) -> str | None:
    """Why the kernel cannot write pages; None: it can."""
    return next((why for side in sides for s in side.segments if (why := _obstacle(s, side)) is not None), None)


def _obstacle(segment: Segment, side: SideLayout) -> str | None:
    if isinstance(segment, Numbers) and segment.dtype not in KINDS:
        return f"numbers of {segment.dtype}"
    if isinstance(segment, Floats):
        return "floating-point codes"
    if isinstance(segment, Codebook) and segment.middles is None and side.gain is None:
        return "codes that follow from more than their segment"
    tables = (segment.book, segment.middles) if isinstance(segment, Codebook) else ()
    if any(x is not None and x.device.type != "cpu" for x in tables):
        return "a codebook on another device"
    return None


def write(
    pool: Tensor,
    ids: Tensor,
    keys: Tensor,
    values: Tensor,
    sides: Sides,
    layout: PageLayout,
    rows: Tensor | None = None,
) -> None:
    """Encode keys [M, P, Rk] and values [M, P, Rv], as `Codec.kernel_input` gives them, into the records ids [M] of a
    pool uint8 [records, bytes_per_page or more], as `sides` say. Summaries become 0.

    rows int64 [M]: keys [M, 1, Rk] and values [M, 1, Rv] are single tokens, written where these tokens of a page lie,
    of a layout that is `tokenwise` and sides without centres; all else of the records stays. What is stored without a grid is converted to the
    dtype of its field.
    """
    base, stride, n = records("pool", pool, layout.bytes_per_page)
    if rows is not None and not (layout.tokenwise and alone(sides)):
        raise KvcompError("single tokens cannot be written into pages whose tokens share scales or a centre")
    tokens = layout.page_size if rows is None else 1
    ids = given("ids", ids, torch.int64, 1)
    rows = None if rows is None else given("rows", rows, torch.int64, ids.shape)
    kept: list[tuple[Described, Tensor]] = []  # as long as the kernel reads them
    numbers: list[float] = []
    for name, x, side in zip(("keys", "values"), (keys, values), sides, strict=True):
        how = described(side, layout)
        dtype = how.dtype or (x.dtype if x.dtype in KINDS else torch.float32)
        x = given(name, x, dtype, (len(ids), tokens, side.inputs))
        kept.append((how, x))
        gain = (1.0, 0.0) if side.gain is None else (side.gain.power, side.gain.most)
        numbers += addressof(how.buffer), len(side.segments), x.data_ptr(), side.inputs, KINDS[dtype], *gain
    places = base, ids.data_ptr(), 0 if rows is None else rows.data_ptr()
    sizes = stride, layout.bytes_per_page, len(ids), tokens, level(), n, layout.page_size
    failed = _compiled().kvcomp_encode(_PAGES.pack(*numbers, *places, *sizes))
    del kept
    if failed:
        raise error(failed)
