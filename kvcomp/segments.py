"""How a codec's pages are to be read, for kernels that know nothing of codecs: where channels lie and what they mean.

A side (K or V) is a list of segments of neighbouring channels, in basis coordinates. Fields are named as in the page's
layout, which has their offsets. Where a segment has a `centre`, a float16 field [1, channels], the page's numbers there
are added to x; kernels that write find them as `quantizers.centred.centre` does, and subtract them first. Descriptions
are equal only if they are the same object: a codec makes its own once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from functools import cached_property, lru_cache
from typing import Any
from weakref import WeakKeyDictionary

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
class Dense:
    """Channels that are stored as float32, float16 or bfloat16 numbers in `field` [P, channels]."""

    channels: int
    field: str
    dtype: torch.dtype


@dataclass(frozen=True)
class Uniform:
    """x = code * scale + zero, with float16 scales [P / token_group, channels / channel_group] in a field.

    planes: the highest bits of the codes first. zero: a field of the scale's shape, or None for -middle * scale.
    clip: the share of a block's range that codes cover, for kernels that write.
    """

    channels: int
    planes: tuple[Plane, ...]
    token_group: int
    channel_group: int
    scale: str
    zero: str | None
    middle: int = 0
    clip: float = 1.0
    centre: str | None = None


@dataclass(frozen=True)
class Codebook:
    """x = codebook[code] * norm, with a codebook float32 [2^bits] and float16 norms [P, 1] in a field.

    thresholds: float32 [2^bits - 1], ascending: norm is |x| / channels^1/2, the code how many of them x / |x| exceeds.
    None: what is written follows from more than the segment: see `Gain`.
    """

    channels: int
    planes: tuple[Plane, ...]
    norm: str
    codebook: Tensor = field(repr=False)
    thresholds: Tensor | None = field(default=None, repr=False)
    centre: str | None = None


@dataclass(frozen=True)
class Floats:
    """x = number * scale, with numbers of the format "e2m1" in 4 bits, "e4m3" or "e5m2" in 8, in one plane.

    Each `channel_group` channels of a token, the last perhaps fewer, share a scale of the format "bf16", "e4m3" or
    "e8m0" in the field `scale` [P, ceil(channels / channel_group)]; page_scale: a float32 field [1] that multiplies
    them, or None.
    """

    channels: int
    planes: tuple[Plane, ...]
    format: str
    channel_group: int
    scale: str
    scale_format: str
    page_scale: str | None = None
    centre: str | None = None


Segment = Dense | Uniform | Codebook | Floats


def centre_of(segment: Segment) -> str | None:
    """The field of a segment's centre; None: it has none."""
    return None if isinstance(segment, Dense) else segment.centre


@dataclass(frozen=True)
class Gain:
    """How codebooks that share a norm, a side's only segments, are written of coordinates x and a norm for each token.

      y = x / norm,  code: of the entry c nearest to y, the lower of two,  what is stored: norm * gain^power,
      gain = sum_i w_i y_i^2 / sum_i w_i c_i y_i  (power 1),  sum_i w_i y_i^2 / sum_i w_i c_i^2  (power 1/2)

    weights: w of each segment. most: gain is at most so much.
    """

    weights: tuple[float, ...]
    power: float
    most: float


@dataclass(frozen=True, eq=False)
class SideLayout:
    """K or V of a page: its segments, in the order of their channels.

    gain: how they are written together; `Codec.kernel_input` has each token's norm after its coordinates then. None:
    each is written by itself.
    """

    segments: tuple[Segment, ...]
    gain: Gain | None = None

    @cached_property
    def channels(self) -> int:
        """Coordinates of a token, of all segments together."""
        return sum(segment.channels for segment in self.segments)

    @property
    def inputs(self) -> int:
        """Numbers of a token that kernels write from."""
        return self.channels + (self.gain is not None)

    def __getstate__(self) -> dict[str, Any]:  # copies make their own `memo`
        return {f.name: getattr(self, f.name) for f in fields(self)}


@lru_cache(maxsize=256)
def side_of(segment: Segment) -> SideLayout:
    """A side of one segment: the same object for all layers whose segments are alike and have the very same tensors, so
    that what kernels made of it is made once."""
    return SideLayout((segment,))


def joined(sides: Iterable[SideLayout | None]) -> SideLayout | None:
    """The segments of all sides in order; None where one has none to tell."""
    parts = list(sides)
    known = [side for side in parts if side is not None]
    return SideLayout(tuple(s for side in known for s in side.segments)) if len(known) == len(parts) else None


KVLayout = tuple[SideLayout, SideLayout]


def centres(side: SideLayout) -> dict[str, slice]:
    """By the field of each centre, the channels of the side that it is added to."""
    found, channel = {}, 0
    for segment in side.segments:
        name = centre_of(segment)
        if name is not None:
            found[name] = slice(channel, channel + segment.channels)
        channel += segment.channels
    return found


def alone(sides: KVLayout) -> bool:
    """Whether a token can be written without the others of its page, as far as centres go."""
    return not any(centres(side) for side in sides)


def memo(sides: KVLayout) -> dict[Any, Any]:
    """What kernels made of K and V, by what it is for: it goes with the sides, and must not hold them.

    Entries are never replaced, as other threads may be reading what one points at: add them with `setdefault`.
    """
    k, held = sides[0], sides[1].__dict__
    by_k: WeakKeyDictionary[SideLayout, dict[Any, Any]] | None = held.get("memo")
    if by_k is None:
        by_k = held.setdefault("memo", WeakKeyDictionary())
    found = by_k.get(k)
    return by_k.setdefault(k, {}) if found is None else found
