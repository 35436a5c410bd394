"""Adapters of PEFT in a model: which of its parameters it computes with. PEFT itself is not imported."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor

WRAPPED = ("base_layer", "original_module")  # what a module of PEFT calls the module whose place it takes


def unwrapped(model: Any) -> Any:
    """The model that a PeftModel or torch.compile wraps; other models as they are."""
    model = getattr(model, "_orig_mod", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def active_adapters(module: torch.nn.Module) -> tuple[str, ...]:
    """Names of the adapters that a module adds to the weights of the one that it wraps."""
    if not any(name in module._modules for name in WRAPPED) or getattr(module, "_disable_adapters", False):
        return ()
    active = getattr(module, "_active_adapter", ())
    merged = getattr(module, "merged_adapters", ())
    return tuple(name for name in ([active] if isinstance(active, str) else active) if name not in merged)


def adapters_of(attention: torch.nn.Module) -> tuple[tuple[str, ...], ...]:
    """The active adapters of an attention module's projections."""
    return tuple(active_adapters(child) for child in attention.children())


def used_tensors(model: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers that a model computes with, under the names that they have without adapters.

    Those of adapters are there only while they are active, and in place of an adapter's name stands its place among the
    active ones: an adapter is known by its numbers.
    """
    wrappers = {path: module for path, module in model.named_modules() if any(n in module._modules for n in WRAPPED)}
    temporary = {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        for name in module._non_persistent_buffers_set
    }
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        used = None if name in temporary else _used_name(name, wrappers)
        if used is not None:
            yield used, tensor
    for path, module in wrappers.items():
        scaling = getattr(module, "scaling", None)
        for i, adapter in enumerate(active_adapters(module)):
            if isinstance(scaling, dict) and isinstance(scaling.get(adapter), int | float):
                yield f"{path}.scaling.{i}", torch.tensor(float(scaling[adapter]), dtype=torch.float64, device="cpu")


def _used_name(name: str, wrappers: dict[str, torch.nn.Module]) -> str | None:
    """The name of a tensor without adapters; None: the model does not compute with it now."""
    parts, used, at = name.split("."), list[str](), 0
    while at < len(parts):
        wrapper, part = wrappers.get(".".join(parts[:at])), parts[at]
        if wrapper is None:
            used.append(part)
            at += 1
            continue
        active = active_adapters(wrapper)
        others = wrapper._modules.get("modules_to_save")  # whole modules that adapters bring
        replaced = isinstance(others, torch.nn.ModuleDict) and any(adapter in others for adapter in active)
        if part in WRAPPED:
            if replaced:
                return None
            at += 1
        elif not any(rest in active for rest in parts[at:]):
            return None
        elif part == "modules_to_save":
            at += 2
        else:
            names = (str(active.index(rest)) if rest in active else rest for rest in parts[at:])
            return ".".join([*used, *names])
    return ".".join(used)
