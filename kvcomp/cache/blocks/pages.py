"""The pages of one layer in an engine's pool: a record per (block, KV head)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kvcomp.errors import UnsupportedError
from kvcomp.kernels.dispatch import encode_pages
from kvcomp.layout import Field, PageLayout
from kvcomp.stages import Codec
from kvcomp.stages.plan import LayerPlan

from ..records import Records
from .centres import Centres, Turned, middle, turns
from .setup import HOST, Setup


class Cells(NamedTuple):
    """Where single tokens go: tokens int64 [t] of a step's, or the first t; and int64 [t * H] the record, the row in it
    and the head of each. On a GPU those that go nowhere are among them, with records below 0.

    begun: records int64 [b * H] that get their centre; turns: what that follows from, float32 [b, F], see
    `centres.turns`; begins bool [b * H, 1]: which of them do, where not all.
    """

    tokens: Tensor | slice
    records: Tensor
    rows: Tensor
    heads: Tensor
    begun: Tensor
    turns: Tensor
    begins: Tensor | None = None


class Pages:
    """Writes and decodes page records, as the layer's codec has them. `at` binds it to the pool."""

    def __init__(
        self,
        setup: Setup,
        layer: int,
        heads: int,
        device: torch.device = HOST,
        biases: Turned | None = None,
        rank: tuple[int, int] = (0, 1),
    ) -> None:
        """For a layer of which `heads` KV heads are on this rank, on the `device` that the pool is on.

        rank: which of how many it is.

        biases: those of the heads' keys, from which centres of pages follow that are written token by token.

        Raises:
            UnsupportedError: the codec settles something by the first data it sees, which no block can hold, or the
                stack makes latents of all heads.
        """
        self.setup, self.heads = setup, heads
        if (latent := setup.stack.latent) is not None:
            raise UnsupportedError(
                f"{setup.stack}: blocks of an engine hold K and V of each head, of which {latent.name} makes one "
                "latent: leave it out, or use Hugging Face's cache"
            )
        plan, shape = setup.plan(layer), replace(setup.shape(heads, layer), device=device, rank=rank)
        self.records = Records(plan, shape)
        if self.records.codec.state():
            raise UnsupportedError(
                f"{setup.stack}: {plan.quantizer.name} settles on channels by the first text it sees, and an "
                "engine's workers and restarts would settle differently: use whole bits"
            )
        by_token = setup.by_token
        self.token_codec = plan.quantizer.codec(replace(shape, page_size=1, centred=False)) if by_token else None
        biases = Turned.nothing(heads, setup.dim, device) if biases is None else biases.to(device)
        self.frequencies = biases.frequencies
        self.centres = Centres(self.codec, self.layout, biases.weights) if by_token else None
        self.head = torch.arange(heads, device=device)

    @property
    def plan(self) -> LayerPlan:
        """The stages of the layer."""
        return self.records.plan

    @property
    def codec(self) -> Codec:
        """What encodes and decodes the layer's pages."""
        return self.records.codec

    @property
    def layout(self) -> PageLayout:
        """The fields of a page."""
        return self.records.layout

    @property
    def pool(self) -> Tensor:
        """uint8 [blocks * H, P * C]: the record of each cell (block, head)."""
        return self.records.data

    def at(self, kv_cache: Tensor) -> Pages:
        """Bound to uint8 [blocks, H, P, C], whose cells (block, head) are records."""
        self.records.memory.data = kv_cache.view(kv_cache.shape[0] * kv_cache.shape[1], -1)
        return self

    def cells(self, slots: Tensor, begun: Tensor) -> Cells:
        """Where tokens go whose slots int64 [T] of the pool are given, in every layer alike; -1: nowhere.

        begun int64 [2, b]: as `Step.begun`. The rest of a page comes later than what begins it, or with it.
        """
        size, every = self.setup.page_size, torch.arange(self.heads, device=slots.device)
        first, page = begun
        records = (slots[first] // size)[:, None] * self.heads + every
        begins = records.flatten().clamp_min(0), turns(self.frequencies, middle(page, size))  # block 0 is nobody's
        tokens: Tensor | slice = slice(len(slots))
        if slots.is_cpu:  # elsewhere, to count those that go somewhere would be to wait
            there = (slots >= 0).nonzero().flatten()
            if len(there) < len(slots):
                tokens, slots = there, slots[there]
        records = (slots // size)[:, None] * self.heads + every  # // rounds down
        rows, heads = (slots % size).repeat_interleave(self.heads), every.repeat(len(slots))
        return Cells(tokens, records.flatten(), rows, heads, *begins)

    def write_tokens(self, keys: Tensor, values: Tensor, cells: Cells) -> None:
        """Write tokens of keys and values [T, H, D] one by one."""
        assert self.token_codec is not None
        assert self.centres is not None
        k, v = self.records.clean(keys[cells.tokens], values[cells.tokens])
        k, v = (x.flatten(0, 1)[:, None] for x in (k, v))  # [t * H, 1, D]
        if self.layout.centres:
            self.centres.begin(self.pool, cells.begun, cells.turns, cells.begins)
            if len(self.frequencies):  # they are 0 otherwise
                k = k - self.centres.of(self.pool, cells.records.clamp_min(0), cells.heads)
        if encode_pages(self.pool, cells.records, self.layout, self.token_codec, k, v, cells.heads, cells.rows):
            return
        encoded, records = self.token_codec.encode(k, v, cells.heads), cells.records.clamp_min(0)  # block 0 is nobody's
        for field, rows in self._rows():
            rows[records, cells.rows] = encoded[field.name].flatten(1).contiguous().view(torch.uint8)

    def write_pages(self, keys: Tensor, values: Tensor, records: Tensor) -> None:
        """Encode the first m * P tokens of keys and values [H, n, D] into records int64 [H, m]."""
        full = records.shape[1] * self.setup.page_size
        self.records.encode(records, keys[:, :full], values[:, :full], self.head)

    def rewrite(self, keys: Tensor, values: Tensor, records: Tensor, old: Tensor, origin: Tensor) -> None:
        """As `write_pages`, of tokens that partly come from pages themselves: keys and values as those decode.

        origin int64 [H, n]: which of the tokens in records `old` [H, o] each is; beyond o * P: it comes from elsewhere.
        A page that holds its tokens singly, without a centre, gets them as they were: nothing is rounded twice.
        """
        size, singly = self.setup.page_size, self.layout.tokenwise and not self.layout.centres
        origin = origin[:, : records.shape[1] * size]
        head, to = ((origin < old.shape[1] * size) & singly).nonzero(as_tuple=True)
        at = origin[head, to]
        moved = [rows[old[head, at // size], at % size] for _, rows in self._rows()] if len(head) else []
        self.write_pages(keys, values, records)
        for (_, rows), tokens in zip(self._rows() if moved else (), moved, strict=True):
            rows[records[head, to // size], to % size] = tokens

    def put_sinks(self, records: Tensor, keys: Tensor, values: Tensor) -> None:
        """Keep exact keys and values [H, s, D] in records int64 [H, m], which hold no pages."""
        each, dtype = self.setup.sinks_of_record, self.setup.exact_dtype
        rows = torch.cat([keys, values], -1).to(dtype)
        for column, part in enumerate(rows.split(each, 1)):
            data = part.flatten(1).contiguous().view(torch.uint8)
            self.pool[records[:, column], : data.shape[1]] = data

    def sinks(self, records: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Keys and values [count, H, D] that `put_sinks` kept in records int64 [H, m]."""
        each, dtype, width = self.setup.sinks_of_record, self.setup.exact_dtype, 2 * self.setup.dim
        held = self.pool[records][..., : each * width * dtype.itemsize].contiguous().view(dtype)
        k, v = held.unflatten(-1, (each, width)).flatten(1, 2)[:, :count].transpose(0, 1).chunk(2, -1)
        return k, v

    def received(self, records: Tensor) -> Tensor:
        """float32 [..., 2] from the tails of records: the attention that pages received, and of how many queries."""
        return self._tails(2)[records]

    def receive(self, records: Tensor, mass: Tensor, queries: int, seen: Tensor) -> None:
        """Add the attention mass float32 [S, n] that pages `records` int [S, n] received from so many queries, where
        seen bool [S, n]; a record may be named several times."""
        more = torch.stack([mass, torch.full_like(mass, queries)], -1)
        more = torch.where(seen[..., None], more, 0)
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
        """Fields with a row per token, where the layout is `tokenwise`, and their tokens uint8 [records, P, bytes]."""
        for field in self.layout.token_fields:
            at = self.layout.offsets[field.name]
            yield field, self.pool[:, at : at + field.nbytes].unflatten(1, (self.setup.page_size, -1))

    def tokens(self, records: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [H, n * P, D] of records [H, n] in the model's dtype."""
        k, v = self.records.decode(records.flatten(), self.head.repeat_interleave(records.shape[1]))
        k, v = (x.unflatten(0, records.shape).flatten(1, 2) for x in (k, v))
        return k, v
