"""The specification of operations on single tokens: attention over exact ones, and runs out of a row."""

from __future__ import annotations

import torch
from torch import Tensor

from kvcomp.attention import Part, Tokens, attend, merge


def attend_tokens(
    queries: Tensor,
    tokens: Tokens,
    scale: float,
    softcap: float | None = None,
    prior: Part | None = None,
    host: bool = True,
) -> Part:
    """Attention of queries [S, R, Dk] over exact tokens and what `prior` attended to; slots past a stream's count may
    hold anything. host: whether counts that lie on the host may be looked at."""
    longest, visible = tokens.keys.shape[1], None
    look = tokens.counts.is_cpu and host  # reading counts would synchronize a GPU
    if look:
        longest = int(tokens.counts.max())
    keys, values = tokens.keys[:, :longest], tokens.values[:, :longest]
    if not look or bool((tokens.counts < longest).any()):
        there = (torch.arange(longest, device=tokens.counts.device) < tokens.counts[:, None]).to(queries.device)
        keys, values = (x.masked_fill(~there[..., None], 0) for x in (keys, values))
        visible = there[:, None]
    part = attend(queries, keys, values, scale, visible, softcap)
    return part if prior is None else merge([prior, part])


def runs(x: Tensor, starts: Tensor, width: int) -> Tensor:
    """[..., width]: of x [N] the runs of so many elements that begin at starts int64 [...]."""
    return x[starts[..., None] + torch.arange(width, device=x.device)]
