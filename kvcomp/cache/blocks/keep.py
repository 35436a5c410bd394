"""What stays of a request: of its prompt, by a policy's choice for each KV head, and of its pages later on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import eviction
from .batch import Keep, Leave, Prompt
from .pages import Pages
from .windows import Windows


def keep_chosen(
    pages: Pages,
    window: Windows,
    keep: Keep,
    blocks: Tensor,
    exact: Sequence[Tensor],
    new: Sequence[Tensor],
    scale: float,
) -> None:
    """Leave of a prompt in one layer what the policy chooses: whole pages, and the rest in the window.

    blocks int64 [m]: those of the request's window. exact: keys and values [H, w, D] that it held before the step.
    new: queries [n, Hq, D], keys and values [n, H, D] of the step, the last of which end the prompt.
    """
    query, setup, old, sinks = new[0], pages.setup, keep.prompt.old, pages.setup.geometry.sinks
    k, v = _tokens(pages, keep.prompt, exact, new)  # [H, prompt, D]
    queries = scored = None
    if setup.sums:
        scored = _summed(pages, keep.prompt, query, k, v, scale)[None] / k.shape[1]
    elif setup.voters:
        before = window.read_queries(blocks, torch.arange(keep.voters, device=blocks.device))
        queries = torch.cat([before, query[-(setup.voters - keep.voters) :]]).transpose(0, 1)[None]
    chunk = eviction.chunk_of(pages.plan, queries, k[None], v[None], scale, scored=scored)
    chosen, k, v = eviction.taken(eviction.select(pages.plan, chunk)[0], k, v)  # [H, kept], ...
    pages.rewrite(k[:, sinks:], v[:, sinks:], keep.pages, old, chosen[:, sinks:] - sinks)
    end = sinks + keep.pages.shape[1] * setup.page_size
    k, v = (torch.cat([x[:, :sinks], x[:, end:]], 1).transpose(0, 1) for x in (k, v))
    window.write(window.starts(blocks[None], keep.slots[None])[0], k, v)


def score(pages: Pages, prompt: Prompt, exact: Sequence[Tensor], new: Sequence[Tensor], scale: float) -> None:
    """Add up what the queries of a part of a prompt give to all its tokens so far; arguments as of `keep_chosen`."""
    k, v = _tokens(pages, prompt, exact, new)
    pages.put_scores(prompt.cells, _summed(pages, prompt, new[0], k, v, scale))


def evict_pages(pages: Pages, leave: Leave) -> None:
    """Close the gaps of pages that the policy evicts, in each head others."""
    policy, heads = pages.setup.policy, pages.heads
    assert policy is not None
    mass, queries = pages.received(leave.pages).cpu().unbind(-1)
    full = torch.ones(heads, dtype=torch.int64, device="cpu")
    n = leave.pages.shape[1]
    counts = full * leave.tokens, full * n
    held = eviction.held_by(
        pages.plan,
        *counts,
        heads,
        mass / queries.clamp_min(1),
        queries,
        keys=lambda: pages.tokens(leave.pages)[0].unflatten(1, (n, -1)),
    )
    gone = policy.expired(held)
    assert gone is not None
    stay = (~gone).nonzero()[:, 1].view(heads, n - leave.count).to(leave.pages.device)
    pages.move(leave.pages.gather(1, stay), leave.pages[:, : n - leave.count])


def _tokens(pages: Pages, prompt: Prompt, exact: Sequence[Tensor], new: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Keys and values [H, n, D] of a prompt as far as it is in."""
    sinks = min(pages.setup.geometry.sinks, exact[0].shape[1])
    k, v = (
        torch.cat([held[:, :sinks], page, held[:, sinks:], last.transpose(0, 1)], 1)
        for held, page, last in zip(exact, pages.tokens(prompt.old), new[1:], strict=True)
    )
    return k, v


def _summed(pages: Pages, prompt: Prompt, query: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """float32 [H, n]: what the queries so far gave to tokens k, v [H, n, D], `query` [m, Hq, D] the last of them."""
    policy, past = pages.setup.policy, prompt.past
    assert policy is not None
    chunk = eviction.chunk_of(pages.plan, query.transpose(0, 1)[None], k[None], v[None], scale)
    total = policy.scores(chunk)[0].float() * len(query)
    if past:
        total[:, :past] += pages.scores(prompt.cells)[:, :past]
    return total
