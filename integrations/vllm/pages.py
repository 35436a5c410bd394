"""The pages of one layer in vLLM's pool: a record per (block, KV head)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kvcomp.errors import UnsupportedError
from kvcomp.finite import saturated
from kvcomp.kernel_layout import centre_of
from kvcomp.kernels.dispatch import encode_pages
from kvcomp.pages import Field, PageLayout
from kvcomp.quantizers.centred import DTYPE as CENTRE_DTYPE
from kvcomp.stages import Codec

from .key_centres import Turned, turns
from .setup import HOST, Setup


class Cells(NamedTuple):
    """Where single tokens go: tokens int64 [t] of a step's, or the first t; and int64 [t * H] the record, the row in it
    and the head of each. On a GPU those that go nowhere are among them, with records below 0.

    begun: records int64 [b * H] that get their centre; turns: what that follows from, float32 [b, F], see
    `key_centres.turns`; begins bool [b * H, 1]: which of them do, where not all.
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
        self, setup: Setup, layer: int, heads: int, device: torch.device = HOST, biases: Turned | None = None
    ) -> None:
        """For a layer of which `heads` KV heads are on this rank, on the `device` that the pool is on.

        biases: those of the heads' keys, from which centres of pages follow that are written token by token.

        Raises:
            UnsupportedError: the codec settles something by the first data it sees, which no block can hold.
        """
        self.setup, self.heads = setup, heads
        self.plan = plan = setup.plan(layer)
        shape = replace(setup.shape(heads, layer), device=device)
        self.codec, self.layout = plan.build(shape)
        self.index = None if plan.chooser is None else plan.chooser.index(shape)
        self.by_tokens = plan.by_tokens(self.layout)
        if self.codec.state():
            raise UnsupportedError(
                f"{setup.stack}: {plan.quantizer.name} settles on channels by the first text it sees, and vLLM's "
                "workers and restarts would settle differently: use whole bits"
            )
        self.one = plan.quantizer.codec(replace(shape, page_size=1, centred=False)) if setup.by_token else None
        biases = Turned.nothing(heads, setup.dim, device) if biases is None else biases.to(device)
        self.frequencies = biases.frequencies
        self.centres = _Centres(self.codec, self.layout, biases.weights) if setup.by_token else None
        self.pool = torch.empty(0, dtype=torch.float32, device="cpu")

    def at(self, kv_cache: Tensor) -> Pages:
        """Bound to uint8 [blocks, H, P, C], whose cells (block, head) are records: uint8 [blocks * H, P * C]."""
        self.pool = kv_cache.view(kv_cache.shape[0] * kv_cache.shape[1], -1)
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
            tokens = (slots >= 0).nonzero().flatten()
            slots = slots[tokens]
        records = (slots // size)[:, None] * self.heads + every  # // rounds down
        rows, heads = (slots % size).repeat_interleave(self.heads), every.repeat(len(slots))
        return Cells(tokens, records.flatten(), rows, heads, *begins)

    def write_tokens(self, keys: Tensor, values: Tensor, cells: Cells) -> None:
        """Write tokens of keys and values [T, H, D] one by one."""
        assert self.one is not None
        assert self.centres is not None
        k, v = (self._finite(x[cells.tokens]).flatten(0, 1)[:, None] for x in (keys, values))  # [t * H, 1, D]
        if self.layout.centres:
            self.centres.begin(self.pool, cells)
            if len(self.frequencies):  # they are 0 otherwise
                k = k - self.centres.of(self.pool, cells)
        if encode_pages(self.pool, cells.records, self.layout, self.one, k, v, cells.heads, cells.rows):
            return
        encoded, records = self.one.encode(k, v, cells.heads), cells.records.clamp_min(0)  # block 0 is nobody's
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
        """Fields with a row per token, where the layout is `tokenwise`, and their tokens uint8 [records, P, bytes]."""
        for field in self.layout.token_fields:
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


def middle(page: Tensor, page_size: int) -> Tensor:
    """float32: the middle position of each page of `page_size` tokens."""
    return page.to(torch.float32) * page_size + (page_size - 1) / 2


class _Centres:
    """Writes and reads the centres of pages that come token by token.

    weights float32 [F, H, D]: of the keys that centres are, see `key_centres`.
    """

    def __init__(self, codec: Codec, layout: PageLayout, weights: Tensor) -> None:
        self.codec, self.parts = codec, []
        sides, (count, heads, dim) = codec.kernel_sides(), weights.shape
        if not layout.centres or sides is None:
            return
        self.channels, self.v_dim = sides[0].channels, sides[1].channels
        streams, nothing = torch.arange(heads, device=weights.device).repeat(count), weights.flatten(0, 1)[:, None]
        given = codec.kernel_input(nothing, nothing, streams)
        assert given is not None
        coordinates, first = given[0].unflatten(0, (count, heads))[:, :, 0], 0  # linear in keys
        for segment in sides[0].segments:
            last, name = first + segment.channels, centre_of(segment)
            if name is not None:
                at = layout.offsets[name]
                place = slice(at, at + segment.channels * CENTRE_DTYPE.itemsize)
                self.parts.append((place, slice(first, last), coordinates[..., first:last].flatten(1).float()))
            first = last

    def begin(self, pool: Tensor, cells: Cells) -> None:
        """Write the centres of pages that begin."""
        if not len(cells.begun):
            return
        for place, _, weights in self.parts:
            held = pool[:, place].view(CENTRE_DTYPE)
            made = saturated((cells.turns @ weights).view(len(cells.begun), -1), CENTRE_DTYPE)
            held[cells.begun] = made if cells.begins is None else torch.where(cells.begins, made, held[cells.begun])

    def of(self, pool: Tensor, cells: Cells) -> Tensor:
        """Keys float32 [t * H, 1, D] that are the centres of the pages of tokens."""
        records = cells.records.clamp_min(0)
        if len(self.parts) == 1 and not self.codec.rotates:
            return pool[:, self.parts[0][0]].view(CENTRE_DTYPE)[records, None].float()
        found = torch.zeros(len(records), 1, self.channels, dtype=torch.float32, device=pool.device)
        for place, channels, _ in self.parts:
            found[:, 0, channels] = pool[:, place].view(CENTRE_DTYPE)[records].float()
        return self.codec.inverse(found, found.new_zeros(len(found), 1, self.v_dim), cells.heads)[0]
