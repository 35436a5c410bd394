"""The C kernels besides attention and writing: what selectors compute, pages of single tokens, and tokens appended."""

from __future__ import annotations

import ctypes
from ctypes import addressof, c_int64
from functools import cache, lru_cache
from math import prod
from struct import Struct

import torch
from torch import Tensor

from kvcomp.errors import KvcompError
from kvcomp.kernels.placed import NOTHING
from kvcomp.layout import PageLayout, Summary

from . import compiled
from .memory import given, records, table

_VECTORS = Struct("18qi4x")  # a structure of the C kernel, as one row of numbers


def append(k: Tensor, v: Tensor, counts: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Write one token of each stream, keys and values [B, H, 1, D], after the counts [S] that k and v [S, N, D] hold,
    and count it; False, and nothing done, where dtypes differ, or something is a view or on another device."""
    if keys.dtype is not k.dtype or values.dtype is not v.dtype:
        return False
    if not (k.is_contiguous() and v.is_contiguous() and keys.is_contiguous() and values.is_contiguous()):
        return False
    if not (k.is_cpu and v.is_cpu and keys.is_cpu and values.is_cpu):
        return False
    sizes = _sizes(k.shape, v.shape, keys.shape, values.shape, k.dtype, v.dtype)
    if counts.dtype is not torch.int64 or not (counts.is_cpu and counts.is_contiguous()) or counts.shape != sizes[:1]:
        told = f"{counts.dtype} {list(counts.shape)}"
        raise KvcompError(f"counts are {told}, and the C kernel counts int64 [{sizes[0]}]")
    places = k.data_ptr(), v.data_ptr(), keys.data_ptr(), values.data_ptr(), counts.data_ptr()
    compiled.functions().kvcomp_append(*places, *sizes)
    return True


@lru_cache(256)
def _sizes(
    held: torch.Size, others: torch.Size, keys: torch.Size, values: torch.Size, k: torch.dtype, v: torch.dtype
) -> tuple[int, int, int, int, int]:
    """Streams, and tokens and bytes of a token of K and of V, where a token of each stream goes to those held."""
    new = *keys[:2], 1
    fits = len(held) == len(others) == 3 and held[0] == others[0] == prod(new)
    if not fits or keys != (*new, held[2]) or values != (*new, others[2]):
        told = f"keys {list(keys)} and values {list(values)}"
        raise KvcompError(f"{told} are no token of each of the streams of {list(held)} and {list(others)}")
    return held[0], held[1], others[1], held[2] * k.itemsize, others[2] * v.itemsize


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
    problem = _VECTORS.pack(
        *listed, *sizes, scale_at, scales, layout.bytes_per_page - offsets[0], named, compiled.level()
    )
    compiled.functions().kvcomp_vector_dots(problem)
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
    compiled.functions().kvcomp_code_dots(*places, *listed, *sizes, out.data_ptr())
    return out


def shares(logits: Tensor, counts: Tensor) -> Tensor:
    """As `select.shares`."""
    logits = given("logits", logits, torch.float32, 3)
    streams, heads, n = logits.shape
    counts = given("counts", counts, torch.int64, (streams,))
    out = logits.new_empty(streams, n)
    compiled.functions().kvcomp_shares(logits.data_ptr(), counts.data_ptr(), streams, heads, n, out.data_ptr())
    return out


def largest(x: Tensor, wanted: Tensor, width: int) -> Tensor:
    """As `select.largest`, of `width` columns."""
    x, wanted = given("x", x, torch.float32, 2), given("wanted", wanted, torch.int64, (len(x),))
    out = wanted.new_empty(len(x), width)
    compiled.functions().kvcomp_largest(x.data_ptr(), wanted.data_ptr(), *x.shape, width, out.data_ptr())
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
    compiled.functions().kvcomp_choose(logits.data_ptr(), scale, counts.data_ptr(), *sizes, *places)
    return out


def regroup(layout: PageLayout, pool: Tensor, ids: Tensor, tokens: Tensor, made: Tensor) -> None:
    """As `select.regroup`, into `made`, but for centres."""
    tokens = given("tokens", tokens, torch.int64, 2)
    streams, many = tokens.shape
    ids, listed, width = table(ids, streams)
    address, stride, n = records("made", made, layout.body_bytes)
    if n * layout.page_size != streams * many:
        raise KvcompError(f"{streams * many} tokens do not fill {n} pages of {layout.page_size}")
    offsets, rows = _rows_of(layout)
    compiled.functions().kvcomp_regroup(
        *records("pool", pool, layout.body_bytes),
        *(ids.data_ptr(), width, listed, tokens.data_ptr(), streams, many, layout.page_size, offsets, rows),
        *(len(offsets), address, stride),
    )


def runs(x: Tensor, starts: Tensor, width: int) -> Tensor:
    """As `dispatch.runs`."""
    if not x.is_cpu or x.dim() != 1:
        raise KvcompError(
            f"runs are taken out of a row of elements on the CPU, not out of {list(x.shape)} on {x.device}"
        )
    x, starts = x.contiguous(), given("starts", starts, torch.int64, starts.shape)
    out = x.new_empty(*starts.shape, width)
    places = x.data_ptr(), len(x), starts.data_ptr()
    compiled.functions().kvcomp_runs(*places, x.itemsize, starts.numel(), width, out.data_ptr())
    return out


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
