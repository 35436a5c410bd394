"""Handles that replace a layer's keys and values, and the base of the layers that give them out."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from transformers.cache_utils import CacheLayerMixin
from transformers.utils import output_capturing

from kvcomp.stages import Choice

from .expansion import Expansion, Latents
from .keywords import CHOICES, choose, chosen
from .masks import Mask, chunk_mask, read_mask

Attention = Callable[..., tuple[Tensor, Tensor | None]]
NOTHING = nullcontext()


def given_dtypes(device: torch.device) -> AbstractContextManager[Any]:
    """Inside, operations run in the dtypes of what they are given, whatever torch.autocast says around."""
    kind = device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else NOTHING


def as_called(function: Attention, device: torch.device) -> Attention:
    """The function, which runs under the autocast of now also where `given_dtypes` ended it."""
    kind = device.type
    dtype = torch.get_autocast_dtype(kind)

    def run(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        with torch.autocast(kind, dtype):
            return function(*args, **kwargs)

    return run


class Call(NamedTuple):
    """What a model asks of its attention function: query [B, Hq, n, Dk], and `base`, its own implementation, which
    transformers knows by `name`.

    latent: how the module's keys and values follow from what the layer holds, where that is latents.
    """

    base: Attention
    module: torch.nn.Module
    query: Tensor
    mask: Mask | None
    scaling: float | None
    kwargs: dict[str, Any]
    name: str
    latent: Latents | None = None

    def dense(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor | None]:
        """The model's own attention over keys [B, Hkv, N, Dk] and values [B, Hkv, N, Dv], as the layer holds them."""
        if self.latent is not None:
            keys, values = self.latent.expanded(keys)
        return self.base(self.module, self.query, keys, values, self.mask, scaling=self.scaling, **self.kwargs)

    def dense_behind(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor | None]:
        """As `dense`, over N tokens of which the queries are the newest, masked by our own mask function."""
        mask, n, length = self.mask, self.query.shape[2], keys.shape[2]
        if 1 < n < length and isinstance(mask, Tensor) and mask.dim() == 2:
            mask = chunk_mask(self.name, self.query, length, mask)
        return self._replace(mask=mask).dense(keys, values)

    def under_choice(self, length: int) -> Call:
        """The call with what the model's indexer chose of `length` tokens in its mask, for attention that knows no
        choices."""
        mask, asked = self.mask, {name: x for name, x in self.kwargs.items() if name in CHOICES and x is not None}
        kwargs = {name: x for name, x in self.kwargs.items() if name not in CHOICES}
        if asked:
            if (mask is None and self.causal) or (isinstance(mask, Tensor) and mask.dim() == 2):
                mask = chunk_mask(self.name, self.query, length, mask, whole=True)
            assert mask is None or isinstance(mask, Tensor)
            mask = choose(self.module, mask, self.query, length, asked)
        return self._replace(mask=mask, kwargs=kwargs)

    def choice(self, length: int, heads: int) -> Choice | None:
        """What a single query sees of `length` tokens, its own the last, in each stream of rows * heads; None: all."""
        seen, shown = None if self.mask is None else read_mask(self.mask, length - 1, 1), None
        if seen is not None and seen.shown is not None and seen.valid is not None:
            shown = torch.cat([seen.shown, seen.valid], 1).expand(self.query.shape[0], -1)
        return chosen(self.module, self.kwargs, shown, length, heads)

    @property
    def tracked(self) -> bool:
        """Whether the answer has a gradient, but for that of keys and values."""
        return self.query.requires_grad or (self.latent is not None and self.latent.weight.requires_grad)

    @property
    def asked(self) -> Tensor:
        """The queries of what the layer holds: absorbed, where that is latents."""
        return self.query if self.latent is None else self.latent.absorbed(self.query)

    @property
    def causal(self) -> bool:
        """Whether a query without mask sees no later token."""
        asked = self.kwargs.get("is_causal")
        return bool(getattr(self.module, "is_causal", True) if asked is None else asked)

    @property
    def wants_weights(self) -> bool:
        """Whether output_attentions=True was asked of an implementation that may give weights."""
        if self.name == "sdpa":
            return False
        config, collected = getattr(self.module, "config", None), _collected()
        asked = self.kwargs.get("output_attentions") or "attentions" in collected
        return bool(asked or getattr(config, "output_attentions", False))


def _collected() -> Mapping[str, Any]:
    """What transformers gathers from the modules of the forward that runs, by name: some models pass nothing on that
    says so."""
    collector = getattr(output_capturing, "_active_collector", None)
    return {} if collector is None else collector.get() or {}


@torch.compiler.disable
def outside_graph(function: Callable[..., Any], *args: Any) -> Any:
    """The function, outside of any graph. Eager steps do without: this costs as much as an operation on tensors."""
    return function(*args)


class HandleLayer(CacheLayerMixin):
    """A cache layer whose `update` gives handles, so that the attention over them is its own.

    As it stands it serves one forward pass: nothing came before the chunk that it is given.
    """

    is_sliding = False
    chooses = False  # whether attention follows what the model's own indexer chose

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
        """`attention`, where graphs may have to break for it, without autocast but in the base's own."""
        if torch.is_autocast_enabled(call.query.device.type):
            call = call._replace(base=as_called(call.base, call.query.device))
            with given_dtypes(call.query.device):
                return outside_graph(self.attention, call) if torch.compiler.is_compiling() else self.attention(call)
        return outside_graph(self.attention, call) if torch.compiler.is_compiling() else self.attention(call)

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
    """Replaces all K or all V of a layer. Its shape is logical; touching its content decodes, with a warning.

    It has the operators and methods of tensors, but is no `Tensor` to `isinstance`: dynamo could not follow that.
    """

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
        with given_dtypes(self.layer.device):
            return self.layer.dense(self.which)

    def pairs(self, values: Any) -> bool:
        """Whether these are all K and `values` all V of the same layer at the same time, so that it can answer."""
        return (
            isinstance(values, Handle)
            and values.layer is self.layer
            and (self.which, values.which) == (0, 1)
            and values.length == self.length
        )

    def expansion(self, values: Any) -> Expansion | None:
        """How these keys and `values`, their pair, follow from what the layer holds; None: they are that."""
        return None

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """As of tensors: the handle itself where nothing changes."""
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        changed = like.to(*args, **kwargs)
        same = changed is like or (changed.dtype, changed.device) == (self.dtype, self.device)
        return self if same and not kwargs.get("copy") else self.dense().to(*args, **kwargs)

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.dense())

    def __getitem__(self, index: Any) -> Tensor:
        return self.dense()[index]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.dense(), name)

    __hash__ = object.__hash__

    @classmethod
    def __torch_function__(cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(lambda x: x.dense() if isinstance(x, Handle) else x, (args, kwargs or {}))
        return func(*args, **kwargs)


def _decoding(name: str) -> Callable[..., Any]:
    """The operator of that name on what a handle stands for."""

    def apply(handle: Handle, *others: Any) -> Any:
        others = tuple(x.dense() if isinstance(x, Handle) else x for x in others)
        return getattr(handle.dense(), name)(*others)

    return apply


_PLAIN = ("eq", "ne", "lt", "le", "gt", "ge", "neg", "pos", "abs", "invert", "bool", "int", "float", "complex", "index")
_BOTH = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor", "lshift", "rshift")
for _name in (*_PLAIN, "contains", "array", "dlpack", "dlpack_device", *_BOTH, *("r" + _name for _name in _BOTH)):
    if hasattr(Tensor, f"__{_name}__"):
        setattr(Handle, f"__{_name}__", _decoding(f"__{_name}__"))
