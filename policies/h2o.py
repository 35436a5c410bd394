"""Attention received so far: H2O by all queries (arXiv 2306.14048), TOVA by the last one (arXiv 2401.06104)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kvcomp.kernels.received import received
from kvcomp.stages import Chunk, arg
from kvcomp.stages.registry import register

from .scored import ScoredPolicy


@register("h2o")
@dataclass(frozen=True)
class H2O(ScoredPolicy):
    """H2O: keeps the heavy hitters, which received most attention of all queries of the prompt, and the newest tokens.

    score_j = sum over all queries i >= j of softmax(q_i k_j), averaged over the query heads of a KV head: a second pass
    over the attention in blocks, never an n x n matrix. Half of the budget goes to the newest tokens; by default both
    halves are a tenth of the prompt, as published. With an absolute budget it is kept while generating: there whole
    pages leave, by the attention that they received since they were written.

    Paper: arXiv 2306.14048.
    """

    paper: ClassVar[str] = "arXiv:2306.14048"
    needs_queries: ClassVar[bool] = True
    scores_within: ClassVar[tuple[float, float]] = (0.0, 1.0)

    hold: bool = arg(True, "keep within an absolute budget while generating, too")
    recent: float = arg(0.5, "share of the budget for the newest tokens, 0 to 1")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(0 <= self.recent <= 1, "recent", "in [0, 1]")

    @property
    def default(self) -> tuple[str, float]:
        return "keep", 0.2

    def newest(self, count: int) -> int:
        return round(self.recent * count)

    @property
    def averages(self) -> bool:
        return True

    def scores(self, chunk: Chunk) -> Tensor:
        assert chunk.queries is not None
        votes = received(chunk.queries, chunk.keys, chunk.scale, chunk.alive)
        means: Tensor = votes.unflatten(1, (chunk.keys.shape[1], -1)).mean(2) / chunk.queries.shape[2]
        return means


@register("tova")
@dataclass(frozen=True)
class TOVA(ScoredPolicy):
    """TOVA: keeps what the last query attends to most, averaged over all heads of a layer, which all keep the same.

    With an absolute budget it is kept while generating: there whole pages leave, by the attention that they received
    since they were written.

    Paper: arXiv 2401.06104.
    """

    paper: ClassVar[str] = "arXiv:2401.06104"
    needs_queries: ClassVar[bool] = True
    scores_within: ClassVar[tuple[float, float]] = (0.0, 1.0)

    hold: bool = arg(True, "keep within an absolute budget while generating, too")
    heads: str = arg("common", "own choice of each KV head, a common one, or adaptive: heads share a layer's budget")

    def newest(self, count: int) -> int:
        return 1

    @property
    def voters(self) -> int:
        return 1

    def scores(self, chunk: Chunk) -> Tensor:
        assert chunk.queries is not None
        votes = received(chunk.queries[:, :, -1:], chunk.keys, chunk.scale, chunk.alive)
        means: Tensor = votes.unflatten(1, (chunk.keys.shape[1], -1)).mean(2)
        return means
