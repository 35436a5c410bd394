"""Functions as operators of `torch.ops.kvcomp`, which torch.compile takes as they are and CUDA graphs record."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any

import torch


def operator(name: str, made: Callable[..., Any], mutates: tuple[str, ...] = ()) -> Callable[[Callable[..., Any]], Any]:
    """Makes a function the operator `name`, which changes the arguments that it `mutates`, and no others.

    While a graph is traced, `made` stands for it: it takes those of the function's arguments that it names, and returns
    tensors of the shapes, dtypes and devices of its results.
    """

    def define(function: Callable[..., Any]) -> Any:
        defined = torch.library.custom_op(f"kvcomp::{name}", function, mutates_args=mutates)
        taken, named = signature(function), signature(made).parameters

        def traced(*args: Any, **kwargs: Any) -> Any:
            bound = taken.bind(*args, **kwargs)
            bound.apply_defaults()
            return made(**{argument: bound.arguments[argument] for argument in named})

        defined.register_fake(traced)
        return defined

    return define
