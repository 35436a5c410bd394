"""The specification of the attention that keys receive: weights of some queries over all keys before them, in blocks.

received[j] = sum_i exp(logit[i, j] - lse[i]), or the maximum over i;  lse[i] = log sum_j exp(logit[i, j])
logit[i, j] = softcap(scale * q[i] . k[j]),  j <= n - w + i
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvcomp.kernels.contract import Reduce

BLOCK = 1 << 22  # elements of attention weights held at once: 16 MiB


def received(
    queries: Tensor,
    keys: Tensor,
    scale: float,
    visible: Tensor | None = None,
    softcap: float | None = None,
    reduce: Reduce = "sum",
) -> Tensor:
    """Attention weights of the last w queries, their sum or with reduce="max" the largest: [b, Hq, n] float32.

    queries [b, Hq, w, D] of the last w tokens, keys [b, Hkv, n, D]; causal; visible bool [b, Hkv, n] hides keys, and a
    query that sees none gives 0. No backend holds all w * n weights: here
    `BLOCK` at once.
    """
    b, hq, w, _ = queries.shape
    hkv, n = keys.shape[1], keys.shape[2]
    grouped = queries.float().unflatten(1, (hkv, -1)).flatten(0, 1) * scale  # [s, G, w, D] of s = b * Hkv streams
    keys = keys.float().flatten(0, 1)
    hidden = None if visible is None or bool(visible.all()) else ~visible.flatten(0, 1)[:, None, None]
    found = keys.new_zeros(*grouped.shape[:2], n)
    block = max(BLOCK // (b * hq * n), 1)
    for at in range(0, w, block):
        q = grouped[:, :, at : at + block]
        rows = q.shape[2]
        end = n - w + at + rows  # of the keys that the last of these queries sees
        logits = torch.bmm(q.flatten(1, 2), keys[:, :end].mT).unflatten(1, q.shape[1:3])  # [s, G, rows, end]
        if softcap is not None:
            logits = torch.tanh(logits / softcap) * softcap
        future = torch.ones(rows, rows, dtype=torch.bool, device=keys.device).triu(1)
        logits[..., end - rows :].masked_fill_(future, -torch.inf)
        if hidden is not None:
            logits = logits.masked_fill(hidden[..., :end], -torch.inf)
        if reduce == "sum":
            weights = logits.softmax(-1)
            found[..., :end] += (weights if hidden is None else weights.nan_to_num(0)).sum(2)
        else:
            lse = logits.logsumexp(-1, keepdim=True)
            lse = lse if hidden is None else lse.masked_fill(lse == -torch.inf, 0)  # of queries that see no key
            weights = (logits - lse).amax(2).exp()
            torch.maximum(found[..., :end], weights, out=found[..., :end])
    return found.view(b, hq, n)
