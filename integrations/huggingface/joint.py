"""Layers of plain attention whose K and V the stack turns into latents: see `kvcomp.stages.joint`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kvcomp.cache.restoring import WIDEST
from kvcomp.errors import KvcompError, UnsupportedError
from kvcomp.ledger import storage_bytes
from kvcomp.stages.joint import JointMaps
from kvcomp.state import State

from .handles import Call, Handle
from .latent import MANY
from .layer import CompressedLayer
from .masks import Seen
from .pending import check_pair
from .reconstruct import RepeatLayer

SHIFTED = {"softcap": "capped logits", "s_aux": "learned sinks"}  # which a constant of all tokens' logits would change


@dataclass(frozen=True)
class Joined:
    """How a layer's keys and values follow from its latents, as `Expansion` says it of a model's own.

    newest: the latents of the newest chunk, and its K and V as they came, which need not be made of them again.
    """

    maps: JointMaps
    newest: tuple[Tensor, tuple[Tensor, Tensor]] | None = None
    expands: bool = True

    @property
    def heads(self) -> int:
        return len(self.maps.keys)

    @property
    def weight(self) -> Tensor:
        return self.maps.write

    def absorbed(self, queries: Tensor) -> Tensor:
        return self.maps.absorbed(queries)

    def output(self, out: Tensor) -> Tensor:
        return self.maps.output(out)

    def expanded(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        if not self.expands:
            return latents, latents
        if self.newest is not None and latents is self.newest[0]:
            return self.newest[1]
        return self.maps.expanded(latents)

    def known(self) -> Joined:
        return replace(self, expands=False)


class JointLayer(CompressedLayer):
    """A layer that is given keys and values of heads, and holds latents c [B, 1, N, n] as keys and as values.

    A prompt is attended to as it came; later queries, fewer than 128 at once, see the latents as
    they are.
    """

    came: tuple[Tensor, tuple[Tensor, Tensor]] | None = None  # as `Joined.newest`
    sizes: tuple[int, int, int] | None = None  # KV heads, channels of keys and of values
    joint: JointMaps | None = None

    @property
    def maps(self) -> JointMaps:
        assert self.joint is not None
        return self.joint

    def reset(self) -> None:
        self.came = self.sizes = self.joint = None
        super().reset()

    def _update(self, key_states: Tensor, value_states: Tensor) -> tuple[Handle, Handle]:
        self.check_heads(key_states, value_states)
        latents = self.maps.latents(key_states, value_states)
        self.came = latents, (key_states, value_states)
        return super()._update(latents, latents)

    def handles(self, keys: torch.Size, values: torch.Size, length: int) -> tuple[Handle, Handle]:
        assert self.came is not None
        k, v = self.came[1]
        return super().handles(k.shape, v.shape, length)

    def newest(self) -> tuple[Tensor, Tensor]:
        assert self.came is not None
        return self.came[1]

    # -- attention ------------------------------------------------------------------------------------------------

    def _attention(self, call: Call, tracked: bool) -> tuple[Tensor, Tensor | None]:
        given = next((name for name in SHIFTED if call.kwargs.get(name) is not None), None)
        if given is not None:
            raise UnsupportedError(
                f"{type(call.module).__name__} has {SHIFTED[given]}, for which the logits over latents that "
                f"{self.name} makes lack a constant: leave {self.name} out of the stack"
            )
        answer = super()._attention(call._replace(latent=Joined(self.maps, self.came)), tracked)
        if self.pending is None:
            self.came = None
        return answer

    def expands(self, n: int, tracked: bool, valid: Tensor | None = None, seen: Seen | None = None) -> bool:
        return not self.plan.policies and (n >= MANY or (tracked and self.plan.selector is None))

    def dense(self, which: int) -> Tensor:
        return self.maps.expanded(super().dense(0))[which]

    # -- what is held ---------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """What the stack calls the stage."""
        assert self.plan.joint is not None
        return self.plan.joint.name

    def check_shapes(self, keys: Tensor, values: Tensor) -> None:
        """Of latents, whose keys and values `check_heads` compared."""

    def check_heads(self, keys: Tensor, values: Tensor) -> None:
        """Raise a KvcompError unless keys [B, H, n, Dk] and values [B, H, n, Dv] are like those that came."""
        check_pair(keys, values)
        if self.is_initialized:
            self.check_rows(keys.shape[0])
        given = (keys.shape[1], keys.shape[3], values.shape[3])
        if self.sizes is not None and given != self.sizes:
            raise KvcompError(
                "the cache holds latents of {} KV heads of {} and {} channels, but the model has {} of {} and {}: it "
                "was filled by another model; make a cache for each".format(*self.sizes, *given)
            )
        if self.sizes is None:
            assert self.plan.joint is not None
            self.sizes, self.joint = given, self.plan.joint.maps(self.plan.layer, *given, keys.device)

    def check_loaded(self, keys: Tensor, values: Tensor) -> None:
        self.check_heads(keys, values)
        latents = self.maps.latents(keys, values)
        super().check_loaded(latents, latents)

    def nothing(self, which: int) -> torch.Size:
        assert self.sizes is not None
        heads, k_dim, v_dim = self.sizes
        return torch.Size((self._store.rows, heads, 0, v_dim if which else k_dim))

    def decoded(self, which: int) -> Tensor:
        return self.maps.expanded(super().decoded(0))[which]

    def held(self, seen: set[int]) -> dict[str, int]:
        parts = super().held(seen)
        if self.joint is not None:
            parts["constants"] = parts.get("constants", 0) + storage_bytes(self.joint.tensors, seen)
        if self.came is not None:
            parts["pending"] = parts.get("pending", 0) + storage_bytes(self.came[1], seen)
        return parts

    def state(self) -> dict[str, Any]:
        return {**super().state(), "sizes": None if self.sizes is None else list(self.sizes)}

    def restore(self, state: Mapping[str, Any], device: torch.device) -> None:
        super().restore(state, device)
        if not self.is_initialized:
            return
        given = State.of(state, f"layer {self.plan.layer}")
        sizes = given.sequence("sizes", 3)
        given.require(all(type(n) is int and 0 < n <= WIDEST for n in sizes), f"sizes are {sizes}")
        heads, k_dim, v_dim = sizes
        given.require(heads * (k_dim + v_dim) == self._store.k_dim, f"sizes are {sizes} of {self._store.k_dim}")
        assert self.plan.joint is not None
        self.sizes = heads, k_dim, v_dim
        self.joint = self.plan.joint.maps(self.plan.layer, heads, k_dim, v_dim, device)


class RepeatJoint(RepeatLayer):
    """A `RepeatLayer` after latents [1, 1, n, channels] of such a layer."""

    def __init__(self, latents: Tensor, maps: JointMaps) -> None:
        super().__init__(latents, latents)
        self.maps = maps

    def take(self, keys: Tensor, values: Tensor) -> None:
        latents = self.maps.latents(keys, values)
        super().take(latents, latents)

    def attention(self, call: Call) -> tuple[Tensor, Tensor | None]:
        return super().attention(call._replace(latent=Joined(self.maps)))
