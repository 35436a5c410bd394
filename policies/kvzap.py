"""KVzap: KVzip's scores predicted from a token's key and value, without a second pass (arXiv 2601.07891)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from kvcomp.calibration.file import Calibration, CalibrationError
from kvcomp.calibration.stage import FILE, Calibrated
from kvcomp.stages import Chunk, ModelPart, PageShape, arg
from kvcomp.stages.registry import register
from kvcomp.state import State

from .scored import LAYERS, ScoredPolicy

CALIBRATED = "calibrated"
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


@lru_cache(maxsize=64)
def shares(file: Calibration, share: float) -> dict[int, float]:
    """Per layer, the share of its tokens whose score exceeds what a `share` of all layers' tokens exceeds on the texts,
    where the scores of a head are taken to be normally distributed."""
    means, spreads = ([file.tensors[f"{i}.{name}"].double() for i in file.layers] for name in ("mean", "spread"))
    mean, spread = torch.cat(means), torch.cat(spreads).clamp_min(1e-6)
    low, high = float((mean - 40 * spread).min()), float((mean + 40 * spread).max())
    for _ in range(100):
        middle = (low + high) / 2
        above = torch.special.ndtr((mean - middle) / spread)
        low, high = (middle, high) if float(above.mean()) > share else (low, middle)
    by_layer = above.split([len(heads) for heads in means])
    return {layer: float(part.mean()) for layer, part in zip(file.layers, by_layer, strict=True)}


@register("kvzap")
@dataclass(frozen=True)
class KVzap(ScoredPolicy, Calibrated):
    """KVzap: keeps the tokens that KVzip is expected to keep, by a linear map of each token's own key and value.

    score_j = a . k_j + b . k_j^2 + c . v_j + d, with post-RoPE keys and their squares channel by channel, predicts the
    logarithm of KVzip's score of token j: of the most attention that it gets while the model repeats the context. The
    vectors a, b, c and the number d of each KV head are fitted by ridge regression to the scores on the texts that
    `kvcomp calibrate --method kvzap` reads, with each key turned to random positions, so that a score does not depend
    on where a token stands. The first `sinks` tokens are always kept.

    KVzip's scores differ most between layers and heads, which all share one budget there. So they do here, by default:
    with `keep`, a layer's part is what exceeds one threshold for all layers on the texts, and its heads share it. A
    `threshold` is such a logarithm, as the authors use it, and how many tokens stay depends on the prompt: -6 keeps
    what is expected to get more than e^-6 = 0.25 % of some query's attention. A `budget` is the same for all layers.

    Differs from the paper: the authors predict from hidden states, which need weights that only the model has, and
    weigh attention by |W_o v| / |h|. Tokens are chosen when the prompt comes; those that are generated are kept, unless
    a budget is to `hold`.

    Paper: arXiv 2601.07891.
    """

    paper: ClassVar[str] = "arXiv:2601.07891"
    seen: ClassVar[type[Repetitions]] = Repetitions
    repeats: ClassVar[int | None] = 2048
    scores_within: ClassVar[tuple[float, float]] = (-1e30, 0.0)
    layers_among: ClassVar[tuple[str, ...]] = (*LAYERS, CALIBRATED)

    layers: str = arg(CALIBRATED, "calibrated: layers share the tokens by their scores on the texts; or as elsewhere")
    heads: str = arg("adaptive", "adaptive: heads share a layer's budget; own; or common. With a threshold: own")
    floor: float = arg(0.0, "adaptive heads: the share of the budget that each keeps at least")
    sinks: int = arg(4, "first tokens, which are kept")
    calibration: str | None = arg(None, FILE)

    def __post_init__(self) -> None:
        sized = self.threshold is not None or self.budget is not None  # for which the defaults mean nothing
        if sized and self.layers == CALIBRATED:
            object.__setattr__(self, "layers", "uniform")
        if self.threshold is not None and self.heads == "adaptive":
            object.__setattr__(self, "heads", "own")
        super().__post_init__()
        self.check(self.sinks >= 0, "sinks", "zero or positive")

    @property
    def implied(self) -> tuple[str, ...]:
        layers = ("layers",) if self.keep is None and self.layers == "uniform" else ()
        return (*layers, "heads") if self.threshold is not None and self.heads == "own" else layers

    @classmethod
    def calibrate(cls, seen: Repetitions, *, ridge: float = 0.01) -> dict[str, Tensor]:
        """key [H, Dk], square [H, Dk], value [H, Dv] and bias [H] of the score; its mean and spread [H] on the texts.

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
            "mean": target[:, 0],
            "spread": torch.einsum("hf,hfg,hg->h", weight, covariance, weight).clamp_min(0).sqrt(),
        }

    @classmethod
    def check_layer(cls, layer: State) -> None:
        key = layer.finite("key", (None, None), torch.float32)
        layer.finite("square", tuple(key.shape), torch.float32)
        layer.finite("value", (len(key), None), torch.float32)
        for name in ("bias", "mean", "spread"):
            layer.finite(name, (len(key),), torch.float32)
        layer.require(bool((layer["spread"] >= 0).all()), "spread is negative")

    def kept(self, tokens: int, sinks: int, recent: int, layer: int, layers: int) -> int:
        count = super().kept(tokens, sinks, recent, layer, layers)
        fixed = sum(self._protected(tokens, sinks, recent))
        if self.layers != CALIBRATED or not fixed < count < tokens:
            return count
        try:
            file = self.load()
        except CalibrationError:  # a plan is made before there is a file
            return count
        share = (count - fixed) / (tokens - fixed)
        return fixed + round((tokens - fixed) * shares(file, share).get(layer, share))

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
