"""What may be passed to a kernel: tensors whose device, shape, order and kind of numbers are what it reads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvcomp.errors import KvcompError
from kvcomp.layout import ALIGN, PageLayout

from .plan import MOST_ROWS

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
INTEGERS = (torch.int64, torch.int32)


def floats(name: str, x: Tensor, device: torch.device, shape: tuple[int, ...] | int, exact: bool = False) -> Tensor:
    """x [*shape], or of so many dimensions, contiguous, in one of `FLOATS`: float32 where `exact`.

    Raises:
        KvcompError: another device or shape, or no floating-point numbers.
    """
    _check(name, x, device, shape)
    if not x.is_floating_point():
        raise KvcompError(f"{name} is {_told(x)}, and the kernels take floating-point numbers")
    return (x.float() if exact or x.dtype not in FLOATS else x).contiguous()


def rows_of(name: str, x: Tensor, device: torch.device, shape: tuple[int, ...]) -> Tensor:
    """As `floats`, of exact tokens [S, N, D]: each stream is contiguous, streams may have gaps between them."""
    _check(name, x, device, shape)
    if x.dtype in FLOATS and x.stride()[1:] == (shape[2], 1):
        return x
    return floats(name, x, device, shape)


def integers(name: str, x: Tensor, device: torch.device, shape: tuple[int, ...] | int) -> Tensor:
    """As `floats`, of integers, in one of `INTEGERS`; rows may have gaps between them."""
    _check(name, x, device, shape)
    if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        raise KvcompError(f"{name} is {_told(x)}, and the kernels take integers")
    x = x if x.dtype in INTEGERS else x.to(torch.int64)
    return x if not x.dim() or x.stride(-1) == 1 else x.contiguous()


def records(pool: Tensor, least: int) -> Tensor:
    """The pool itself: records uint8 [n, least bytes or more], each at a multiple of `ALIGN`, which kernels read in
    words.

    Raises:
        KvcompError: they are not.
    """
    fits = pool.dtype == torch.uint8 and pool.dim() == 2 and pool.shape[1] >= least
    if fits and pool.stride(1) == 1 and pool.stride(0) % ALIGN == 0:
        return pool
    raise KvcompError(
        f"pool is {_told(pool)} with strides {pool.stride()}, and the kernels take torch.uint8 [n, {least} or more] "
        f"with contiguous rows at multiples of {ALIGN} bytes"
    )


def _check(name: str, x: Tensor, device: torch.device, shape: tuple[int, ...] | int) -> None:
    if x.device != device or (x.dim() if isinstance(shape, int) else x.shape) != shape:
        wanted = f"{shape} dimensions" if isinstance(shape, int) else list(shape)
        raise KvcompError(f"{name} is {_told(x)}, and the kernels take {wanted} on {device}")


def _told(x: Tensor) -> str:
    return f"{x.dtype} {list(x.shape)} on {x.device}"


def pages_of(
    pool: Tensor, ids: Tensor, counts: Tensor | None, layout: PageLayout, streams: int, rows: int = 1
) -> tuple[Tensor, Any]:
    """Ids [S, n] and counts [S] of so many streams, of `rows` queries each, in a pool that is contiguous."""
    records(pool, layout.bytes_per_page if counts is not None else layout.body_bytes)
    if not pool.is_contiguous() or rows > MOST_ROWS:
        raise KvcompError(
            f"pool of strides {pool.stride()}, {rows} queries: expected contiguous pages, {MOST_ROWS} at most"
        )
    ids = integers("ids", ids, pool.device, 2)
    if len(ids) != streams:
        raise KvcompError(f"ids are of {len(ids)} streams, and queries or tokens of {streams}")
    return ids, None if counts is None else integers("counts", counts, pool.device, (streams,)).contiguous()
