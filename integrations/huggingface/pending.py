"""A chunk between `update` and the store."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kvcomp.attention import causal
from kvcomp.cache.layer import LayerStore
from kvcomp.errors import KvcompError, UnsupportedError
from kvcomp.stages.latent import stored
from kvcomp.state import FLOATS, State


class Pending(NamedTuple):
    """A chunk that was passed to `update` and is not committed yet, and those before it that wait for more.

    keys [B, Hkv, n, Dk], values [B, Hkv, n, Dv]; valid bool [B, n], queries [B, Hq, n, Dk] and the softmax scale are
    known once attention ran.
    """

    keys: Tensor
    values: Tensor
    valid: Tensor | None = None
    queries: Tensor | None = None
    scale: float | None = None
    chosen: Tensor | None = None  # bool [B, Hkv, n]: what a policy that reconstructs keeps

    def followed_by(self, keys: Tensor, values: Tensor) -> Pending:
        """With a chunk after it, for which `completed` has to be called."""
        k, v = torch.cat([self.keys, keys], 2), torch.cat([self.values, values], 2)
        return self._replace(keys=k, values=v, scale=None)

    def completed(self, n: int, valid: Tensor | None, queries: Tensor | None, scale: float) -> Pending:
        """With what its newest n tokens lack: valid bool [B, n] and queries [B, Hq, n, Dk], or None."""
        rows, waiting = self.keys.shape[0], self.keys.shape[2] - n
        if waiting and queries is not None and self.queries is not None:
            queries = torch.cat([self.queries, queries], 2)
        if waiting and (valid is not None or self.valid is not None):
            parts = (self.valid, waiting), (valid, n)
            every = [self.keys.new_ones(rows, m, dtype=torch.bool) if x is None else x for x, m in parts]
            valid = torch.cat(every, 1)
        return self._replace(valid=valid, queries=queries, scale=scale)

    def whole(self) -> Pending:
        """Without what is known of the earlier chunks alone, where attention never ran over the newest."""
        if self.scale is not None:
            return self
        missing = 0 if self.valid is None else self.keys.shape[2] - self.valid.shape[1]
        valid = None if self.valid is None else F.pad(self.valid, (0, missing), value=True)
        return self._replace(valid=valid, queries=None)

    def counts(self, n: int) -> Tensor | int:
        """Tokens without padding, per row [B] (on the host), of the chunks before its newest n."""
        return self.keys.shape[2] - n if self.valid is None else self.valid[:, : self.keys.shape[2] - n].sum(-1).cpu()

    def visible(self, n: int, own: Tensor | None) -> Tensor | None:
        """bool [B, n, c]: which of all c tokens the newest n see; of themselves `own`, bool [B or 1, n, n]. None: those
        up to each one's own."""
        rows, waiting = self.keys.shape[0], self.keys.shape[2] - n
        if not waiting or (own is None and self.valid is None):
            return own
        own = causal(n, self.keys.device) if own is None else own
        shown = own.new_ones(rows, waiting) if self.valid is None else self.valid[:, :waiting].to(own.device)
        return torch.cat([shown[:, None].expand(-1, n, -1), own.expand(rows, -1, -1)], -1)

    def rows(self, index: Tensor) -> Pending:
        on = index.to(self.keys.device)
        valid = None if self.valid is None else self.valid[on]
        queries = None if self.queries is None else self.queries[on]
        chosen = None if self.chosen is None else self.chosen[on]
        return Pending(self.keys[on], self.values[on], valid, queries, self.scale, chosen)

    def without_last(self, n: int) -> Pending:
        end = self.keys.shape[2] - n
        valid = None if self.valid is None else self.valid[:, :end]
        queries = None if self.queries is None else self.queries[:, :, :end]
        chosen = None if self.chosen is None else self.chosen[:, :, :end]
        return Pending(self.keys[:, :, :end], self.values[:, :, :end], valid, queries, self.scale, chosen)

    def state(self, store: LayerStore) -> tuple[Any, ...]:
        """What `restored` takes: latents as they were passed, c and r."""
        if not store.plan.latent:
            return tuple(self)
        return self.values, self.keys[..., store.v_dim :], *self[2:]

    @classmethod
    def restored(cls, state: State, store: LayerStore, device: torch.device) -> Pending:
        """The chunk whose fields a state's `pending` has, on `device`, for the tokens that a store holds.

        Raises:
            DamagedError: it is no such chunk.
        """
        fields = dict(zip(cls._fields, state.sequence("pending", len(cls._fields)), strict=True))
        state = State(fields, f"{state.where}.pending")
        state.require(store.started, "there is a chunk, but no store")
        rows, heads = store.rows, store.heads
        given = stored(replace(store.records.shape, kept=None))
        keys = state.tensor("keys", (rows, heads, None, given.k_dim), store.dtype)
        n = keys.shape[2]
        values = state.tensor("values", (rows, heads, n, given.v_dim), store.dtype)
        if store.plan.latent:
            fields["keys"] = torch.cat([keys, values], -1)
            fields["values"] = fields["keys"][..., : store.v_dim]
        if fields["valid"] is not None:
            state.tensor("valid", (rows, n), torch.bool)
        if fields["queries"] is not None:
            queries = state.tensor("queries", (rows, None, n, store.k_dim), *FLOATS)
            state.require(queries.shape[1] % heads == 0, f"{queries.shape[1]} query heads for {heads} KV heads")
        if fields["scale"] is not None:
            state.number("scale")
        if fields["chosen"] is not None:
            state.tensor("chosen", (rows, heads, n), torch.bool)
        moved: Any = (x.to(device) if isinstance(x, Tensor) else x for x in fields.values())
        return cls(*moved)


def check_pair(keys: Tensor, values: Tensor) -> None:
    """Raise a KvcompError unless these may be keys [B, Hkv, n, Dk] and values [B, Hkv, n, Dv] of the same tokens, and
    an UnsupportedError where they have no content."""
    k, v = tuple(keys.shape), tuple(values.shape)
    if len(k) != 4 or k[:3] != v[:3] or len(v) != 4:
        raise KvcompError(f"keys {k} and values {v}: expected [B, Hkv, n, Dk] and [B, Hkv, n, Dv] of the same tokens")
    if keys.is_meta or values.is_meta:
        raise UnsupportedError(
            "keys and values lie on the meta device, which holds no numbers to compress: load the model's weights "
            "first, or ask `kvcomp plan` for sizes"
        )
