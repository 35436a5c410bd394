"""Budgets: how many tokens each layer and head keeps, and the choice of the best within that number."""

from __future__ import annotations

import torch
from torch import Tensor

CRITICAL = 1e-4  # what CriticalKV adds to a score, so that a large value counts without one


def keep_count(tokens: int, keep: float | None, budget: int | None, protected: int) -> int:
    """Tokens to keep of `tokens`: the share `keep` or the absolute `budget`, at least the protected ones."""
    wanted = round(keep * tokens) if keep is not None else budget
    assert wanted is not None
    return min(max(wanted, protected, 1), tokens)


def pyramid(mean: int, most: int, beta: int, layer: int, layers: int) -> int:
    """Tokens of one of `layers` layers that keep `mean` on average and fewer with every layer (arXiv 2406.02069).

    From 2 mean - mean / beta in the first layer, or `most` where that is less, linearly to what leaves the sum at
    layers * mean, exactly: running sums are rounded, not their parts.
    """
    if layers == 1:
        return mean
    top = min(2 * mean - mean / beta, most)
    step = 2 * (top - mean) / (layers - 1)

    def until(count: int) -> int:
        return round(count * top - step * count * (count - 1) / 2)

    return until(layer + 1) - until(layer)


def in_spans(scores: Tensor, span: int, first: int) -> Tensor:
    """Scores [b, H, n] that make runs of `span` tokens, counted from token `first`, stay or leave together.

    Runs are ordered by the mean of their finite scores, those of all heads of a row together; within a run the earlier
    token comes first, so that a budget cuts no more than one run.
    """
    if span == 1:
        return scores
    b, heads, n = scores.shape
    run = (torch.arange(n, device=scores.device) - first).div(span, rounding_mode="floor")
    run = (run - run.min()).expand(b, heads, n)
    runs = int(run.max()) + 1
    finite = scores.isfinite()
    total = scores.new_zeros(b, heads, runs).scatter_add_(-1, run, scores.masked_fill(~finite, 0))
    members = torch.zeros_like(total).scatter_add_(-1, run, finite.to(scores.dtype))
    means = (total / members.clamp_min(1)).masked_fill(members == 0, -torch.inf)
    place = means.flatten(1).argsort(dim=-1, descending=True, stable=True).argsort(-1).view_as(means)  # 0 is the best
    return -(place.gather(-1, run) * n + torch.arange(n, device=scores.device)).double()  # exact far beyond 2^24


def keep_best(scores: Tensor, alive: Tensor, count: int, first: int, last: int) -> Tensor:
    """bool [b, H, n]: the `first` and `last` tokens and the best scored others, `count` in all per head.

    scores, alive [b, H, n]; tokens that are not alive are never kept. Ties go to whichever topk picks.
    """
    n = scores.shape[-1]
    if count >= n:
        return alive
    kept = torch.zeros_like(alive).scatter_(-1, _guarded(scores, alive, first, last).topk(count, -1).indices, True)
    return kept & alive


def keep_best_of_heads(scores: Tensor, alive: Tensor, count: int, first: int, last: int, floor: int) -> Tensor:
    """bool [b, H, n]: as `keep_best`, but H * `count` in all heads of a row, wherever the scores are best.

    Every head keeps the protected tokens, and its own best `floor` others (AdaKV, arXiv 2407.11550).
    """
    n = scores.shape[-1]
    if count >= n:
        return alive
    scores = _guarded(scores, alive, first, last)
    own = scores.topk(min(first + last + floor, n), -1).indices
    scores = scores.scatter(-1, own, torch.inf).masked_fill(~alive, -torch.inf)
    best = scores.flatten(1).topk(count * scores.shape[1], -1).indices
    kept = torch.zeros_like(alive).flatten(1).scatter_(-1, best, True).view_as(alive)
    return kept & alive


def refined(kept: Tensor, scores: Tensor, weights: Tensor, alive: Tensor, first: int, last: int) -> Tensor:
    """bool [b, H, n]: as many tokens per head as `kept` has, chosen in two steps (CriticalKV, arXiv 2502.03805).

    Half of them, the protected ones among these, by their scores; the others by (score + 1e-4) * weight.
    """
    count = kept.sum(-1, keepdim=True)

    def best(scores: Tensor, count: Tensor) -> Tensor:
        order = _guarded(scores, alive, first, last).masked_fill(~alive, -torch.inf)
        return order.argsort(dim=-1, descending=True, stable=True).argsort(-1) < count

    half = best(scores, count // 2)
    return best(((scores + CRITICAL) * weights).masked_fill(half, torch.inf), count)


def _guarded(scores: Tensor, alive: Tensor, first: int, last: int) -> Tensor:
    """Scores with infinity for protected tokens, and minus infinity for dead ones that are not."""
    scores = scores.masked_fill(~alive, -torch.inf)
    scores[..., :first] = torch.inf
    scores[..., scores.shape[-1] - last :] = torch.inf
    return scores
