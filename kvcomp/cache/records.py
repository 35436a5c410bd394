"""Page records of one layer: the only place where K and V become pages, and where pages become K and V again.

Whose memory they lie in is not known here: a pool that grows, one of fixed size, or an engine's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy

import torch
from torch import Tensor

from kvcomp.finite import finite, saturated
from kvcomp.kernels.dispatch import encode_pages
from kvcomp.layout import SUMMARY, PageLayout
from kvcomp.ledger import storage_bytes
from kvcomp.stages import Codec, PageShape
from kvcomp.stages.plan import LayerPlan


class PageMemory:
    """Records uint8 [n, bytes] of one layout; bytes past `layout.bytes_per_page` are somebody else's.

    host: whether the host may look at tensors, which on an accelerator would be to wait.
    """

    def __init__(self, layout: PageLayout, data: Tensor, host: bool | None = None) -> None:
        self.layout, self.data = layout, data
        self._host = host

    @property
    def host(self) -> bool:
        return self.data.is_cpu if self._host is None else self._host

    def encode(
        self,
        ids: Tensor,
        codec: Codec,
        keys: Tensor,
        values: Tensor,
        streams: Tensor,
        summaries: Mapping[str, Tensor],
    ) -> None:
        """Store keys [M, P, Dk] and values [M, P, Dv], or [s, M / s, P, D], of `streams` int64, as of `Codec.encode`,
        as the codec encodes them, and summary fields [M, ...], in the records ids int64 [M]: in one pass, where a
        kernel can. Ids below 0: nowhere."""
        if not encode_pages(self.data, ids, self.layout, codec, keys, values, streams):
            k, v = keys.flatten(0, -3), values.flatten(0, -3)
            self.write(ids, codec.encode(k, v, streams) | dict(summaries))
        elif summaries:
            self.write(ids, summaries)

    def write(self, ids: Tensor, fields: Mapping[str, Tensor]) -> None:
        """Store encoded fields [M, *shape], all of the layout's or its summaries alone, in the records ids int64 [M].
        Ids below 0: nowhere."""
        layout = self.layout
        start = layout.body_bytes if all(name.startswith(SUMMARY) for name in fields) else 0
        records = self.data.new_zeros(len(ids), layout.bytes_per_page - start)
        for summary in (False, True) if start == 0 else (True,):
            for name, view in layout.views(records, summary, start).items():
                view.copy_(fields[name])
        at = slice(start, layout.bytes_per_page)
        if self.host or ids.device != self.data.device:
            if bool((ids < 0).any()):
                there = (ids >= 0).nonzero().flatten()
                ids, records = ids[there], records[there.to(records.device)]
            self.data[ids.to(self.data.device), at] = records
        elif len(ids):
            there = ids >= 0
            # Those that go nowhere repeat the first that goes somewhere, or what record 0 has.
            first = torch.where(there, torch.arange(len(ids), device=ids.device), there.int().argmax())
            ids = ids[first].clamp_min(0)
            self.data[ids, at] = torch.where(there.any(), records[first], self.data[ids, at])


class Records:
    """How one layer's stack writes and reads page records. A stream is row * heads + head.

    codec, index, layout: the plan's, for pages of this `shape`; index: None where the layer does not choose for itself.
    by_tokens: whether decode queries read single tokens. memory: where the records lie.
    """

    def __init__(self, plan: LayerPlan, shape: PageShape, memory: PageMemory | None = None) -> None:
        self.plan, self.shape = plan, shape
        self.codec, self.layout = plan.build(shape)
        self.index = None if plan.chooser is None else plan.chooser.index(shape)
        self.by_tokens = plan.by_tokens(self.layout)
        nothing = torch.empty(0, self.layout.bytes_per_page, dtype=torch.uint8, device=shape.device)
        self.memory = PageMemory(self.layout, nothing) if memory is None else memory

    @property
    def data(self) -> Tensor:
        """uint8 [n, bytes]: all records that there are, in use or not."""
        return self.memory.data

    # -- write ----------------------------------------------------------------------------------------------------

    def encode(
        self,
        ids: Tensor,
        keys: Tensor,
        values: Tensor,
        streams: Tensor,
        due: Tensor | None = None,
        look: bool | None = None,
        fit: bool = True,
    ) -> None:
        """Encode the first m * P of the given tokens, keys [s, n, Dk] and values [s, n, Dv] of `streams` int64 [s],
        into the records ids int64 [s, m], oldest first; ids below 0: nowhere.

        The newer ones are shown to what adapts to the data. due: as in `Codec.fit`. look: whether the host may look at
        tensors, and warn of numbers that are not finite; None: as the memory says. fit: False where all the streams
        have pages, so that nothing adapts to these.
        """
        m, size = ids.shape[1], self.layout.page_size
        keys, values = self.clean(keys, values, look)
        streams = streams.to(self.data.device)
        if fit:
            self.codec.fit(streams, keys, values, due)
            if self.index is not None:
                self.index.fit(streams, keys)
        k, v = (x[:, : m * size].unflatten(1, (m, size)) for x in (keys, values))  # [s, m, P, D]
        summaries = {}
        if self.index is not None:
            k, v = k.flatten(0, 1), v.flatten(0, 1)
            summaries = self.index.summarize(k, v, streams.repeat_interleave(m) if m > 1 else streams)
        self.memory.encode(ids.flatten(), self.codec, k, v, streams, summaries)

    def clean(self, keys: Tensor, values: Tensor, look: bool | None = None) -> tuple[Tensor, Tensor]:
        """Keys and values with 0 for what is not finite, which would spoil what many numbers share; as they are where
        the codec is lossless. look: as in `encode`; the host warns of what it sees."""
        if self.codec.lossless:
            return keys, values
        if not (self.memory.host if look is None else look):
            return keys.nan_to_num(0.0, 0.0, 0.0), values.nan_to_num(0.0, 0.0, 0.0)
        layer = self.plan.layer
        if self.plan.latent:
            keys = finite(keys, f"latents of layer {layer}")
            return keys, keys[..., : values.shape[-1]]
        return finite(keys, f"keys of layer {layer}"), finite(values, f"values of layer {layer}")

    def observe(self, streams: Tensor, queries: Tensor) -> None:
        """Show queries [s, R, Dk] of `streams` int64 [s] to what adapts to them."""
        chooser, by_codec = self.plan.chooser, self.plan.quantizer.needs_queries
        by_index = chooser is not None and chooser.needs_queries
        if not (by_index or by_codec):
            return
        queries, streams = finite(queries, f"queries of layer {self.plan.layer}"), streams.to(self.data.device)
        if by_codec:
            self.codec.observe(streams, queries)
        if self.index is not None and by_index:
            self.index.observe(streams, queries)

    # -- read -----------------------------------------------------------------------------------------------------

    def decode(self, ids: Tensor, streams: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [M, P, Dk] and values [M, P, Dv] of the records ids [M], of streams as of `Codec.encode`, in original
        coordinates and the model's dtype. For round trips, surgery and policies, never on the way of attention."""
        shape = self.shape
        if not len(ids):  # a codec that adapts to its first page has nothing to decode with yet
            sizes = (shape.k_dim, shape.v_dim)
            k, v = (torch.zeros(0, shape.page_size, d, dtype=shape.dtype, device=shape.device) for d in sizes)
            return k, v
        k, v = self.codec.decode(self.layout.gather(self.data, ids))
        k, v = self.codec.inverse(k, v, streams)
        if not self.codec.lossless:
            k, v = saturated(k, shape.dtype), saturated(v, shape.dtype)
        return k.to(shape.dtype), v.to(shape.dtype)

    # -- streams --------------------------------------------------------------------------------------------------

    def select(self, streams: Tensor) -> None:
        """Keep, repeat and order what was adapted to streams: int64 [S']. The records stay where they are."""
        streams = streams.to(self.data.device)
        self.codec.select(streams)
        if self.index is not None:
            self.index.select(streams)

    def fork(self) -> Records:
        """The same records, for a twin that adapts by itself from here."""
        twin = copy(self)
        twin.codec = self.codec.fork()
        twin.index = None if self.index is None else self.index.fork()
        return twin

    # -- accounting -----------------------------------------------------------------------------------------------

    def adapted_bytes(self) -> int:
        """Bytes of the codec's constants that a decode step loads."""
        adapted = self.codec.adapted()
        return storage_bytes(adapted) if adapted else 0

    def held(
        self, seen: set[int], exact: Sequence[Tensor], table: Iterable[Tensor], used: Callable[[], int]
    ) -> dict[str, int]:
        """Bytes of live storages by part: of the records, of which so many are `used`, of `exact` tokens [S, slots, D],
        of what lists pages, and of what codec and index hold besides. Storages whose address is in `seen` are skipped,
        the others added to it."""
        window, slots = storage_bytes(exact, seen), max(exact[0].shape[1], 1)
        sinks = window * min(self.plan.sinks, slots) // slots
        pool, layout = storage_bytes([self.data], seen), self.layout
        pages = used() if pool else 0
        constants = [*self.codec.constants(), *(() if self.index is None else self.index.constants())]
        return {
            "pages": pages * layout.body_bytes,
            "summaries": pages * layout.summary_bytes,
            "slack": pool - pages * layout.bytes_per_page,
            "sinks": sinks,
            "window": window - sinks,
            "table": storage_bytes(table, seen),
            "constants": storage_bytes(constants, seen),
        }
