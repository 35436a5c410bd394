"""A landlord of fixed size, for decode steps that torch.compile takes whole and CUDA graphs record.

A prompt enters through a `LayerStore`, whose memory grows and whose counts lie on the host. `take` copies what that
holds into tensors of fixed shapes and addresses, with the counts beside them on the device. From then on a `step` puts
a token, attends and settles, and what is computed follows from shapes alone: where the host may not look at counts,
every step encodes the oldest page of each window, and writes that of a window that is not full yet nowhere. `give`
lends the same tensors to a `LayerStore` again, for prompts and surgery: only counts are copied.
"""

from __future__ import annotations

from copy import copy, deepcopy
from typing import Any

import torch
from torch import Tensor

from kvcomp.attention import Part, Tokens, merge
from kvcomp.errors import UnsupportedError
from kvcomp.finite import saturated
from kvcomp.kernels.dispatch import advance, shift_windows
from kvcomp.ledger import ReadPlan
from kvcomp.modes import outside_inference
from kvcomp.stages.plan import COUNTER, TABLE_ENTRY, LayerPlan, exact_dtype

from . import reader, writer
from .checked import check
from .content import LayerContent
from .exact import ExactBuffer
from .growing import Growing
from .lent import FixedPool, Lent
from .operator import published
from .reader import View
from .records import Records


def why_not(plan: LayerPlan) -> str | None:
    """Why a layer cannot decode in memory of fixed size; None: it can."""
    if plan.exact_bits == 8:
        return "window(bits=8) is decoded on its way to attention, into memory of its own"
    if plan.selector is not None:
        return f"{plan.selector.name} chooses pages on the host in every step"
    for policy in plan.policies:
        if policy.expires:
            return f"{policy.name} lets pages go while decoding, which the host decides"
    return None


class FixedStore:
    """S streams with space for `tokens` columns per row, padding included, in tensors that stay where they are.

    k [S, slots, Dk], v [S, slots, Dv]: the exact buffer, of which a stream's first counts [S] are tokens. pool: n pages
    of each stream one after another; of ids int32 [S, n] a stream's first pages [S] exist. seen [B]: a row's tokens
    without padding. length []: the columns of a row, which the engine counts and reads.

    host: whether steps may look at counts, as on CPUs, where that spares them the encoding of pages that do not exist.
    """

    records: Records
    pool: FixedPool

    def __init__(self, plan: LayerPlan, tokens: int, host: bool | None = None) -> None:
        self.plan, self.tokens, self._host = plan, tokens, host
        self.live = False  # holds the tokens, which a LayerStore holds otherwise
        self.name = ""  # for graphs; another one where the tensors are others
        self.cache: object = self  # what is the same for all layers of a cache

    # -- hand-over ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    @outside_inference
    def take(self, store: LayerContent) -> None:
        """Hold what a store does, which holds nothing then but its history. Later ones of the same shapes, and no more
        tokens beyond those that the policies left, are taken into the same tensors; what was lent is not copied.

        Raises:
            UnsupportedError: a compacted span, or a codec that adapts to the first pages of each stream where steps
                may not look at counts.
        """
        if store.compacted is not None:
            raise UnsupportedError("a compacted span cannot be taken into a preallocated cache: leave preallocate= out")
        held, self.cache = store.storage, store.choices
        most = int(store.kept.max()) + self.tokens - store.history.length
        pages = max(self.plan.pages_of(most), held.table.longest)  # after a crop the window may be short of its tokens
        held.records.codec.reserve(store.rows * store.heads)
        if not self._fits(store, pages):
            self._allocate(store, pages)
        self._adopt(held.records)
        longest = held.table.longest
        if longest and not (isinstance(held, Lent) and held.pool is self.pool and held.in_place()):
            self._pages[:, :longest] = held.pool.data[held.table.ids().long()]
        slots = held.exact.k.shape[1]
        if held.exact.k is not self.k:
            self.k[:, :slots], self.v[:, :slots] = held.exact.k, held.exact.v
        self.counts.copy_(held.exact.counts)
        self.pages.copy_(held.table.counts)
        self.seen.copy_(store.history.counts)
        self.length.fill_(store.history.length)
        nothing = (x.new_zeros(store.rows, store.heads, 0, x.shape[-1], dtype=self.dtype) for x in (self.k, self.v))
        store.storage = Growing.empty(copy(self.records), *nothing)
        self.live = True

    @torch.no_grad()
    @outside_inference
    def give(self, store: LayerContent) -> None:
        """Lend all tensors to the store that they were taken from, with what steps added."""
        exact = ExactBuffer.over(self.plan, self.k, self.v, self.counts.cpu().clone(), self.dtype)
        lent, pages = Lent(copy(self.records), exact, self.pool), self.pages.cpu()
        longest = int(pages.max())
        streams = torch.arange(len(pages), device="cpu")
        lent.table.append(streams, lent.new_pages(streams, longest))
        lent.table.drop_newest(longest - pages)
        store.storage = lent
        steps = int(self.length) - store.history.length
        if steps:
            store.end_prompt()
            store.history.append(steps, None)
            store.tail = None if store.tail is None else store.tail + steps
        self.live = False

    @property
    def _pages(self) -> Tensor:
        """uint8 [S, n, bytes_per_page], a view: the pages of each stream."""
        return self.pool.data.view(*self.ids.shape, -1)

    def _fits(self, store: LayerContent, pages: int) -> bool:
        """Whether the tensors there are have the shapes of the store's, and space for so many pages of a stream."""
        if not self.name:
            return False
        held = (len(self.seen), self.k.shape[0], self.k.shape[2], self.v.shape[2], self.dtype, self.k.device)
        streams = store.rows * store.heads
        asked = (store.rows, streams, store.k_dim, store.v_dim, store.dtype, store.device)
        if not self.host and self.adapted.keys() != store.codec.state().keys():  # saved before codecs adapted to that
            return False
        return held == asked and self.ids.shape[1] >= pages

    def _allocate(self, store: LayerContent, pages: int) -> None:
        """Tensors of the store's shapes with space for so many pages of a stream, all of them empty."""
        device, streams = store.device, store.rows * store.heads
        self.host = device.type == "cpu" if self._host is None else self._host
        if store.codec.hosted and not self.host:
            raise UnsupportedError(
                f"{self.plan.quantizer.name} adapts to pages as they are written, on the host: without preallocate= it "
                "is served"
            )
        self.adapted = {} if self.host else store.codec.state()
        self.dtype, stored = store.dtype, exact_dtype(self.plan.exact_bits, store.dtype)
        self.k = torch.zeros(streams, self.plan.slots, store.k_dim, dtype=stored, device=device)
        self.v = torch.zeros(streams, self.plan.slots, store.v_dim, dtype=stored, device=device)
        self.pool = FixedPool(store.layout, streams, pages, device, self.host)
        self.ids = torch.arange(streams * pages, dtype=TABLE_ENTRY, device=device).view(streams, pages)
        self.first = torch.arange(streams, device=device) * pages  # of each stream's ids
        self.streams = torch.arange(streams, device=device)
        self.counts, self.pages = (torch.zeros(streams, dtype=COUNTER, device=device) for _ in range(2))
        self.seen = torch.zeros(store.rows, dtype=COUNTER, device=device)
        self.length = torch.zeros((), dtype=COUNTER, device=device)
        self._publish()
        if not self.host:  # kernels make what they keep, such as codebooks, now: what is made in a graph is its own
            self._adopt(store.storage.records)
            reader.attend(self.records, self.view(), self.k[:, :1], 1.0)
            nowhere = torch.full_like(self.streams, -1)
            token = [x[:, :1].unflatten(0, (store.rows, -1)) for x in (self.k, self.v)]
            if self._put(*token) is None:
                self.records.encode(nowhere[:, None], self.k, self.v, self.streams, due=self.pages > 0)
            else:
                self._settle(nowhere)
            self.counts.zero_()
            self.seen.zero_()

    def _adopt(self, records: Records) -> None:
        """Go on with what a store's codec adapted to: where graphs are recorded, in the tensors that they know."""
        adapted = {} if self.host else records.codec.state()
        for name, tensor in self.adapted.items():
            tensor.copy_(adapted[name])
        self.records = copy(records)
        self.records.memory = self.pool
        if not self.host:
            self.records.codec.restore(self.adapted)

    def _publish(self) -> None:
        """Let graphs know the tensors there are by a new name."""
        torch._dynamo.mark_static_address(self.length)  # the only one that graphs see: the others are the operator's
        self.name = published(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> FixedStore:
        memo[id(self)] = twin = copy(self)
        vars(twin).update({name: deepcopy(value, memo) for name, value in vars(self).items()})
        if self.name:
            twin._publish()
        return twin

    # -- decode ---------------------------------------------------------------------------------------------------

    @outside_inference
    def step(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        mask: Tensor | None,
        length: Tensor,
        scale: float,
        softcap: float | None = None,
    ) -> Part:
        """Add a token to every row and attend to everything held: out [B, Hq, 1, Dv] and lse [B, Hq, 1], float32.

        queries [B, Hq, 1, Dk], keys [B, Hkv, 1, Dk], values [B, Hkv, 1, Dv]; length []: columns so far.
        mask [B or 1, 1, 1, N], bool or additive: it must show the tokens that were written, and those alone.

        Raises:
            KvcompError: the row is full.
            UnsupportedError: a mask that shows other tokens. On GPUs both stop the device at an assertion instead.
        """
        check(mask, length, self.seen, self.tokens, self.host, self.plan.layer, self.cache)
        streams, rows = self.k.shape[0], queries.shape[:2]
        due = self._put(keys, values)
        q = queries.reshape(streams, -1, queries.shape[-1])
        part = merge(reader.attend(self.records, self.view(), q, scale, softcap).parts)
        if due is None:
            writer.settle(self)
        else:
            self._settle(due)
        return Part(part.out.reshape(*rows, 1, -1), part.lse.reshape(*rows, 1))

    def _put(self, keys: Tensor, values: Tensor) -> Tensor | None:
        """Add a token of each stream. int64 [S]: the records of pages that are due then, of streams that have none -1;
        None where `writer.settle` has to find out, as on the host, or for codecs that adapt to their tokens."""
        streams = self.k.shape[0]
        if self.k.dtype != self.dtype:
            keys, values = saturated(keys, self.k.dtype), saturated(values, self.v.dtype)
        if not (self.host or self.records.codec.adapts):
            state = self.k, self.v, self.counts, self.pages, self.seen
            due = advance(*state, keys, values, self.ids.shape[1])
            if due is not None:
                return due
        self.k[self.streams, self.counts] = keys.reshape(streams, -1)
        self.v[self.streams, self.counts] = values.reshape(streams, -1)
        self.counts += 1
        self.seen += 1
        return None

    def _settle(self, due: Tensor) -> None:
        """As `writer.settle`, on the device, of the streams whose next page goes to record due [S], if one does."""
        plan, codec = self.plan, self.records.codec
        sizes = plan.page_size, plan.sinks, plan.recent
        moved = shift_windows(self.k, self.v, self.counts, self.pages, due, *sizes, not codec.lossless)
        assert moved is not None
        keys, values = moved
        self.records.memory.encode(due, codec, keys, values, self.streams, {})

    def view(self) -> View:
        """What queries may read. How many pages that is, `read` finds out when it is asked."""
        ids = self.ids[:, : int(self.pages.max())] if self.host else self.ids
        tokens = Tokens(self.k, self.v, self.counts)
        return View(ids, self.pages, tokens, self.records.shape.heads, self.pages, total=0)

    def full(self) -> tuple[Tensor, Tensor | None] | None:
        full = self.counts == self.plan.slots
        if not self.host:
            return self.streams, full
        streams = full.nonzero().flatten()
        return (streams, None) if len(streams) else None

    def window(self, streams: Tensor, due: Tensor | None) -> tuple[Tensor, Tensor]:
        at = streams if due is None else slice(None)
        return self.k[at, self.plan.sinks :], self.v[at, self.plan.sinks :]

    def fresh(self, streams: Tensor) -> bool:
        return not self.host or not bool(self.pages[streams].all())

    def new_pages(self, streams: Tensor, m: int, due: Tensor | None = None) -> Tensor:
        ids = (self.first + self.pages)[streams]
        ids = ids if due is None else torch.where(due, ids, -1)
        return ids[:, None] + torch.arange(m, device=ids.device) if m > 1 else ids[:, None]

    def paged(self, streams: Tensor, ids: Tensor, due: Tensor | None = None) -> None:
        if due is None:
            self.pages[streams] += ids.shape[1]
        else:
            self.pages += due

    def shift(self, streams: Tensor, k: Tensor, v: Tensor, due: Tensor | None) -> None:
        size, sinks, recent = self.plan.page_size, self.plan.sinks, self.plan.recent
        at = streams if due is None else slice(None)
        for buffer, window in ((self.k, k), (self.v, v)):
            moved = window[:, size:]
            if due is not None:
                moved = torch.where(due[:, None, None], moved, window[:, :recent])
            buffer[at, sinks : sinks + recent] = moved
        self.counts[at] -= size if due is None else due * size

    # -- accounting -----------------------------------------------------------------------------------------------

    def held(self, seen: set[int]) -> dict[str, int]:
        """Bytes by part, as `Records.held`; room that nothing is in is slack."""
        if not self.name:
            return {}
        counts = [self.ids, self.first, self.streams, self.counts, self.pages, self.seen, self.length]
        return self.records.held(seen, [self.k, self.v], counts, lambda: int(self.pages.sum()) if self.live else 0)

    def read_exact(self, plan: ReadPlan) -> None:
        """Where steps may not look at counts, all windows are read once more, to settle."""
        column = sum(x[:, 0].nbytes for x in (self.k, self.v))
        longest = int(self.counts.max())
        sinks = min(self.plan.sinks, longest)
        plan.add("sinks", column, sinks)
        plan.add("window", column, longest - sinks + (0 if self.host else self.plan.slots - self.plan.sinks))

    def read(self) -> dict[str, int]:
        """Bytes that attention over what is held loads, by part."""
        plan, pages = ReadPlan(), int(self.pages.sum())
        plan.add("pages", self.records.layout.body_bytes, pages)
        plan.add("table", self.view().ids.numel() * self.ids.itemsize)
        plan.add("constants", self.records.adapted_bytes() if pages else 0)
        self.read_exact(plan)
        return plan.bytes()

    @property
    def dense_bytes(self) -> int:
        """Bytes of full-precision K and V for all tokens seen, padding excluded."""
        heads, channels = len(self.k) // len(self.seen), self.k.shape[2] + self.v.shape[2]
        return int(self.seen.sum()) * heads * channels * self.dtype.itemsize
