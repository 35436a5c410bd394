"""What a layer holds, for code that reads `cache.layers[i].keys` as it reads DynamicCache's."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from kvcomp.errors import KvcompWarning

from .handles import Handle, HandleLayer


class Contents(Handle):
    """Replaces all K or V that a layer holds between forwards: a size, and tensors only where they are asked."""

    layer: Readable

    def __init__(self, layer: Readable, which: int) -> None:
        super().__init__(layer, which, layer.nothing(which), layer.readable())

    def numel(self) -> int:
        return self.shape.numel()

    nelement = numel

    def dense(self) -> Tensor:
        """[B, Hkv, N, D], decoded anew at every call; zeros where padding was never stored.

        Raises:
            UnsupportedError: some tokens were evicted.
        """
        if not self.layer.warned:
            warnings.warn(
                "the cache is read as dense tensors: all of a layer is decoded, which nothing keeps",
                KvcompWarning,
                stacklevel=3,
            )
            self.layer.warned = True
        return self.layer.decoded(self.which)


class Readable(HandleLayer):
    """A layer whose `keys` and `values` can be read between forwards."""

    warned = False  # that it is read as dense tensors

    def readable(self) -> int:
        """Columns of K and V that can be read."""
        return int(self.get_seq_length())

    def nothing(self, which: int) -> torch.Size:
        """The shape [B, Hkv, 0, D] of no K (0) or V (1)."""
        raise NotImplementedError

    def decoded(self, which: int) -> Tensor:
        """All K (0) or V (1) that is held, [B, Hkv, N, D]."""
        raise NotImplementedError

    @property  # type: ignore[override]
    def keys(self) -> Contents | None:
        """All K that is held, [B, Hkv, N, Dk], decoded only where its content is asked for; None while empty."""
        return Contents(self, 0) if self.is_initialized else None

    @keys.setter
    def keys(self, value: Any) -> None:
        """transformers' own constructor clears it."""

    @property  # type: ignore[override]
    def values(self) -> Contents | None:
        """All V that is held, [B, Hkv, N, Dv], as `keys`."""
        return Contents(self, 1) if self.is_initialized else None

    @values.setter
    def values(self, value: Any) -> None:
        """transformers' own constructor clears it."""
