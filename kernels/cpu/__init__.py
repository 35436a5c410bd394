"""The C kernel through ctypes: descriptions of pages to its structures, tensors to pointers."""

from __future__ import annotations

import ctypes
from ctypes import Structure, addressof, c_float, c_int32, c_int64, c_void_p
from functools import cache
from math import prod
from struct import Struct
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from kvcomp.attention import Part
from kvcomp.errors import KvcompError
from kvcomp.exact import Tokens
from kvcomp.kernel_layout import Codebook, Floats, Numbers, Segment, SideLayout, Sides, Uniform, centre_of
from kvcomp.pages import PageLayout, Summary

from .loading import MISSING, load
from .memory import given, records, table

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
        ("centre", c_int64),
    ]


# Structures of the C kernel, as one row of numbers each; 0 for a pointer that is NULL.
_SOURCE = 15  # as the C structure of that name has it: two sides of 4, ids, counts, 5 sizes
_NO_SOURCE = (0,) * _SOURCE
_PROBLEM = Struct(f"{2 * _SOURCE + 14}q2fi4x")
_VECTORS = Struct("18qi4x")


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernel, or None where there is none; see `missing`. torch is imported by then: they share its
    OpenMP."""
    return _loaded()[0]


def missing() -> str:
    """Why there is no compiled kernel, and what to do."""
    return _loaded()[1] or MISSING


@cache
def _loaded() -> tuple[ctypes.CDLL | None, str | None]:
    return load()


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
        bits, name = sum(p.width for p in segment.planes), centre_of(segment)
        centre = NOTHING if name is None else offsets[name]
        if isinstance(segment, Uniform):
            zero = NOTHING if segment.zero is None else offsets[segment.zero]
            groups = segment.token_group, segment.channel_group, segment.middle
            sizes = segment.channels, len(planes), *groups
            return _Segment(KINDS["uniform"], *sizes, offsets[segment.scale], zero, None, bits, planes, centre)
        room = 1 << (FEW_BITS if bits <= FEW_BITS else 8)
        self.books.append(segment.book.float().repeat(room // len(segment.book)))
        places = offsets[segment.norm], NOTHING, self.books[-1].data_ptr(), bits, planes
        return _Segment(KINDS["codebook"], segment.channels, len(planes), 1, segment.channels, 0, *places, centre)


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


# By sides, then by layouts. Nothing is replaced: other threads may be reading what an entry points at.
_DESCRIBED: WeakKeyDictionary[SideLayout, dict[PageLayout, Described]] = WeakKeyDictionary()


def described(side: SideLayout, layout: PageLayout) -> Described:
    """The description of K or V in pages of this layout, made once."""
    of_side = _DESCRIBED.get(side)
    if of_side is None:
        of_side = _DESCRIBED.setdefault(side, {})
    known = of_side.get(layout)
    return of_side.setdefault(layout, Described(side, layout)) if known is None else known


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
    token_bias: Tensor | None = None,
) -> Part:
    """Attention of queries [S, R, Dk] over pages, exact tokens and what `prior` attended to; one of the three at least.

    All are in the coordinates of the queries, and so is the output. bias [S, R] and token_bias [S, R, n * P] are added
    to every q . k of pages, as in `attention.attend`. The groups are the lse of each page, as in the reference, where
    asked for.
    """
    queries = given("queries", queries, torch.float32, 3)
    streams, rows, k_dim = queries.shape
    sources, groups, v_dim = _NO_SOURCE, None, 0
    if pages is not None:
        base, stride, named = records("pool", pages.pool, pages.layout.body_bytes)
        ids, many, width = table(pages.ids, streams)
        counts = given("counts", pages.counts, torch.int64, (streams,))
        k, v = (described(side, pages.layout) for side in pages.sides)
        v_dim = v.dim
        if k.dim != k_dim:
            raise KvcompError(f"queries have {k_dim} channels, and the keys in these pages {k.dim}")
        sides = k.address, base, stride, k.count, v.address, base, stride, v.count
        sizes = width, pages.layout.page_size, pages.in_tokens, many, named
        sources = *sides, ids.data_ptr(), counts.data_ptr(), *sizes
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
    if token_bias is not None:
        every = 0 if pages is None else many * pages.layout.page_size
        token_bias = given("bias of tokens", token_bias, torch.float32, (streams, rows, every))
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
        0 if prior_out is None else prior_out.data_ptr(),
        0 if prior_lse is None else prior_lse.data_ptr(),
        out.data_ptr(),
        lse.data_ptr(),
        0 if groups is None else groups.data_ptr(),
        0 if groups is None else many,
        scale,
        softcap or 0,
        level(),
    )
    if failed := _compiled().kvcomp_attend(problem):
        raise error(failed)
    return Part(out, lse, groups)


def append(k: Tensor, v: Tensor, counts: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Write one token of each stream, keys and values [B, H, 1, D], behind the counts [S] that k and v [S, N, D] hold,
    and count it; False, and nothing done, where dtypes differ, or something is a view or on another device."""
    if keys.dtype is not k.dtype or values.dtype is not v.dtype:
        return False
    if not (k.is_contiguous() and v.is_contiguous() and keys.is_contiguous() and values.is_contiguous()):
        return False
    if not (k.is_cpu and v.is_cpu and keys.is_cpu and values.is_cpu):
        return False
    held, others, new = k.shape, v.shape, (*keys.shape[:2], 1)
    fits = len(held) == len(others) == 3 and held[0] == others[0] == prod(new)
    if not fits or keys.shape != (*new, held[2]) or values.shape != (*new, others[2]):
        told = f"keys {list(keys.shape)} and values {list(values.shape)}"
        raise KvcompError(f"{told} are no token of each of the streams of {list(held)} and {list(others)}")
    streams, k_room, k_dim = held
    v_room, v_dim = others[1:]
    if counts.dtype is not torch.int64 or not (counts.is_cpu and counts.is_contiguous()) or counts.shape != (streams,):
        raise KvcompError(f"counts are {counts.dtype} {list(counts.shape)}, and the C kernel counts int64 [{streams}]")
    k_bytes, v_bytes = k_dim * k.itemsize, v_dim * v.itemsize
    places = k.data_ptr(), v.data_ptr(), keys.data_ptr(), values.data_ptr(), counts.data_ptr()
    if failed := _compiled().kvcomp_append(*places, streams, k_room, v_room, k_bytes, v_bytes):
        raise error(failed)
    return True


def vector_dots(queries: Tensor, summary: Summary, names: tuple[str, ...], scale: str | None) -> Tensor:
    """As `select.vector_dots`, from where the summaries are; nothing is written for pages that do not exist."""
    layout = summary.layout
    shape, offsets, scale_at, scales = _vectors(layout, names, scale)
    queries = given("queries", queries, torch.float32, 3)
    streams, rows, dim = queries.shape
    if dim != shape[-1]:
        raise KvcompError(f"queries have {dim} channels, and the vectors of {names} {shape[-1]}")
    (base, stride, named), (ids, pages, width), counts = _summaries(summary, streams)
    many = prod(shape[:-1])
    out = queries.new_empty(streams, rows, pages * many)
    listed = base, ids.data_ptr(), counts.data_ptr(), addressof(offsets), queries.data_ptr()
    sizes = out.data_ptr(), stride, width, streams, rows, pages, len(names), many, dim
    problem = _VECTORS.pack(*listed, *sizes, scale_at, scales, layout.bytes_per_page - offsets[0], named, level())
    if failed := _compiled().kvcomp_vector_dots(problem):
        raise error(failed)
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
    rows, size = next(f.shape for f in summary.layout.fields if f.name == name)
    queries = given("queries", queries, torch.float32, 3)
    streams, heads, channels = queries.shape
    if channels != rows * 8 // bits:
        raise KvcompError(f"queries have {channels} channels, and the codes of {name} {rows * 8 // bits}")
    offset = given("offset", offset, torch.float32, (streams, heads, 1))
    (base, stride, named), (ids, pages, width), counts = _summaries(summary, streams)
    out = queries.new_empty(streams, heads, pages * size)
    places = queries.data_ptr(), offset.data_ptr(), base + summary.layout.offsets[name], stride, named
    listed = ids.data_ptr(), width, counts.data_ptr()
    sizes = streams, heads, rows, bits, pages, size
    if failed := _compiled().kvcomp_code_dots(*places, *listed, *sizes, out.data_ptr()):
        raise error(failed)
    return out


def shares(logits: Tensor, counts: Tensor) -> Tensor:
    """As `select.shares`."""
    logits = given("logits", logits, torch.float32, 3)
    streams, heads, n = logits.shape
    counts = given("counts", counts, torch.int64, (streams,))
    out = logits.new_empty(streams, n)
    if failed := _compiled().kvcomp_shares(logits.data_ptr(), counts.data_ptr(), streams, heads, n, out.data_ptr()):
        raise error(failed)
    return out


def largest(x: Tensor, wanted: Tensor, width: int) -> Tensor:
    """As `select.largest`, of `width` columns."""
    x, wanted = given("x", x, torch.float32, 2), given("wanted", wanted, torch.int64, (len(x),))
    out = wanted.new_empty(len(x), width)
    if failed := _compiled().kvcomp_largest(x.data_ptr(), wanted.data_ptr(), *x.shape, width, out.data_ptr()):
        raise error(failed)
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
    logits = given("logits", logits, torch.float32, 3)
    streams, heads, n = logits.shape
    counts = given("counts", counts, torch.int64, (streams,))
    wanted = given("wanted", wanted, torch.int64, (streams,))
    out = wanted.new_empty(streams, width)
    if n % pages or unit not in (1, n // pages):
        raise KvcompError(f"{n} logits are not the same number of each of {pages} pages, or of units of {unit}")
    sizes = streams, heads, pages, n // pages, unit
    places = wanted.data_ptr(), width, *ends, out.data_ptr()
    if failed := _compiled().kvcomp_choose(logits.data_ptr(), scale, counts.data_ptr(), *sizes, *places):
        raise error(failed)
    return out


def regroup(layout: PageLayout, pool: Tensor, ids: Tensor, tokens: Tensor, made: Tensor) -> None:
    """As `select.regroup`, into `made`."""
    tokens = given("tokens", tokens, torch.int64, 2)
    streams, many = tokens.shape
    ids, listed, width = table(ids, streams)
    address, stride, n = records("made", made, layout.body_bytes)
    if n * layout.page_size != streams * many:
        raise KvcompError(f"{streams * many} tokens do not fill {n} pages of {layout.page_size}")
    offsets, rows = _rows_of(layout)
    failed = _compiled().kvcomp_regroup(
        *records("pool", pool, layout.body_bytes),
        *(ids.data_ptr(), width, listed, tokens.data_ptr(), streams, many, layout.page_size, offsets, rows),
        *(len(offsets), address, stride),
    )
    if failed:
        raise error(failed)


def runs(x: Tensor, starts: Tensor, width: int) -> Tensor:
    """As `dispatch.runs`."""
    if not x.is_cpu or x.dim() != 1:
        raise KvcompError(
            f"runs are taken out of a row of elements on the CPU, not out of {list(x.shape)} on {x.device}"
        )
    x, starts = x.contiguous(), given("starts", starts, torch.int64, starts.shape)
    out = x.new_empty(*starts.shape, width)
    places = x.data_ptr(), len(x), starts.data_ptr()
    if failed := _compiled().kvcomp_runs(*places, x.itemsize, starts.numel(), width, out.data_ptr()):
        raise error(failed)
    return out


def error(code: int) -> Exception:
    """What a number that a function returned stands for."""
    if code == 1:
        return MemoryError("no memory for a step of attention over compressed pages")
    return KvcompError("counts, ids or places are below 0, or beyond what there is: the cache is damaged")


def _summaries(summary: Summary, streams: int) -> tuple[tuple[int, int, int], tuple[Tensor, int, int], Tensor]:
    """Pool, ids [S, n] and counts [S] of the pages of so many streams."""
    counts = given("counts", summary.counts, torch.int64, (streams,))
    return records("pool", summary.pool, summary.layout.bytes_per_page), table(summary.ids, streams), counts


@cache
def _rows_of(layout: PageLayout) -> tuple[ctypes.Array[c_int64], ctypes.Array[c_int64]]:
    """Where each field with a row per token begins in a page, and its bytes a token."""
    fields = layout.token_fields
    offsets, rows = [layout.offsets[f.name] for f in fields], [f.nbytes // layout.page_size for f in fields]
    return (c_int64 * len(fields))(*offsets), (c_int64 * len(fields))(*rows)


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
    return (_Segment * 1)(_numbers(dim, dtype, 0, stride * dtype.itemsize))


def _numbers(channels: int, dtype: torch.dtype, offset: int, stride: int) -> _Segment:
    return _Segment(KINDS[dtype], channels, 1, 1, channels, plane=(_Plane(offset, stride, 0),), centre=NOTHING)
