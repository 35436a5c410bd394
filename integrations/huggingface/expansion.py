"""Keys and values that attention modules make of latents (MLA), and attention that leaves the latents as they are.

Of a latent c [R] and a rotary key r [Dr], which all heads share, head h has

  [k_h, v_h] = W_h c,  keys [k_h, r],  values v_h

so that q_h . [k_h, r] = [W_hk' q_h, r part of q_h] . [c, r], and outputs over c are multiplied by W_hv.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F


class Latents(Protocol):
    """How keys and values of heads follow from what a layer holds."""

    @property
    def heads(self) -> int:
        """Heads of keys and values."""

    @property
    def weight(self) -> Tensor:
        """That they are made by."""

    def absorbed(self, queries: Tensor) -> Tensor:
        """Queries [B, Hq, n, Dk] of keys as queries of what is held."""

    def output(self, out: Tensor) -> Tensor:
        """Attention output [B, Hq, n, R] over what is held as output over values."""

    def expanded(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of what is held, [B, 1, N, R]."""

    def known(self) -> Latents:
        """The same where keys and values are not needed, as the answer is known."""


@dataclass(frozen=True)
class Expansion:
    """W [H * E, R] of a module, and which of a head's E channels are its keys' and its values'.

    rotary: channels of r. expands: False where keys and values are not needed, as the answer is known.
    """

    weight: Tensor
    heads: int
    keys: slice
    values: slice
    rotary: int
    expands: bool = True

    def known(self) -> Expansion:
        return replace(self, expands=False)

    def _part(self, channels: slice) -> Tensor:
        """[H, channels, R], a view."""
        by_head: Tensor = self.weight.detach().unflatten(0, (self.heads, -1))
        return by_head[:, channels]

    def absorbed(self, queries: Tensor) -> Tensor:
        """Queries [B, H, n, Dn + Dr] of keys as queries [B, H, n, R + Dr] of [c, r]."""
        rows, _, n, dim = queries.shape
        own, rotary = queries.split([dim - self.rotary, self.rotary], -1)
        by_head = own.transpose(0, 1).flatten(1, 2).to(self.weight.dtype)  # [H, B * n, Dn]
        latent = torch.bmm(by_head, self._part(self.keys)).unflatten(1, (rows, n)).transpose(0, 1)
        return torch.cat([latent.to(queries.dtype), rotary], -1)

    def output(self, out: Tensor) -> Tensor:
        """Attention output [B, H, n, R] over c as output [B, H, n, Dv] over values."""
        rows, _, n, _ = out.shape
        by_head = out.transpose(0, 1).flatten(1, 2).to(self.weight.dtype)
        expanded: Tensor = torch.bmm(by_head, self._part(self.values).mT).unflatten(1, (rows, n))
        return expanded.transpose(0, 1)

    def expanded(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """[c, r] [B, 1, N, R + Dr] -> keys [B, H, N, Dn + Dr] and values [B, H, N, Dv]."""
        if not self.expands:
            return latents, latents
        rank = self.weight.shape[1]
        each = F.linear(latents[..., :rank].to(self.weight.dtype), self.weight)  # [B, 1, N, H * E]
        each = each[:, 0].unflatten(-1, (self.heads, -1)).transpose(1, 2)
        rotary = latents[..., rank:].expand(-1, self.heads, -1, -1)
        return torch.cat([each[..., self.keys], rotary.to(each.dtype)], -1), each[..., self.values]
