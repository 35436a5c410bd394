"""Memory as the allocator sees it."""

from __future__ import annotations

import gc
import types
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor


def reachable_bytes(root: Any) -> int:
    """Bytes of all distinct tensor storages that can be reached from an object, whatever it declares; without what
    kernels remember of a layout, which all layers of the process share (`segments.memo`)."""
    skip = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.FrameType, WeakKeyDictionary)
    seen, storages, todo = {id(root)}, {}, [root]
    while todo:
        thing = todo.pop()
        if isinstance(thing, Tensor):
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
            continue
        for child in gc.get_referents(thing):
            if id(child) not in seen and not isinstance(child, skip):
                seen.add(id(child))
                todo.append(child)
    return sum(storages.values())
