"""Attention that tokens receive: weights of some queries over all keys before them, block by block."""

from __future__ import annotations

import torch
from torch import Tensor

from kvcomp.kernels.dispatch import on_gpu

BLOCK = 1 << 22  # elements of attention weights held at once: 16 MiB


def votes(queries: Tensor, keys: Tensor, scale: float, visible: Tensor | None = None) -> Tensor:
    """Attention weights of the last w queries, summed over them: [b, Hq, n] float32.

    queries [b, Hq, w, D] of the last w tokens, keys [b, Hkv, n, D]; causal; visible [b, Hkv, n] hides evicted tokens.
    Never more than `BLOCK` weights exist at once, whatever w is; on a GPU, where a kernel sums them, none do.
    """
    if on_gpu(queries):
        from kvcomp.kernels import triton

        return triton.attention_received(queries, keys, scale, visible)
    b, hq, w, _ = queries.shape
    hkv, n = keys.shape[1], keys.shape[2]
    grouped = queries.float().unflatten(1, (hkv, -1)).flatten(0, 1) * scale  # [s, G, w, D] of s = b * Hkv streams
    keys = keys.float().flatten(0, 1)
    hidden = None if visible is None or bool(visible.all()) else ~visible.flatten(0, 1)[:, None, None]
    received = keys.new_zeros(*grouped.shape[:2], n)
    block = max(BLOCK // (b * hq * n), 1)
    for at in range(0, w, block):
        q = grouped[:, :, at : at + block]
        rows = q.shape[2]
        end = n - w + at + rows  # of the keys that the last of these queries sees
        logits = torch.bmm(q.flatten(1, 2), keys[:, :end].mT).unflatten(1, q.shape[1:3])
        future = torch.ones(rows, rows, dtype=torch.bool, device=keys.device).triu(1)
        logits[..., end - rows :].masked_fill_(future, -torch.inf)
        if hidden is not None:
            logits = logits.masked_fill(hidden[..., :end], -torch.inf)
        weights = logits.softmax(-1)
        received[..., :end] += (weights if hidden is None else weights.nan_to_num(0)).sum(2)
    return received.view(b, hq, n)
