"""Layers that are the library's own, as they come back from a file: attributes that they have, of the right kinds."""

from __future__ import annotations

import dis
from inspect import isfunction
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from kvcomp.state import FLOATS, State, described


def restore_library(layer: Any, state: State, device: torch.device) -> None:
    """Give a new layer the attributes that a state has, on `device`; the state's tensors lie on the host.

    Raises:
        DamagedError: attributes that the layer does not have, or values that it cannot have.
    """
    known = {*vars(layer), *_assigned(type(layer))}
    state.only(*known, "dtype")  # which layers had before transformers 5.24
    for name, value in state.items():
        state.require(_can_be(value, vars(layer).get(name)), f"{name} is {described(value)}")
    if isinstance(state.get("keys"), Tensor) or state.get("is_initialized") != vars(layer).get("is_initialized"):
        _check_attention(layer, state)
    if isinstance(state.get("conv_states"), dict):
        _check_linear(state)
    own = dict(state)
    if "dtype" not in known:
        own.pop("dtype", None)
    elif isinstance(state.get("keys"), Tensor):
        own["dtype"] = state["keys"].dtype
    vars(layer).update(tree_map(lambda x: _on(x, device), own))


def _on(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.device):
        return device
    return value.to(device) if isinstance(value, Tensor) else value


def _assigned(kind: type) -> frozenset[str]:
    """Attributes that the methods of a class assign, such as those that the first tokens bring."""
    functions = [value for base in kind.__mro__ for value in vars(base).values() if isfunction(value)]
    return frozenset(x.argval for f in functions for x in dis.get_instructions(f) if x.opname == "STORE_ATTR")


def _can_be(value: Any, new: Any) -> bool:
    """Whether an attribute that is `new` in a new layer can be `value` in a used one: counters start at 0, what comes
    with the first tokens is None, and other numbers and tensors are constants."""
    if isinstance(new, Tensor):
        return isinstance(value, Tensor) and value.dtype == new.dtype and torch.equal(value, new.cpu())
    if isinstance(new, dict):
        return isinstance(value, dict) and value.keys() == new.keys() and all(_can_be(value[k], new[k]) for k in new)
    if isinstance(new, bool):
        return isinstance(value, bool)
    if new is None or new == 0:
        counts = type(value) is int and value >= 0
        return counts if new == 0 else counts or value is None or isinstance(value, Tensor | torch.dtype | torch.device)
    return type(value) is type(new) and bool(value == new)


def _check_attention(layer: Any, state: State) -> None:
    """Keys [B, H, n, Dk] and values [B, H, n, Dv], of which sliding layers hold a window."""
    state.require(state.flag("is_initialized"), "is_initialized is False, but there are keys")
    if isinstance(state["keys"], Tensor) and state["keys"].shape == (0,):  # what tokens are added to
        return
    keys = state.tensor("keys", (None, None, None, None), *FLOATS)
    state.tensor("values", (*keys.shape[:3], None), keys.dtype)
    dtype = state.get("dtype", keys.dtype)
    state.require(dtype == keys.dtype, f"keys are {described(keys)} in a layer of {dtype}")
    window = getattr(layer, "sliding_window", None)
    if window is not None and "cumulative_length" in state:
        seen, held = state.integer("cumulative_length", 0), keys.shape[2]
        least = min(seen, window - 1)
        most = seen if window == 1 or state.get("record_past") else least
        state.require(least <= held <= most, f"{held} of {seen} tokens are held in a window of {window}")


def _check_linear(state: State) -> None:
    """Convolutional and recurrent states [B, ...]: those that are said to be there are, and no others."""
    rows = set()
    for name in ("conv_states", "recurrent_states"):
        said = state.get(f"is_{name}_initialized")
        for i, tensor in state[name].items():
            there = isinstance(tensor, Tensor)
            state.require(said is None or said[i] is there, f"{name} {i} is {described(tensor)}, against what it says")
            if there:
                state.require(tensor.dim() > 1 and tensor.dtype in FLOATS, f"{name} {i} is {described(tensor)}")
                rows.add(len(tensor))
    state.require(len(rows) < 2, f"its states have {' and '.join(map(str, sorted(rows)))} rows")
