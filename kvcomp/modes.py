"""Inference mode and gradients leave no trace in what a cache holds."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

from kvcomp.errors import UnsupportedError

Method = TypeVar("Method", bound=Callable[..., Any])
_SAME = nullcontext()


class _Normal:
    """Outside of inference mode, without gradients: both at once, as a decode step enters it in every layer."""

    __slots__ = ("inference", "tracked")

    def __enter__(self) -> None:
        self.inference = torch.inference_mode(False)
        self.inference.__enter__()  # turns gradients on
        self.tracked = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)

    def __exit__(self, *raised: Any) -> None:
        torch._C._set_grad_enabled(self.tracked)
        self.inference.__exit__(*raised)


def normal_tensors() -> AbstractContextManager[Any]:
    """Inside, tensors are made that may be written to anywhere: those made in inference mode may only be there."""
    return _Normal() if torch.is_inference_mode_enabled() else _SAME


def outside_inference(method: Method) -> Method:
    """The method, within `normal_tensors`."""

    @wraps(method)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_inference_mode_enabled():
            return method(*args, **kwargs)
        with _Normal():
            return method(*args, **kwargs)

    return run  # type: ignore[return-value]


class _NoGradient(torch.autograd.Function):
    """The identity of its first argument; no gradient flows back to any."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, *sources: Tensor) -> Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise UnsupportedError(
            "no gradients flow through the cached tokens of a CompressedCache: train without past_key_values, or with "
            "DynamicCache"
        )


def without_gradient(out: Tensor, *sources: Tensor) -> Tensor:
    """`out`, made of `sources` under no_grad: a backward pass that reaches it raises an UnsupportedError."""
    result: Tensor = _NoGradient.apply(out, *sources)
    return result
