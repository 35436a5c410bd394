"""What Python, PEFT and pickle ask of a cache, besides transformers."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

from transformers.cache_utils import Cache

from kvcomp.errors import KvcompError, UnsupportedError
from kvcomp.modes import normal_tensors

from .contents import Contents


class Surface(Cache):
    """A cache that is iterated, copied and refused to be pickled."""

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        """Per layer, as of DynamicCache: all keys and values as tensors, and the sliding window where it has one."""
        for layer in self.layers:
            both = getattr(layer, "keys", None), getattr(layer, "values", None)
            keys, values = (x.dense() if isinstance(x, Contents) else x for x in both)
            yield keys, values, getattr(layer, "_sliding_window_tensor", None)

    @property
    def max_cache_len(self) -> int:
        """Only static caches have it; PEFT asks for it where it is about to put a cache of its own in place."""
        raise _NoAttribute(
            "max_cache_len: PEFT's prefix tuning replaces an empty past_key_values by its own cache, so nothing "
            "would be compressed: generate without past_key_values, or use LoRA or prompt tuning"
        )

    def __copy__(self) -> Surface:
        twin = type(self).__new__(type(self))
        vars(twin).update(vars(self))
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> Surface:
        memo[id(self)] = twin = type(self).__new__(type(self))
        with normal_tensors():
            vars(twin).update({name: deepcopy(value, memo) for name, value in vars(self).items()})
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise KvcompError(
            "a CompressedCache cannot be pickled, as it belongs to a model: use cache.save(path) and "
            "CompressedCache.load(path, model)"
        )


class _NoAttribute(UnsupportedError, AttributeError):
    """An attribute that is missing for a reason."""
