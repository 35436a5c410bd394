"""What stays of a prompt, once a step has brought its last token: a policy's own choice for each KV head."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvcomp.stages import Chunk

from .pages import Pages
from .step import Keep
from .window import Window


def keep_chosen(
    pages: Pages,
    window: Window,
    keep: Keep,
    blocks: Tensor,
    exact: Sequence[Tensor],
    new: Sequence[Tensor],
    scale: float,
) -> None:
    """Leave of a prompt in one layer what the policy chooses: whole pages, and the rest in the window.

    blocks int64 [m]: those of the request's window. exact: keys and values [w, H, D] that it held before the step.
    new: queries [n, Hq, D], keys and values [n, H, D] of the step, the last of which end the prompt.
    """
    query, *added = new
    setup, plan = pages.setup, pages.plan
    assert setup.policy is not None
    sinks = min(setup.sinks, len(exact[0]))
    k, v = (
        torch.cat([held[:sinks].transpose(0, 1), page, torch.cat([held[sinks:], last]).transpose(0, 1)], 1)
        for held, page, last in zip(exact, pages.tokens(keep.old), added, strict=True)
    )  # [H, prompt, D]
    prompt, queries = k.shape[1], None
    if setup.voters:
        before = window.read_queries(blocks[None], torch.arange(keep.voters, device=blocks.device)[None])[0]
        queries = torch.cat([before, query[-(setup.voters - keep.voters) :]]).transpose(0, 1)[None]
    alive = torch.ones(1, *k.shape[:2], dtype=torch.bool, device=k.device)
    recent = min(setup.recent, prompt - setup.sinks)
    chunk = Chunk(queries, k[None], v[None], alive, 0, setup.sinks, recent, scale, plan.layer, plan.layers)
    chosen = setup.policy.select(chunk)[0].nonzero()[:, 1].view(len(k), -1)  # [H, kept], ascending
    k, v = (x.take_along_dim(chosen[..., None], 1) for x in (k, v))
    pages.rewrite(
        k[:, setup.sinks :], v[:, setup.sinks :], keep.pages, keep.old, chosen[:, setup.sinks :] - setup.sinks
    )
    end = setup.sinks + keep.pages.shape[1] * setup.page_size
    k, v = (torch.cat([x[:, : setup.sinks], x[:, end:]], 1).transpose(0, 1) for x in (k, v))
    window.write(blocks.expand(len(keep.slots), -1), keep.slots, k, v)
