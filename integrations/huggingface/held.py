"""What a compressed layer of the cache holds, and all that is done to it between forwards."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from typing import Any

import torch
from torch import Tensor

from kvcomp.cache.layer import LayerStore, Shared
from kvcomp.errors import KvcompError, UnsupportedError
from kvcomp.ledger import storage_bytes
from kvcomp.modes import outside_inference
from kvcomp.stages.plan import LayerPlan
from kvcomp.state import State

from .contents import Readable
from .handles import given_dtypes
from .pending import Pending, check_pair
from .turns import Turns


class HeldLayer(Readable):
    """Keys and values of one layer: those in the core's `LayerStore`, and chunks that wait to go there.

    `CompressedLayer` brings them in, and attends.
    """

    gathers = True  # whether small chunks wait for more of a prompt that nobody announced
    is_compileable = False
    is_croppable = True
    supports_early_init = False

    def __init__(
        self,
        plan: LayerPlan,
        max_tokens: int | None,
        prefill_chunk: int | None = None,
        choices: dict[int, Shared] | None = None,
    ) -> None:
        super().__init__()
        self.plan, self.max_tokens, self.prefill_chunk, self.choices = plan, max_tokens, prefill_chunk, choices
        self.record_past = False
        self.warned = False
        self.lends = False  # later layers of the model attend to this one's keys and values
        self.turns: Turns | None = None  # of the first compressed layer of a cache
        self.reset()

    def reset(self) -> None:
        self.store = LayerStore(self.plan, self.choices)
        self.pending: Pending | None = None
        self.earlier: Pending | None = None  # what waited when a chunk came, until attention ran over that
        self.to_come: int | None = None  # of a prompt that was announced
        self.ends = False  # whether the pending chunk is the last of an announced prompt
        self.attended = False  # the pending chunk's own layer did
        self.unsettled = False  # a step's token is in the store, which has not settled yet
        self.cut = False  # tokens were written that gradients would flow through
        self.is_initialized = False
        self.adapters: tuple[tuple[str, ...], ...] | None = None  # that the last chunk came through
        self.loaded = False  # from a file, and not compared with the model's keys and values yet
        if self.turns is not None:
            self.turns.reset()

    @property
    def store(self) -> LayerStore:
        """All that is held. To look at it while chunks wait lets the policies choose from those."""
        if self.waiting:
            self.commit()
        return self._store

    @store.setter
    def store(self, store: LayerStore) -> None:
        self.waiting, self._store = False, store  # waiting: `pending` is to be chosen from with more of its prompt

    def expect(self, tokens: int) -> None:
        """Announce a prompt: the next `tokens` tokens are its, also those that come one at a time."""
        self.to_come = tokens if self.plan.gathers else None

    @property
    def batch_size(self) -> int:
        return self._store.rows if self.is_initialized else -1

    @outside_inference
    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.store.start(key_states, value_states)
        super().lazy_initialization(key_states, value_states)

    def activate_past_recording(self) -> None:
        """From now on a chunk is committed at the following `crop` (or the next update), so that a crop is exact."""
        self.record_past = True

    def columns(self, past: int) -> int:
        """How many of `past` columns queries may see: those that masks tell of."""
        return past

    def in_full(self) -> tuple[Tensor, Tensor]:
        """Keys [B, Hkv, N, Dk] and values [B, Hkv, N, Dv] of those `columns`, decoded."""
        return self.store.padded()

    def readable(self) -> int:
        return self.columns(self.get_seq_length())

    # Lengths are logical: transformers derives positions and the tokens still to be fed from them.
    def get_seq_length(self) -> int:
        return self._store.history.length + (self.pending.keys.shape[2] if self.pending else 0)

    def check_shapes(self, keys: Tensor, values: Tensor) -> None:
        """Raise a KvcompError unless keys [B, Hkv, n, Dk] and values [B, Hkv, n, Dv] are of the shape of those held."""
        held, k, v = self._store, keys.shape, values.shape
        if k[0] == held.rows and k[1] == held.heads and k[3] == held.k_dim and v[3] == held.v_dim and k[:3] == v[:3]:
            return
        check_pair(keys, values)
        self.check_rows(k[0])
        raise KvcompError(
            f"the cache holds {held.heads} KV heads of {held.k_dim} and {held.v_dim} channels, but the model has "
            f"{k[1]} of {k[3]} and {v[3]}: it was filled by another model; make a cache for each"
        )

    def check_rows(self, rows: int) -> None:
        """Raise a KvcompError unless so many rows are held."""
        if rows != self._store.rows:
            raise KvcompError(
                f"the cache holds {self._store.rows} rows, but the batch has {rows}: use a new cache, reset() this "
                "one, or batch_repeat_interleave / batch_select_indices"
            )

    def counted(self) -> tuple[Tensor, int]:
        """Real tokens of each row, int64 [B], and columns, those of pending chunks included, which go on waiting."""
        history, pending = self._store.history, self.pending
        if pending is None:
            return history.counts, history.length
        return history.counts + pending.counts(0), history.length + pending.keys.shape[2]

    def settle(self) -> None:
        """Let the store settle after a step, where that waited for the layers that attend to the same tokens."""
        if self.unsettled:
            self.unsettled = False
            self._store.settle()

    def finish(self) -> None:
        """Write what waits for nothing but other layers of a forward that is over."""
        if self.lends and self.attended and not self.record_past:
            self.commit()

    @outside_inference
    def commit(self) -> None:
        """Write the pending chunk to the store."""
        self.waiting, self.earlier = False, None
        if self.pending is not None:
            chunk, self.pending = self.pending.whole(), None
            if chunk.keys.shape[2]:
                self.cut |= chunk.keys.requires_grad or chunk.values.requires_grad
                scale = chunk.keys.shape[-1] ** -0.5 if chunk.scale is None else chunk.scale
                with torch.no_grad(), given_dtypes(chunk.keys.device):
                    self.store.write(chunk.keys, chunk.values, chunk.valid, chunk.queries, scale, chunk.chosen)
                    if self.record_past or self.ends:  # drafts come in chunks, too
                        self.store.end_prompt()
        self.ends = False
        self.settle()

    def nothing(self, which: int) -> torch.Size:
        store = self._store
        return torch.Size((store.rows, store.heads, 0, store.v_dim if which else store.k_dim))

    def decoded(self, which: int) -> Tensor:
        """All K (0) or V (1) that is held, [B, Hkv, N, D], a pending chunk included."""
        if self.pending is None:
            return self.in_full()[which]
        new = (self.pending.keys, self.pending.values)[which]
        return new if self._store.history.length == 0 else torch.cat([self.in_full()[which], new], 2)

    @outside_inference
    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens; `tokens_to_remove` is negative, as in transformers. Exact, or refused."""
        if tokens_to_remove > 0:
            raise KvcompError(f"crop({tokens_to_remove}): pass a negative number, the tokens to remove from the end")
        remove = -tokens_to_remove
        if remove > self.get_seq_length():
            raise KvcompError(f"crop({tokens_to_remove}): the cache holds {self.get_seq_length()} tokens")
        if self.waiting:
            self.commit()
        self.settle()
        columns = remove
        if self.pending is not None:
            here = min(remove, self.pending.keys.shape[2])
            self.pending = self.pending.without_last(here)
            remove -= here
            if remove:
                self.pending = None
            else:
                self.commit()
        if remove:
            self.store.crop(remove)
        if self.turns is not None:
            self.turns.crop(columns)

    @outside_inference
    def select_rows(self, rows: Tensor) -> None:
        if self.is_initialized:
            self.settle()
            self.store.select_rows(rows)
            self.pending = None if self.pending is None else self.pending.rows(rows)
            if self.turns is not None:
                self.turns.select(rows)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.select_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.select_rows(torch.arange(max(self.batch_size, 0), device="cpu").repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.select_rows(torch.arange(max(self.batch_size, 0), device="cpu")[indices.cpu()])

    @outside_inference
    def fork(self, choices: dict[int, Shared]) -> HeldLayer:
        """A layer that goes on by itself from here, among those with the same `choices`, and shares the pages that
        there are."""
        self.finish()
        store = self.store.fork(choices)
        twin = copy(self)
        twin.choices, twin.store = choices, store
        twin.turns = None if self.turns is None else self.turns.fork()
        return twin

    def offload(self) -> None:
        raise UnsupportedError(
            "a compressed cache cannot be offloaded: it is small enough to stay; drop the offloading option"
        )

    prefetch = offload

    def state(self) -> dict[str, Any]:
        """All that the layer holds, as tensors and plain values: what `restore` takes."""
        self.finish()
        pending = None if self.pending is None else self.pending.state(self._store)
        flags = {name: getattr(self, name) for name in ("record_past", "warned", "waiting")}
        positions = None if self.turns is None else self.turns.state()
        return {"store": self._store.state(), "pending": pending, **flags, "positions": positions}

    @outside_inference
    def restore(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Become the layer whose `state` this is, on `device`; the state's tensors lie on the host.

        Raises:
            KvcompError: more tokens than there is memory for, or pages of another layout.
            DamagedError: the state is no layer's of this plan.
        """
        state = State.of(state, f"layer {self.plan.layer}")
        self.store.restore(state.part("store"), device)
        if self.store.started:
            self.dtype, self.device, self.is_initialized = self.store.dtype, self.store.device, True
        if state["pending"] is not None:
            self.pending = Pending.restored(state, self.store, device)
        self.record_past, self.warned = state.flag("record_past"), state.flag("warned")
        self.waiting = "waiting" in state and state.flag("waiting")  # caches saved before chunks waited have none
        self.loaded = True
        self.check_room()
        if self.turns is not None:
            rows = self._store.rows if self.is_initialized else 0
            known = state.get("positions") is not None  # caches saved before positions were followed have none
            self.turns.restore(state.part("positions") if known else None, rows)

    def check_loaded(self, keys: Tensor, values: Tensor) -> None:
        """Raise a KvcompError unless a model's keys [B, Hkv, n, Dk] and values [B, Hkv, n, Dv] are like those held."""
        if self.is_initialized:
            store = self.store
            held = (store.heads, store.k_dim, store.v_dim, store.dtype)
            given = (keys.shape[1], keys.shape[3], values.shape[3], keys.dtype)
            if given != held:
                raise KvcompError(
                    "the cache holds {} KV heads of {} and {} channels in {}, but the model has {} of {} and {} in {}: "
                    "it was saved by another model, or its file is damaged".format(*held, *given)
                )
        self.loaded = False

    def check_room(self) -> None:
        """Raise a KvcompError where a layer that was loaded holds more tokens than `max_tokens`."""
        held = 0 if self.pending is None else self.pending.keys.shape[2]
        held += int(self._store.history.counts.max()) if self.batch_size > 0 else 0
        if self.max_tokens is not None and held > self.max_tokens:
            raise KvcompError(
                f"max_tokens={self.max_tokens}: the cache holds {held} tokens, and with the next one {held + 1} tokens "
                "exceed it. The default is the model's max_position_embeddings: load the cache with a larger "
                "max_tokens= if the model's positions do reach further"
            )

    def library(self) -> list[Tensor]:
        """What the layer holds as transformers would, beside keys and values."""
        return []

    def decoded_library(self) -> tuple[int, int]:
        """Bytes of those that a step decodes, and how many fewer they take as they are held."""
        return 0, 0

    @property
    def dense_bytes(self) -> int:
        """Bytes of full-precision K and V for all tokens seen, padding that is written excluded."""
        self.finish()
        written = self.store.dense_bytes
        if self.pending is None:
            return written
        return written + self.pending.keys.nbytes + (0 if self.plan.latent else self.pending.values.nbytes)

    def read(self) -> tuple[dict[str, int], int]:
        """Bytes that the last decode step loaded, by part, and what it would have loaded without compression."""
        return self.store.read, self.store.dense_read

    def held(self, seen: set[int]) -> dict[str, int]:
        self.finish()
        parts = self.store.held(seen)
        if self.pending is not None:
            parts["pending"] = storage_bytes([x for x in self.pending if isinstance(x, Tensor)], seen)
        return parts
