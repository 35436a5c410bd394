"""Attention over a union of disjoint token sets: each part gives (out, lse), and parts merge by log-sum-exp.

With logits s_j over the tokens j of a part, lse = log sum_j exp(s_j) and out = sum_j exp(s_j - lse) v_j. The attention
over all parts is sum_i w_i out_i with w_i = exp(lse_i - logsumexp_i lse_i): exact, whatever the split.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

MAX_LOGITS = 1 << 24  # largest block of logits held at once, in elements (64 MiB of float32)
MANY_LOGITS = 1 << 16  # from so many on torch's flash attention is faster, and holds none of them
ALIGNED = 8  # elements: what kernels of 16 bits take is a multiple of it
MANY_ROWS = 64  # of queries, from which on a GPU multiplies matrices of 16 bits
HIDDEN = -30000.0  # logits are far above it, and float16 has it
HALVES = (torch.float16, torch.bfloat16)
_flash: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)


class Part(NamedTuple):
    """Attention over some of the tokens: out [S, R, Dv] float32 and lse [S, R] float32 (-inf where it saw none).

    groups [S, R, n]: the lse of each run of tokens alone, where it was asked for.
    """

    out: Tensor
    lse: Tensor
    groups: Tensor | None = None


class Tokens(NamedTuple):
    """Tokens of S streams: of keys [S, N, Dk] and values [S, N, Dv] a stream's first counts [S] (on the host)."""

    keys: Tensor
    values: Tensor
    counts: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of the slots that attention reads: those up to the end of the longest stream."""
        return int(self.counts.max()) * sum(x[:, 0].nbytes for x in (self.keys, self.values))


def merge(parts: Sequence[Part]) -> Part:
    """Attention over the union of the parts. A row that no part saw gives zeros and lse -inf."""
    if len(parts) == 1:
        return parts[0]
    lse = torch.logsumexp(torch.stack([p.lse for p in parts]), 0)
    safe = lse.masked_fill(lse == -torch.inf, 0)
    out = sum(p.out * (p.lse - safe).exp()[..., None] for p in parts)
    assert isinstance(out, Tensor)
    return Part(out, lse)


def joined(parts: Sequence[Part]) -> Part:
    """The merge of parts that are neighbours, with the groups of all."""
    part = merge(parts)
    groups = [p.groups for p in parts if p.groups is not None]
    return part._replace(groups=torch.cat(groups, -1)) if groups else part


def attend(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    visible: Tensor | None = None,
    softcap: float | None = None,
    bias: Tensor | None = None,
    group: int | None = None,
    key_bias: Tensor | None = None,
) -> Part:
    """Attention of queries [S, R, Dk] over keys [S, N, Dk], values [S, N, Dv], computed in float32.

    `visible` is bool, broadcastable to [S, R, N]. `bias` [S, R] or [S, R, N] is added to every q . k before it is
    scaled. Logits are capped as softcap * tanh(logit / softcap) where asked. `key_bias` [S, N] is added to every logit
    after that: a key with bias log(w) counts as w keys, and one with bias -inf is not seen.
    Runs over blocks of keys, so that no more than `MAX_LOGITS` logits exist at once. With `group`, which divides N, the
    lse of each run of so many tokens is returned as well.
    """
    streams, rows, _ = queries.shape
    tokens = keys.shape[1]
    plain = softcap is None and bias is None and group is None and key_bias is None
    if plain and _efficient(queries, keys, values, visible):
        if visible is None:
            return by_efficient(queries, keys, values, scale)
        there = visible.expand(streams, 1, tokens)[:, 0]
        keys, values = (x.masked_fill(~there[..., None], 0) for x in (keys, values))
        hidden = torch.where(there, 0.0, HIDDEN).to(queries.dtype)
        return seen_by_some(by_efficient(queries, keys, values, scale, hidden))
    if plain and _flashable(queries, keys, values):
        if visible is None:
            return _by_flash(queries, keys, values, scale, None)
        sees = visible.expand(torch.broadcast_shapes(visible.shape, (1, rows, tokens)))
        if bool(sees.any(-1).all()):
            block = max(MAX_LOGITS // (len(sees) * tokens), 1)  # of the mask
            masks = zip(queries.split(block, 1), sees.split(block, 1), strict=True)
            done = [_by_flash(q, keys, values, scale, mask) for q, mask in masks]
            return Part(torch.cat([part.out for part in done], 1), torch.cat([part.lse for part in done], 1))
    unit = group or 1
    block = max(MAX_LOGITS // max(streams * rows, 1) // unit, 1) * unit
    if tokens > block:
        parts = []
        for at in range(0, tokens, block):
            piece = slice(at, at + block)
            seen = visible if visible is None or visible.shape[-1] == 1 else visible[..., piece]
            extra = None if key_bias is None else key_bias[:, piece]
            own = bias if bias is None or bias.dim() == 2 else bias[..., piece]
            parts.append(attend(queries, keys[:, piece], values[:, piece], scale, seen, softcap, own, group, extra))
        return joined(parts)
    logits = torch.bmm(queries.float(), keys.float().transpose(1, 2))  # [S, R, N]
    if bias is not None:
        logits = logits + (bias if bias.dim() == 3 else bias[..., None])
    logits = logits * scale
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    if key_bias is not None:
        logits = logits + key_bias.float()[:, None]
    if visible is not None:
        logits = logits.masked_fill(~visible, -torch.inf)
    groups = None if group is None else logits.unflatten(-1, (-1, group)).logsumexp(-1)
    lse = torch.logsumexp(logits, -1)  # [S, R]
    unseen = visible is not None or key_bias is not None  # a row may see nothing
    safe = lse.masked_fill(lse == -torch.inf, 0) if unseen else lse
    weights = (logits - safe[..., None]).exp()
    return Part(torch.bmm(weights, values.float()), lse, groups)


def attend_causal(queries: Tensor, keys: Tensor, values: Tensor, scale: float, softcap: float | None = None) -> Part:
    """Attention of queries [S, G, n, Dk], of G heads, over n keys [S, n, Dk] and values [S, n, Dv] of their own
    positions, each over those up to its own: rows R = G * n."""
    _, group, n, _ = queries.shape
    if softcap is None and queries.dtype in HALVES and _on_gpu(queries) and keys.shape[2] == values.shape[2]:
        k, v = (x.to(queries.dtype)[:, None].expand(-1, group, -1, -1) for x in (keys, values))
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention(queries, k, v, 0.0, True, scale=scale)[:2]
        return Part(out.flatten(1, 2).float(), lse.flatten(1, 2))
    if softcap is None and _flashable(queries.flatten(1, 2), keys, values):
        k, v = (x.float()[:, None].expand(-1, group, -1, -1) for x in (keys, values))
        out, lse = _flash(queries.float(), k, v, 0.0, True, scale=scale)
        return Part(out.flatten(1, 2), lse.flatten(1, 2))
    return attend(queries.flatten(1, 2), keys, values, scale, causal(n, keys.device).repeat(1, group, 1), softcap)


def attend_after(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    own_keys: Tensor,
    own_values: Tensor,
    scale: float,
    softcap: float | None = None,
) -> Part:
    """As `attend_causal`, also over earlier keys [S, N, Dk] and values [S, N, Dv], without a mask of n x N."""
    earlier, flat = keys.shape[1], queries.flatten(1, 2)
    whole = earlier - earlier % ALIGNED if _on_gpu(queries) else earlier
    runs = [slice(a, b) for a, b in ((0, whole), (whole, earlier)) if a < b]
    parts = [attend(flat, keys[:, run], values[:, run], scale, None, softcap) for run in runs]
    return merge([*parts, attend_causal(queries, own_keys, own_values, scale, softcap)])


def by_efficient(queries: Tensor, keys: Tensor, values: Tensor, scale: float, hidden: Tensor | None = None) -> Part:
    """Attention on a GPU of queries [S, R, Dk] over keys [S, N, Dk] and values [S, N, Dv] of 16 bits, by torch's
    kernel, which holds no logits. hidden [S, N]: `HIDDEN` for tokens that are not seen, whose numbers must be finite;
    0 for others."""
    rows = queries.shape[1]
    q, k, v = (x[:, None] for x in (queries, keys, values))
    extra = None if hidden is None else hidden[:, None, None].expand(-1, 1, rows, -1)
    out, lse = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, extra, True, scale=scale)[:2]
    return Part(out[:, 0].float(), lse[:, 0, :rows])


def _efficient(queries: Tensor, keys: Tensor, values: Tensor, visible: Tensor | None) -> bool:
    """Whether `by_efficient` takes these, and there are queries enough: what is visible, all of a stream see alike."""
    aligned = all(n % ALIGNED == 0 for n in (keys.shape[1], keys.shape[2], values.shape[2]))
    alike = visible is None or (visible.dim() == 3 and visible.shape[1] == 1)
    halves = queries.dtype in HALVES and queries.dtype == keys.dtype == values.dtype
    return halves and _on_gpu(queries) and queries.shape[1] > MANY_ROWS and aligned and alike


def seen_by_some(part: Part) -> Part:
    """A part of `by_efficient` whose rows may have seen hidden tokens alone, which count as none."""
    return Part(part.out, part.lse.masked_fill(part.lse < HIDDEN / 2, -torch.inf))


def _on_gpu(x: Tensor) -> bool:
    """Whether torch has kernels for GPUs where x is, or would have them."""
    return x.is_cuda or x.is_meta


def causal(n: int, device: torch.device) -> Tensor:
    """bool [1, n, n]: each of n queries sees the keys up to its own."""
    return torch.ones(1, n, n, dtype=torch.bool, device=device).tril()


def _flashable(queries: Tensor, keys: Tensor, values: Tensor) -> bool:
    many = queries.shape[0] * queries.shape[1] * keys.shape[1] >= MANY_LOGITS and queries.shape[1] > 1
    return _flash is not None and queries.is_cpu and many and keys.shape[2] == values.shape[2]


def _by_flash(queries: Tensor, keys: Tensor, values: Tensor, scale: float, visible: Tensor | None) -> Part:
    """`attend` by torch's kernel for CPUs, which gives the lse too; visible: bool [S or 1, R, N]."""
    q, k, v = (x.float()[:, None] for x in (queries, keys, values))
    mask = None
    if visible is not None:
        mask = q.new_zeros(visible.shape).masked_fill_(~visible, -torch.inf)[:, None]
    out, lse = _flash(q, k, v, 0.0, False, attn_mask=mask, scale=scale)
    return Part(out[:, 0].contiguous(), lse[:, 0])


def sink_logit(part: Part, logits: Tensor) -> Part:
    """Merge with a learned sink: an extra logit [S, R] whose value is zero (gpt-oss)."""
    return merge([part, Part(torch.zeros_like(part.out), logits.float())])
