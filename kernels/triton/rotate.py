"""Queries into the basis of pages, and attention over those back, each in one launch.

  out[r] = x[r] M,  bias[r] = x[r] . mean;  back: out[r] = share[r] (x[r] M) + other[r]

Products are exact (tf32 in three terms). Grid: (stream * blocks of rows, block of columns). Moved: the matrix of a
stream once for each block of rows, which of a matrix that all streams share comes from a cache.
"""

# mypy: disable-error-code="no-untyped-def, assignment"

from __future__ import annotations

import triton
import triton.language as tl

from .unpack import dot


@triton.jit(do_not_specialize=["rows", "heads"])
def rotate_kernel(
    x, matrix, mean, out, bias, other, share, rows, heads, k_dim, n_dim, head_stride, k_stride, n_stride,
    mean_stride, MEAN: tl.constexpr, ADDS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """x [S, R, k_dim], of whatever floating-point numbers; matrix [heads, k_dim, n_dim] with these strides, of which
    stream s has matrix s % heads; out float32 [S, R, n_dim]. MEAN: mean float32 [heads, k_dim], or of all heads, and
    bias float32 [S, R]. ADDS: share float32 [S, R] and other float32 [S, R, n_dim]."""
    blocks = tl.cdiv(rows, ROWS)
    stream = (tl.program_id(0) // blocks).to(tl.int64)
    row = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    head = stream % heads
    found = tl.zeros((ROWS, COLUMNS), tl.float32)
    offset = tl.zeros((ROWS,), tl.float32)
    for at in range(0, k_dim, BLOCK):
        channel = at + tl.arange(0, BLOCK)
        there = (row < rows)[:, None] & (channel < k_dim)[None, :]
        part = tl.load(x + (stream * rows + row[:, None]) * k_dim + channel[None, :], mask=there, other=0)
        part = part.to(tl.float32)
        place = head * head_stride + channel[:, None] * k_stride + column[None, :] * n_stride
        there = (channel < k_dim)[:, None] & (column < n_dim)[None, :]
        found = dot(part, tl.load(matrix + place, mask=there, other=0).to(tl.float32), found, tl.float32)
        if MEAN:
            centre = tl.load(mean + head * mean_stride + channel, mask=channel < k_dim, other=0)
            offset += tl.sum(part * centre[None, :], 1)
    place = (stream * rows + row[:, None]) * n_dim + column[None, :]
    there = (row < rows)[:, None] & (column < n_dim)[None, :]
    if ADDS:
        found *= tl.load(share + stream * rows + row, mask=row < rows, other=0)[:, None]
        found += tl.load(other + place, mask=there, other=0)
    tl.store(out + place, found, mask=there)
    if MEAN:
        tl.store(bias + stream * rows + row, offset, mask=row < tl.where(tl.program_id(1) == 0, rows, 0))
