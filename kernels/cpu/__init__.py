"""The C kernel through ctypes: descriptions of pages to its structures, tensors to pointers."""

from __future__ import annotations

import ctypes
from ctypes import Structure, addressof, c_char_p, c_float, c_int, c_int32, c_int64, c_void_p
from functools import cache
from importlib.util import find_spec
from math import prod
from struct import Struct
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, empty

from kvcomp.attention import Part
from kvcomp.exact import Tokens
from kvcomp.kernel_layout import Codebook, Floats, Numbers, Segment, SideLayout, Sides, Uniform
from kvcomp.pages import SUMMARY, PageLayout, Summary

KINDS = {"uniform": 0, "codebook": 1, torch.float32: 2, torch.float16: 3, torch.bfloat16: 4}
LEVELS = ("portable", "AVX2", "AVX-512")
NOTHING = -1
LANES = 16  # floats in the widest vector: rows are padded to whole ones
TILE = 16  # tokens that share scales come in multiples of it
FEW_BITS = 4  # books of so many bits have room for 16 entries, others for 256


class _Plane(Structure):
    _fields_ = [("offset", c_int64), ("stride", c_int64), ("width", c_int32)]


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
        ("book", c_void_p),
        ("bits", c_int32),
        ("plane", _Plane * 4),
    ]


# Structures of the C kernel, as one row of numbers each; 0 for a pointer that is NULL.
_SOURCE = 13  # two sides of segments, base, page_bytes and count; ids, counts, ids_stride, page_tokens, in_tokens
_NO_SOURCE = (0,) * _SOURCE
_PROBLEM = Struct(f"{2 * _SOURCE + 13}q2fi4x")
_VECTORS = Struct("17qi4x")


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernel, or None where it is not installed. torch is imported by then: they share its OpenMP."""
    spec = find_spec(f"{__name__}._attend")
    if spec is None or spec.origin is None:
        return None
    try:
        found = ctypes.CDLL(spec.origin)
    except OSError:
        return None
    found.kvcomp_attend.argtypes, found.kvcomp_attend.restype = [c_char_p], c_int
    number, place = c_int64, c_void_p
    found.kvcomp_vector_dots.argtypes, found.kvcomp_vector_dots.restype = [c_char_p], c_int
    found.kvcomp_encode.argtypes, found.kvcomp_encode.restype = [c_char_p], c_int
    found.kvcomp_code_dots.argtypes = [place, place, place, number, place, number, place, *[number] * 6, place]
    many = [number] * 5
    found.kvcomp_choose.argtypes = [place, c_float, place, *many, place, *[number] * 3, place]
    found.kvcomp_choose.restype = c_int
    found.kvcomp_append.argtypes, found.kvcomp_append.restype = [*[place] * 5, *many], None
    found.kvcomp_shares.argtypes = [place, place, number, number, number, place]
    found.kvcomp_largest.argtypes = [place, place, number, number, number, place]
    sizes = [number] * 3
    found.kvcomp_regroup.argtypes = [place, number, place, number, place, *sizes, place, place, number, place, number]
    found.kvcomp_code_dots.restype = found.kvcomp_shares.restype = found.kvcomp_regroup.restype = None
    found.kvcomp_largest.restype = c_int
    return found


def _compiled() -> ctypes.CDLL:
    found = library()
    assert found is not None
    return found


def level() -> int:
    """The best of `LEVELS` on this machine."""
    return int(_compiled().kvcomp_level())


class Described:
    """One side of a page as the kernel takes it."""

    def __init__(self, side: SideLayout, layout: PageLayout) -> None:
        self.obstacle = next((why for s in side.segments if (why := obstacle(s)) is not None), None)
        if self.obstacle is not None:
            return
        self.books: list[Tensor] = []  # kept alive: the structures point at them
        self.array = (_Segment * len(side.segments))(*(self._segment(s, layout) for s in side.segments))
        self.address, self.count, self.dim = addressof(self.array), len(side.segments), side.channels

    def _segment(self, segment: Segment, layout: PageLayout) -> _Segment:
        offsets, strides = layout.offsets, {f.name: f.nbytes // layout.page_size for f in layout.fields}
        if isinstance(segment, Numbers):
            return _numbers(segment.channels, segment.dtype, offsets[segment.field], strides[segment.field])
        assert not isinstance(segment, Floats)
        planes = tuple(_Plane(offsets[p.field] + p.start, strides[p.field], p.width) for p in segment.planes)
        bits = sum(p.width for p in segment.planes)
        if isinstance(segment, Uniform):
            zero = NOTHING if segment.zero is None else offsets[segment.zero]
            groups = segment.token_group, segment.channel_group, segment.middle
            scale = offsets[segment.scale]
            return _Segment(KINDS["uniform"], segment.channels, len(planes), *groups, scale, zero, None, bits, planes)
        room = 1 << (FEW_BITS if bits <= FEW_BITS else 8)
        self.books.append(segment.book.float().repeat(room // len(segment.book)))
        places = offsets[segment.norm], NOTHING, self.books[-1].data_ptr(), bits, planes
        return _Segment(KINDS["codebook"], segment.channels, len(planes), 1, segment.channels, 0, *places)


class Pages(NamedTuple):
    """Pages of a pool [pages, bytes_per_page]: of ids [S, n] a stream's first counts [S], read as `sides` say.

    in_tokens: counts are of tokens, of a layout that is `tokenwise`, and the last page may be filled in part.
    """

    pool: Tensor
    ids: Tensor
    counts: Tensor
    layout: PageLayout
    sides: Sides
    in_tokens: bool = False


_DESCRIBED: WeakKeyDictionary[SideLayout, tuple[PageLayout, SideLayout, Described, Described]] = WeakKeyDictionary()


def described(sides: Sides, layout: PageLayout) -> tuple[Described, Described]:
    """The descriptions of K and V in pages of this layout, made once."""
    known = _DESCRIBED.get(sides[0])
    if known is None or known[0] is not layout or known[1] is not sides[1]:
        k, v = (Described(side, layout) for side in sides)
        known = _DESCRIBED[sides[0]] = layout, sides[1], k, v
    return known[2], known[3]


def obstacle(segment: Segment) -> str | None:
    """Why the kernel cannot read a segment; None: it can."""
    if isinstance(segment, Numbers) and segment.dtype not in KINDS:
        return f"numbers of {segment.dtype}"
    if isinstance(segment, Floats):
        return "floating-point codes"
    if isinstance(segment, Uniform) and segment.token_group > 1 and segment.token_group % TILE:
        return f"scales that {segment.token_group} tokens share, no multiple of {TILE}"
    if isinstance(segment, Codebook) and segment.book.device.type != "cpu":
        return "a codebook on another device"
    return None


def attend(
    queries: Tensor,
    pages: Pages | None,
    tokens: Tokens | None,
    scale: float,
    softcap: float | None = None,
    bias: Tensor | None = None,
    prior: Part | None = None,
    lse_of_pages: bool = False,
) -> Part:
    """Attention of queries [S, R, Dk] over pages, exact tokens and what `prior` attended to; one of the three at least.

    All are in the coordinates of the queries, and so is the output. bias [S, R] as in `attention.attend`. The groups
    are the lse of each page, as in the reference, where asked for.
    """
    queries = queries.float().contiguous()
    streams, rows, k_dim = queries.shape
    sources, groups, v_dim = _NO_SOURCE, None, 0
    if pages is not None:
        ids, counts = _ids(pages.ids), _counts(pages.counts)
        base, stride = pages.pool.data_ptr(), pages.pool.stride(0)
        k, v = described(pages.sides, pages.layout)
        v_dim = v.dim
        sides = k.address, base, stride, k.count, v.address, base, stride, v.count
        sources = *sides, ids.data_ptr(), counts.data_ptr(), ids.stride(0), pages.layout.page_size, pages.in_tokens
        if lse_of_pages:
            groups = queries.new_full((streams, rows, ids.shape[1]), -torch.inf)
    if tokens is not None:
        v_dim = tokens.values.shape[2]
        own = *_rows(tokens.keys), *_rows(tokens.values), 0, tokens.counts.data_ptr(), 0, tokens.keys.shape[1], 0
        sources = (*own, *_NO_SOURCE) if pages is None else (*sources, *own)
    else:
        sources = *sources, *_NO_SOURCE
    out, lse = empty(streams, rows, v_dim), empty(streams, rows)
    if bias is not None:
        bias = bias.float().contiguous()
    problem = _PROBLEM.pack(
        *sources,
        (pages is not None) + (tokens is not None),
        streams,
        rows,
        k_dim,
        v_dim,
        queries.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        0 if prior is None else prior.out.data_ptr(),
        0 if prior is None else prior.lse.data_ptr(),
        out.data_ptr(),
        lse.data_ptr(),
        0 if groups is None else groups.data_ptr(),
        0 if groups is None else groups.shape[2],
        scale,
        softcap or 0,
        level(),
    )
    if _compiled().kvcomp_attend(problem):
        raise MemoryError("no memory for attention over compressed pages")
    return Part(out, lse, groups)


def append(k: Tensor, v: Tensor, counts: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Write one token of each stream, keys and values [B, H, 1, D], behind the counts [S] that k and v [S, N, D] hold,
    and count it; False, and nothing done, where dtypes differ or the buffers are views."""
    if keys.dtype != k.dtype or values.dtype != v.dtype or not (k.is_contiguous() and v.is_contiguous()):
        return False
    k_bytes, v_bytes = k.shape[2] * k.itemsize, v.shape[2] * v.itemsize
    places = k.data_ptr(), v.data_ptr(), keys.data_ptr(), values.data_ptr(), counts.data_ptr()
    _compiled().kvcomp_append(*places, len(k), k.stride(0) * k.itemsize, v.stride(0) * v.itemsize, k_bytes, v_bytes)
    return True


def vector_dots(queries: Tensor, summary: Summary, names: tuple[str, ...], scale: str | None) -> Tensor:
    """As `select.vector_dots`, from where the summaries are; nothing is written for pages that do not exist."""
    layout = summary.layout
    shape, offsets, scale_at, scales = _vectors(layout, names, scale)
    queries, ids, counts = queries.float().contiguous(), _ids(summary.ids), _counts(summary.counts)
    streams, rows, dim = queries.shape
    pages, many = ids.shape[1], prod(shape[:-1])
    out = empty(streams, rows, pages * many)
    listed = summary.pool.data_ptr(), ids.data_ptr(), counts.data_ptr(), addressof(offsets), queries.data_ptr()
    sizes = out.data_ptr(), summary.pool.stride(0), ids.stride(0), streams, rows, pages, len(names), many, dim
    problem = _VECTORS.pack(*listed, *sizes, scale_at, scales, layout.bytes_per_page - offsets[0], level())
    if _compiled().kvcomp_vector_dots(problem):
        raise MemoryError("no memory to choose what to read")
    return out


@cache
def _vectors(
    layout: PageLayout, names: tuple[str, ...], scale: str | None
) -> tuple[tuple[int, ...], ctypes.Array[c_int64], int, int]:
    """The shape of these fields and where they begin in a page; where their scales do, and how many a vector has."""
    fields, at = {f.name: f for f in layout.fields}, layout.offsets
    offsets = (c_int64 * len(names))(*(at[name] for name in names))
    if scale is None or scale not in fields:
        return fields[names[0]].shape, offsets, NOTHING, 0
    return fields[names[0]].shape, offsets, at[scale], fields[scale].shape[-1]


def code_dots(queries: Tensor, offset: Tensor, summary: Summary, name: str, bits: int) -> Tensor:
    """As `select.code_dots`, from where the summaries are; offset [S, J, 1]. Nothing is written for pages that do not
    exist."""
    queries, offset = queries.contiguous(), offset.contiguous()
    ids, counts = _ids(summary.ids), _counts(summary.counts)
    streams, heads, _ = queries.shape
    rows, size = next(f.shape for f in summary.layout.fields if f.name == name)
    pages, pool = ids.shape[1], summary.pool
    out = empty(streams, heads, pages * size)
    places = queries.data_ptr(), offset.data_ptr(), pool.data_ptr() + summary.layout.offsets[name], pool.stride(0)
    listed = ids.data_ptr(), ids.stride(0), counts.data_ptr()
    _compiled().kvcomp_code_dots(*places, *listed, streams, heads, rows, bits, pages, size, out.data_ptr())
    return out


def shares(logits: Tensor, counts: Tensor) -> Tensor:
    """As `select.shares`."""
    logits, counts = logits.float().contiguous(), _counts(counts)
    streams, heads, n = logits.shape
    out = empty(streams, n)
    _compiled().kvcomp_shares(logits.data_ptr(), counts.data_ptr(), streams, heads, n, out.data_ptr())
    return out


def largest(x: Tensor, wanted: Tensor, width: int) -> Tensor:
    """As `select.largest`, of `width` columns."""
    x, wanted = x.float().contiguous(), _counts(wanted)
    out = empty(len(x), width, dtype=torch.int64)
    if _compiled().kvcomp_largest(x.data_ptr(), wanted.data_ptr(), *x.shape, width, out.data_ptr()):
        raise MemoryError("no memory to choose what to read")
    return out


def choose(
    logits: Tensor,
    scale: float,
    counts: Tensor,
    unit: int,
    wanted: Tensor,
    width: int,
    pages: int,
    ends: tuple[int, int],
) -> Tensor:
    """As `select.choose`."""
    logits, counts = logits.float().contiguous(), _counts(counts)
    streams, heads, n = logits.shape
    out = empty(streams, width, dtype=torch.int64)
    sizes = streams, heads, pages, n // pages, unit
    places = wanted.data_ptr(), width, *ends, out.data_ptr()
    if _compiled().kvcomp_choose(logits.data_ptr(), scale, counts.data_ptr(), *sizes, *places):
        raise MemoryError("no memory to choose what to read")
    return out


def regroup(layout: PageLayout, pool: Tensor, ids: Tensor, tokens: Tensor, records: Tensor) -> None:
    """As `select.regroup`, into `records`."""
    ids, tokens = _ids(ids), tokens.contiguous()
    offsets, rows = _rows_of(layout)
    _compiled().kvcomp_regroup(
        *(pool.data_ptr(), pool.stride(0), ids.data_ptr(), ids.stride(0), tokens.data_ptr(), *tokens.shape),
        *(layout.page_size, offsets, rows, len(offsets), records.data_ptr(), records.stride(0)),
    )


def _ids(ids: Tensor) -> Tensor:
    """int32 ids [S, n] whose rows are contiguous."""
    ids = ids if ids.dtype == torch.int32 else ids.to(torch.int32)
    return ids if ids.stride(1) == 1 else ids.contiguous()


def _counts(counts: Tensor) -> Tensor:
    """int64 counts [S], side by side."""
    return counts if counts.dtype == torch.int64 and counts.is_contiguous() else counts.to(torch.int64).contiguous()


@cache
def _rows_of(layout: PageLayout) -> tuple[ctypes.Array[c_int64], ctypes.Array[c_int64]]:
    """Where each field that attention reads begins in a page, and its bytes a token."""
    body = [f for f in layout.fields if not f.name.startswith(SUMMARY)]
    offsets, rows = [layout.offsets[f.name] for f in body], [f.nbytes // layout.page_size for f in body]
    return (c_int64 * len(body))(*offsets), (c_int64 * len(body))(*rows)


def readable(tokens: Tokens) -> bool:
    """Whether the kernel can read exact tokens: on this device, in a dtype that it knows, channels side by side."""
    return all(x.is_cpu and x.dtype in KINDS and x.stride(2) == 1 for x in (tokens.keys, tokens.values))


def _rows(x: Tensor) -> tuple[int, int, int, int]:
    """A side of exact tokens [S, N, D]."""
    segment = _row_segment(x.shape[2], x.dtype, x.stride(1))
    return addressof(segment), x.data_ptr(), x.stride(0) * x.itemsize, 1


@cache
def _row_segment(dim: int, dtype: torch.dtype, stride: int) -> ctypes.Array[_Segment]:
    return (_Segment * 1)(_numbers(dim, dtype, 0, stride * dtype.itemsize))


def _numbers(channels: int, dtype: torch.dtype, offset: int, stride: int) -> _Segment:
    return _Segment(KINDS[dtype], channels, 1, 1, channels, plane=(_Plane(offset, stride, 0),))
