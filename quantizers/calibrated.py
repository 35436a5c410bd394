"""Quantizers whose bases come from a calibration file."""

from __future__ import annotations

import torch
from torch import Tensor

from kvcomp.calibration.file import CalibrationError
from kvcomp.calibration.stage import Blank, Calibrated, Tensors
from kvcomp.calibration.statistics import Statistics
from kvcomp.layout import Field
from kvcomp.ledger import storage_bytes
from kvcomp.stages import Codec, PageShape, Quantizer
from kvcomp.state import State, described

from .basis import Basis
from .codecs import Grid, GridCodec

NEAR = 1e-2  # to the identity is the product of a matrix and its inverse
ROUNDING = 1e-5  # of the norms of their columns is added for float32


def check_inverse(layer: State, write: str, read: str) -> None:
    """Raise a DamagedError unless W [H, D, D] and R [H, D, D] of these names have W' R = I."""
    one = layer.finite(write, (None, None, None), torch.float32)
    two = layer.finite(read, (*one.shape[:2], one.shape[1]), torch.float32)
    layer.require(one.shape == two.shape, f"{write} is {described(one)}, no square matrices")
    w, r = one.double(), two.double()
    away = (w.mT @ r - torch.eye(w.shape[1], dtype=w.dtype, device=w.device)).abs()
    allowed = NEAR + ROUNDING * w.norm(dim=1)[:, :, None] * r.norm(dim=1)[:, None]
    layer.require(bool((away < allowed).all()), f"{write} is not inverted by {read}")


class CalibratedQuantizer(Calibrated, Quantizer):
    """A quantizer of calibrated bases.

    Subclasses say what a page's fields are (`sides`), what the file has to hold (`calibrate`) and how bases are made of
    that (`bases`). Fields need no file: a plan is made before there is one.
    """

    @classmethod
    def calibrate(cls, seen: Statistics) -> dict[str, Tensor]:
        raise NotImplementedError

    def sides(self, shape: PageShape) -> tuple[Grid, Grid]:
        """The grids of K and of V."""
        raise NotImplementedError

    def bases(self, calibration: Tensors, shape: PageShape) -> tuple[Basis, Basis]:
        """The bases of K and of V."""
        raise NotImplementedError

    def fields(self, shape: PageShape) -> tuple[Field, ...]:
        return tuple(field for side in self.sides(shape) for field in side.fields)

    def made_of(self, calibration: Tensors, shape: PageShape) -> Codec:
        """The codec that a file gives."""
        return GridCodec(*self.sides(shape), *self.bases(calibration, shape))

    def codec(self, shape: PageShape) -> Codec:
        return self.made_of(self.load(), shape)

    def has_layer(self, layer: int) -> bool:
        try:
            return self.calibration is None or layer in self.load().layers
        except CalibrationError:  # a plan is made before there is a file
            return True

    def shared_bytes(self, shape: PageShape) -> int:
        if self.calibration is None and not self.required:
            return 0
        return storage_bytes(self.made_of(Blank(), shape).constants())
