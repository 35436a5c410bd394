"""Functions as operators of `torch.ops.kvcomp`, which torch.compile takes as they are and CUDA graphs record."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from inspect import signature
from typing import Any

import torch
from torch import Tensor


def operator(name: str, made: Callable[..., Any], mutates: tuple[str, ...] = ()) -> Callable[[Callable[..., Any]], Any]:
    """Makes a function the operator `name`, which changes the arguments that it `mutates`, and no others.

    While a graph is traced, `made` stands for it: it takes those of the function's arguments that it names, and returns
    tensors of the shapes, dtypes and devices of its results. The function is called directly where nothing traces:
    torch's dispatcher takes longer for an operator of 20 arguments than a GPU for what it launches.
    """

    def define(function: Callable[..., Any]) -> Any:
        defined = torch.library.custom_op(f"kvcomp::{name}", function, mutates_args=mutates)
        taken, named = signature(function), signature(made).parameters

        def traced(*args: Any, **kwargs: Any) -> Any:
            bound = taken.bind(*args, **kwargs)
            bound.apply_defaults()
            return made(**{argument: bound.arguments[argument] for argument in named})

        defined.register_fake(traced)

        @wraps(function)
        def called(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling() or _watched(args):
                return defined(*args, **kwargs)
            return function(*args, **kwargs)

        return called

    return define


def _watched(args: tuple[Any, ...]) -> bool:
    """Whether torch has to know of an operation on these: a mode or a subclass traces it, or autograd follows it."""
    first = args[0]
    if torch._C._len_torch_dispatch_stack() or type(first) is not Tensor or first.is_meta:
        return True
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args)
