"""A device whose numbers nobody can look at stands for a GPU: what would wait for one, or mix devices, raises."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

FAR = torch.device("meta")  # shapes and dtypes; .item(), nonzero and copies to the host raise by themselves
COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class FarDevice(TorchDispatchMode):
    """Inside, an operation on tensors of the host and on such of `FAR` raises, unless it copies from the host, or has a
    single number of it. `moved`: how many copies there were."""

    def __init__(self) -> None:
        super().__init__()
        self.moved = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        devices = {x.device.type for x in tensors if x.dim() or x.device == FAR}
        if func in COPIES:
            to = args[0].device if func is COPIES[1] else torch.device(kwargs.get("device") or args[0].device)
            if to.type == "cpu" and FAR.type in devices:
                raise RuntimeError(f"{func} waits for the device")
            self.moved += to == FAR and "cpu" in devices
        elif len(devices) > 1:
            raise RuntimeError(f"{func} is given tensors of the host and of the device")
        return func(*args, **kwargs)


NO_LAUNCH = ("empty", "new_empty", "empty_like", "empty_strided", "_unsafe_view", "lift_fresh", "detach")
SEVERAL = {"attend_pages": 2, "attention_received": 3}  # operators of ours that launch more than one kernel


class Counted(FarDevice):
    """`FarDevice` that counts what is launched there, and remembers the largest tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[str] = []
        self.largest, self.largest_of = 0, ""

    @property
    def launches(self) -> int:
        """Kernels, and copies from the host."""
        return sum(SEVERAL.get(name, 1) for name in self.operators)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = super().__torch_dispatch__(func, types, args, kwargs)
        name = func.overloadpacket.__name__
        tensors = [x for x in tree_leaves((args, kwargs, found)) if isinstance(x, torch.Tensor)]
        if not func.is_view and name not in NO_LAUNCH and any(x.device == FAR for x in tensors):
            self.operators.append(name)
        results = [] if func.is_view else [x for x in tree_leaves(found) if isinstance(x, torch.Tensor)]
        made = max((x.untyped_storage().nbytes() for x in results), default=0)
        if made > self.largest:
            self.largest, self.largest_of = made, name
        return found
