"""What may be passed to C by address: tensors whose dtype, shape, device and order are known to be what it reads."""

from __future__ import annotations

import torch
from torch import Tensor

from kvcomp.errors import KvcompError


def given(name: str, x: Tensor, dtype: torch.dtype, shape: tuple[int, ...] | int) -> Tensor:
    """x [*shape], or of so many dimensions, on the CPU, contiguous and in this dtype: x itself, or a copy where floats
    or integers have another one or lie in another order.

    Raises:
        KvcompError: another shape or device, or floats for integers.
    """
    if x.dtype is not dtype:
        if x.is_floating_point() is not dtype.is_floating_point or x.is_complex() or x.dtype is torch.bool:
            raise KvcompError(f"{name} is {_told(x)}, and the C kernel takes {dtype}: convert it first")
        x = x.to(dtype)
    if not x.is_cpu or (x.dim() if isinstance(shape, int) else x.shape) != shape:
        wanted = f"{shape} dimensions" if isinstance(shape, int) else list(shape)
        raise KvcompError(f"{name} is {_told(x)}, and the C kernel takes {wanted} on the CPU")
    return x if x.is_contiguous() else x.contiguous()


def pages(name: str, x: Tensor, dtype: torch.dtype, shape: tuple[int, int, int]) -> tuple[Tensor, int, int, int]:
    """x [M, P, R], or [s, M / s, P, R] of s streams, as of `given`, whose channels lie side by side and whose tokens
    have one stride within a stream: x itself or a copy, the pages of a stream, and the strides of streams and of
    tokens, in numbers.

    Raises:
        KvcompError: as of `given`.
    """
    x = x[None] if x.dim() == 3 else x
    if x.dim() == 4 and x.is_cpu and x.dtype is dtype and (x.shape[0] * x.shape[1], *x.shape[2:]) == shape:
        each, (stream, page, token, channel) = x.shape[1], x.stride()
        row = token if shape[1] > 1 else page
        if channel == 1 and (each == 1 or page == shape[1] * row):
            return x, max(each, 1), stream, row
    x = given(name, x.flatten(0, 1) if x.dim() == 4 else x, dtype, shape)
    return x, max(shape[0], 1), 0, shape[2]


def table(ids: Tensor, streams: int) -> tuple[Tensor, int, int]:
    """int32 ids [S, n] on the CPU whose rows are contiguous, n, and entries from a row to the next.

    Raises:
        KvcompError: as of `given`.
    """
    shape, strides = ids.shape, ids.stride()
    if not (ids.dtype is torch.int32 and ids.is_cpu and len(shape) == 2 and shape[0] == streams and strides[1] == 1):
        ids = given("ids", ids, torch.int32, (streams, shape[1] if len(shape) == 2 else 0))
        return ids, shape[1], shape[1]
    return ids, shape[1], strides[0]


def records(name: str, x: Tensor, least: int) -> tuple[int, int, int]:
    """Where page records uint8 [n, least bytes or more] begin, bytes from one to the next, and n.

    Raises:
        KvcompError: they are no such records, on the CPU, the bytes of each side by side.
    """
    shape, strides = x.shape, x.stride()
    if x.dtype is torch.uint8 and x.is_cpu and len(shape) == 2 and shape[1] >= least and strides[1] == 1:
        return x.data_ptr(), strides[0], shape[0]
    raise KvcompError(
        f"{name} is {_told(x)} with strides {strides}, and the C kernel takes torch.uint8 [n, {least} or more] on the "
        "CPU with contiguous rows"
    )


def _told(x: Tensor) -> str:
    return f"{x.dtype} {list(x.shape)} on {x.device.type}"
