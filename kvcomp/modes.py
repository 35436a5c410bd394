"""Inference mode and gradients leave no trace in what a cache holds."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

from kvcomp.errors import UnsupportedError

Method = TypeVar("Method", bound=Callable[..., Any])


def normal_tensors() -> AbstractContextManager[Any]:
    """Inside, tensors are made that may be written to anywhere: those made in inference mode may only be there."""
    if not torch.is_inference_mode_enabled():
        return nullcontext()
    stack = ExitStack()
    stack.enter_context(torch.inference_mode(False))
    stack.enter_context(torch.no_grad())
    return stack


def outside_inference(method: Method) -> Method:
    """The method, within `normal_tensors`."""

    @wraps(method)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_inference_mode_enabled():
            return method(*args, **kwargs)
        with normal_tensors():
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
