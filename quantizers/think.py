"""ThinK: keys without the channels that queries hardly use (arXiv 2407.21018)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from kvcomp.calibration.stage import FILE, Tensors
from kvcomp.calibration.statistics import Statistics
from kvcomp.stages import Alias, PageShape, arg, dropped_share
from kvcomp.stages.registry import register
from kvcomp.state import State

from .basis import IDENTITY, Basis
from .calibrated import CalibratedQuantizer
from .codecs import Grid, RawGrid
from .grid import UniformGrid, channel_group
from .svd import check_amount, kept


@register("think")
@dataclass(frozen=True)
class ThinK(CalibratedQuantizer):
    """ThinK: of K only the channels with the largest E[q_c^2] E[k_c^2]; of V all.

    Needs a file of `kvcomp calibrate --method think`; the authors take the same score from the current prompt and the
    queries of its last 32 tokens. Keeping 0.6 and 32 exact tokens are the authors'. With `bits`, K and V are stored as
    KIVI stores them, integers per channel and per token. Effective bits: (keep + 1) / 2 of the dtype's, or of
    bits + 32 / group.

    Paper: arXiv 2407.21018.
    """

    paper: ClassVar[str] = "arXiv:2407.21018"
    aliases: ClassVar[Mapping[str, str | Alias]] = {"key_channel_compression_ratio": dropped_share("keep")}

    keep: int | float = arg(0.6, "channels of K kept: how many, or a share of all (to a multiple of 8)")
    bits: int | None = arg(None, "bits per element, 2 to 8; None: the model's dtype")
    group: int = arg(32, "with bits: elements that share a scale and a zero; a multiple of 16")
    calibration: str | None = arg(None, FILE)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_amount(self, "keep")
        self.check(self.bits is None or 2 <= self.bits <= 8, "bits", "None or 2 to 8")
        self.check(self.group > 0 and self.group % 16 == 0, "group", "a positive multiple of 16")

    @property
    def page_multiple(self) -> int:
        return 1 if self.bits is None else self.group

    @property
    def default_window(self) -> tuple[int, int]:
        return 0, 32

    @classmethod
    def calibrate(cls, seen: Statistics) -> dict[str, Tensor]:
        """score [H, Dk]: E[q_c^2] E[k_c^2]."""
        keys = seen.key_covariance.diagonal(dim1=1, dim2=2) + seen.key_mean.square()
        return {"score": seen.queries.diagonal(dim1=1, dim2=2) * keys}

    @classmethod
    def check_layer(cls, layer: State) -> None:
        score = layer.finite("score", (None, None), torch.float32)
        layer.require(bool((score >= 0).all()), "score is negative")
        layer.require(bool((score > 0).any(-1).all()), "score of a head is 0 everywhere")

    def sides(self, shape: PageShape) -> tuple[Grid, Grid]:
        channels = kept(self.keep, shape.k_dim, "think", "keep")
        if self.bits is None:
            return (
                RawGrid("k", shape.page_size, channels, shape.dtype),
                RawGrid("v", shape.page_size, shape.v_dim, shape.dtype),
            )
        group = channel_group(self.name, self.group, shape.v_dim, 16)
        return (
            UniformGrid("k", shape.page_size, channels, self.bits, self.group, 1),
            UniformGrid("v", shape.page_size, shape.v_dim, self.bits, 1, group),
        )

    def bases(self, calibration: Tensors, shape: PageShape) -> tuple[Basis, Basis]:
        channels = kept(self.keep, shape.k_dim, "think", "keep")
        return selection(calibration.tensor("score", shape, shape.k_dim), channels), IDENTITY


def selection(score: Tensor, channels: int) -> Basis:
    """The `channels` channels of the largest score [n, D], in their order: a basis of n matrices [D, channels]."""
    chosen = score.topk(channels).indices.sort().values
    return Basis(F.one_hot(chosen, score.shape[-1]).mT.float().contiguous())
