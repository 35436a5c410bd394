"""Layers of models that choose by themselves which tokens attention sees, by an indexer: DeepSeek-V3.2, GLM, Qwen4."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kvcomp.errors import UnsupportedError

from .handles import Call
from .layer import CompressedLayer


class IndexedLayer(CompressedLayer):
    """A full-attention layer that also holds what the model's own indexer needs, as it is.

    index_keys: its keys [B, n, D].
    indexer_position_ids: int64 [dims, B, n], the positions of tokens, which some models keep here themselves; the name
        is transformers'. All of a model's indexed layers may use those of the first.

    The model masks what its indexer does not choose, so that the choice is kept, but every token is decoded in every
    step: either it expands its latents before it attends, or `attention` gives it all tokens under its mask.
    """

    def reset(self) -> None:
        super().reset()
        self.index_keys: Tensor | None = None
        self.indexer_position_ids: Tensor | None = None

    def update_indexer(self, indexer_key_states: Tensor) -> Tensor:
        """Take index keys [B, n, D]; returns all of them."""
        held = self.index_keys
        self.index_keys = indexer_key_states if held is None else torch.cat([held, indexer_key_states], 1)
        return self.index_keys

    def attention(self, call: Call) -> tuple[Tensor, Tensor | None]:
        """The model's own attention over all tokens.

        Its mask hides what the indexer did not choose for a query, and so does not tell which tokens are padding: all
        are stored, as in transformers' own cache.
        """
        answer = call.dense(self.dense(0), self.dense(1))
        self._hold(None, call, call.query.shape[-1] ** -0.5 if call.scaling is None else call.scaling)
        return answer

    def crop(self, tokens_to_remove: int) -> None:
        if self.is_initialized or self.index_keys is None:  # else it shares the latents of another layer
            super().crop(tokens_to_remove)
        if tokens_to_remove:
            keys, positions = self.index_keys, self.indexer_position_ids
            self.index_keys = None if keys is None else keys[:, :tokens_to_remove].clone()
            self.indexer_position_ids = None if positions is None else positions[..., :tokens_to_remove].clone()

    def select_rows(self, rows: Tensor) -> None:
        super().select_rows(rows)
        keys, positions = self.index_keys, self.indexer_position_ids
        self.index_keys = None if keys is None else keys[rows.to(keys.device)]
        self.indexer_position_ids = None if positions is None else positions[:, rows.to(positions.device)]

    def state(self) -> dict[str, Any]:
        return {**super().state(), "index_keys": self.index_keys, "index_positions": self.indexer_position_ids}

    def restore(self, state: Mapping[str, Any], device: torch.device) -> None:
        super().restore(state, device)
        keys, positions = state["index_keys"], state.get("index_positions")  # files without positions are older
        self.index_keys = None if keys is None else keys.to(device)
        self.indexer_position_ids = None if positions is None else positions.to(device)

    def library(self) -> list[Tensor]:
        return [x for x in (self.index_keys, self.indexer_position_ids) if x is not None]


class IndexerPositions:
    """What a cache of such layers has beside them."""

    layers: list[Any]

    @property
    def position_ids(self) -> Tensor:
        """int64 [dims, B, n]: positions of all tokens, which Qwen4 of transformers 5.19 keeps here if there are any
        already, and later versions in the first indexed layer."""
        held = next((x.indexer_position_ids for x in self.layers if isinstance(x, IndexedLayer)), None)
        if held is None:
            raise AttributeError("position_ids: no model has left any here")
        return held

    @position_ids.setter
    def position_ids(self, positions: Tensor) -> None:
        first = next((x for x in self.layers if isinstance(x, IndexedLayer)), None)
        if first is None:
            raise UnsupportedError(
                "the model leaves position_ids on its cache, which follow crops and files only in layers with an "
                "indexer: use the model's own cache"
            )
        first.indexer_position_ids = positions
