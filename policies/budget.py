"""Budgets: how many tokens a policy keeps, and the choice of the best within that number."""

from __future__ import annotations

import torch
from torch import Tensor


def keep_count(tokens: int, keep: float | None, budget: int | None, protected: int) -> int:
    """Tokens to keep of `tokens`: the share `keep` or the absolute `budget`, at least the protected ones."""
    wanted = round(keep * tokens) if keep is not None else budget
    assert wanted is not None
    return min(max(wanted, protected, 1), tokens)


def keep_best(scores: Tensor, alive: Tensor, count: int, first: int, last: int) -> Tensor:
    """bool [b, H, n]: the `first` and `last` tokens and the best scored others, `count` in all per head.

    scores, alive [b, H, n]; tokens that are not alive are never kept. Ties go to whichever topk picks.
    """
    n = scores.shape[-1]
    if count >= n:
        return alive
    scores = scores.masked_fill(~alive, -torch.inf)
    scores[..., :first] = torch.inf
    scores[..., n - last :] = torch.inf
    kept = torch.zeros_like(alive).scatter_(-1, scores.topk(count, -1).indices, True)
    return kept & alive
