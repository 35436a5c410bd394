"""Pages as the Triton kernels take them: each side cut into chunks of channels that one tile of a kernel reads.

A chunk is up to `WIDEST` columns of `lanes` neighbouring channels each: a column is a number, or a byte of the widest
plane of codes. Lane j of column i is channel `channel + i * lanes + j`. Kernels treat each lane as a tile of its own:
codes are unpacked with a shift and a mask, and nothing moves between threads.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvcomp.kernels.placed import CODEBOOK, FLOATS, NOTHING, NUMBERS, PlacedSegment, placed, reason
from kvcomp.layout import PageLayout
from kvcomp.segments import Codebook, Dense, Floats, KVLayout, Segment, SideLayout, Uniform

# Kinds of chunks. CODEBOOK: x = codebook[code] * norm of the token; FLOATS: x = number of a format * scale; NUMBERS: x.
OF_TOKEN, OF_CHANNEL, OF_BLOCK = "token", "channel", "block"  # x = code * scale + zero, by what has a scale in a chunk
UNITS = "units"  # as CODEBOOK, of two units whose codebooks may differ
DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
NARROWEST, WIDEST = 16, 128  # columns: what tensor cores take, and what registers hold
IDLE = 1.75  # what tiles may have in channels, of those that there are
FOLDED = 32  # columns with a common scale from which on it folds into a product of its own
UNIT = 8  # channels of a unit
UNIT_WIDTHS = (1,), (2,), (2, 1), (4,), (4, 1), (4, 2)


# (first channel; (offset in a token's row, width) of each plane, the highest bits first; first entry among the side's;
# entries of the codebook) of 8 channels, each plane of which fills as many bytes as it has bits
Unit = tuple[int, tuple[tuple[int, int], ...], int, tuple[float, ...]]


@dataclass(frozen=True)
class Chunk:
    """Some channels of a side. All places are in bytes from the start of a page, or of a stream's exact tokens.

    columns: how many there are, in a tile of `block`. planes: (offset, bytes from a token to the next, width) of each,
    the highest bits first. scale, zero: of the segment, float16 in rows of `groups`, a row for each `token_group`
    tokens; `inner` is the chunk's first channel in the segment. middle: the code that is read as 0, for codes about 0
    lose less in 16 bits; the zeros that are stored are those of code 0. codebook: its first entry among the side's.
    Scales of floats have `scale_format`; page_scale: offset of a float32 that multiplies them. centre: offset of the
    float16 numbers that the chunk's channels gain in all tokens of a page. table: entries of the codebook, if
    they are 4, or 16 that are symmetric: kernels hold them in registers. units: of a chunk of UNITS, whose planes are a
    token's row.
    """

    kind: str
    channel: int
    lanes: int
    columns: int
    block: int
    planes: tuple[tuple[int, int, int], ...]
    dtype: str = ""
    scale: int = NOTHING
    zero: int = NOTHING
    middle: int = 0
    token_group: int = 1
    channel_group: int = 1
    groups: int = 1
    inner: int = 0
    codebook: int = NOTHING
    format: str = ""
    scale_format: str = ""
    page_scale: int = NOTHING
    centre: int = NOTHING
    table: tuple[float, ...] = ()
    units: tuple[Unit, ...] = ()

    @property
    def adds(self) -> bool:
        """Whether each token adds a zero to all of the chunk's channels."""
        return self.kind == OF_TOKEN and self.zero != NOTHING

    @property
    def whole(self) -> bool:
        """Whether codes have one plane, and a column is a byte or a word of it."""
        return len(self.planes) == 1 and self.lanes * self.planes[0][2] in (8, 16)


Chunks = tuple[Chunk, ...]


def cut(columns: int) -> Iterable[tuple[int, int, int]]:
    """(first column, columns, width of the tile) of powers of two that cover `columns`; only the last has idle ones."""
    at = 0
    while at < columns:
        left = columns - at
        block = NARROWEST if left < NARROWEST else min(1 << left.bit_length() - 1, WIDEST)
        yield at, min(left, block), block
        at += block


def numbers(channels: int, dtype: torch.dtype, channel: int = 0, offset: int = 0, stride: int = 0) -> Chunks:
    """Chunks of numbers side by side; `stride` bytes a token, 0: as many as they are."""
    size = dtype.itemsize
    return tuple(
        Chunk(NUMBERS, channel + at, 1, n, block, ((offset + at * size, stride or channels * size, 0),), DTYPES[dtype])
        for at, n, block in cut(channels)
    )


def chunks(side: SideLayout, layout: PageLayout) -> Chunks:
    """A side of pages."""
    found: list[Chunk] = []
    codebook = 0
    if in_units(side, layout):
        return _units(side, layout)
    for at in placed(side, layout):
        if isinstance(at.segment, Dense):
            found += numbers(at.channels, at.segment.dtype, at.channel, *at.planes[0][:2])
        else:
            found += _codes(at, at.segment, codebook)
        if isinstance(at.segment, Codebook):
            codebook += len(at.segment.codebook)
    return tuple(found)


def in_units(side: SideLayout, layout: PageLayout) -> bool:
    """Whether a side is read in units: segments of several widths under one norm, in rows of whole words of 32 bits."""
    parts = placed(side, layout)
    if len(parts) < 2 or side.channels > WIDEST:
        return False
    rows = {(p.segment.planes[0].field, p.scale, p.planes[0][1]) for p in parts if isinstance(p.segment, Codebook)}
    start = min(p.planes[0][0] for p in parts)
    return len(rows) == 1 and not start % 4 and not parts[0].planes[0][1] % 4 and all(map(_of_units, parts))


def _of_units(at: PlacedSegment) -> bool:
    if not isinstance(at.segment, Codebook) or at.channels % UNIT or at.centre != NOTHING:
        return False
    entries = at.segment.codebook
    widths = tuple(width for _, _, width in at.planes)
    return widths in UNIT_WIDTHS and not entries.is_meta and torch.equal(entries, -entries.flip(0))


def _units(side: SideLayout, layout: PageLayout) -> Chunks:
    """A side that is read in units: two a chunk, of one segment where it has two left."""
    parts = placed(side, layout)
    start = min(p.planes[0][0] for p in parts)
    whole: list[Unit] = []
    single: list[Unit] = []
    codebook = 0
    for at in parts:
        assert isinstance(at.segment, Codebook)
        entries = tuple(at.segment.codebook.tolist())
        units = [
            (
                at.channel + i * UNIT,
                tuple((offset - start + i * width, width) for offset, _, width in at.planes),
                codebook,
                entries,
            )
            for i in range(at.channels // UNIT)
        ]
        pairs = len(units) // 2 * 2
        whole, single, codebook = whole + units[:pairs], single + units[pairs:], codebook + len(entries)
    units = whole + single
    _, stride, _ = parts[0].planes[0]
    return tuple(
        Chunk(
            UNITS,
            units[i][0],
            1,
            UNIT * len(units[i : i + 2]),
            NARROWEST,
            ((start, stride, 0),),
            scale=parts[0].scale,
            channel_group=UNIT,
            units=tuple(units[i : i + 2]),
        )
        for i in range(0, len(units), 2)
    )


def _codes(at: PlacedSegment, segment: Uniform | Codebook | Floats, codebook: int) -> list[Chunk]:
    """The chunks of a segment of codes, whose codebook's first entry is `codebook` of the side's."""
    lanes = lanes_of(segment, at.planes)
    columns = run = at.channels // lanes
    shared: dict[str, Any] = {"scale": at.scale, "channel_group": at.channel_group}
    if isinstance(segment, Codebook):
        kind = CODEBOOK
        shared |= {"codebook": codebook, "table": table(segment)}
    elif isinstance(segment, Floats):
        kind = FLOATS
        formats = {"format": segment.format, "scale_format": segment.scale_format, "page_scale": at.page_scale}
        shared |= {"groups": -(-at.channels // at.channel_group)} | formats
    else:
        group = at.channel_group // lanes
        kind = OF_CHANNEL if at.token_group > 1 else OF_TOKEN
        if kind == OF_TOKEN and group < columns:
            kind, run = (OF_BLOCK, columns) if group < FOLDED and power_of_two(group) else (OF_TOKEN, group)
        shared |= {
            "zero": at.zero,
            "middle": segment.middle if segment.zero is None else 1 << at.bits - 1,
            "token_group": at.token_group,
            "groups": at.channels // at.channel_group,
        }
    found = []
    for first in range(0, columns, run):
        for start, n, block in cut(run):
            inner = (first + start) * lanes
            planes = tuple((offset + inner * width // 8, stride, width) for offset, stride, width in at.planes)
            centre = NOTHING if at.centre == NOTHING else at.centre + 2 * inner
            made = Chunk(kind, at.channel + inner, lanes, n, block, planes, inner=inner, centre=centre, **shared)
            found.append(made)
    return found


def power_of_two(n: int) -> bool:
    return n & (n - 1) == 0


def lanes_of(segment: Uniform | Codebook | Floats, planes: tuple[tuple[int, int, int], ...]) -> int:
    """Channels of a column: those of a word of 16 bits of the only plane where that leaves no tile idle, of a byte of
    the widest, or fewer where tiles would be idle for the most part: then several columns read the same byte.

    planes: as of `Chunk`. Words of values are turned on their way out of shared memory, as bytes are not.
    """
    width = segment.planes[0].width
    filled = {n: n * sum(block for _, _, block in cut(segment.channels // n)) for n in (16, 8, 4, 2, 1)}
    word = 16 // width
    words = len(planes) == 1 and (width < 8 or isinstance(segment, Floats)) and not any(x % 2 for x in planes[0][:2])
    words = words and segment.channels // word >= NARROWEST
    if words and filled[word] == segment.channels:
        return word
    filled = {n: room for n, room in filled.items() if n <= 8 // width}
    return next(
        (n for n, room in filled.items() if room <= IDLE * segment.channels), min(filled, key=filled.__getitem__)
    )


def table(segment: Codebook) -> tuple[float, ...]:
    """As of `Chunk`."""
    entries = segment.codebook
    if entries.is_meta or len(entries) not in (4, 16):
        return ()
    known = len(entries) == 4 or torch.equal(entries, -entries.flip(0))
    return tuple(entries.tolist()) if known else ()


def codebooks(side: SideLayout, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The entries [n] of all codebooks of a side in the order of its segments; one idle entry where it has none."""
    found = [s.codebook for s in side.segments if isinstance(s, Codebook)]
    return torch.cat([b.to(device, dtype) for b in found]) if found else torch.zeros(1, dtype=dtype, device=device)


def obstacle(sides: KVLayout) -> str | None:
    """Why the kernel cannot read pages; None: it can."""
    return reason(sides, _unreadable)


def _unreadable(segment: Segment, side: SideLayout) -> str | None:
    if isinstance(segment, Dense):
        return None if segment.dtype in DTYPES else f"numbers of {segment.dtype}"
    if [p.width for p in segment.planes] != sorted((p.width for p in segment.planes), reverse=True):
        return "planes of codes that are not in the order of their widths"
    if isinstance(segment, Floats):
        few = segment.channel_group < segment.channels
        if few and (segment.channel_group % NARROWEST or not power_of_two(segment.channel_group)):
            return f"scales that {segment.channel_group} channels share, no power of two from {NARROWEST} on"
    if isinstance(segment, Uniform):
        if segment.token_group > 1 and segment.token_group % NARROWEST:
            return f"scales that {segment.token_group} tokens share, no multiple of {NARROWEST}"
        whole = 8 // segment.planes[-1].width  # a group begins with a byte of each plane
        if segment.token_group == 1 and segment.channel_group % whole:
            return f"scales that {segment.channel_group} channels share, no multiple of {whole}"
    return None
