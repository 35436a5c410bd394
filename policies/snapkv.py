"""SnapKV: the last queries of the prompt vote for what to keep (arXiv 2404.14469)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from kvcomp.kernels.received import received
from kvcomp.stages import Alias, Chunk, arg
from kvcomp.stages.registry import register

from .scored import ScoredPolicy


@register("snapkv")
@dataclass(frozen=True)
class SnapKV(ScoredPolicy):
    """SnapKV: keeps the prompt tokens that the last `window` queries attend to most, smoothed along the sequence.

    score_j = pool(mean over the window's queries of softmax(q k_j)), averaged over the query heads of a KV head; the
    window itself is always kept. Defaults are the authors' class: window 64, capacity 320, average pooling over 5.
    Of a prompt in chunks each round (`ScoredPolicy`) is scored by its own last queries.

    Paper: arXiv 2404.14469.
    """

    paper: ClassVar[str] = "arXiv:2404.14469"
    needs_queries: ClassVar[bool] = True
    scores_within: ClassVar[tuple[float, float]] = (0.0, 1.0)

    window: int = arg(64, "last queries that vote; their own tokens are always kept")
    kernel: int = arg(5, "width of the pooling along the sequence, odd")
    pooling: str = arg("avg", "avg or max")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(self.window > 0, "window", "positive")
        self.check(self.kernel > 0 and self.kernel % 2 == 1, "kernel", "odd and positive")
        self.check(self.pooling in ("avg", "max"), "pooling", "avg or max")

    @property
    def default(self) -> tuple[str, float]:
        return "budget", 320

    def newest(self, count: int) -> int:
        return self.window

    @property
    def voters(self) -> int:
        return self.window

    def scores(self, chunk: Chunk) -> Tensor:
        """[b, Hkv, n] float32: pooled votes, averaged over the group."""
        assert chunk.queries is not None
        window = min(self.window, chunk.queries.shape[2])
        votes = received(chunk.queries[:, :, -window:], chunk.keys, chunk.scale, chunk.alive)
        prefix = votes[..., : votes.shape[-1] - window]
        pool = F.avg_pool1d if self.pooling == "avg" else F.max_pool1d
        pooled = pool(prefix, self.kernel, 1, self.kernel // 2) if prefix.shape[-1] else prefix
        means: Tensor = F.pad(pooled, (0, window)).unflatten(1, (chunk.keys.shape[1], -1)).mean(2) / window
        return means


@register("pyramidkv")
@dataclass(frozen=True)
class PyramidKV(SnapKV):
    """PyramidKV: SnapKV's votes, with budgets that fall linearly from the first layer to the last at the same sum.

    Paper: arXiv 2406.02069.
    """

    paper: ClassVar[str] = "arXiv:2406.02069"

    layers: str = arg("pyramid", "uniform, or pyramid: the first layers keep most, at the same sum")


@register("adakv")
@dataclass(frozen=True)
class AdaKV(SnapKV):
    """AdaKV: SnapKV's votes, with one budget per layer that its heads share: a head keeps what scores best anywhere.

    Paper: arXiv 2407.11550.
    """

    paper: ClassVar[str] = "arXiv:2407.11550"
    aliases: ClassVar[Mapping[str, str | Alias]] = {"floor_alpha": "floor", "base_capacity": "budget"}

    heads: str = arg("adaptive", "own choice of each KV head, a common one, or adaptive: heads share a layer's budget")


@register("criticalkv")
@dataclass(frozen=True)
class CriticalKV(SnapKV):
    """CriticalKV: half of the tokens by SnapKV's votes, the others by votes times |W_o v|, which they can change.

    Paper: arXiv 2502.03805.
    """

    paper: ClassVar[str] = "arXiv:2502.03805"

    critical: bool = arg(True, "choose half by the score, then by the score times |W_o v|, as CriticalKV does")


@register("chunkkv")
@dataclass(frozen=True)
class ChunkKV(SnapKV):
    """ChunkKV: SnapKV's votes, summed over runs of 10 tokens and all heads: whole runs stay or leave.

    Paper: arXiv 2502.00299.
    """

    paper: ClassVar[str] = "arXiv:2502.00299"
    aliases: ClassVar[Mapping[str, str | Alias]] = {"chunk_length": "span"}

    heads: str = arg("common", "own choice of each KV head, a common one, or adaptive: heads share a layer's budget")
    span: int = arg(10, "neighbouring tokens that stay or leave together")
    kernel: int = arg(1, "width of the pooling along the sequence, odd")
