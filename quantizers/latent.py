"""Latents of plain models: K and V of all heads together in fewer coordinates (after MHA2MLA and Palu)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from einops import rearrange
from torch import Tensor

from kvcomp.calibration.file import Calibration
from kvcomp.calibration.stage import FILE, Calibrated
from kvcomp.calibration.statistics import weighted_directions
from kvcomp.stages import PageShape, arg
from kvcomp.stages.joint import JointMaps, LatentStage
from kvcomp.stages.registry import register
from kvcomp.state import State

from .svd import check_amount, kept

_made: WeakKeyDictionary[Calibration, dict[Any, JointMaps]] = WeakKeyDictionary()  # caches of a model share them
SINKS = 4  # first tokens of a context, whose norms are far from those of all others; the window keeps them exactly


@dataclass(frozen=True)
class JointStatistics:
    """One layer as calibration saw it: means over tokens, float64 on the CPU, all post-RoPE.

    mean [n], moment [n, n] about it, of x = K and V of all H heads in a row, n = H * (Dk + Dv). queries [H, Dk, Dk]:
    the mean of q q' over the tokens and query heads of a KV head. output [H, Dv, Dv]: as in `Statistics`.
    """

    mean: Tensor
    moment: Tensor
    queries: Tensor
    output: Tensor | None


class JointMoments:
    """Sums that `JointStatistics` are made of: memory does not grow with the tokens added."""

    def __init__(self) -> None:
        self.tokens, self.sums = 0, list[Tensor]()

    def add(self, queries: Tensor, keys: Tensor, values: Tensor) -> None:
        """Add a context: queries [B, Hq, n, Dk], keys [B, H, n, Dk], values [B, H, n, Dv]. Its first tokens are left
        out."""
        heads = keys.shape[1]
        queries, keys, values = (x[:, :, SINKS:].double() for x in (queries, keys, values))
        q = rearrange(queries, "b (h g) n d -> h (b g n) d", h=heads)
        x = torch.cat([rearrange(side, "b h n d -> (b n) (h d)") for side in (keys, values)], -1)
        chunk = [x.sum(0), x.mT @ x, q.mT @ q * (len(x) / max(q.shape[1], 1))]
        self.sums = [a + b for a, b in zip(self.sums, chunk, strict=True)] if self.sums else chunk
        self.tokens += len(x)

    def result(self, output: Tensor | None = None) -> JointStatistics:
        """What was added so far; at least one token."""
        mean, moment, queries = ((total / max(self.tokens, 1)).cpu() for total in self.sums)
        return JointStatistics(mean, moment - mean[:, None] * mean, queries, output)


@register("latent")
@dataclass(frozen=True)
class Latent(Calibrated, LatentStage):
    """Latent state for plain models: K and V of all heads of a layer become one latent, of which pages keep a part.

    Needs a file of `kvcomp calibrate --method latent`, which serves every rank. Its coordinates are the linear ones of
    least expected error of q . k and of the outputs after their projection, the most important ones first; the stack's
    quantizer codes the first `rank` of them. Sinks and window keep all of them, which is exact. Nothing is trained, and
    K is taken post-RoPE: MHA2MLA and Palu compress it before RoPE. Decode steps attend to the latent as it is, all
    query heads over one stream, as in MLA; policies and selectors choose for all heads together.

    Papers: arXiv 2502.14837, 2407.21118.
    """

    paper: ClassVar[str] = "arXiv:2502.14837, arXiv:2407.21118"
    seen: ClassVar[type[JointMoments]] = JointMoments

    rank: int | float = arg(0.5, "coordinates kept of K and V of all heads: how many, or a share (to a multiple of 8)")
    calibration: str | None = arg(None, FILE)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_amount(self, "rank")

    @property
    def default_window(self) -> tuple[int, int]:
        return SINKS, 0

    @classmethod
    def calibrate(cls, seen: JointStatistics, *, key_weight: float = 4.0, damping: float = 1e-4) -> dict[str, Tensor]:
        """write [1, n, n]: W, by falling importance; mean [1, n].

        key_weight: how much the error of q . k counts, in all, for each that of the outputs does. damping: share of the
        mean weight that every direction gets at least, which keeps the inverse bounded.
        """
        heads, k_dim, _ = seen.queries.shape
        n = heads * k_dim
        v_dim = (len(seen.mean) - n) // heads
        output = seen.output
        if output is None:
            output = torch.eye(v_dim, dtype=seen.moment.dtype, device=seen.moment.device).expand(heads, -1, -1)
        k, v = torch.block_diag(*seen.queries), torch.block_diag(*output)
        size = [float((weight * part).sum()) for weight, part in ((k, seen.moment[:n, :n]), (v, seen.moment[n:, n:]))]
        weight = torch.block_diag(k * (key_weight * size[1] / max(size[0], torch.finfo(torch.float64).tiny)), v)
        write, _ = weighted_directions(seen.moment[None], weight[None], damping)
        return {"write": write, "mean": seen.mean[None]}

    @classmethod
    def check_layer(cls, layer: State) -> None:
        write = layer.finite("write", (1, None, None), torch.float32)
        layer.require(write.shape[1] == write.shape[2], "write is no square matrix")
        layer.finite("mean", (1, write.shape[1]), torch.float32)
        inverse = torch.linalg.inv_ex(write[0].double())
        layer.require(int(inverse.info) == 0 and bool(inverse.inverse.isfinite().all()), "write has no inverse")

    def kept(self, channels: int) -> int:
        return kept(self.rank, channels, self.name, "rank")

    def maps(self, layer: int, heads: int, k_dim: int, v_dim: int, device: torch.device) -> JointMaps:
        n, file = heads * (k_dim + v_dim), self.load()
        made, key = _made.setdefault(file, {}), (layer, heads, k_dim, device)
        if key not in made:
            shape = PageShape(1, n, n, 1, torch.float32, torch.device("cpu"), layer)
            write, mean = file.tensor("write", shape, n, n)[0], file.tensor("mean", shape, n)[0]
            made.setdefault(key, JointMaps.of(write, mean, heads, k_dim, device))
        return made[key]
