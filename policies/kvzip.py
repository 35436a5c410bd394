"""KVzip: what the model needs to repeat the prompt answers any question about it (arXiv 2505.23416)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvcomp.errors import UnsupportedError
from kvcomp.kernels.received import received
from kvcomp.stages import Chunk, Policy, arg
from kvcomp.stages.registry import register

from .budgets import keep_best_of_heads, keep_count

LAYERS = ("adaptive", "uniform")


def most_received(queries: Tensor, keys: Tensor, scale: float, softcap: float | None = None) -> Tensor:
    """The largest attention weight that a key gets from any query and any head of its group: [b, Hkv, n] float32.

    queries [b, Hq, w, D] of the last w tokens, keys [b, Hkv, n, D]; causal.
    """
    most = received(queries, keys, scale, softcap=softcap, reduce="max")
    largest: Tensor = most.unflatten(1, (keys.shape[1], -1)).amax(2)
    return largest


@register("kvzip")
@dataclass(frozen=True)
class KVzip(Policy):
    """KVzip: keeps the tokens that the model attends to most, at their best, while it repeats the prompt.

    The score of a token is the most attention that it gets from any query and any head of its group in that pass, which
    `kvcomp.prefill` runs; no question is needed, so that one prefill serves many. All heads of all layers share one
    budget, as published, or those of a layer do. Tokens that come later are kept.

    Paper: arXiv 2505.23416.
    """

    paper: ClassVar[str] = "arXiv:2505.23416"

    keep: float = arg(0.3, "share of the prompt to keep on average, protected tokens included, 0 < keep <= 1")
    layers: str = arg("adaptive", "adaptive: all layers share one budget, or uniform: each keeps the same")
    chunk: int = arg(2048, "tokens of the prompt that are repeated at a time")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_share("keep")
        self.check(self.layers in LAYERS, "layers", " or ".join(LAYERS))
        self.check(self.chunk > 0, "chunk", "positive")

    @property
    def reconstructs(self) -> int | None:
        return self.chunk

    @property
    def default_window(self) -> tuple[int, int]:
        return 4, 0

    def kept(self, tokens: int, sinks: int, recent: int, layer: int, layers: int) -> int:
        return keep_count(tokens, self.keep, None, min(sinks + recent, tokens))

    def choose(self, received: Sequence[Tensor], sinks: int, recent: int) -> list[Tensor]:
        n = received[0].shape[-1]
        count = self.kept(n, sinks, recent, 0, len(received))
        first = min(sinks, n)
        guards = first, min(recent, n - first)

        def best(scores: Tensor) -> Tensor:
            alive = torch.ones_like(scores, dtype=torch.bool)
            return keep_best_of_heads(scores, alive, count, *guards, floor=0)

        if self.layers == "uniform":
            return [best(scores) for scores in received]
        kept = best(torch.cat(list(received), 1))  # heads of all layers side by side
        return list(kept.split([scores.shape[1] for scores in received], 1))

    def select(self, chunk: Chunk) -> Tensor:
        if chunk.past:
            return chunk.alive
        if chunk.chosen is None:
            raise UnsupportedError(
                "kvzip lets the model repeat the prompt, which takes a pass of its own: fill the cache with "
                "kvcomp.prefill(model, input_ids, [cache], tokenizer=tokenizer), then generate"
            )
        return chunk.alive & chunk.chosen
