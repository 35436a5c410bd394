"""The C kernel of attention through ctypes: descriptions of pages to its structures, tensors to pointers."""

from __future__ import annotations

from functools import cache, lru_cache
from struct import Struct

import torch
from torch import Tensor

from kvcomp.attention import Part, Tokens
from kvcomp.errors import KvcompError
from kvcomp.kernels.contract import PagesView, ReadBasis
from kvcomp.kernels.placed import reason
from kvcomp.segments import Codebook, Dense, KVLayout, Segment, SideLayout, Uniform

from . import compiled
from .compiled import library, missing
from .memory import given, records, table
from .sides import KINDS, SOURCE, Described, described, row_side

__all__ = ["KINDS", "Described", "attend", "described", "library", "missing", "obstacle", "readable", "unknown"]
BLOCKED_ROWS = 16  # from more queries of a stream on, all sides are read in blocks

TILE = 16  # tokens that share scales come in multiples of it
# Structures of the C kernel, as one row of numbers each; 0 for a pointer that is NULL.
_NO_SOURCE = (0,) * SOURCE
_NO_MAP: tuple[int, ...] = (0,) * 7
_PROBLEM = Struct(f"{2 * SOURCE + 2 * len(_NO_MAP) + 15}q2fi4x")


def obstacle(sides: KVLayout) -> str | None:
    """Why the kernel cannot read pages; None: it can."""
    return reason(sides, _unreadable)


def unknown(segment: Segment) -> str | None:
    """Why no kernel knows a segment; None: one does."""
    if isinstance(segment, Dense) and segment.dtype not in KINDS:
        return f"numbers of {segment.dtype}"
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
    maps: tuple[ReadBasis, ReadBasis] | None = None,
) -> Part:
    """Attention of queries [S, R, Dk] over pages, exact tokens and what `prior` attended to; one of the three at least.

    All are in the coordinates of the queries, and so is the output; maps: bases of K and of V, where pages have
    others. bias [S, R] as in `attention.attend`. The groups are the lse of each page, as in the reference, where
    asked for.
    """
    queries = given("queries", queries, torch.float32, 3)
    streams, rows, k_dim = queries.shape
    sources, groups, v_dim, token_bias, skipped = _NO_SOURCE, None, 0, None, None
    blocked, k_map, v_map = rows > BLOCKED_ROWS, _NO_MAP, _NO_MAP
    if pages is not None:
        base, stride, named = records("pool", pages.pool, pages.layout.body_bytes)
        ids, many, width = table(pages.ids, streams)
        counts = given("counts", pages.counts, torch.int64, (streams,))
        assert pages.sides is not None
        k, v = described(pages.sides, pages.layout)
        v_dim = v.dim
        if maps is not None:
            (v_dim, v_map, _v), (other, k_map, _k) = _mapped(maps[1], v.dim), _mapped(maps[0], k.dim)
        if (k.dim if maps is None or maps[0].read_matrix is None else other) != k_dim:
            raise KvcompError(f"queries have {k_dim} channels, and the keys in these pages {k.dim}")
        sides = (*k.packed(base, stride, blocked), *v.packed(base, stride, blocked))
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
        keys, values, held = tokens
        k_side, k_rest, room, dim = _rows("keys", keys.shape, keys.stride(), keys.dtype, keys.device, streams, blocked)
        v_side, v_rest, *fits = _rows(
            "values", values.shape, values.stride(), values.dtype, values.device, streams, blocked
        )
        if dim != k_dim or fits[0] != room or (pages is not None and fits[1] != v_dim):
            told = f"keys {list(keys.shape)} and values {list(values.shape)}"
            raise KvcompError(f"{told} do not fit {streams} streams of {k_dim} and {v_dim or fits[1]} channels")
        v_dim, held = fits[1], given("counts of tokens", held, torch.int64, (streams,))
        own = k_side, keys.data_ptr(), *k_rest, v_side, values.data_ptr(), *v_rest, 0, held.data_ptr(), 0, room, 0, 0, 0
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
        *k_map,
        *v_map,
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


def _mapped(basis: ReadBasis, coordinates: int) -> tuple[int, tuple[int, ...], tuple[Tensor | None, ...]]:
    """The original channels of so many coordinates, the kernel's structure of the basis, and what that points at."""
    matrix, mean, order = basis.read_matrix, basis.mean, basis.order
    n, dim, places = 1, coordinates, [0, 0, 0]
    each = stride = half = 0
    if matrix is not None:
        if matrix.stride(-1) != 1:
            matrix = _row_major(matrix)
        dim, width = matrix.shape[-2:]
        half = matrix.dtype is torch.float16
        if width != coordinates or not (half or matrix.dtype is torch.float32) or not matrix.is_cpu:
            raise KvcompError(
                f"the matrix of a basis is {matrix.dtype} {list(matrix.shape)} on {matrix.device}, and the C kernel "
                f"takes float16 or float32 [n, D, {coordinates}] on the CPU"
            )
        stride, places[0] = matrix.stride(-2), matrix.data_ptr()
        if matrix.dim() == 3:
            n, each = len(matrix), matrix.stride(0)
    if mean is not None:
        n = len(mean) if mean.dim() == 2 else n
        mean = given("mean of a basis", mean if mean.dim() == 2 else mean.expand(n, -1), torch.float32, (n, dim))
    if order is not None:
        n, order = len(order), given("order of a basis", order, torch.int16, (len(order), dim))
    places[1:] = 0 if mean is None else mean.data_ptr(), 0 if order is None else order.data_ptr()
    return dim, (*places, n, each, stride, half), (matrix, mean, order)


@cache
def _row_major(matrix: Tensor) -> Tensor:
    """A copy with contiguous rows of a matrix that all layers share."""
    return matrix.contiguous()


@lru_cache(256)
def _rows(
    name: str,
    shape: torch.Size,
    strides: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    streams: int,
    blocked: bool,
) -> tuple[int, tuple[int, ...], int, int]:
    """The kernel's structure of a side of exact tokens [S, N, D] that are `readable`, but for its address, which goes
    after the first number; N and D."""
    if len(shape) != 3 or shape[0] != streams or strides[2] != 1 or dtype not in KINDS or device.type != "cpu":
        raise KvcompError(
            f"{name} of exact tokens are {dtype} {list(shape)} on {device}, and the C kernel takes float32, float16 "
            f"or bfloat16 [{streams}, N, D] on the CPU with contiguous rows"
        )
    first, _, *rest = row_side(shape[2], dtype, strides[1]).packed(0, strides[0] * dtype.itemsize, blocked)
    return first, tuple(rest), shape[1], shape[2]
