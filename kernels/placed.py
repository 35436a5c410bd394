"""Where the segments of a side lie in a page: the one translation of a layout that all kernels use."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from kvcomp.layout import PageLayout
from kvcomp.segments import Codebook, Dense, Floats, KVLayout, Segment, SideLayout, Uniform, centre_of

NUMBERS, UNIFORM, CODEBOOK, FLOATS = "numbers", "uniform", "codebook", "floats"
KINDS = {Dense: NUMBERS, Uniform: UNIFORM, Codebook: CODEBOOK, Floats: FLOATS}
NOTHING = -1  # the place of what a segment does not have


class PlacedSegment(NamedTuple):
    """A segment of a side; places are in bytes from the start of a page.

    channel: its first among the side's. planes: (offset, bytes from a token to the next, width) of each, the highest
    bits first; numbers are one of width 0. levels: the highest code, of 2 * middle + 1 symmetric ones without a zero.
    A scale is shared by `token_group` tokens and `channel_group` channels; weight: of its side's `Gain`. centre: of
    float16 [channels], which is added to all tokens of the page.
    """

    kind: str
    segment: Segment
    channel: int
    channels: int
    planes: tuple[tuple[int, int, int], ...]
    token_group: int = 1
    channel_group: int = 1
    scale: int = NOTHING
    zero: int = NOTHING
    page_scale: int = NOTHING
    levels: int = 0
    weight: float = 0.0
    centre: int = NOTHING

    @property
    def bits(self) -> int:
        """Of a code."""
        return sum(width for _, _, width in self.planes)


def placed(side: SideLayout, layout: PageLayout) -> tuple[PlacedSegment, ...]:
    """The segments of K or V in pages of this layout, in the order of their channels."""
    strides = {f.name: f.nbytes // layout.page_size for f in layout.fields}
    weights = [0.0] * len(side.segments) if side.gain is None else side.gain.weights
    found, channel = [], 0
    for segment, weight in zip(side.segments, weights, strict=True):
        name = centre_of(segment)
        centre = NOTHING if name is None else layout.offsets[name]
        found.append(_placed(segment, layout.offsets, strides, channel)._replace(weight=weight, centre=centre))
        channel += segment.channels
    return tuple(found)


def _placed(segment: Segment, offsets: dict[str, int], strides: dict[str, int], channel: int) -> PlacedSegment:
    start = KINDS[type(segment)], segment, channel, segment.channels
    if isinstance(segment, Dense):
        return PlacedSegment(*start, ((offsets[segment.field], strides[segment.field], 0),))
    planes = tuple((offsets[p.field] + p.start, strides[p.field], p.width) for p in segment.planes)
    if isinstance(segment, Codebook):
        shared = 1, segment.channels, offsets[segment.norm]
        return PlacedSegment(*start, planes, *shared, levels=len(segment.codebook) - 1)
    if isinstance(segment, Floats):
        page_scale = NOTHING if segment.page_scale is None else offsets[segment.page_scale]
        return PlacedSegment(*start, planes, 1, segment.channel_group, offsets[segment.scale], page_scale=page_scale)
    shared = segment.token_group, segment.channel_group, offsets[segment.scale]
    if segment.zero is None:
        return PlacedSegment(*start, planes, *shared, levels=2 * segment.middle)
    most = (1 << sum(p.width for p in segment.planes)) - 1
    return PlacedSegment(*start, planes, *shared, offsets[segment.zero], levels=most)


def reason(sides: KVLayout, why: Callable[[Segment, SideLayout], str | None]) -> str | None:
    """The first reason that `why` gives against a segment of a side; None: it gives none."""
    each = (why(segment, side) for side in sides for segment in side.segments)
    return next((found for found in each if found is not None), None)


def unwritable(segment: Segment, side: SideLayout) -> str | None:
    """Why no kernel writes a segment; None: one may."""
    if isinstance(segment, Codebook) and segment.thresholds is None and side.gain is None:
        return "codes that follow from more than their segment"
    return None
