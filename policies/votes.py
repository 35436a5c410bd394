"""Attention that tokens receive: weights of some queries over all keys before them, block by block."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 1 << 24  # elements of attention weights held at once


def votes(queries: Tensor, keys: Tensor, scale: float, visible: Tensor | None = None) -> Tensor:
    """Attention weights of the last w queries, summed over them: [b, Hq, n] float32.

    queries [b, Hq, w, D] of the last w tokens, keys [b, Hkv, n, D]; causal; visible [b, Hkv, n] hides evicted tokens.
    Never more than `BLOCK` weights exist at once, whatever w is.
    """
    b, hq, w, _ = queries.shape
    hkv, n = keys.shape[1], keys.shape[2]
    grouped = queries.float().unflatten(1, (hkv, -1))  # [b, Hkv, G, w, D]
    causal = torch.arange(n, device=keys.device) <= torch.arange(n - w, n, device=keys.device)[:, None]
    received = keys.new_zeros(b, hkv, grouped.shape[2], n, dtype=torch.float32)
    block = max(BLOCK // (b * hq * n), 1)
    for at in range(0, w, block):
        rows = slice(at, at + block)
        logits = torch.einsum("bhgwd,bhnd->bhgwn", grouped[:, :, :, rows], keys.float()) * scale
        seen = causal[rows] if visible is None else causal[rows] & visible[:, :, None, None]
        received += logits.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0).sum(3)
    return received.flatten(1, 2)
