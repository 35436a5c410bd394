"""The pages of one layer in an engine's pool: a record per (block, KV head)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kvcomp.errors import UnsupportedError
from kvcomp.finite import saturated
from kvcomp.kernels.dispatch import encode_pages
from kvcomp.layout import SUMMARY, Field

from .setup import HOST, Setup


class Cells(NamedTuple):
    """Where single tokens go: tokens int64 [t] of a step's, or the first t; and int64 [t * H] the record, the row in it
    and the head of each. On a GPU those that go nowhere are among them, with records below 0."""

    tokens: Tensor | slice
    records: Tensor
    rows: Tensor
    heads: Tensor


class Pages:
    """Writes and decodes page records, as the layer's codec has them. `at` binds it to the pool."""

    def __init__(
        self, setup: Setup, layer: int, heads: int, device: torch.device = HOST, means: Tensor | None = None
    ) -> None:
        """For a layer of which `heads` KV heads are on this rank, on the `device` that the pool is on.

        means [heads, D]: a mean key of each head, the same for every request; see `key_means`.

        Raises:
            UnsupportedError: the codec settles something by the first data it sees, which no block can hold.
        """
        self.setup, self.heads = setup, heads
        self.plan = plan = setup.plan(layer)
        shape = replace(setup.shape(heads, layer), device=device)
        self.codec, self.layout = plan.build(shape)
        self.codec.fix(means)  # what a block holds depends on its tokens alone
        self.index = None if plan.chooser is None else plan.chooser.index(shape)
        self.by_tokens = plan.by_tokens(self.layout)
        if self.codec.state():
            raise UnsupportedError(
                f"{setup.stack}: {plan.quantizer.name} settles on channels by the first text it sees, and vLLM's "
                "workers and restarts would settle differently: use whole bits"
            )
        self.token_codec = plan.quantizer.codec(replace(shape, page_size=1)) if setup.by_token else None
        if self.token_codec is not None:
            self.token_codec.fix(means)
        self.pool = torch.empty(0, dtype=torch.float32, device="cpu")

    def at(self, kv_cache: Tensor) -> Pages:
        """Bound to uint8 [blocks, H, P, C], whose cells (block, head) are records: uint8 [blocks * H, P * C]."""
        self.pool = kv_cache.view(kv_cache.shape[0] * kv_cache.shape[1], -1)
        return self

    def cells(self, slots: Tensor) -> Cells:
        """Where tokens go whose slots int64 [T] of the pool are given, in every layer alike; -1: nowhere."""
        size, every = self.setup.page_size, torch.arange(self.heads, device=slots.device)
        tokens: Tensor | slice = slice(len(slots))
        if slots.is_cpu:  # elsewhere, to count those that go somewhere would be to wait
            tokens = (slots >= 0).nonzero().flatten()
            slots = slots[tokens]
        records = (slots // size)[:, None] * self.heads + every  # // rounds down
        return Cells(tokens, records.flatten(), (slots % size).repeat_interleave(self.heads), every.repeat(len(slots)))

    def write_tokens(self, keys: Tensor, values: Tensor, cells: Cells) -> None:
        """Write tokens of keys and values [T, H, D] one by one."""
        assert self.token_codec is not None
        k, v = (self._finite(x[cells.tokens]).flatten(0, 1)[:, None] for x in (keys, values))  # [t * H, 1, D]
        if encode_pages(self.pool, cells.records, self.layout, self.token_codec, k, v, cells.heads, cells.rows):
            return
        encoded, records = self.token_codec.encode(k, v, cells.heads), cells.records.clamp_min(0)  # block 0 is nobody's
        for field, rows in self._rows():
            rows[records, cells.rows] = encoded[field.name].flatten(1).contiguous().view(torch.uint8)

    def write_pages(self, keys: Tensor, values: Tensor, records: Tensor) -> None:
        """Encode the first m * P tokens of keys and values [H, n, D] into records int64 [H, m]."""
        pages, size, record = records.shape[1], self.setup.page_size, records.flatten()
        k, v = (self._finite(x[:, : pages * size]).reshape(-1, size, x.shape[2]) for x in (keys, values))
        heads = torch.arange(self.heads, device=records.device).repeat_interleave(pages)
        fields = {} if self.index is None else self.index.summarize(k, v, heads)
        if not encode_pages(self.pool, record, self.layout, self.codec, k, v, heads):
            fields |= self.codec.encode(k, v, heads)
        for field in self.layout.fields:
            if field.name in fields:
                at = self.layout.offsets[field.name]
                self.pool[record, at : at + field.nbytes] = fields[field.name].flatten(1).contiguous().view(torch.uint8)

    def rewrite(self, keys: Tensor, values: Tensor, records: Tensor, old: Tensor, origin: Tensor) -> None:
        """As `write_pages`, of tokens that partly come from pages themselves: keys and values as those decode.

        origin int64 [H, n]: which of the tokens in records `old` [H, o] each is; beyond o * P: it comes from elsewhere.
        A page that holds its tokens singly gets them as they were: nothing is rounded twice.
        """
        size = self.setup.page_size
        origin = origin[:, : records.shape[1] * size]
        head, to = ((origin < old.shape[1] * size) & self.layout.tokenwise).nonzero(as_tuple=True)
        at = origin[head, to]
        moved = [rows[old[head, at // size], at % size] for _, rows in self._rows()] if len(head) else []
        self.write_pages(keys, values, records)
        for (_, rows), tokens in zip(self._rows() if moved else (), moved, strict=True):
            rows[records[head, to // size], to % size] = tokens

    def received(self, records: Tensor) -> Tensor:
        """float32 [..., 2] from the tails of records: the attention that pages received, and of how many queries."""
        return self._tails(2)[records]

    def receive(self, records: Tensor, more: Tensor) -> None:
        """Add `more` float32 [S, n, 2] to what records int [S, n] received; one may be named several times."""
        self._tails(2).index_put_((records.long(),), more, accumulate=True)

    def forget(self, records: Tensor) -> None:
        """Nothing was received yet by pages records int64 [m]."""
        self._tails(2)[records] = 0

    def move(self, origin: Tensor, records: Tensor) -> None:
        """Put whole records `origin` int64 [H, n], tails too, in place of `records` [H, n]; they may overlap."""
        self.pool[records] = self.pool[origin]

    def scores(self, cells: Tensor) -> Tensor:
        """float32 [H, c * P] of cells int64 [H, c]: a number for each token of so many columns, kept in their tails."""
        return self._tails(self.setup.page_size)[cells].flatten(1)

    def put_scores(self, cells: Tensor, scores: Tensor) -> None:
        """Keep scores float32 [H, n] of the first n tokens of cells' columns."""
        size = self.setup.page_size
        padded = F.pad(scores, (0, cells.shape[1] * size - scores.shape[1]))
        self._tails(size)[cells] = padded.unflatten(1, (-1, size))

    def _tails(self, numbers: int) -> Tensor:
        """The last `numbers` of each record, float32 [records, numbers]."""
        return self.pool[:, -numbers * torch.float32.itemsize :].view(torch.float32)

    def _rows(self) -> Iterator[tuple[Field, Tensor]]:
        """Fields that attention reads, where the layout is `tokenwise`, and their tokens uint8 [records, P, bytes]."""
        for field in self.layout.fields:
            if not field.name.startswith(SUMMARY):
                at = self.layout.offsets[field.name]
                yield field, self.pool[:, at : at + field.nbytes].unflatten(1, (self.setup.page_size, -1))

    def tokens(self, records: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [H, n * P, D] of records [H, n] in the model's dtype."""
        heads, n = records.shape
        if not n:
            k = v = torch.zeros(heads, 0, self.setup.dim, dtype=self.setup.dtype, device=records.device)
            return k, v
        k, v = self._decode(records.flatten(), torch.arange(heads, device=records.device).repeat_interleave(n))
        if not self.codec.lossless:
            k, v = saturated(k, self.setup.dtype), saturated(v, self.setup.dtype)
        k, v = (x.to(self.setup.dtype).unflatten(0, (heads, n)).flatten(1, 2) for x in (k, v))
        return k, v

    def _decode(self, records: Tensor, streams: Tensor) -> tuple[Tensor, Tensor]:
        k, v = self.codec.decode(self.layout.gather(self.pool, records))
        return self.codec.inverse(k, v, streams)

    def _finite(self, x: Tensor) -> Tensor:
        return x if self.codec.lossless else x.nan_to_num(0.0, 0.0, 0.0)
