"""Layers that are given latents, and give handles for them that are followed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .followed import Latent, Rotary
from .handles import Handle, HandleLayer


class LatentHandles(HandleLayer):
    """Layers that are given latents c [B, 1, n, R] and rotary keys r [B, 1, n, Dr], and hold keys [c, r] and values c,
    a view of them; unless it turns out that the model expands latents before it caches them."""

    latent = True

    def expanded(self) -> None:
        """Go on as a layer that is given keys and values of heads."""
        self.latent = False

    def update(  # type: ignore[override]
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Handle, Handle]:
        if self.latent and key_states.shape[1] > 1:
            self.expanded()
        if not self.latent:
            return super().update(key_states, value_states, *args, **kwargs)
        latents, rank = torch.cat([key_states, value_states], -1), key_states.shape[-1]
        return super().update(latents, latents[..., :rank], *args, **kwargs)

    def handles(self, keys: torch.Size, values: torch.Size, length: int) -> tuple[Handle, Handle]:
        if not self.latent:
            return super().handles(keys, values, length)
        rotary = keys[3] - values[3]
        return Latent(self, 0, values, length), Rotary(self, 1, torch.Size((*keys[:3], rotary)), length)
