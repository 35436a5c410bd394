"""Layers that cache latents (MLA), which decode steps attend to as they are: queries are absorbed, outputs expanded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kvcomp.cache.layer import LayerStore, Shared
from kvcomp.stages.plan import LayerPlan
from kvcomp.state import State

from .handles import Call, Handle
from .latent_handles import LatentHandles
from .layer import CompressedLayer
from .masks import Seen, read_mask

MANY = 128  # queries from which on it is cheaper to expand the latents of all tokens than to attend to them as they are


class LatentLayer(LatentHandles, CompressedLayer):
    """A layer of one stream, keys [c, r] and values c.

    Prompts are expanded, as is cheaper; so is everything where the module's own expansion could not be followed, which
    decodes all tokens in every step. `blind`: tokens came in such a forward, whose mask nobody read: some may be
    padding.
    """

    def __init__(
        self,
        plan: LayerPlan,
        max_tokens: int | None,
        prefill_chunk: int | None = None,
        choices: dict[int, Shared] | None = None,
    ) -> None:
        super().__init__(replace(plan, latent=True), max_tokens, prefill_chunk, choices)

    def reset(self) -> None:
        self.blind = False
        super().reset()

    def expanded(self) -> None:
        super().expanded()
        self.plan = replace(self.plan, latent=False)
        self.store = LayerStore(self.plan, self.choices)

    def hold(self, latents: Tensor, values: Tensor) -> tuple[Handle, Handle]:
        """Take keys [c, r] and values c, as `update` takes c and r."""
        return CompressedLayer.update(self, latents, values)

    # -- attention ------------------------------------------------------------------------------------------------

    def attention(self, call: Call) -> tuple[Tensor, Tensor | None]:
        if not self.latent or (call.latent is not None and not self._hides(call)):
            return super().attention(call)
        latents = super().dense(0)
        both = (self._part(latents, 0), self._part(latents, 1)) if call.latent is None else (latents, latents)
        answer = call.dense_behind(*both)
        self.blind = True
        self._hold(None, call, call.query.shape[-1] ** -0.5 if call.scaling is None else call.scaling)
        return answer

    def _hides(self, call: Call) -> bool:
        """Whether the mask may hide tokens that are held, as padding that came unseen, or heads are not those of the
        queries."""
        assert call.latent is not None
        if call.query.shape[1] != call.latent.heads:
            return True
        if not self.blind or call.mask is None:
            return False
        past = int(self.get_seq_length()) - call.query.shape[2]
        facts = read_mask(call.mask, past, call.query.shape[2]).facts
        return facts is not None and bool((facts.counts != past).any())

    def expands(self, n: int, tracked: bool, valid: Tensor | None = None, seen: Seen | None = None) -> bool:
        if not self.latent or self.plan.policies:
            return False
        return n >= MANY or (tracked and self.plan.selector is None)  # gradients flow through what is expanded

    def commit(self) -> None:
        self.blind |= self.pending is not None and self.pending.scale is None
        super().commit()

    # -- what is held ---------------------------------------------------------------------------------------------

    def dense(self, which: int) -> Tensor:
        if not self.latent:
            return super().dense(which)
        return self._part(super().dense(0), which)

    def _part(self, latents: Tensor, which: int) -> Tensor:
        """c (0) or r (1) of [c, r] [..., R + Dr]."""
        rank = self._store.v_dim
        return latents[..., rank:] if which else latents[..., :rank]

    def nothing(self, which: int) -> torch.Size:
        store = self._store
        if not self.latent:
            return super().nothing(which)
        return torch.Size((store.rows, store.heads, 0, store.k_dim - store.v_dim if which else store.v_dim))

    def decoded(self, which: int) -> Tensor:
        return self._part(super().decoded(0), which) if self.latent else super().decoded(which)

    def state(self) -> dict[str, Any]:
        return {**super().state(), "blind": self.blind}

    def restore(self, state: Mapping[str, Any], device: torch.device) -> None:
        heads = State.of(state, f"layer {self.plan.layer}").part("store").get("heads")
        if self.latent and isinstance(heads, int) and heads > 1:
            self.expanded()
        super().restore(state, device)
        given = State.of(state, f"layer {self.plan.layer}")
        self.blind = given.flag("blind") if "blind" in given else True  # of caches saved when all were expanded
