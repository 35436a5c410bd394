"""Quantizers whose bases come from a calibration file."""

from __future__ import annotations

from torch import Tensor

from kvcomp.calibration import Blank, Calibrated, Tensors
from kvcomp.ledger import storage_bytes
from kvcomp.pages import Field
from kvcomp.stages import Codec, PageShape, Quantizer
from kvcomp.statistics import Statistics

from .basis import Basis
from .codecs import GridCodec, Side


class CalibratedQuantizer(Calibrated, Quantizer):
    """A quantizer of calibrated bases.

    Subclasses say what a page's fields are (`sides`), what the file has to hold (`calibrate`) and how bases are made of
    that (`bases`). Fields need no file: a plan is made before there is one.
    """

    @classmethod
    def calibrate(cls, seen: Statistics) -> dict[str, Tensor]:
        raise NotImplementedError

    def sides(self, shape: PageShape) -> tuple[Side, Side]:
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

    def shared_bytes(self, shape: PageShape) -> int:
        if self.calibration is None and not self.required:
            return 0
        return storage_bytes(self.made_of(Blank(), shape).constants())
