"""What policies keep of tokens that come, and which pages they evict: asked here for every landlord."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from kvcomp.errors import UnsupportedError
from kvcomp.stages import Chunk, Held, ModelPart
from kvcomp.stages.plan import LayerPlan


def chunk_of(
    plan: LayerPlan,
    queries: Tensor | None,
    keys: Tensor,
    values: Tensor,
    scale: float,
    past: int = 0,
    before: int = 0,
    model: ModelPart | None = None,
    chosen: Tensor | None = None,
    scored: Tensor | None = None,
) -> Chunk:
    """Tokens keys [b, Hkv, n, Dk] and values [b, Hkv, n, Dv] as the policies of a layer see them; the rest: as in
    `Chunk`."""
    n = keys.shape[2]
    alive = torch.ones(keys.shape[:3], dtype=torch.bool, device=keys.device)
    sinks = min(max(plan.sinks - past, 0), n)
    recent = min(plan.recent, n - sinks)
    exact = past, sinks, recent
    return Chunk(
        queries, keys, values, alive, *exact, scale, plan.layer, plan.layers, model, chosen, scored, before=before
    )


def select(plan: LayerPlan, chunk: Chunk) -> Tensor:
    """bool [b, Hkv, n]: what the policies of a layer keep of a chunk, each of what those before it kept.

    Raises:
        UnsupportedError: a policy needs queries or weights that are not available.
    """
    for policy in plan.policies:
        if policy.needs_queries and chunk.queries is None and chunk.scored is None:
            raise UnsupportedError(
                f"{policy.name} scores tokens with the prompt's queries, which are not at hand here: "
                "pass queries=, or use a policy that needs none (streaming)"
            )
        if policy.needs_model and chunk.model is None:
            raise UnsupportedError(f"{policy.name} needs the model's weights, which are not at hand here")
        chunk = replace(chunk, alive=policy.select(chunk))
    return chunk.alive


def taken(kept: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What is kept, bool [s, n], as many tokens of each stream: their places int64 [s, k], ascending, and keys [s, k,
    Dk] and values [s, k, Dv] of the streams' [s, n, ...]."""
    places = kept.nonzero()[:, 1]
    at = places.view(len(kept), len(places) // len(kept))
    return at, keys.take_along_dim(at[..., None], 1), values.take_along_dim(at[..., None], 1)


def held_by(
    plan: LayerPlan,
    tokens: Tensor,
    pages: Tensor,
    heads: int,
    attention: Tensor | None = None,
    queries: Tensor | None = None,
    before: Tensor | None = None,
    keys: Callable[[], Tensor] | None = None,
) -> Held:
    """What streams hold, as the policies of a layer see it: as in `Held`."""
    at = plan.layer, plan.layers
    return Held(tokens, pages, plan.page_size, plan.sinks, heads, attention, queries, before, *at, keys)
