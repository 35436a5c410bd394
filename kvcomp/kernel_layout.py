"""How a codec's pages are to be read, for kernels that know nothing of codecs: where channels lie and what they mean.

A side (K or V) is a list of segments of neighbouring channels, in basis coordinates. Fields are named as in the page's
layout, which has their offsets. Descriptions are equal only if they are the same object: a codec makes its own once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Plane:
    """Codes of `width` bits (1, 2, 4 or 8), the first in the low bits: bytes of `field` from `start` on, in each
    token's row."""

    field: str
    width: int
    start: int = 0


@dataclass(frozen=True)
class Numbers:
    """Channels that are stored as float32, float16 or bfloat16 numbers in `field` [P, channels]."""

    channels: int
    field: str
    dtype: torch.dtype


@dataclass(frozen=True)
class Uniform:
    """x = code * scale + zero, with float16 scales [P / token_group, channels / channel_group] in a field.

    planes: the highest bits of the codes first. zero: a field of the scale's shape, or None for -middle * scale.
    """

    channels: int
    planes: tuple[Plane, ...]
    token_group: int
    channel_group: int
    scale: str
    zero: str | None
    middle: int = 0


@dataclass(frozen=True)
class Codebook:
    """x = book[code] * norm, with a book float32 [2^bits] and float16 norms [P, 1] in a field."""

    channels: int
    planes: tuple[Plane, ...]
    norm: str
    book: Tensor = field(repr=False)


Segment = Numbers | Uniform | Codebook


@dataclass(frozen=True, eq=False)
class SideLayout:
    """K or V of a page: its segments, in the order of their channels."""

    segments: tuple[Segment, ...]

    @property
    def channels(self) -> int:
        return sum(segment.channels for segment in self.segments)


def joined(sides: Iterable[SideLayout | None]) -> SideLayout | None:
    """The segments of all sides in order; None where one has none to tell."""
    parts = list(sides)
    known = [side for side in parts if side is not None]
    return SideLayout(tuple(s for side in known for s in side.segments)) if len(known) == len(parts) else None


Sides = tuple[SideLayout, SideLayout]
