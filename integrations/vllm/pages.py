"""The pages of one layer in vLLM's pool: a record per (block, KV head)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from kvcomp.errors import UnsupportedError

from .setup import Setup


class Pages:
    """Writes and decodes page records, as the layer's codec has them. `at` binds it to the pool."""

    def __init__(self, setup: Setup, layer: int, heads: int) -> None:
        """For a layer of which `heads` KV heads are on this rank.

        Raises:
            UnsupportedError: the codec settles something by the first data it sees, which no block can hold.
        """
        self.setup, self.heads = setup, heads
        self.plan = plan = setup.plan(layer)
        shape = setup.shape(heads, layer)
        self.codec, self.layout = plan.build(shape)
        self.index = None if plan.chooser is None else plan.chooser.index(shape)
        self.by_tokens = plan.by_tokens(self.layout)
        if self.codec.state():
            raise UnsupportedError(
                f"{setup.stack}: {plan.quantizer.name} settles on channels by the first text it sees, and vLLM's "
                "workers and restarts would settle differently: use whole bits"
            )
        self.one = plan.quantizer.codec(replace(shape, page_size=1)) if setup.by_token else None
        self.pool = torch.empty(0)

    def at(self, kv_cache: Tensor) -> Pages:
        """Bound to uint8 [blocks, H, P, C], whose cells (block, head) are records: uint8 [blocks * H, P * C]."""
        self.pool = kv_cache.view(kv_cache.shape[0] * kv_cache.shape[1], -1)
        return self

    def write_tokens(self, keys: Tensor, values: Tensor, slots: Tensor) -> None:
        """Write keys and values [T, H, D] one by one into slots int64 [T] of the pool; -1: not at all."""
        assert self.one is not None
        size, heads = self.setup.page_size, torch.arange(self.heads, device=slots.device)
        kept = slots >= 0
        slots = slots[kept]
        record = (slots // size)[:, None] * self.heads + heads  # [T, H]
        row = (slots % size).repeat_interleave(self.heads)
        k, v = (self._finite(x[kept]).flatten(0, 1)[:, None] for x in (keys, values))  # [T * H, 1, D]
        record = record.flatten()
        encoded = self.one.encode(k, v, heads.repeat(len(slots)))
        for field in self.layout.fields:
            at = self.layout.offsets[field.name]
            rows = self.pool[:, at : at + field.nbytes].unflatten(1, (size, -1))  # uint8 [records, P, bytes]
            rows[record, row] = encoded[field.name].flatten(1).contiguous().view(torch.uint8)

    def write_pages(self, keys: Tensor, values: Tensor, records: Tensor) -> None:
        """Encode the first m * P tokens of keys and values [H, n, D] into records int64 [H, m]."""
        pages, size = records.shape[1], self.setup.page_size
        k, v = (self._finite(x[:, : pages * size]).reshape(-1, size, x.shape[2]) for x in (keys, values))
        heads = torch.arange(self.heads, device=records.device).repeat_interleave(pages)
        fields = self.codec.encode(k, v, heads)
        if self.index is not None:
            fields |= self.index.summarize(k, v, heads)
        record = records.flatten()
        for field in self.layout.fields:
            at = self.layout.offsets[field.name]
            self.pool[record, at : at + field.nbytes] = fields[field.name].flatten(1).contiguous().view(torch.uint8)

    def decode(self, records: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [S, P, D] of records [S], float32 in original coordinates; what was not written may be
        anything."""
        k, v = self.codec.decode(self.layout.gather(self.pool, records))
        return self.codec.inverse(k, v, torch.arange(len(records), device=records.device))

    def _finite(self, x: Tensor) -> Tensor:
        return x if self.codec.lossless else x.nan_to_num(0.0, 0.0, 0.0)
