"""Layers of models that choose by themselves which tokens attention sees, by an indexer: DeepSeek-V3.2, MiniMax-M3."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kvcomp.cache.layer import Shared
from kvcomp.cache.rows import Rows
from kvcomp.errors import KvcompError, UnsupportedError
from kvcomp.modes import normal_tensors, outside_inference
from kvcomp.state import FLOATS, State

from .handles import Call
from .held import HeldLayer
from .latent import LatentLayer
from .layer import CompressedLayer, answered

SPARE = 64  # tokens that the buffer of index keys is longer whenever it grows


class IndexedLayer(CompressedLayer):
    """A layer that also holds what the model's own indexer needs, as it is, and whose steps read what that chose.

    index_keys: its keys [B, n, D], a view of a longer buffer; with `window(bits=8)` decoded from `Rows` of 8 bits, in
    every step, as the indexer reads a tensor of them all. indexer_position_ids: int64 [dims, B, n], the positions
    of tokens, which some models keep here themselves; the name is transformers'. All of a model's indexed layers may
    use those of the first.

    Prompts are attended to in full under the model's mask, and so is whatever comes in chunks. That mask may hide what
    the indexer left out, too, and so does not tell which tokens are padding: all are stored, as in transformers' cache.
    """

    chooses = True
    former = "MiniMaxM3VLSparseCacheLayer"  # transformers' own, which files of kvcomp 0.2 have in its place

    def reset(self) -> None:
        super().reset()
        self._index: Tensor | None = None  # [B, tokens and some more, width]
        self._indexed = 0
        self._index_rows, self._index_dim = self._rows(torch.float32), 0
        self.indexer_position_ids: Tensor | None = None

    @property
    def batch_size(self) -> int:
        return super().batch_size if self.is_initialized or self._index is None else len(self._index)

    # -- what the indexer needs -----------------------------------------------------------------------------------

    def _rows(self, dtype: torch.dtype) -> Rows:
        return Rows(8 if self.plan.exact_bits == 8 else None, dtype)

    @property
    def _stored(self) -> Tensor | None:
        """The index keys as they are held: a view [B, n, width]."""
        return None if self._index is None else self._index[:, : self._indexed]

    @property
    def index_keys(self) -> Tensor | None:
        return None if self._stored is None else self._index_rows.decode(self._stored, self._index_dim)

    @index_keys.setter
    def index_keys(self, keys: Tensor | None) -> None:
        self._index = None if keys is None else self._encoded(keys)
        self._indexed = 0 if keys is None else keys.shape[1]

    def _encoded(self, keys: Tensor) -> Tensor:
        """Index keys [B, n, D] as they are held."""
        if self._index is None:
            self._index_rows, self._index_dim = self._rows(keys.dtype), keys.shape[2]
        return self._index_rows.encode(keys)

    @outside_inference
    @torch.no_grad()
    def update_indexer(self, indexer_key_states: Tensor) -> Tensor:
        """Take index keys [B, n, D]; returns all of them, these as they are."""
        new, before = self._encoded(indexer_key_states), self._indexed
        held, end = new[:, :0] if self._index is None else self._index, before + new.shape[1]
        if end > held.shape[1]:
            held = F.pad(held[:, :before], (0, 0, 0, end - before + SPARE))
        held[:, before:end] = new
        self._index, self._indexed = held, end
        keys = self._index_rows.decode(held[:, :end], self._index_dim)
        if self._index_rows.coded:
            keys[:, before:] = indexer_key_states
        return keys

    def update_index(self, idx_k: Tensor) -> Tensor:
        """As `update_indexer`, of keys [B, 1, n, D]: MiniMax-M3's name for it."""
        return self.update_indexer(idx_k[:, 0])[:, None]

    # -- attention ------------------------------------------------------------------------------------------------

    def attention(self, call: Call) -> tuple[Tensor, Tensor | None]:
        if self.pending is None and not self.lends:
            return self._lend(call)  # says why that cannot be
        try:
            if self._follows(call):
                with normal_tensors():
                    return self._step(call)
            answer = self._in_full(call.under_choice(int(self.get_seq_length())))
        except KvcompError:
            self._forget_newest()
            raise
        if self.pending is not None:
            self.attended = True
            self._hold(None, call, call.query.shape[-1] ** -0.5 if call.scaling is None else call.scaling)
        return answer

    def _follows(self, call: Call) -> bool:
        """Whether this is a step that reads what the indexer chose, and nothing else."""
        if call.query.shape[2] > 1 or self.record_past or not self._store.history.length:
            return False
        blocks = call.kwargs.get("block_indices")  # of each of the indexer's heads
        by_head = isinstance(call.mask, Tensor) and call.mask.dim() == 4 and call.mask.shape[1] > 1
        by_head |= blocks is not None and self._store.heads % blocks.shape[1] != 0
        tracked = torch.is_grad_enabled() and (call.tracked or self._tracked())
        return not (by_head or tracked or call.wants_weights)

    def _step(self, call: Call) -> tuple[Tensor, Tensor | None]:
        """Attention of one query a head over what the indexer chose, of all that is held and the token that came; of
        later layers, which this one lends its tokens, over what theirs chose."""
        store, length = self._store, int(self.get_seq_length())
        choice = call.choice(length, store.heads)
        reads, dense = store.reads, store.dense_read
        if self.pending is not None:
            reads, dense = [], 0
            store.append(self.pending.keys, self.pending.values)
            self.pending, self.unsettled = None, True
        scale = call.query.shape[-1] ** -0.5 if call.scaling is None else call.scaling
        part = store.attend(call.asked, scale, call.kwargs.get("softcap"), choice=choice)
        store.reads, store.dense_read = [*reads, *store.reads], dense + store.dense_read
        if not self.lends:
            self.settle()
        return answered(part, call), None

    def _in_full(self, call: Call) -> tuple[Tensor, Tensor | None]:
        """The model's own attention over all tokens, decoded."""
        if self.pending is None:  # of a step whose token another layer's attention took
            return call.dense_behind(*self._store.padded())
        keys, values = self.pending[:2]
        return self._behind(call, keys, values) if self._store.history.length else call.dense(keys, values)

    # -- surgery and accounting -----------------------------------------------------------------------------------

    def crop(self, tokens_to_remove: int) -> None:
        if self.is_initialized or self._index is None:  # else it shares the latents of another layer
            super().crop(tokens_to_remove)
        if tokens_to_remove:
            self._indexed = max(self._indexed + tokens_to_remove, 0)
            positions = self.indexer_position_ids
            self.indexer_position_ids = None if positions is None else positions[..., :tokens_to_remove].clone()

    def select_rows(self, rows: Tensor) -> None:
        super().select_rows(rows)
        stored, positions = self._stored, self.indexer_position_ids
        self._index = None if stored is None else stored[rows.to(stored.device)]
        self.indexer_position_ids = None if positions is None else positions[:, rows.to(positions.device)]

    def fork(self, choices: dict[int, Shared]) -> HeldLayer:
        twin = super().fork(choices)
        assert isinstance(twin, IndexedLayer)
        twin._index = None if self._stored is None else self._stored.clone()
        return twin

    def state(self) -> dict[str, Any]:
        keys = None if self.index_keys is None else self.index_keys.contiguous()
        return {**super().state(), "index_keys": keys, "index_positions": self.indexer_position_ids}

    def restore(self, state: Mapping[str, Any], device: torch.device) -> None:
        super().restore(state, device)
        own, positions = State.of(state, f"layer {self.plan.layer}"), state.get("index_positions")  # of newer files
        keys = None if state["index_keys"] is None else own.tensor("index_keys", (None, None, None), *FLOATS)
        self.index_keys = None if keys is None else keys.to(device)
        self.indexer_position_ids = None if positions is None else positions.to(device)

    def take_over(self, state: State, device: torch.device) -> None:
        """Become what a layer of `former` held, on `device`.

        Raises:
            DamagedError: the state is none of such a layer.
        """
        if state.get("keys") is None:
            return
        keys = state.tensor("keys", (None, None, None, None), *FLOATS)
        values = state.tensor("values", (*keys.shape[:3], None), keys.dtype)
        index = state.tensor("idx_keys", (len(keys), 1, keys.shape[2], None), *FLOATS)
        self.update(keys.to(device), values.to(device))
        self.commit()
        self.update_index(index.to(device))

    def library(self) -> list[Tensor]:
        return [x for x in (self._stored, self.indexer_position_ids) if x is not None]

    def decoded_library(self) -> tuple[int, int]:
        if self._stored is None or not self._index_rows.coded:
            return 0, 0
        rows, n, width = self._stored.shape
        copied = rows * n * self._index_dim * self._index_rows.dtype.itemsize
        return copied, copied - rows * n * width


class IndexedLatentLayer(IndexedLayer, LatentLayer):
    """An indexed layer of latents, keys [c, r] and values c: steps read those that the indexer chose as they are."""

    def _follows(self, call: Call) -> bool:
        absorbs = call.latent is not None and call.query.shape[1] == call.latent.heads
        return (absorbs or not self.latent) and super()._follows(call)

    def _in_full(self, call: Call) -> tuple[Tensor, Tensor | None]:
        if self.latent and call.latent is None:  # the model attends to c and r themselves
            return call.dense_behind(self.dense(0), self.dense(1))
        return super()._in_full(call)


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
