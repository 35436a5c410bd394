"""Operators of `torch.ops.kvcomp` that multiply with bases. As in `ops`, nothing looks into a tensor."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from kvcomp.kernels.contract import ReadBasis
from kvcomp.operators import operator

from . import rotate as rotating
from .chunks import NARROWEST
from .launching import Launch
from .memory import floats
from .plan import FEWEST_ROWS

ROTATED = 32  # channels of a product with a basis: its matrix is read once for each block of rows
WARPS = 4


def _rotated(x: Tensor, matrix: Tensor, mean: Tensor | None, back: bool) -> tuple[Tensor, Tensor]:
    streams, rows, _ = x.shape
    out = torch.empty((streams, rows, matrix.shape[-2 if back else -1]), dtype=torch.float32, device=x.device)
    return out, torch.empty((0,) if mean is None else (streams, rows), dtype=torch.float32, device=x.device)


@operator("rotate", _rotated)
def rotate(
    x: Tensor,
    matrix: Tensor,
    mean: Tensor | None,
    back: bool = False,
    other: Tensor | None = None,
    share: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """x [S, R, A] times matrix [A, B] or [n, A, B], of which stream s has matrix s mod n, or, `back`, [B, A] turned:
    float32 [S, R, B]; and x . mean [S, R], of mean float32 [A] or [n, A], empty without. other [S, R, B], share [S, R]:
    the product times share, plus other. See `rotating.rotate_kernel`."""
    out, bias = _rotated(x, matrix, mean, back)
    streams, rows, k_dim = x.shape
    of_heads = matrix.dim() == 3, mean is not None and mean.dim() == 2
    heads = len(matrix) if of_heads[0] else len(mean) if of_heads[1] and mean is not None else 1
    head_stride = matrix.stride(0) if of_heads[0] else 0
    strides = matrix.stride()[:-3:-1] if back else matrix.stride()[-2:]
    n_dim, adds = out.shape[2], share is not None
    how = _rotation(k_dim, n_dim, rows, mean is not None, adds)
    how(
        (streams * -(-rows // how.constants["ROWS"]), -(-n_dim // how.constants["COLUMNS"])),
        x.device,
        *(x, matrix, out if mean is None else mean, out, bias if mean is not None else out),
        *(out if other is None else other, out if share is None else share),
        *(rows, heads, k_dim, n_dim, head_stride, *strides, k_dim if of_heads[1] else 0),
    )
    return out, bias


@lru_cache(1024)
def _rotation(k_dim: int, n_dim: int, rows: int, mean: bool, adds: bool) -> Launch:
    return Launch(rotating.rotate_kernel, rotate_constants(k_dim, n_dim, rows, mean, adds))


def rotate_constants(k_dim: int, n_dim: int, rows: int, mean: bool, adds: bool) -> dict[str, Any]:
    """What `rotate_kernel` is compiled for, and how."""
    sizes = {"ROWS": FEWEST_ROWS if rows <= FEWEST_ROWS else 2 * FEWEST_ROWS}
    sizes |= {"BLOCK": _tile(k_dim), "COLUMNS": _tile(n_dim)}
    return {"MEAN": mean, "ADDS": adds, **sizes, "num_warps": WARPS}


def _tile(channels: int) -> int:
    size: int = min(max(triton.next_power_of_2(channels), NARROWEST), ROTATED)
    return size


def rotated(queries: Tensor, basis: ReadBasis) -> tuple[Tensor, Tensor | None]:
    """As `Codec.read_query` of queries [S, R, D], in one launch."""
    matrix, mean = basis.read_matrix, basis.mean
    if matrix is None:
        return queries, basis.offset(queries)
    x = floats("queries", queries, matrix.device, (*queries.shape[:2], matrix.shape[-2]))
    out, bias = rotate(x, matrix, None if mean is None else mean.float().contiguous())
    return out, None if mean is None else bias
