"""Pages as the Triton kernel that writes them takes them: the tiles of tokens and channels that programs encode.

A piece is a segment of K or V, cut into tiles of [T, G, R] elements: T tokens of G runs of `run` channels each. The
channels of a run share a scale, or each has its own. T, G and R are powers of two; a tile may have idle elements.
Segments that are written together are the parts of one piece, whose tiles are whole tokens.
"""

from __future__ import annotations

import json
from dataclasses import astuple, dataclass, replace
from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor

from kvcomp.kernels.placed import CODEBOOK, NOTHING, PlacedSegment, placed, reason, unwritable
from kvcomp.layout import PageLayout
from kvcomp.segments import Codebook, Floats, KVLayout, Segment, SideLayout, Uniform

from .chunks import obstacle as read_obstacle

JOINT = "joint"  # a kind of `Piece` besides those of `placed`
ELEMENTS = 2048  # of a tile: 16 a thread
COLUMNS = 128  # of a tile, at least where there are as many: tokens share their lines of memory then
NARROWEST = 16
MOST_TOKENS = 2048  # that share a scale: a program has them all


@dataclass(frozen=True)
class Piece:
    """A segment of a side: `channels` channels of its coordinates from `channel` on.

    planes: (offset, bytes from a token to the next, width) of each, the highest bits first. scale, zero: offsets.
    levels: the highest code, of 2 * middle + 1 symmetric ones without a zero; thresholds: its first in the side's.
    format, scale_format, page_scale, centre: as in `chunks.Chunk`.
    step: tokens of a tile, of which it can hold T; tiles: of a page, along tokens and along channels.
    """

    kind: str
    side: int
    channel: int
    channels: int
    planes: tuple[tuple[int, int, int], ...]
    token_group: int
    channel_group: int
    scale: int
    zero: int
    levels: int
    clip: float
    thresholds: int
    format: str
    scale_format: str
    page_scale: int
    centre: int
    step: int
    run: int
    shape: tuple[int, int, int]
    tiles: tuple[int, int]

    @property
    def programs(self) -> int:
        """Of a page."""
        return self.tiles[0] * self.tiles[1]

    @property
    def anchored(self) -> bool:
        """Whether the centre is `anchored`: of tokens coded one by one, in two bits or more, of a book in three."""
        bits = sum(width for _, _, width in self.planes)
        return self.centre != NOTHING and self.token_group == 1 and bits > (2 if self.kind == CODEBOOK else 1)

    @property
    def elements(self) -> int:
        """Of a tile."""
        return prod(self.shape)


@dataclass(frozen=True)
class Joint:
    """A side whose segments are `parts`, cut alike, along tokens alone; weights, power and most: of its `Gain`."""

    kind: str
    side: int
    parts: tuple[Piece, ...]
    weights: tuple[float, ...]
    power: float
    most: float

    @property
    def programs(self) -> int:
        """Of a page."""
        return self.parts[0].programs

    @property
    def elements(self) -> int:
        """Of the largest part's tile."""
        return max(part.elements for part in self.parts)


@dataclass(frozen=True)
class Description:
    """What the kernel is compiled for: `tokens` tokens, a whole page or one of it. gaps: (offset, bytes) of those that
    belong to no field and are written as 0. k_dim, v_dim: numbers of a token in what is to be written."""

    pieces: tuple[Piece | Joint, ...]
    k_dim: int
    v_dim: int
    tokens: int
    gaps: tuple[tuple[int, int], ...]

    @property
    def programs(self) -> int:
        """Of a page."""
        return sum(piece.programs for piece in self.pieces)

    @property
    def warps(self) -> int:
        return min(max(max(piece.elements for piece in self.pieces) // 512, 4), 32)

    def __str__(self) -> str:
        """A form that custom ops take; `parsed` reads it."""
        return json.dumps(astuple(self), separators=(",", ":"))


@cache
def parsed(text: str) -> Description:
    """Inverse of `str`."""
    pieces, k_dim, v_dim, size, gaps = json.loads(text)
    return Description(tuple(_piece(fields) for fields in pieces), k_dim, v_dim, size, tuple(map(tuple, gaps)))


def _piece(fields: list[Any]) -> Piece | Joint:
    if fields[0] == JOINT:
        kind, side, parts, weights, *rest = fields
        return Joint(kind, side, tuple(map(_segment_piece, parts)), tuple(weights), *rest)
    return _segment_piece(fields)


def _segment_piece(fields: list[Any]) -> Piece:
    fields[4], fields[-2], fields[-1] = tuple(map(tuple, fields[4])), tuple(fields[-2]), tuple(fields[-1])
    return Piece(*fields)


def described(sides: KVLayout, layout: PageLayout, single: bool = False) -> Description:
    """Pages of this layout whose K and V are to be written as `sides` say; `single`: one token of a page."""
    size = 1 if single else layout.page_size
    found: list[Piece | Joint] = []
    for i, side in enumerate(sides):
        thresholds, parts = 0, []
        for at in placed(side, layout):
            parts.append(_piece_of(at, size, i, thresholds))
            thresholds += len(_table(at.segment, side))
        found += parts if side.gain is None else [_joint(side, parts)]
    ends = {f.name: layout.offsets[f.name] + f.nbytes for f in layout.fields}
    gaps = () if single else tuple((end, -end % 16) for end in ends.values() if end % 16)
    k, v = (side.inputs for side in sides)
    return Description(tuple(found), k, v, size, gaps)


def _piece_of(at: PlacedSegment, size: int, side: int, thresholds: int) -> Piece:
    """A segment, of which `size` tokens of a page are written at once."""
    segment, channels, tokens, group = at.segment, at.channels, at.token_group, at.channel_group
    clip = segment.clip if isinstance(segment, Uniform) else 1.0
    formats = (segment.format, segment.scale_format) if isinstance(segment, Floats) else ("", "")
    room = _power(tokens) if tokens > 1 else min(_power(size), NARROWEST)
    if group == 1:
        run = width = max(min(_power(channels), max(ELEMENTS // room, NARROWEST), COLUMNS), NARROWEST)
        groups = 1
    else:
        run, width = group, max(_power(group), 8)
        groups = min(_power(-(-channels // group)), max(min(COLUMNS, ELEMENTS // room) // width, 1))
    if tokens == 1:
        room = min(_power(size), max(ELEMENTS // (groups * width), 1))
    step = tokens if tokens > 1 else room
    tiles = -(-size // step), -(-channels // (run * groups))
    shape = room, groups, width
    return Piece(
        *(
            at.kind,
            side,
            at.channel,
            channels,
            at.planes,
            tokens,
            group,
            at.scale,
            at.zero,
            at.levels,
            clip,
            thresholds,
        ),
        *(*formats, at.page_scale, at.centre, step, run, shape, tiles),
    )


def _joint(side: SideLayout, parts: list[Piece]) -> Joint:
    """The pieces of a side's segments as parts of one, whose tiles have as many tokens as the widest."""
    assert side.gain is not None
    first = min(parts, key=lambda part: part.step)
    alike = tuple(
        replace(part, step=first.step, shape=(first.shape[0], *part.shape[1:]), tiles=first.tiles) for part in parts
    )
    return Joint(JOINT, first.side, alike, side.gain.weights, side.gain.power, side.gain.most)


def _power(n: int) -> int:
    """The least power of two that is no less."""
    return 1 << (n - 1).bit_length()


def thresholds(sides: KVLayout, device: torch.device) -> list[Tensor]:
    """float32 [n], the tables of K and of V: the thresholds of all codebooks in the order of segments, each followed by
    its codebook where there is a gain or a centre; one idle entry where there are none."""
    found = [torch.cat([_table(segment, side).to(device) for segment in side.segments]) for side in sides]
    return [table if len(table) else torch.zeros(1, device=device, dtype=torch.float32) for table in found]


def _table(segment: Segment, side: SideLayout) -> Tensor:
    """A segment's part of the table."""
    if isinstance(segment, Codebook) and side.gain is not None:
        codebook = segment.codebook.float()
        return torch.cat([(codebook[1:] + codebook[:-1]) / 2, codebook])
    if isinstance(segment, Codebook) and segment.thresholds is not None:
        return torch.cat([segment.thresholds.float(), segment.codebook.float()][: 1 if segment.centre is None else 2])
    return torch.zeros(0, dtype=torch.float32, device="cpu")


def obstacle(sides: KVLayout) -> str | None:
    """Why the kernel cannot write pages; None: it can."""
    return read_obstacle(sides) or reason(sides, _unwritable)


def _unwritable(segment: Segment, side: SideLayout) -> str | None:
    if isinstance(segment, Uniform):
        if segment.token_group > MOST_TOKENS:
            return f"scales that {segment.token_group} tokens share, more than {MOST_TOKENS}"
        if 1 < segment.channel_group < segment.channels and segment.channel_group % (8 // segment.planes[-1].width):
            return f"scales that {segment.channel_group} channels share, which fill no whole bytes"
    return unwritable(segment, side)
