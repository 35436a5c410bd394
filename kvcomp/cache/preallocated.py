"""One layer's store of fixed size, for decode steps that torch.compile takes whole and CUDA graphs record.

A prompt enters through a `LayerStore`, whose memory grows and whose counts lie on the host. `take` copies what that
holds into tensors of fixed shapes and addresses, with the counts beside them on the device. From then on a `step` puts
a token, attends and settles, and what is computed follows from shapes alone: in every step the oldest page of each
window is encoded into the stream's next page, or, where the window is not full yet, into a page that nobody reads.
"""

from __future__ import annotations

from copy import copy, deepcopy
from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from kvcomp.attention import Part, Tokens, attend, merge
from kvcomp.errors import KvcompError, UnsupportedError
from kvcomp.finite import finite
from kvcomp.kernels import reference
from kvcomp.kernels.dispatch import attend_pages, attend_tokens, obstacle
from kvcomp.ledger import storage_bytes
from kvcomp.modes import outside_inference
from kvcomp.stages.plan import COUNTER, TABLE_ENTRY, LayerPlan

from .exact import ExactBuffer
from .layer import LayerStore
from .pool import PagePool, PageTable

_STORES: WeakValueDictionary[str, PreallocatedStore] = WeakValueDictionary()
_NUMBERS = count()


def why_not(plan: LayerPlan) -> str | None:
    """Why a layer cannot decode in a preallocated store; None: it can."""
    if plan.selector is not None:
        return f"{plan.selector.name} chooses pages on the host in every step"
    for policy in plan.policies:
        if policy.expires:
            return f"{policy.name} lets pages go while decoding, which the host decides"
    return None


class PreallocatedStore:
    """S streams with room for `tokens` columns per row, padding included, in tensors that stay where they are.

    k [S, slots, Dk], v [S, slots, Dv]: the exact buffer, of which a stream's first counts [S] are tokens. pool: n pages
    of each stream one after another, then one that nobody reads; of ids int32 [S, n] a stream's first pages [S] exist.
    seen [B]: a row's tokens without padding. length []: the columns of a row, which the engine counts and reads.

    host: whether steps may look at counts, as they do on CPUs, where that costs nothing and spares them the encoding
    of pages that do not exist; by default where the tensors lie there.
    """

    def __init__(self, plan: LayerPlan, tokens: int, host: bool | None = None) -> None:
        self.plan, self.tokens, self._host = plan, tokens, host
        self.live = False  # holds the tokens, which a LayerStore holds otherwise
        self.name = ""  # for graphs; another one where the tensors are others

    # -- hand-over ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    @outside_inference
    def take(self, store: LayerStore) -> None:
        """Hold what a store does, which holds nothing then but its history. Later ones of the same shapes, and no more
        tokens beyond those that the policies left, are taken into the same tensors.

        Raises:
            UnsupportedError: a compacted span, or a codec that adapts to the first pages of each stream where steps
                may not look at counts.
        """
        if store.compacted is not None:
            raise UnsupportedError("a compacted span cannot be taken into a preallocated cache: leave preallocate= out")
        most = int(store.kept.max()) + self.tokens - store.history.length
        pages = max(self.plan.pages_of(most), store.table.longest)  # after a crop the window may be short of its tokens
        store.codec.room(store.rows * store.heads)
        if not self._fits(store, pages):
            self._allocate(store, pages)
        self.codec = store.codec
        if self.host:  # those of the first one are held by nobody else
            self.adapted = store.codec.state()
        else:  # recorded graphs know them
            adapted = store.codec.state()
            for name, tensor in self.adapted.items():
                tensor.copy_(adapted[name])
            self.codec.restore(self.adapted)
        ids, counts = store.table.held()
        if ids.shape[1]:
            self._records[:, : ids.shape[1]] = store.pool.data[ids.long()]
        slots = store.exact.k.shape[1]
        self.k[:, :slots], self.v[:, :slots] = store.exact.k, store.exact.v
        self.counts.copy_(store.exact.counts)
        self.pages.copy_(counts)
        self.seen.copy_(store.history.counts)
        self.length.fill_(store.history.length)
        _empty(store)
        self.live = True

    @torch.no_grad()
    @outside_inference
    def give(self, store: LayerStore) -> None:
        """Hand everything back to the store that it was taken from, with what steps added."""
        pages, counts = self.pages.cpu(), self.counts.cpu()
        longest = int(pages.max())
        store.exact.k, store.exact.v = self.k.clone(), self.v.clone()
        store.exact.recount(slice(None), counts)
        store.pool.data = self._records[:, :longest].flatten(0, 1).clone()
        rows = torch.arange(len(store.pool.data), dtype=TABLE_ENTRY, device="cpu").view(len(pages), longest)
        store.table.append(torch.arange(len(rows), device="cpu"), rows)
        store.table.drop_newest(longest - pages)
        store.pool.reclaim()
        store.codec = self.codec
        steps = int(self.length) - store.history.length
        if steps:
            store.end_prompt()
            store.history.append(steps, None)
            store.tail = None if store.tail is None else store.tail + steps
        self.live = False

    @property
    def _records(self) -> Tensor:
        """uint8 [S, n, bytes_per_page], a view: the pages of each stream."""
        return self.pool.data[:-1].view(*self.ids.shape, self.layout.bytes_per_page)

    def _fits(self, store: LayerStore, pages: int) -> bool:
        """Whether the tensors there are have the shapes of the store's, and room for so many pages of a stream."""
        if not self.name:
            return False
        held = (len(self.seen), self.k.shape[0], self.k.shape[2], self.v.shape[2], self.k.dtype, self.k.device)
        streams = store.rows * store.heads
        asked = (store.rows, streams, store.k_dim, store.v_dim, store.dtype, store.device)
        if not self.host and self.adapted.keys() != store.codec.state().keys():  # saved before codecs adapted to that
            return False
        return held == asked and self.ids.shape[1] >= pages

    def _allocate(self, store: LayerStore, pages: int) -> None:
        """Tensors of the store's shapes with room for so many pages of a stream, all of them empty."""
        device, streams = store.device, store.rows * store.heads
        self.host = device.type == "cpu" if self._host is None else self._host
        if store.codec.hosted and not self.host:
            name = self.plan.quantizer.name
            raise UnsupportedError(
                f"{name} adapts to pages as they are written, on the host: without preallocate= it is served"
            )
        self.codec, self.layout = store.codec, store.layout
        self.adapted = {} if self.host else store.codec.state()
        self.k = torch.zeros(streams, self.plan.slots, store.k_dim, dtype=store.dtype, device=device)
        self.v = torch.zeros(streams, self.plan.slots, store.v_dim, dtype=store.dtype, device=device)
        self.pool = PagePool(store.layout, device)
        self.pool.data = self.pool.data.new_zeros(streams * pages + 1, store.layout.bytes_per_page)
        self.ids = torch.arange(streams * pages, dtype=TABLE_ENTRY, device=device).view(streams, pages)
        self.first = torch.arange(streams, device=device) * pages  # of each stream's ids
        self.streams = torch.arange(streams, device=device)
        self.counts = torch.zeros(streams, dtype=COUNTER, device=device)
        self.pages = torch.zeros(streams, dtype=COUNTER, device=device)
        self.seen = torch.zeros(store.rows, dtype=COUNTER, device=device)
        self.length = torch.zeros((), dtype=COUNTER, device=device)
        self._publish()
        if not self.host:  # kernels make what they keep, such as codebooks, now: what is made in a graph is its own
            self._attend(self.k[:, :1], 1.0, None)
            nowhere = torch.full_like(self.streams, len(self.pool.data) - 1)
            self._encode(nowhere, self.k, self.v, self.streams, due=self.pages > 0)

    def _publish(self) -> None:
        """Let graphs know the tensors there are by a new name."""
        torch._dynamo.mark_static_address(self.length)  # the only one that graphs see: the others are the operator's
        self.name = f"{next(_NUMBERS)}"
        _STORES[self.name] = self

    def __deepcopy__(self, memo: dict[int, Any]) -> PreallocatedStore:
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
        self._check(mask, length)
        streams, rows = self.k.shape[0], queries.shape[:2]
        self.k[self.streams, self.counts] = keys.reshape(streams, -1)
        self.v[self.streams, self.counts] = values.reshape(streams, -1)
        self.counts += 1
        self.seen += 1
        part = self._attend(queries.reshape(streams, -1, queries.shape[-1]), scale, softcap)
        self._settle()
        return Part(part.out.reshape(*rows, 1, -1), part.lse.reshape(*rows, 1))

    def _check(self, mask: Tensor | None, length: Tensor) -> None:
        room = f"the cache has room for preallocate={self.tokens} tokens per row, and all is taken: ask for more"
        self._require(length < self.tokens, KvcompError, room)
        if mask is not None:
            allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
            hidden = (
                "the attention mask hides or shows other cached tokens than those that were written as no padding; "
                "compressed pages cannot follow a mask that changes later"
            )
            self._require((allowed.flatten(1).sum(-1) == self.seen + 1).all(), UnsupportedError, hidden)

    def _require(self, fulfilled: Tensor, error: type[KvcompError], message: str) -> None:
        if not self.host:
            torch._assert_async(fulfilled, message)
        elif not fulfilled:
            raise error(message)

    def _attend(self, q: Tensor, scale: float, softcap: float | None) -> Part:
        """Attention of q [S, R, Dk] over all that is held."""
        tokens, ids = Tokens(self.k, self.v, self.counts), self.ids
        if self.host:
            ids = ids[:, : int(self.pages.max())]
            if not ids.shape[1]:
                return attend_tokens(q, tokens, scale, softcap)
        read = self.pool.data, ids, self.pages, self.layout, self.codec, scale, softcap
        if self.host or (ids.shape[1] and obstacle(self.codec, self.layout, q.device, q.shape[1]) is None):
            return attend_pages(q, *read, tokens=tokens)
        seen = torch.arange(self.k.shape[1], device=q.device) < self.counts[:, None]
        parts = [attend(q, self.k, self.v.masked_fill(~seen[..., None], 0), scale, seen[:, None], softcap)]
        if ids.shape[1]:
            parts.append(reference.attend_pages(q, *read, ragged=True))
        return merge(parts)

    def _settle(self) -> None:
        """Move the oldest page of full windows into pages."""
        size, sinks, recent = self.plan.page_size, self.plan.sinks, self.plan.recent
        full = self.counts == self.plan.slots
        at = full.nonzero().flatten() if self.host else slice(None)
        streams = self.streams[at]
        if not len(streams):
            return
        k, v = self.k[at, sinks:], self.v[at, sinks:]  # [s, P + recent, D]
        ids = (self.first + self.pages).masked_fill(~full, len(self.pool.data) - 1)[at]
        self._encode(ids, k, v, streams, None if self.host else full)
        for buffer, window in ((self.k, k), (self.v, v)):
            moved = torch.where(full[at][:, None, None], window[:, size:], window[:, :recent])
            buffer[at, sinks : sinks + recent] = moved
        self.counts -= full * size
        self.pages += full

    def _encode(self, ids: Tensor, k: Tensor, v: Tensor, streams: Tensor, due: Tensor | None = None) -> None:
        """Encode the first P tokens of k [s, n, Dk], v [s, n, Dv] of `streams` into the pages ids [s]; those of streams
        that are not `due` are read by nobody."""
        if not self.codec.lossless:
            named = ((k, f"keys of layer {self.plan.layer}"), (v, f"values of layer {self.plan.layer}"))
            k, v = (finite(x, name) if self.host else x.nan_to_num(0.0, 0.0, 0.0) for x, name in named)
        self.codec.fit(streams, k, v, due)
        size = self.plan.page_size
        self.pool.encode(ids, self.codec, k[:, :size], v[:, :size], streams, {})

    # -- accounting -----------------------------------------------------------------------------------------------

    def held(self, seen: set[int]) -> dict[str, int]:
        """Bytes by part, as `LayerStore.held`; room that nothing is in is slack."""
        if not self.name:
            return {}
        counts = [self.ids, self.first, self.streams, self.counts, self.pages, self.seen, self.length]
        exact, pool = storage_bytes([self.k, self.v], seen), storage_bytes([self.pool.data], seen)
        sinks = exact * self.plan.sinks // self.plan.slots
        pages = int(self.pages.sum()) * self.layout.bytes_per_page if self.live else 0
        return {
            "pages": pages,
            "slack": pool - pages,
            "sinks": sinks,
            "window": exact - sinks,
            "table": storage_bytes(counts, seen),
            "constants": storage_bytes(self.codec.constants(), seen),
        }

    def read(self) -> dict[str, int]:
        """Bytes that attention over what is held loads, by part. Where steps may not look at counts, all windows are
        read once more, to settle."""
        column = sum(x[:, 0].nbytes for x in (self.k, self.v))
        longest = int(self.counts.max())
        sinks = min(self.plan.sinks, longest)
        pages = int(self.pages.sum())
        width = int(self.pages.max()) if self.host else self.ids.shape[1]
        adapted = self.codec.adapted() if pages else []
        settled = 0 if self.host else (self.plan.slots - self.plan.sinks) * column
        return {
            "pages": pages * self.layout.bytes_per_page,
            "table": self.ids[:, :width].numel() * self.ids.itemsize,
            "sinks": sinks * column,
            "window": (longest - sinks) * column + settled,
            "constants": storage_bytes(adapted),
        }

    @property
    def dense_bytes(self) -> int:
        """Bytes of full-precision K and V for all tokens seen, padding excluded."""
        heads = len(self.k) // len(self.seen)
        return int(self.seen.sum()) * heads * (self.k.shape[2] + self.v.shape[2]) * self.k.itemsize


def _empty(store: LayerStore) -> None:
    """Let go of all tokens that a store holds; it knows its history still."""
    nothing = (x.new_zeros(store.rows, store.heads, 0, x.shape[-1]) for x in (store.exact.k, store.exact.v))
    store.exact = ExactBuffer(store.plan, *nothing)
    store.pool = PagePool(store.layout, store.device)
    store.table = PageTable(store.rows * store.heads, store.device, store.plan.watched)
    store.pool.join(store.table)


@torch.library.custom_op("kvcomp::decode_step", mutates_args=())
def decode_step(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    length: Tensor,
    store: str,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """`PreallocatedStore.step` of the store with that name, whose tensors it changes, as one operator for graphs;
    softcap 0: none."""
    part = _STORES[store].step(queries, keys, values, mask, length, scale, softcap or None)
    return part.out, part.lse


@decode_step.register_fake
def _(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    length: Tensor,
    store: str,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    rows = queries.shape[:3]
    out = queries.new_empty(*rows, values.shape[-1], dtype=torch.float32)
    return out, queries.new_empty(rows, dtype=torch.float32)
