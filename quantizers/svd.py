"""Low rank: K and V in fewer directions, chosen from calibration (after Palu, 2407.21118, and MHA2MLA, 2502.14837)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvcomp.calibration.stage import FILE, Tensors, own
from kvcomp.calibration.statistics import Statistics, weighted_directions
from kvcomp.errors import SpecError
from kvcomp.stages import PageShape, Stage, arg
from kvcomp.stages.registry import register
from kvcomp.state import State

from .basis import Basis, hadamard
from .calibrated import CalibratedQuantizer, check_inverse
from .codecs import Grid, RawGrid
from .grid import UniformGrid

MULTIPLE = 8  # channels: codes of any width then fill bytes


@register("svd")
@dataclass(frozen=True)
class SVD(CalibratedQuantizer):
    """Low rank: each KV head keeps the few directions of K and V that matter most, as they are or as integers.

    Needs a file of `kvcomp calibrate --method svd`, which serves every rank. K's directions have the least expected
    squared error of q . k, V's the least after the output projection; what is dropped is replaced by its mean. Nothing
    is trained, and K is taken post-RoPE, where Palu and MHA2MLA compress it before RoPE. With `bits`, coordinates are
    mixed by a Hadamard matrix, as in Palu, and stored as integers per token. Effective bits of a side: rank / D of the
    dtype's, or (bits * rank + 32) / D.

    Papers: arXiv 2407.21118, 2502.14837.
    """

    paper: ClassVar[str] = "arXiv:2407.21118, arXiv:2502.14837"

    rank: int | float = arg(0.5, "directions kept: how many, or a share of all (to a multiple of 8)")
    v_rank: int | float | None = arg(None, "those of V, where they differ: V bears less")
    bits: int | None = arg(None, "bits per kept coordinate, 2 to 8; None: the model's dtype")
    calibration: str | None = arg(None, FILE)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_amount(self, "rank")
        if self.v_rank is not None:
            check_amount(self, "v_rank")
            if (type(self.v_rank), self.v_rank) == (type(self.rank), self.rank):  # equal stacks are written alike
                object.__setattr__(self, "v_rank", None)
        self.check(self.bits is None or 2 <= self.bits <= 8, "bits", "None or 2 to 8")

    @classmethod
    def calibrate(cls, seen: Statistics, *, damping: float = 1e-4) -> dict[str, Tensor]:
        """k, v [H, D, D]: how to write, by falling importance; k_dual, v_dual: how to read; k_mean, v_mean [H, D].

        damping: share of the mean weight that every direction gets at least, which keeps the inverse bounded.
        """
        k, k_dual = weighted_directions(seen.key_covariance, seen.queries, damping)
        even = torch.eye(seen.value_mean.shape[-1], dtype=seen.value_mean.dtype, device="cpu")
        even = even.expand_as(seen.value_covariance)
        cost = even if seen.output is None else seen.output
        v, v_dual = weighted_directions(seen.value_covariance, cost, damping)
        means = {"k_mean": seen.key_mean, "v_mean": seen.value_mean}
        return {"k": k, "k_dual": k_dual, "v": v, "v_dual": v_dual, **means}

    @classmethod
    def check_layer(cls, layer: State) -> None:
        for name in ("k", "v"):
            check_inverse(layer, name, f"{name}_dual")
            layer.finite(f"{name}_mean", layer[name].shape[:2], torch.float32)

    def sides(self, shape: PageShape) -> tuple[Grid, Grid]:
        return self._side("k", shape, shape.k_dim), self._side("v", shape, shape.v_dim)

    def _kept(self, name: str, dim: int) -> int:
        if name == "v" and self.v_rank is not None:
            return kept(self.v_rank, dim, "svd", "v_rank")
        return kept(self.rank, dim, "svd", "rank")

    def _side(self, name: str, shape: PageShape, dim: int) -> Grid:
        rank = self._kept(name, dim)
        if self.bits is None:
            return RawGrid(name, shape.page_size, rank, shape.dtype)
        return UniformGrid(name, shape.page_size, rank, self.bits, 1, rank)

    def bases(self, calibration: Tensors, shape: PageShape) -> tuple[Basis, Basis]:
        return self._basis("k", calibration, shape, shape.k_dim), self._basis("v", calibration, shape, shape.v_dim)

    def _basis(self, name: str, calibration: Tensors, shape: PageShape, dim: int) -> Basis:
        rank = self._kept(name, dim)
        write, read = (calibration.tensor(n, shape, dim, dim)[..., :rank] for n in (name, f"{name}_dual"))
        if self.bits is not None:
            mixing = hadamard(rank, shape.device).matrix
            assert mixing is not None
            write, read = write @ mixing, read @ mixing
        return Basis(own(write), own(read), calibration.tensor(f"{name}_mean", shape, dim))


def check_amount(stage: Stage, argument: str) -> None:
    """Raise a SpecError unless the argument is a positive number of channels or a share of them."""
    value = getattr(stage, argument)
    ok = value >= 1 if isinstance(value, int) else 0 < value <= 1
    stage.check(ok, argument, "a positive whole number, or a share above 0 and at most 1.0")
    if isinstance(value, float):
        stage.check_share(argument)


def kept(amount: int | float, dim: int, stage: str, argument: str) -> int:
    """How many of `dim` channels stay: `amount` of them, or that share, to the nearest multiple of 8.

    Raises:
        SpecError: there are not as many.
    """
    if isinstance(amount, int):
        if amount > dim:
            raise SpecError(f"{stage}({argument}={amount}): there are {dim} channels: use at most {dim}")
        return amount
    return dim if amount == 1 else min(max(round(amount * dim / MULTIPLE), 1) * MULTIPLE, dim)
