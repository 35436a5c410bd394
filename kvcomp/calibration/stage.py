"""Stages that read a calibration file."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from kvcomp.fingerprint import Fingerprint
from kvcomp.stages import ModelPart, PageShape, Stage
from kvcomp.state import DamagedError, State
from kvcomp.text import brief

from .file import Calibration, CalibrationError, digest, load
from .statistics import Moments

FILE = "file that `kvcomp calibrate` wrote for this method and model"


@lru_cache(maxsize=8)
def _flaw(calibration: Calibration, stage: type[Calibrated]) -> str | None:
    """Why a method cannot use its file; None: it can."""
    try:
        for layer in calibration.layers:
            tensors = {
                name.partition(".")[2]: tensor
                for name, tensor in calibration.tensors.items()
                if int(name.partition(".")[0]) == layer
            }
            stage.check_layer(State(tensors, f"layer {layer}"))
    except DamagedError as error:
        return str(error)
    return None


class Tensors(Protocol):
    """What a calibrated stage takes from its file."""

    def tensor(self, name: str, shape: PageShape, *dims: int | None) -> Tensor:
        """As `Calibration.tensor`."""


class Blank:
    """Stands for a file that need not be there yet: tensors of ones, of the right shapes. For plans."""

    def tensor(self, name: str, shape: PageShape, *dims: int | None) -> Tensor:
        return torch.ones(shape.heads, *(dim or 1 for dim in dims), dtype=torch.float32, device="cpu")


class Seen(Protocol):
    """What calibration keeps of one layer while the model reads: chunks of post-RoPE tensors go in, without padding."""

    def add(self, queries: Tensor, keys: Tensor, values: Tensor) -> None:
        """Add a chunk: queries [B, Hq, n, Dk], keys [B, H, n, Dk], values [B, H, n, Dv]."""

    def result(self, output: Tensor | None) -> Any:
        """What `Calibrated.calibrate` gets; output as in `Statistics`."""


class Repeated(Seen, Protocol):
    """What calibration keeps of a layer where the model repeats each context, too."""

    def repeated(self, received: Tensor, model: ModelPart) -> None:
        """received [1, H, n]: the most attention that each token of the context added last got while the model repeated
        it; model: the layer's."""


class Calibrated(Stage):
    """A stage that reads a calibration file, which its argument `calibration` names.

    required: whether there is no other way, such as fitting to the prompt. seen: what it is computed from. repeats: how
    many tokens of each context the model repeats at a time once it has read it, for a `seen` that is `Repeated`; None:
    it does not.
    """

    required: ClassVar[bool] = True
    seen: ClassVar[type[Seen]] = Moments
    repeats: ClassVar[int | None] = None
    calibration: str | None

    @classmethod
    def calibrate(cls, seen: Any) -> dict[str, Tensor]:
        """Tensors of one layer, each [H, ...], from what `Seen.result` gave; keyword-only arguments are settings, and
        are recorded in the file."""
        raise NotImplementedError

    @classmethod
    def check_layer(cls, layer: State) -> None:
        """Raise a DamagedError unless a file's tensors of one layer can be what `calibrate` gave."""

    def load(self) -> Calibration:
        """The file.

        Raises:
            CalibrationError: none is named, or it cannot be used.
        """
        if self.calibration is None:
            raise CalibrationError(
                f"{self.name} needs calibration='FILE', a file that `kvcomp calibrate --method {self.name}` wrote"
            )
        found = load(self.calibration, self.name)
        flaw = _flaw(found, type(self))
        if flaw is not None:
            raise CalibrationError(f"calibration={self.calibration!r} is damaged: {flaw}: calibrate again")
        return found

    def serves(self, model: Callable[[], Fingerprint]) -> None:
        if self.calibration is None and not self.required:
            return
        file = self.load()
        here = model()
        if not file.model.same(here):
            what = "with other weights" if file.model.config == here.config else "which is another model"
            raise CalibrationError(
                f"{self.name}(calibration={self.calibration!r}) was calibrated for {brief(file.model.name)}, and the "
                f"cache is for {brief(here.name)}, {what}: run `kvcomp calibrate --method {self.name}` on that one"
            )

    def identity(self, argument: str) -> Any:
        value = super().identity(argument)
        return digest(value) or value if argument == "calibration" and value is not None else value


def own(tensor: Tensor) -> Tensor:
    """A copy that holds nothing but its own elements: what a layer keeps of a file's tensor."""
    return tensor.clone(memory_format=torch.contiguous_format)
