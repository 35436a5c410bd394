"""The C kernel of attention through ctypes: descriptions of pages to its structures, tensors to pointers."""

from __future__ import annotations

import ctypes
from ctypes import Structure, addressof, c_float, c_int32, c_int64, c_void_p
from functools import cache
from struct import Struct

import torch
from torch import Tensor

from kvcomp.attention import Part, Tokens
from kvcomp.errors import KvcompError
from kvcomp.kernels.contract import PagesView
from kvcomp.kernels.placed import CODEBOOK, NOTHING, UNIFORM, PlacedSegment, placed, reason
from kvcomp.layout import PageLayout
from kvcomp.segments import Codebook, Dense, Floats, KVLayout, Segment, SideLayout, Uniform, memo

from . import compiled
from .compiled import library, missing
from .memory import given, records, table

__all__ = ["KINDS", "Described", "attend", "described", "library", "missing", "obstacle", "readable", "unknown"]
KINDS = {UNIFORM: 0, CODEBOOK: 1, torch.float32: 2, torch.float16: 3, torch.bfloat16: 4}
TILE = 16  # tokens that share scales come in multiples of it
FEW_BITS = 4  # codebooks of so many bits can hold 16 entries, others for 256


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
        ("codebook", c_void_p),
        ("bits", c_int32),
        ("plane", _Plane * 4),
        ("centre", c_int64),
    ]


# Structures of the C kernel, as one row of numbers each; 0 for a pointer that is NULL.
_SOURCE = 15  # as the C structure of that name has it: two sides of 4, ids, counts, 5 sizes
_NO_SOURCE = (0,) * _SOURCE
_PROBLEM = Struct(f"{2 * _SOURCE + 15}q2fi4x")


class Described:
    """One side of a page as the kernel takes it."""

    def __init__(self, side: SideLayout, layout: PageLayout) -> None:
        self.codebooks: list[Tensor] = []  # kept alive: the structures point at them
        self.array = (_Segment * len(side.segments))(*(self._segment(s) for s in placed(side, layout)))
        self.address, self.count, self.dim = addressof(self.array), len(side.segments), side.channels

    def _segment(self, at: PlacedSegment) -> _Segment:
        segment = at.segment
        if isinstance(segment, Dense):
            return _dense(at.channels, segment.dtype, *at.planes[0][:2])
        planes, middle, codebook = tuple(_Plane(*plane) for plane in at.planes), 0, None
        if isinstance(segment, Uniform):
            middle = segment.middle
        elif isinstance(segment, Codebook):
            room = 1 << (FEW_BITS if at.bits <= FEW_BITS else 8)
            self.codebooks.append(segment.codebook.float().repeat(room // len(segment.codebook)))
            codebook = self.codebooks[-1].data_ptr()
        groups = at.token_group, at.channel_group, middle
        places = at.scale, at.zero, codebook, at.bits, planes, at.centre
        return _Segment(KINDS[at.kind], at.channels, len(planes), *groups, *places)


def described(sides: KVLayout, layout: PageLayout) -> tuple[Described, Described]:
    """K and V in pages of this layout, made once."""
    known, key = memo(sides), (Described, layout)
    found: tuple[Described, Described] | None = known.get(key)
    if found is None:
        found = known.setdefault(key, (Described(sides[0], layout), Described(sides[1], layout)))
    return found


def obstacle(sides: KVLayout) -> str | None:
    """Why the kernel cannot read pages; None: it can."""
    return reason(sides, _unreadable)


def unknown(segment: Segment) -> str | None:
    """Why neither kernel knows a segment; None: both do."""
    if isinstance(segment, Dense) and segment.dtype not in KINDS:
        return f"numbers of {segment.dtype}"
    if isinstance(segment, Floats):
        return "floating-point codes"
    tables = (segment.codebook, segment.thresholds) if isinstance(segment, Codebook) else ()
    if any(x is not None and x.device.type != "cpu" for x in tables):
        return "a codebook on another device"
    return None


def _unreadable(segment: Segment, side: SideLayout) -> str | None:
    if isinstance(segment, Uniform) and segment.token_group > 1 and segment.token_group % TILE:
        return f"scales that {segment.token_group} tokens share, no multiple of {TILE}"
    return unknown(segment)


def attend(
    queries: Tensor,
    pages: PagesView | None,
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
    queries = given("queries", queries, torch.float32, 3)
    streams, rows, k_dim = queries.shape
    sources, groups, v_dim, token_bias, skipped = _NO_SOURCE, None, 0, None, None
    if pages is not None:
        base, stride, named = records("pool", pages.pool, pages.layout.body_bytes)
        ids, many, width = table(pages.ids, streams)
        counts = given("counts", pages.counts, torch.int64, (streams,))
        assert pages.sides is not None
        k, v = described(pages.sides, pages.layout)
        v_dim = v.dim
        if k.dim != k_dim:
            raise KvcompError(f"queries have {k_dim} channels, and the keys in these pages {k.dim}")
        sides = k.address, base, stride, k.count, v.address, base, stride, v.count
        sizes = width, pages.layout.page_size, pages.in_tokens, many, named
        sources = *sides, ids.data_ptr(), counts.data_ptr(), *sizes
        if pages.token_bias is not None:
            every = streams, rows, many * pages.layout.page_size
            token_bias = given("bias of tokens", pages.token_bias, torch.float32, every)
        if pages.skipped is not None:
            skipped = given("skipped", pages.skipped, torch.int64, (streams,))
        if lse_of_pages:
            groups = queries.new_full((streams, rows, many), -torch.inf)
    if tokens is not None:
        keys, room, dim = _rows("keys", tokens.keys, streams)
        values, other, width = _rows("values", tokens.values, streams)
        if dim != k_dim or other != room or (pages is not None and width != v_dim):
            told = f"keys {list(tokens.keys.shape)} and values {list(tokens.values.shape)}"
            raise KvcompError(f"{told} do not fit {streams} streams of {k_dim} and {v_dim or width} channels")
        v_dim, held = width, given("counts of tokens", tokens.counts, torch.int64, (streams,))
        own = *keys, *values, 0, held.data_ptr(), 0, room, 0, 0, 0
        sources = (*own, *_NO_SOURCE) if pages is None else (*sources, *own)
    else:
        sources = *sources, *_NO_SOURCE
    out, lse = queries.new_empty(streams, rows, v_dim), queries.new_empty(streams, rows)
    if bias is not None:
        bias = given("bias", bias, torch.float32, (streams, rows))
    prior_out = prior_lse = None
    if prior is not None:
        prior_out = given("out of prior", prior.out, torch.float32, (streams, rows, v_dim))
        prior_lse = given("lse of prior", prior.lse, torch.float32, (streams, rows))
    problem = _PROBLEM.pack(
        *sources,
        (pages is not None) + (tokens is not None),
        streams,
        rows,
        k_dim,
        v_dim,
        queries.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        0 if token_bias is None else token_bias.data_ptr(),
        0 if skipped is None else skipped.data_ptr(),
        0 if prior_out is None else prior_out.data_ptr(),
        0 if prior_lse is None else prior_lse.data_ptr(),
        out.data_ptr(),
        lse.data_ptr(),
        0 if groups is None else groups.data_ptr(),
        0 if groups is None else many,
        scale,
        softcap or 0,
        compiled.level(),
    )
    compiled.functions().kvcomp_attend(problem)
    return Part(out, lse, groups)


def readable(tokens: Tokens) -> bool:
    """Whether the kernel can read exact tokens: on this device, in a dtype that it knows, channels side by side."""
    k, v, _ = tokens
    held = k.dtype in KINDS and v.dtype in KINDS and k.is_cpu and v.is_cpu
    return held and k.stride()[-1] == 1 and v.stride()[-1] == 1


def _rows(name: str, x: Tensor, streams: int) -> tuple[tuple[int, int, int, int], int, int]:
    """A side of exact tokens [S, N, D] that are `readable`; N and D."""
    shape, strides, dtype = x.shape, x.stride(), x.dtype
    if len(shape) != 3 or shape[0] != streams or strides[2] != 1 or dtype not in KINDS or not x.is_cpu:
        raise KvcompError(
            f"{name} of exact tokens are {dtype} {list(shape)} on {x.device}, and the C kernel takes float32, float16 "
            f"or bfloat16 [{streams}, N, D] on the CPU with contiguous rows"
        )
    segment = _row_segment(shape[2], dtype, strides[1])
    return (addressof(segment), x.data_ptr(), strides[0] * dtype.itemsize, 1), shape[1], shape[2]


@cache
def _row_segment(dim: int, dtype: torch.dtype, stride: int) -> ctypes.Array[_Segment]:
    return (_Segment * 1)(_dense(dim, dtype, 0, stride * dtype.itemsize))


def _dense(channels: int, dtype: torch.dtype, offset: int, stride: int) -> _Segment:
    return _Segment(KINDS[dtype], channels, 1, 1, channels, plane=(_Plane(offset, stride, 0),), centre=NOTHING)
