"""Latent stages: K and V of all heads of a layer as one latent, of which pages keep the first coordinates.

With x the K and V of a token's heads in a row, [H * (Dk + Dv)], c = W' (x - m) are its coordinates, as many as x has.
For W' R = I, x = m + R c, so that for a query of head h

  q_h . k_h = (R_kh' q_h) . c + q_h . m_kh,  outputs over values = m_vh + R_vh (output over c)

where q_h . m_kh is the same for all tokens, which no softmax sees. A layer is then one of latents (see `latent`): one
stream, queries that are absorbed, outputs that are expanded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .stage import Stage


@dataclass(frozen=True, eq=False)
class JointMaps:
    """The maps of one layer, all float32: write [n, n] (W) for n = H * (Dk + Dv), keys [H, Dk, n] and values [H, Dv, n]
    (rows of R), mean [n]."""

    write: Tensor
    keys: Tensor
    values: Tensor
    mean: Tensor

    @classmethod
    def of(cls, write: Tensor, mean: Tensor, heads: int, k_dim: int, device: torch.device) -> JointMaps:
        """Of W [n, n] and m [n], for keys [H, k_dim]; held by nothing else."""
        read = torch.linalg.inv(write.double()).mT.float()  # R
        k, v = read.split([heads * k_dim, len(read) - heads * k_dim])
        parts = (x.unflatten(0, (heads, -1)).contiguous() for x in (k, v))
        own = write.float().clone(memory_format=torch.contiguous_format), *parts, mean.float().clone()
        return cls(*(x.to(device) for x in own))

    @property
    def tensors(self) -> list[Tensor]:
        """All of them: write [n, n], keys [H, Dk, n], values [H, Dv, n], mean [n]."""
        return [self.write, self.keys, self.values, self.mean]

    def latents(self, keys: Tensor, values: Tensor) -> Tensor:
        """c [B, 1, N, n] of keys [B, H, N, Dk] and values [B, H, N, Dv], in their dtype."""
        x = torch.cat([side.transpose(1, 2).flatten(2) for side in (keys, values)], -1)
        return ((x.float() - self.mean) @ self.write)[:, None].to(keys.dtype)

    def absorbed(self, queries: Tensor) -> Tensor:
        """Queries [B, Hq, N, Dk] of keys as queries [B, Hq, N, n] of c, in their dtype."""
        return self._by_head(queries, self.keys).to(queries.dtype)

    def output(self, out: Tensor) -> Tensor:
        """Attention output [B, Hq, N, n] over c as output [B, Hq, N, Dv] over values, float32."""
        heads = len(self.values)
        mean = self.mean[-heads * self.values.shape[1] :].unflatten(0, (heads, 1, 1, -1))
        return self._by_head(out, self.values.mT, mean)

    def expanded(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [B, H, N, Dk] and values [B, H, N, Dv] of c [B, 1, N, n], in its dtype."""
        heads, k_dim, _ = self.keys.shape
        mean = self.mean.split([heads * k_dim, len(self.mean) - heads * k_dim])
        found = []
        for side, m in zip((self.keys, self.values), mean, strict=True):
            found.append((latents.float() @ side.mT + m.unflatten(0, (heads, 1, -1))).to(latents.dtype))
        return found[0], found[1]

    def _by_head(self, x: Tensor, maps: Tensor, shift: Tensor | float = 0.0) -> Tensor:
        """x [B, Hq, N, D] times maps [H, D, E] of its head, and a shift [H, 1, 1, E]: float32 [B, Hq, N, E]."""
        by_head = x.float().unflatten(1, (len(maps), -1))
        mapped: Tensor = by_head @ maps[:, None] + shift
        return mapped.flatten(1, 2)


@dataclass(frozen=True)
class LatentStage(Stage):
    """Makes one latent of a layer's K and V; the stack's quantizer codes what pages keep of it."""

    family: ClassVar[str] = "latent"

    def kept(self, channels: int) -> int:
        """How many of a latent's `channels` coordinates pages keep.

        Raises:
            SpecError: more than there are.
        """
        raise NotImplementedError

    def maps(self, layer: int, heads: int, k_dim: int, v_dim: int, device: torch.device) -> JointMaps:
        """Those of a layer of so many KV heads, on a device.

        Raises:
            KvcompError: there are none for such a layer.
        """
        raise NotImplementedError

    def map_bytes(self, channels: int) -> int:
        """Bytes of `maps` of a layer, whatever the context and the batch."""
        return (2 * channels * channels + channels) * torch.float32.itemsize
