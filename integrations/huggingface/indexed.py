"""Layers of models that choose by themselves which tokens attention sees, by an indexer: DeepSeek-V3.2, GLM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .layer import CompressedLayer


class IndexedLayer(CompressedLayer):
    """A full-attention layer that also holds the keys of the model's own indexer, as they are: [B, n, D].

    The model masks what its indexer does not choose. It expands its latents before it attends, so that the choice is
    kept, but every latent is decoded in every step.
    """

    def reset(self) -> None:
        super().reset()
        self.index_keys: Tensor | None = None

    def update_indexer(self, indexer_key_states: Tensor) -> Tensor:
        """Take index keys [B, n, D]; returns all of them."""
        held = self.index_keys
        self.index_keys = indexer_key_states if held is None else torch.cat([held, indexer_key_states], 1)
        return self.index_keys

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        if self.index_keys is not None and tokens_to_remove:
            self.index_keys = self.index_keys[:, :tokens_to_remove].clone()

    def select_rows(self, rows: Tensor) -> None:
        super().select_rows(rows)
        if self.index_keys is not None:
            self.index_keys = self.index_keys[rows.to(self.index_keys.device)]

    def state(self) -> dict[str, Any]:
        return {**super().state(), "index_keys": self.index_keys}

    def restore(self, state: Mapping[str, Any], device: torch.device) -> None:
        super().restore(state, device)
        keys = state["index_keys"]
        self.index_keys = None if keys is None else keys.to(device)

    def library(self) -> list[Tensor]:
        return [] if self.index_keys is None else [self.index_keys]
