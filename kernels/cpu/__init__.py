"""The C kernel through ctypes: descriptions of pages to its structures, tensors to pointers."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, byref, c_float, c_int, c_int32, c_int64, c_void_p
from functools import cache
from importlib.util import find_spec
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, empty
from torch.nn import functional as F

from kvcomp.attention import Part
from kvcomp.exact import Tokens
from kvcomp.kernel_layout import Codebook, Numbers, Segment, SideLayout, Sides, Uniform
from kvcomp.pages import SUMMARY, PageLayout

KINDS = {"uniform": 0, "codebook": 1, torch.float32: 2, torch.float16: 3, torch.bfloat16: 4}
LEVELS = ("portable", "AVX2", "AVX-512")
NOTHING = -1
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


class _Side(Structure):
    _fields_ = [("segments", c_void_p), ("base", c_void_p), ("page_bytes", c_int64), ("count", c_int64)]


class _Source(Structure):
    _fields_ = [
        ("k", _Side),
        ("v", _Side),
        ("ids", c_void_p),
        ("counts", c_void_p),
        ("ids_stride", c_int64),
        ("page_tokens", c_int64),
    ]


class _Problem(Structure):
    _fields_ = [
        ("source", _Source * 2),
        ("sources", c_int64),
        ("streams", c_int64),
        ("rows", c_int64),
        ("k_dim", c_int64),
        ("v_dim", c_int64),
        ("q", c_void_p),
        ("bias", c_void_p),
        ("prior_out", c_void_p),
        ("prior_lse", c_void_p),
        ("out", c_void_p),
        ("lse", c_void_p),
        ("lse_of_pages", c_void_p),
        ("pages", c_int64),
        ("scale", c_float),
        ("softcap", c_float),
        ("level", c_int32),
    ]


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
    found.kvcomp_attend.argtypes, found.kvcomp_attend.restype = [POINTER(_Problem)], c_int
    number, place = c_int64, c_void_p
    found.kvcomp_code_dots.argtypes = [place, place, place, *[number] * 8, place]
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
        self.address, self.count, self.dim = ctypes.addressof(self.array), len(side.segments), side.channels

    def _segment(self, segment: Segment, layout: PageLayout) -> _Segment:
        offsets, strides = layout.offsets, {f.name: f.nbytes // layout.page_size for f in layout.fields}
        if isinstance(segment, Numbers):
            return _numbers(segment.channels, segment.dtype, offsets[segment.field], strides[segment.field])
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
    """Pages of a pool [pages, bytes_per_page]: of ids [S, n] a stream's first counts [S], read as `sides` say."""

    pool: Tensor
    ids: Tensor
    counts: Tensor
    layout: PageLayout
    sides: Sides


_DESCRIBED: WeakKeyDictionary[SideLayout, tuple[PageLayout, Described]] = WeakKeyDictionary()


def described(side: SideLayout, layout: PageLayout) -> Described:
    """The description of a side in pages of this layout, made once."""
    known = _DESCRIBED.get(side)
    if known is None or known[0] is not layout:
        known = _DESCRIBED[side] = layout, Described(side, layout)
    return known[1]


def obstacle(segment: Segment) -> str | None:
    """Why the kernel cannot read a segment; None: it can."""
    if isinstance(segment, Numbers) and segment.dtype not in KINDS:
        return f"numbers of {segment.dtype}"
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
    sources, groups, v_dim = [], None, 0
    if pages is not None:
        ids, counts = pages.ids.to(torch.int32), pages.counts.to(torch.int64).contiguous()
        ids = ids if ids.stride(1) == 1 else ids.contiguous()
        base, stride = pages.pool.data_ptr(), pages.pool.stride(0)
        k, v = (described(side, pages.layout) for side in pages.sides)
        v_dim = v.dim
        sides = (k.address, base, stride, k.count), (v.address, base, stride, v.count)
        sources.append(_Source(*sides, ids.data_ptr(), counts.data_ptr(), ids.stride(0), pages.layout.page_size))
        if lse_of_pages:
            groups = queries.new_full((streams, rows, ids.shape[1]), -torch.inf)
    if tokens is not None:
        v_dim = tokens.values.shape[2]
        sides = _rows(tokens.keys), _rows(tokens.values)
        sources.append(_Source(*sides, None, tokens.counts.data_ptr(), 0, tokens.keys.shape[1]))
    out, lse = empty(streams, rows, v_dim), empty(streams, rows)
    if bias is not None:
        bias = bias.float().contiguous()
    problem = _Problem(
        tuple(sources),
        len(sources),
        streams,
        rows,
        k_dim,
        v_dim,
        queries.data_ptr(),
        None if bias is None else bias.data_ptr(),
        None if prior is None else prior.out.data_ptr(),
        None if prior is None else prior.lse.data_ptr(),
        out.data_ptr(),
        lse.data_ptr(),
        None if groups is None else groups.data_ptr(),
        0 if groups is None else groups.shape[2],
        scale,
        softcap or 0,
        level(),
    )
    if _compiled().kvcomp_attend(byref(problem)):
        raise MemoryError("no memory for attention over compressed pages")
    return Part(out, lse, groups)


def code_dots(queries: Tensor, offset: Tensor, codes: Tensor, bits: int) -> Tensor:
    """As `select.code_dots`; offset [S, J, 1]."""
    queries, offset = queries.contiguous(), offset.contiguous()
    if codes.stride()[2:] != (codes.shape[3], 1):
        codes = codes.contiguous()
    streams, pages, rows, size = codes.shape
    heads = queries.shape[1]
    out = empty(streams, heads, pages * size)
    places = queries.data_ptr(), offset.data_ptr(), codes.data_ptr()
    sizes = codes.stride(0), codes.stride(1), streams, heads, rows, bits, pages, size
    _compiled().kvcomp_code_dots(*places, *sizes, out.data_ptr())
    return out


def shares(logits: Tensor, counts: Tensor) -> Tensor:
    """As `select.shares`."""
    logits, counts = logits.float().contiguous(), counts.to(torch.int64).contiguous()
    streams, heads, n = logits.shape
    out = empty(streams, n)
    _compiled().kvcomp_shares(logits.data_ptr(), counts.data_ptr(), streams, heads, n, out.data_ptr())
    return out


def largest(x: Tensor, wanted: Tensor, width: int) -> Tensor:
    """As `select.largest`, of `width` columns."""
    x, wanted = x.float().contiguous(), wanted.to(torch.int64).contiguous()
    out = empty(len(x), width, dtype=torch.int64)
    if _compiled().kvcomp_largest(x.data_ptr(), wanted.data_ptr(), *x.shape, width, out.data_ptr()):
        raise MemoryError("no memory to choose what to read")
    return out


def regroup(layout: PageLayout, pool: Tensor, ids: Tensor, tokens: Tensor, records: Tensor) -> None:
    """As `select.regroup`, into `records`."""
    ids, tokens = ids.to(torch.int32), tokens.contiguous()
    ids = ids if ids.stride(1) == 1 else ids.contiguous()
    offsets, rows = _rows_of(layout)
    _compiled().kvcomp_regroup(
        *(pool.data_ptr(), pool.stride(0), ids.data_ptr(), ids.stride(0), tokens.data_ptr(), *tokens.shape),
        *(layout.page_size, offsets, rows, len(offsets), records.data_ptr(), records.stride(0)),
    )


@cache
def _rows_of(layout: PageLayout) -> tuple[ctypes.Array[c_int64], ctypes.Array[c_int64]]:
    """Where each field that attention reads begins in a page, and its bytes a token."""
    body = [f for f in layout.fields if not f.name.startswith(SUMMARY)]
    offsets, rows = [layout.offsets[f.name] for f in body], [f.nbytes // layout.page_size for f in body]
    return (c_int64 * len(body))(*offsets), (c_int64 * len(body))(*rows)


def readable(tokens: Tokens) -> bool:
    """Whether the kernel can read exact tokens: on this device, in a dtype that it knows, side by side."""
    return all(
        x.is_cpu and x.dtype in KINDS and x.stride(2) == 1 and x.stride(1) == x.shape[2]
        for x in (tokens.keys, tokens.values)
    )


def _rows(x: Tensor) -> tuple[int, int, int, int]:
    """A side of exact tokens [S, N, D]."""
    segment = _row_segment(x.shape[2], x.dtype)
    return ctypes.addressof(segment), x.data_ptr(), x.stride(0) * x.itemsize, 1


@cache
def _row_segment(dim: int, dtype: torch.dtype) -> ctypes.Array[_Segment]:
    return (_Segment * 1)(_numbers(dim, dtype, 0, dim * dtype.itemsize))


def _numbers(channels: int, dtype: torch.dtype, offset: int, stride: int) -> _Segment:
    return _Segment(KINDS[dtype], channels, 1, 1, channels, plane=(_Plane(offset, stride, 0),))
