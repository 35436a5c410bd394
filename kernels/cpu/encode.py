"""The C kernel that writes pages: K and V in basis coordinates to records, in one pass."""

from __future__ import annotations

from ctypes import addressof, create_string_buffer
from struct import Struct
from typing import NamedTuple

import torch
from torch import Tensor

from kvcomp.errors import KvcompError
from kvcomp.kernels.placed import CODEBOOK, NOTHING, UNIFORM, PlacedSegment, placed, reason, unwritable
from kvcomp.layout import PageLayout
from kvcomp.segments import Codebook, Dense, Floats, KVLayout, Segment, SideLayout, Uniform, alone, memo

from . import KINDS, compiled, unknown
from .memory import given, pages, records

# Structures of the C kernel, as one row of numbers each.
_PIECE = Struct("11q3f4xq12q")
_SIDE = "8q2f"
FLOATS = {("e4m3", "bf16"): 5, ("e5m2", "bf16"): 6, ("e2m1", "e4m3"): 7, ("e2m1", "e8m0"): 8}  # and their scales
BLOCK = 32  # channels that a power of two is chosen for, at most
_PAGES = Struct(2 * _SIDE + "10q")


class _Piece(NamedTuple):
    """A segment, as the kernel's structure of that name has it; planes: (offset, bytes a token, width) of each.
    thresholds, codebook: kept alive for the kernel, which gets their addresses."""

    kind: int
    channels: int
    planes: tuple[tuple[int, int, int], ...]
    token_group: int = 1
    channel_group: int = 1
    scale: int = NOTHING
    zero: int = NOTHING
    page_scale: int = NOTHING
    levels: int = 0
    thresholds: Tensor | None = None
    codebook: Tensor | None = None
    cut: float = 0.0
    weight: float = 0.0
    centre: int = NOTHING

    def packed(self) -> bytes:
        planes = [number for plane in self.planes for number in plane] + [0] * (12 - 3 * len(self.planes))
        tables = (0 if table is None else table.data_ptr() for table in (self.thresholds, self.codebook))
        factors = self.cut, self.channels**0.5, self.weight
        sizes = self.kind, self.channels, len(self.planes), *self[3:9]
        return _PIECE.pack(*sizes, *tables, *factors, self.centre, *planes)


def _piece(at: PlacedSegment) -> _Piece:
    segment, shape = at.segment, (at.channels, at.planes, at.token_group, at.channel_group)
    if isinstance(segment, Dense):
        return _Piece(KINDS[segment.dtype], *shape)
    if isinstance(segment, Floats):
        kind = FLOATS[segment.format, segment.scale_format]
        return _Piece(kind, *shape, at.scale, page_scale=at.page_scale, centre=at.centre)
    shared = *shape, at.scale, at.zero, at.page_scale, at.levels
    if isinstance(segment, Uniform):
        return _Piece(KINDS[UNIFORM], *shared, cut=(1 - segment.clip) / 2, centre=at.centre)
    assert isinstance(segment, Codebook)
    codebook = segment.codebook.float().contiguous()
    thresholds = (
        (codebook[1:] + codebook[:-1]) / 2 if segment.thresholds is None else segment.thresholds.float().contiguous()
    )
    return _Piece(KINDS[CODEBOOK], *shared, thresholds, codebook, weight=at.weight, centre=at.centre)


class Described:
    """One side of a page as the kernel takes it: pieces, and all of them in one buffer, which points at their tensors.
    dtype: of what is stored without a grid, which the kernel copies; None where there is nothing of the kind."""

    def __init__(self, side: SideLayout, layout: PageLayout) -> None:
        self.pieces = [_piece(segment) for segment in placed(side, layout)]
        self.buffer = create_string_buffer(b"".join(piece.packed() for piece in self.pieces))
        numbers = {segment.dtype for segment in side.segments if isinstance(segment, Dense)}
        self.dtype = numbers.pop() if len(numbers) == 1 else None


def described(sides: KVLayout, layout: PageLayout) -> tuple[Described, Described]:
    """K and V of pages of this layout; made once."""
    known, key = memo(sides), (Described, layout)
    found: tuple[Described, Described] | None = known.get(key)
    if found is None:
        found = known.setdefault(key, (Described(sides[0], layout), Described(sides[1], layout)))
    return found


def obstacle(sides: KVLayout) -> str | None:
    """Why the kernel cannot write pages; None: it can."""
    return reason(sides, lambda segment, side: _unknown(segment) or unwritable(segment, side))


def _unknown(segment: Segment) -> str | None:
    if not isinstance(segment, Floats):
        return unknown(segment)
    kind = FLOATS.get((segment.format, segment.scale_format), 0)
    whole = segment.channel_group == segment.channels if kind < 7 else kind < 8 or segment.channel_group == BLOCK
    if kind == 0 or not whole or (segment.page_scale is None) is (kind == 7):
        return "floating-point codes of another format or with other scales"
    return None


def write(
    pool: Tensor,
    ids: Tensor,
    keys: Tensor,
    values: Tensor,
    sides: KVLayout,
    layout: PageLayout,
    rows: Tensor | None = None,
) -> None:
    """Encode keys [M, P, Rk] and values [M, P, Rv], or [s, M / s, P, R] of s streams, as `Codec.kernel_input` gives
    them, into the records ids [M] of a pool uint8 [records, bytes_per_page or more], as `sides` say; ids below 0:
    nowhere. Summaries become 0. Tokens may be strided; they are read where they lie.

    rows int64 [M]: keys [M, 1, Rk] and values [M, 1, Rv] are single tokens, written where these tokens of a page lie,
    of a layout that is `tokenwise` and sides without centres; all else of the records stays. What is stored without a
    grid is converted to the dtype of its field.
    """
    base, stride, n = records("pool", pool, layout.bytes_per_page)
    if rows is not None and not (layout.tokenwise and alone(sides)):
        raise KvcompError("single tokens cannot be written into pages whose tokens share scales or a centre")
    tokens = layout.page_size if rows is None else 1
    ids = given("ids", ids, torch.int64, 1)
    rows = None if rows is None else given("rows", rows, torch.int64, ids.shape)
    if bool((ids < 0).any()):
        there = (ids >= 0).nonzero().flatten()
        ids, keys, values = ids[there], *(x.flatten(0, -3)[there] for x in (keys, values))
        rows = None if rows is None else rows[there]
    kept: list[tuple[Described, Tensor]] = []  # as long as the kernel reads them
    numbers: list[float] = []
    each = zip(("keys", "values"), (keys, values), sides, described(sides, layout), strict=True)
    for name, x, side, how in each:
        dtype = how.dtype or (x.dtype if x.dtype in KINDS else torch.float32)
        x, *where = pages(name, x, dtype, (len(ids), tokens, side.inputs))
        kept.append((how, x))
        gain = (1.0, 0.0) if side.gain is None else (side.gain.power, side.gain.most)
        numbers += addressof(how.buffer), len(side.segments), x.data_ptr(), side.inputs, KINDS[dtype], *where, *gain
    places = base, ids.data_ptr(), 0 if rows is None else rows.data_ptr()
    sizes = stride, layout.bytes_per_page, len(ids), tokens, compiled.level(), n, layout.page_size
    compiled.functions().kvcomp_encode(_PAGES.pack(*numbers, *places, *sizes))
    del kept
