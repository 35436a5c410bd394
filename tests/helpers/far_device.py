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
