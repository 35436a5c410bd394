"""Handles that stand in for a layer's keys and values, and the base of the layers that give them out."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from transformers.cache_utils import CacheLayerMixin

Attention = Callable[..., tuple[Tensor, Tensor | None]]


class Call(NamedTuple):
    """What a model asks of its attention function: query [B, Hq, n, Dk], and `base`, its own implementation."""

    base: Attention
    module: torch.nn.Module
    query: Tensor
    mask: Tensor | None
    scaling: float | None
    kwargs: dict[str, Any]

    def dense(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor | None]:
        """The model's own attention over keys [B, Hkv, N, Dk] and values [B, Hkv, N, Dv]."""
        return self.base(self.module, self.query, keys, values, self.mask, scaling=self.scaling, **self.kwargs)


@torch.compiler.disable
def apart(function: Callable[..., Any], *args: Any) -> Any:
    """The function, outside of any graph. Eager steps do without: this costs as much as an operation on tensors."""
    return function(*args)


class HandleLayer(CacheLayerMixin):
    """A cache layer whose `update` gives handles, so that the attention over them is its own.

    As it stands it serves one forward pass: nothing came before the chunk that it is given.
    """

    is_sliding = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(  # type: ignore[override]
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Handle, Handle]:
        """Take keys [B, Hkv, n, Dk] and values [B, Hkv, n, Dv]; returns handles for all K and all V."""
        self.lazy_initialization(key_states, value_states)
        self.take(key_states, value_states)
        return self.handles(key_states.shape, value_states.shape, key_states.shape[2])

    def take(self, keys: Tensor, values: Tensor) -> None:
        """Keep what `update` is given."""

    def handles(self, keys: torch.Size, values: torch.Size, length: int) -> tuple[Handle, Handle]:
        """Handles for K and V of `length` tokens, of which the newest have these shapes."""
        return Handle(self, 0, keys, length), Handle(self, 1, values, length)

    def answer(self, call: Call) -> tuple[Tensor, Tensor | None]:
        """`attention`, where graphs may have to break for it."""
        return apart(self.attention, call) if torch.compiler.is_compiling() else self.attention(call)

    @abstractmethod
    def attention(self, call: Call) -> tuple[Tensor, Tensor | None]:
        """Attention over what the handles stand for, [B, n, Hq, Dv], and its weights where there are any."""

    @abstractmethod
    def dense(self, which: int) -> Tensor:
        """All K (0) or V (1) as a tensor."""

    def get_seq_length(self) -> int:
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1


class Handle:
    """Stands in for all K or all V of a layer. Its shape is logical; touching its content decodes, with a warning."""

    def __init__(self, layer: HandleLayer, which: int, new: torch.Size, length: int) -> None:
        self.layer, self.which, self.new, self.length = layer, which, new, length

    ndim = 4

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.new[:2], self.length, self.new[3]))

    @property
    def dtype(self) -> torch.dtype:
        return self.layer.dtype

    @property
    def device(self) -> torch.device:
        return self.layer.device

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return 4

    def dense(self) -> Tensor:
        return self.layer.dense(self.which)

    def __getitem__(self, index: Any) -> Tensor:
        return self.dense()[index]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.dense(), name)

    @classmethod
    def __torch_function__(cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(lambda x: x.dense() if isinstance(x, Handle) else x, (args, kwargs or {}))
        return func(*args, **kwargs)
