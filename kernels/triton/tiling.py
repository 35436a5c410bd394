"""What a Triton kernel over pages is compiled for: the chunks of both sides, and how many tokens a tile has."""

from __future__ import annotations

import json
from dataclasses import astuple, dataclass, replace
from functools import cache
from typing import Any

from kvcomp.layout import PageLayout
from kvcomp.segments import KVLayout, Uniform

from .chunks import CODEBOOK, NOTHING, OF_TOKEN, UNITS, WIDEST, Chunk, Chunks, chunks
from .plan import WIDE

TILE = 64  # tokens at once, at most: half where gathers or several chunks a side, a quarter where many tiles of several
MANY = 16


@dataclass(frozen=True)
class Description:
    """What a kernel is compiled for: pages of `page_size` tokens, in tiles of `tile` tokens."""

    k: Chunks
    v: Chunks
    page_size: int
    tile: int

    @property
    def lanes(self) -> int:
        """Tiles of numbers that a tile of tokens is decoded into."""
        return sum(chunk.lanes for side in (self.k, self.v) for chunk in side)

    @property
    def crowded(self) -> bool:
        """Whether registers are short: several tiles a side, or more than `WIDEST` channels in one."""
        return any(len(side) > 1 or any(c.block * c.lanes > WIDEST for c in side) for side in (self.k, self.v))

    @property
    def by_rows(self) -> bool:
        """Whether a side is read by tokens' rows, of which a thread has its own."""
        return any(chunk.kind == UNITS for chunk in (*self.k, *self.v))

    @property
    def centred(self) -> bool:
        """Whether pages have centres."""
        return any(chunk.centre != NOTHING for chunk in self.k)

    @property
    def k_dim(self) -> int:
        return sum(c.columns * c.lanes for c in self.k)

    @property
    def v_dim(self) -> int:
        return sum(c.columns * c.lanes for c in self.v)

    def __str__(self) -> str:
        """A form that custom ops take; `parsed` reads it."""
        return json.dumps(astuple(self), separators=(",", ":"))


@cache
def parsed(text: str) -> Description:
    """Inverse of `str`."""
    k, v, *sizes = json.loads(text)
    sides = [tuple(_chunk(fields) for fields in side) for side in (k, v)]
    return Description(sides[0], sides[1], *sizes)


def _chunk(fields: list[Any]) -> Chunk:
    return Chunk(*map(_tuples, fields))


def _tuples(x: Any) -> Any:
    return tuple(map(_tuples, x)) if isinstance(x, list) else x


def described(sides: KVLayout, layout: PageLayout) -> Description:
    """Pages of this layout whose K and V are to be read as `sides` say."""
    shared = [s.token_group for side in sides for s in side.segments if isinstance(s, Uniform) and s.token_group > 1]
    k, v = (chunks(side, layout) for side in sides)
    description = Description(k, v, layout.page_size, TILE)
    full = min(len(k), len(v)) > 1 or any(map(_full, (*k, *v)))  # of registers
    several = min(len(k), len(v)) > 1 and (description.lanes >= MANY or description.centred)
    many = several or sides[0].channels > WIDE
    if description.by_rows:
        full = many = False
    most = TILE // 4 if many else TILE // 2 if full else TILE
    return replace(description, tile=min([most, *(group & -group for group in shared)]))  # of one row of scales


def _full(chunk: Chunk) -> bool:
    """Whether a chunk's codes go by way of float32, or of a gather."""
    return (chunk.kind == CODEBOOK and not chunk.table) or (chunk.kind == OF_TOKEN and chunk.planes[0][2] == 8)


def within_pages(description: Description) -> Description:
    """The same pages in tiles that lie within one page each."""
    size = description.page_size
    return replace(description, tile=min(description.tile, size & -size))
