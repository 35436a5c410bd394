"""What a layer holds, for code that reads `cache.layers[i].keys` as it reads DynamicCache's."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvcomp.errors import KvcompWarning

from .handles import Handle

if TYPE_CHECKING:
    from .layer import CompressedLayer


class Contents(Handle):
    """Stands in for all K or V that a layer holds between forwards: a size, and tensors only where they are asked."""

    layer: CompressedLayer

    def __init__(self, layer: CompressedLayer, which: int) -> None:
        store = layer._store
        new = torch.Size((store.rows, store.heads, 0, store.v_dim if which else store.k_dim))
        super().__init__(layer, which, new, int(layer.get_seq_length()))

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
