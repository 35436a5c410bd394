"""How attention modules expand latents (MLA), followed without computing it.

`expand_kv` of transformers' modules makes keys and values of all heads of a latent c and a rotary key r (`expansion`).
With handles for these it runs as it is, and what it makes is remembered instead of computed, so that attention can be
told the `Expansion`. Whatever else a module does with them (a bias, a norm, an adapter, a hook, quantized weights)
computes them: then attention is given tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .expansion import Expansion
from .handles import Handle

CONCATENATIONS = (torch.cat, torch.concat, torch.concatenate)


class Followed(Handle):
    """What stands for a tensor that `expand_kv` makes, or takes: the tensor itself only where its content is used."""

    @property
    def pure(self) -> bool:
        """Whether nothing has looked at its content, which may have changed it."""
        return True

    @classmethod
    def __torch_function__(cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = _follow(func, args, kwargs or {})
        return super().__torch_function__(func, types, args, kwargs) if found is None else found


class Latent(Followed):
    """All latents c [B, 1, N, R] of a layer."""


class Rotary(Followed):
    """All rotary keys r [B, 1, N, Dr] of a layer."""

    def expand(self, *sizes: Any) -> Any:
        wanted = _sizes(sizes)
        rows, _, n, dim = self.shape
        if len(wanted) == 4 and wanted[1] > 0:
            same = (a in (-1, b) for a, b in zip(wanted, (rows, wanted[1], n, dim), strict=True))
            return Spread(self, wanted[1]) if all(same) else self.dense().expand(*sizes)
        return self.dense().expand(*sizes)


class Made(Followed):
    """A tensor that is made of others once it is looked at, and is that tensor from then on."""

    def __init__(self, source: Followed, shape: tuple[int, ...]) -> None:
        super().__init__(source.layer, source.which, torch.Size(shape), source.length)
        self.source, self._tensor = source, None

    _tensor: Tensor | None

    @property
    def shape(self) -> torch.Size:
        return self.new

    @property
    def pure(self) -> bool:
        return self._tensor is None and self.source.pure

    def dense(self) -> Tensor:
        if self._tensor is None:
            self._tensor = self.make(self.source.dense())
        return self._tensor

    def make(self, source: Tensor) -> Tensor:
        """The tensor, of that of its source: a view of it, where torch would give one."""
        raise NotImplementedError


class Spread(Made):
    """Rotary keys [B, H, N, Dr], the same for all heads."""

    def __init__(self, rotary: Rotary, heads: int) -> None:
        rows, _, n, dim = rotary.shape
        super().__init__(rotary, (rows, heads, n, dim))

    def make(self, source: Tensor) -> Tensor:
        return source.expand(-1, self.new[1], -1, -1)


class Projected(Made):
    """W c [B, 1, N, H * E]."""

    def __init__(self, latent: Latent, weight: Tensor) -> None:
        super().__init__(latent, (*latent.shape[:3], weight.shape[0]))
        self.weight = weight

    def make(self, source: Tensor) -> Tensor:
        return F.linear(source, self.weight)

    def view(self, *sizes: Any) -> Any:
        rows, _, n, outputs = self.shape
        wanted = _sizes(sizes)
        if self.pure and len(wanted) == 4 and tuple(wanted[:2]) == (rows, n):
            heads, each = wanted[2:]
            heads = outputs // each if heads == -1 and each > 0 else heads
            each = outputs // heads if each == -1 and heads > 0 else each
            if heads * each == outputs:
                return ByHead(self, heads, each)
        return self.dense().view(*sizes)

    reshape = view


class ByHead(Made):
    """W c of each head, [B, N, H, E], or [B, H, N, E] where `turned`."""

    source: Projected

    def __init__(self, source: Projected, heads: int, each: int, turned: bool = False) -> None:
        rows, _, n, _ = source.shape
        super().__init__(source, (rows, heads, n, each) if turned else (rows, n, heads, each))
        self.heads, self.each, self.turned = heads, each, turned

    def make(self, source: Tensor) -> Tensor:
        rows, _, n, _ = source.shape
        x = source.view(rows, n, self.heads, self.each)
        return x.transpose(1, 2) if self.turned else x

    def transpose(self, one: int, other: int) -> Any:
        if self.pure and {one % 4, other % 4} == {1, 2}:
            return ByHead(self.source, self.heads, self.each, not self.turned)
        return self.dense().transpose(one, other)

    def split(self, sizes: Any, dim: int = 0) -> Any:
        if self.pure and self.turned and dim % 4 == 3 and isinstance(sizes, list | tuple) and sum(sizes) == self.each:
            ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
            return tuple(Channels(self, slice(end - size, end)) for size, end in zip(sizes, ends, strict=True))
        return self.dense().split(sizes, dim)

    def __getitem__(self, index: Any) -> Any:
        channels = _channels(index, self.each)
        return Channels(self, channels) if self.pure and self.turned and channels else self.dense()[index]

    def new_empty(self, *sizes: Any, **options: Any) -> Any:
        wanted = _sizes(sizes)
        if self.pure and self.turned and not options and len(wanted) == 4 and wanted[:3] == tuple(self.shape[:3]):
            return Assembled(self, wanted[3])
        return self.dense().new_empty(*sizes, **options)


class Channels(Made):
    """Some channels of each head, [B, H, N, channels]."""

    source: ByHead

    def __init__(self, source: ByHead, channels: slice) -> None:
        super().__init__(source, (*source.shape[:3], channels.stop - channels.start))
        self.channels = channels

    def make(self, source: Tensor) -> Tensor:
        return source[..., self.channels]


class Assembled(Made):
    """Keys [B, H, N, D], of which a run of channels after another is filled in."""

    source: ByHead

    def __init__(self, source: ByHead, dim: int, parts: tuple[Made, ...] = ()) -> None:
        super().__init__(source, (*source.shape[:3], dim))
        self.parts = list(parts)

    @property
    def filled(self) -> int:
        """Channels so far."""
        return sum(part.shape[3] for part in self.parts)

    @property
    def pure(self) -> bool:
        return super().pure and all(part.pure for part in self.parts)

    def make(self, source: Tensor) -> Tensor:
        made, at = source.new_empty(self.new), 0
        for part in self.parts:
            made[..., at : at + part.shape[3]].copy_(part.dense())
            at += part.shape[3]
        return made

    def fill(self, channels: slice, x: Any) -> bool:
        """Whether x could be put there without a look at it."""
        next_one = channels.start == self.filled and isinstance(x, Channels | Spread) and x.layer is self.layer
        fits = next_one and x.pure and self.pure and x.shape == (*self.shape[:3], channels.stop - channels.start)
        if fits:
            self.parts.append(x)
        return fits

    def __getitem__(self, index: Any) -> Any:
        channels = _channels(index, self.shape[3])
        return Place(self, channels) if self.pure and channels else self.dense()[index]

    def __setitem__(self, index: Any, x: Any) -> None:
        channels = _channels(index, self.shape[3])
        if channels is None or not self.fill(channels, x):
            self.dense()[index] = x.dense() if isinstance(x, Handle) else x

    def pairs(self, values: Any) -> bool:
        """Whether these keys and `values` are an expansion of the same latents, all of them as it was followed."""
        if not (self.pure and isinstance(values, Channels) and values.pure and len(self.parts) == 2):
            return False
        keys, rotary = self.parts
        weights = values.source.source
        return (
            self.filled == self.shape[3]
            and isinstance(keys, Channels)
            and isinstance(rotary, Spread)
            and keys.source.source is weights is self.source.source
            and keys.shape[1] == values.shape[1] == rotary.shape[1]
            and rotary.source.length == weights.length
        )

    def expansion(self, values: Any) -> Expansion:
        keys, rotary = self.parts
        assert isinstance(keys, Channels)
        assert isinstance(values, Channels)
        weight = self.source.source.weight
        return Expansion(weight, self.shape[1], keys.channels, values.channels, rotary.shape[3])


class Place(Made):
    """Some channels of keys that are being filled in."""

    source: Assembled

    def __init__(self, source: Assembled, channels: slice) -> None:
        super().__init__(source, (*source.shape[:3], channels.stop - channels.start))
        self.channels = channels

    def make(self, source: Tensor) -> Tensor:
        return source[..., self.channels]

    def copy_(self, x: Any, *options: Any) -> Any:
        if self.pure and self.source.fill(self.channels, x):
            return self
        return self.dense().copy_(x.dense() if isinstance(x, Handle) else x, *options)


def _follow(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a function of torch gives, where that is followed; None: it is not."""
    if func is F.linear and args and isinstance(args[0], Latent):
        weight: Any = args[1] if len(args) > 1 else kwargs.get("weight")
        bias = args[2] if len(args) > 2 else kwargs.get("bias")
        return Projected(args[0], weight) if bias is None and _plain(weight, args[0]) else None
    if func in (torch.split, torch.functional.split) and args and isinstance(args[0], ByHead):
        return args[0].split(*args[1:], **{"sizes" if k.startswith("split") else k: v for k, v in kwargs.items()})
    if func in CONCATENATIONS and args:
        return _joined(args[0], args[1] if len(args) > 1 else kwargs.get("dim", 0))
    return None


def _joined(parts: Any, dim: int) -> Any:
    """The keys that are made of some channels of heads and rotary keys; None: something else."""
    first, second = parts if len(parts) == 2 else (None, None)
    if not (isinstance(first, Channels) and isinstance(second, Spread) and dim % 4 == 3):
        return None
    fits = first.pure and second.pure and first.shape[:3] == second.shape[:3]
    return Assembled(first.source, first.shape[3] + second.shape[3], (first, second)) if fits else None


def _plain(weight: Any, latent: Latent) -> bool:
    """Whether a projection's weight is a matrix of numbers, for the latents' channels."""
    known = type(weight) in (Tensor, torch.nn.Parameter) and weight.dim() == 2 and weight.is_floating_point()
    return known and weight.shape[1] == latent.shape[3] and weight.device == latent.device


def _sizes(sizes: tuple[Any, ...]) -> tuple[int, ...]:
    """Sizes that methods of tensors are given, one by one or together."""
    return tuple(sizes[0]) if len(sizes) == 1 and isinstance(sizes[0], list | tuple) else tuple(sizes)


def _channels(index: Any, dim: int) -> slice | None:
    """The run of the last dimension that x[..., run] is of; None for anything else."""
    if isinstance(index, tuple) and len(index) == 2 and index[0] is Ellipsis and isinstance(index[1], slice):
        start, stop, step = index[1].indices(dim)
        return slice(start, stop) if step == 1 and start <= stop else None
    return None
