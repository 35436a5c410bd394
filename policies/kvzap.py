"""KVzap: KVzip's scores predicted from a token's key and value, without a second pass (arXiv 2601.07891)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvcomp.calibration.stage import FILE, Calibrated
from kvcomp.stages import Chunk, ModelPart, PageShape, arg
from kvcomp.stages.registry import register
from kvcomp.state import State

from .scored import ScoredPolicy

LEAST = 1e-6  # attention below which a token is worth nothing: its logarithm has a lower bound
POSITIONS = 1 << 15  # at which keys are seen during calibration, whatever the length of a context
TURNS = 2  # positions at which each of them is seen


def features(keys: Tensor, values: Tensor) -> Tensor:
    """[k, k^2, v, 1] float64 [H, n, 2 Dk + Dv + 1] of keys [H, n, Dk] and values [H, n, Dv]."""
    k, v = keys.double(), values.double()
    return torch.cat([k, k.square(), v, torch.ones_like(k[..., :1])], -1)


class Repetitions:
    """Sums of a layer's features x and of their logarithmic KVzip scores y: x x' [H, F, F] and x y [H, F], float64.

    k_dim: Dk of its keys. Each key is turned to random positions, as if its token were there: a score that went by a
    key's position would fail on contexts longer than those of the calibration. Memory does not grow with the tokens.
    """

    def __init__(self) -> None:
        self.chance = torch.Generator().manual_seed(0)
        self.squares = self.products = torch.zeros((), dtype=torch.float64, device="cpu")
        self.k_dim = 0

    def add(self, queries: Tensor, keys: Tensor, values: Tensor) -> None:
        """A context, B = 1: keys [1, H, n, Dk], values [1, H, n, Dv]."""
        self.k_dim, self.context = keys.shape[-1], (keys, values)

    def repeated(self, received: Tensor, model: ModelPart) -> None:
        """received [1, H, n]: the most attention that each token of the context got while the model repeated it."""
        (keys,), (values,) = self.context
        del self.context
        n = keys.shape[1]
        y = received[0].double().clamp_min(LEAST).log()[..., None]  # [H, n, 1]
        for _ in range(TURNS):
            there = torch.randint(POSITIONS, (n,), generator=self.chance, device="cpu")
            turn = (there - torch.arange(n, device="cpu")).to(keys.device)
            x = features(model.rotate(keys.float(), turn), values)  # [H, n, F]
            self.squares = self.squares + (x.mT @ x).cpu()
            self.products = self.products + (x.mT @ y)[..., 0].cpu()

    def result(self, output: Tensor | None) -> Repetitions:
        return self


@register("kvzap")
@dataclass(frozen=True)
class KVzap(ScoredPolicy, Calibrated):
    """KVzap: keeps the tokens that KVzip is expected to keep, by a linear map of each token's own key and value.

    score_j = a . k_j + b . k_j^2 + c . v_j + d, with post-RoPE keys and their squares channel by channel, predicts the
    logarithm of KVzip's score of token j: of the most attention that it gets while the model repeats the context. The
    vectors a, b, c and the number d of each KV head are fitted by ridge regression to the scores on the texts that
    `kvcomp calibrate --method kvzap` reads, with each key turned to random positions, so that a score does not depend
    on where a token stands. A threshold is such a logarithm, as the authors use it: -6 keeps what is expected to get
    more than e^-6 = 0.25 % of some query's attention. The first `sinks` tokens are always kept.

    Differs from the paper: the authors predict from hidden states, which need weights that only the model has, and
    weigh attention by |W_o v| / |h|. Tokens are chosen when the prompt comes; those that are generated are kept, unless
    a budget is to `hold`.

    Paper: arXiv 2601.07891.
    """

    paper: ClassVar[str] = "arXiv:2601.07891"
    seen: ClassVar[type[Repetitions]] = Repetitions
    repeats: ClassVar[int | None] = 2048
    scores_within: ClassVar[tuple[float, float]] = (-1e30, 0.0)

    sinks: int = arg(4, "first tokens, which are kept")
    calibration: str | None = arg(None, FILE)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(self.sinks >= 0, "sinks", "zero or positive")

    @classmethod
    def calibrate(cls, seen: Repetitions, *, ridge: float = 0.01) -> dict[str, Tensor]:
        """key [H, Dk], square [H, Dk], value [H, Dv] and bias [H] of the score.

        ridge: what is added to the diagonal of the features' correlation matrix.
        """
        tokens = seen.squares[:, -1:, -1]  # [H, 1]: the last feature is 1
        mean, target = seen.squares[:, -1, :-1] / tokens, seen.products[:, -1:] / tokens
        covariance = seen.squares[:, :-1, :-1] / tokens[..., None] - mean[:, :, None] * mean[:, None]
        spread = covariance.diagonal(dim1=1, dim2=2).clamp_min(1e-12).sqrt()
        correlation = covariance / spread[:, :, None] / spread[:, None]
        correlation.diagonal(dim1=1, dim2=2).add_(ridge)
        wanted = (seen.products[:, :-1] / tokens - mean * target) / spread
        weight = torch.linalg.solve(correlation, wanted) / spread
        dim = seen.k_dim
        return {
            "key": weight[:, :dim],
            "square": weight[:, dim : 2 * dim],
            "value": weight[:, 2 * dim :],
            "bias": (target - (weight * mean).sum(-1, keepdim=True))[:, 0],
        }

    @classmethod
    def check_layer(cls, layer: State) -> None:
        key = layer.finite("key", (None, None), torch.float32)
        layer.finite("square", tuple(key.shape), torch.float32)
        layer.finite("value", (len(key), None), torch.float32)
        layer.finite("bias", (len(key),), torch.float32)

    def scores(self, chunk: Chunk) -> Tensor:
        file, (_, heads, _, dim) = self.load(), chunk.keys.shape
        width = chunk.values.shape[-1]
        shape = PageShape(1, dim, width, heads, chunk.keys.dtype, chunk.keys.device, chunk.layer)
        key, square, value = (
            file.tensor(name, shape, size)[..., None]
            for name, size in (("key", dim), ("square", dim), ("value", width))
        )
        k, v = chunk.keys.float(), chunk.values.float()
        found = (k @ key + k.square() @ square + v @ value)[..., 0] + file.tensor("bias", shape)[:, None]
        found[..., : max(self.sinks - chunk.past, 0)] = torch.inf
        return found
