"""What vLLM's builder hands to layers: a step that is planned when the first layer runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvcomp.cache.blocks.step import Step


class Batch:
    """A step's batch, planned once the first layer says how many tokens each request found in blocks of others."""

    def __init__(self, plan: Callable[[Sequence[int] | None], Step]) -> None:
        self.plan = plan
        self.planned: Step | None = None

    def step(self, found: Sequence[int] | None) -> Step:
        if self.planned is None:
            self.planned = self.plan(found)
        return self.planned
