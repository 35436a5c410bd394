"""One layer's store: tokens enter through the writer, queries ask the reader, and surgery changes what is held.

Per stream (one KV head of one row) the kept tokens lie in this order: the sinks, then full pages, then the window.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from typing import Any

import torch
from torch import Tensor

from kvcomp.attention import Part, attend, attend_causal, merge
from kvcomp.ledger import ReadPlan, add_counts, storage_bytes
from kvcomp.stages import Choice
from kvcomp.stages.plan import LayerPlan
from kvcomp.state import State

from . import chosen, reader, sliding, surgery, writer
from .content import LayerContent
from .pool import compact
from .reader import Shared
from .restoring import restore


class LayerStore(LayerContent):
    """Keys and values of one layer, compressed.

    `start` fixes the shapes, `append` and `write` add tokens, `attend` reads, `settle` moves what overflows the window
    into pages and evicts. All tokens held lie in the past of the queries that `attend` is given.

    reads: what the last decode step read. dense_read: bytes that the same step would have loaded without compression.
    """

    def __init__(self, plan: LayerPlan, choices: dict[int, Shared] | None = None) -> None:
        super().__init__(plan, choices)
        self.reads: list[ReadPlan] = []
        self.dense_read = 0

    # -- write ----------------------------------------------------------------------------------------------------

    write = writer.write

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add one token to every row: keys [B, Hkv, 1, Dk], values [B, Hkv, 1, Dv]. The buffer has room after
        `settle`."""
        if self.prompt is not None:
            self.end_prompt()
        self.history.append(1, None)
        self.storage.exact.append(keys, values)
        if self.tail is not None:
            self.tail += 1

    def settle(self) -> None:
        """Move what overflows the windows into pages, then let the policies expire old pages."""
        if self.plan.sliding is not None:
            sliding.leave(self)
        writer.settle(self.storage)
        if self.plan.policies:
            writer.expire(self)

    # -- read -----------------------------------------------------------------------------------------------------

    def attend(
        self,
        queries: Tensor,
        scale: float,
        softcap: float | None = None,
        chunk: tuple[Tensor, Tensor, Tensor | None] | None = None,
        choice: Choice | None = None,
    ) -> Part:
        """Attention of queries [B, Hq, n, Dk] over everything held: out [B, Hq, n, Dv] and lse [B, Hq, n], float32.

        `chunk` adds tokens that are not written yet: keys [B, Hkv, c, Dk], values [B, Hkv, c, Dv] and which of them
        each query sees, bool, broadcastable to [B, n, c]; None: those up to its own, the queries being those of the
        last n <= c. Selectors act on single queries only (n = 1); more read every page. Where a window slides, all
        queries see all exact tokens, and a query without chunk is that of the newest token held. `choice`: what the
        model's own indexer chose for single queries, of all tokens held, as `chosen.attend` takes it, instead of a
        selector.
        """
        n, storage = queries.shape[2], self.storage
        table = storage.table
        if chunk is not None and self.prompt is not None and self.plan.trims:
            table.begin_watch()
        group = queries.shape[1] // self.heads
        q = queries.reshape(self.rows * self.heads, group * n, queries.shape[3])
        self.choices.pop(self.plan.layer, None)
        view, watched, oldest = storage.view(), table.received is not None, None
        if self.plan.sliding is not None:
            view, oldest = sliding.seen(self, view, n, 0 if chunk is None else chunk[0].shape[2])
        found = None
        if choice is None:
            found = reader.attend(
                storage.records, view, q, scale, softcap, single=n == 1, watched=watched, choices=self.choices
            )
            plan, parts = found.plan, list(found.parts)
            storage.read_exact(plan)
        else:
            plan = ReadPlan()
            parts = [chosen.attend(storage.records, view, q, scale, softcap, choice, plan)]
        self.dense_read = self.dense_bytes
        if oldest is not None:
            visible = oldest.visible.repeat(1, group, 1)
            parts.append(attend(q, oldest.keys, oldest.values, scale, visible, softcap))
            plan.add("pages", self.layout.body_bytes, oldest.pages)
        if self.compacted is not None:
            parts.append(self.compacted.attend(q, scale, softcap))
            plan.add("compacted", self.compacted.nbytes)
        if chunk is not None:
            parts.append(self._attend_chunk(q.unflatten(1, (group, n)), *chunk, scale, softcap))
            new = chunk[0].nbytes + (0 if self.plan.latent else chunk[1].nbytes)
            plan.add("chunk", new)
            self.dense_read += new
        self.reads = [plan]
        part = merge(parts)
        if watched and found and (mass := reader.received(found, part.lse, n, table.longest)) is not None:
            table.watch(mass, n)
        heads = self.heads * group
        return Part(part.out.reshape(self.rows, heads, n, -1), part.lse.reshape(self.rows, heads, n))

    def _attend_chunk(
        self, q: Tensor, keys: Tensor, values: Tensor, visible: Tensor | None, scale: float, softcap: float | None
    ) -> Part:
        """Attention of q [S, G, n, Dk] over a chunk, as `attend` has it."""
        k, v = keys.flatten(0, 1), values.flatten(0, 1)
        group, n = q.shape[1:3]
        if visible is None:
            first = k.shape[1] - n
            own = attend_causal(q, k[:, first:], v[:, first:], scale, softcap)
            if not first:
                return own
            return merge([attend(q.flatten(1, 2), k[:, :first], v[:, :first], scale, None, softcap), own])
        seen = visible.expand(self.rows, n, k.shape[1])[:, None, None]  # [B, 1, 1, n, c]
        seen = seen.expand(-1, self.heads, group, -1, -1).flatten(2, 3).flatten(0, 1)
        return attend(q.flatten(1, 2), k, v, scale, seen, softcap)

    # -- surgery --------------------------------------------------------------------------------------------------

    crop = surgery.crop
    drop_newest = surgery.drop_newest
    compactable = surgery.compactable
    compact = surgery.compact
    select_rows = surgery.select_rows

    def fork(self, choices: dict[int, Shared] | None = None) -> LayerStore:
        """A store that goes on by itself from here, with the `choices` of its own cache. The two share the pages that
        there are, and the pool of later ones; the rest is copied."""
        twin = copy(self)
        twin.choices = {} if choices is None else choices
        twin.history = self.history.fork()
        if self.started:
            twin.storage = self.storage.fork()
        return twin

    # -- saving ---------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """All that is held, as tensors and plain values from which `restore` makes the same store.

        The live tensors wherever nothing in them is idle. Left out is what the plan rebuilds (`Codec.constants`), and
        what the last step read.
        """
        if not self.started:
            return {}
        pages, table = compact(self.storage.pool, self.storage.table)
        watched = self.table.received
        return {
            "rows": self.rows,
            "heads": self.heads,
            "fields": [[f.name, *f.shape, str(f.dtype)] for f in self.layout.fields],
            "pages": pages,
            "table": table,
            "counts": self.table.counts,
            "received": None if watched is None else watched[:, : self.table.longest],
            "exact": self.exact.state(),
            "history": self.history.state(),
            "codec": self.codec.state(),
            "index": {} if self.records.index is None else self.records.index.state(),
            "compacted": None if self.compacted is None else self.compacted._asdict(),
            "tail": self.tail,
            "prompt": None if self.prompt is None else [list(numbers) for numbers in self.prompt],
            **({} if self.table.left is None else {"left": self.table.left}),
        }

    def restore(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Become the store whose `state` this is, on `device`; the state's tensors lie on the host.

        Raises:
            KvcompError: pages of another layout than this plan's.
            DamagedError: the state is no store's of this plan.
        """
        if state:
            restore(self, State.of(state, f"layer {self.plan.layer}"), device)

    # -- accounting -----------------------------------------------------------------------------------------------

    @property
    def read(self) -> dict[str, int]:
        """Bytes that the last decode step loaded, by part. Waits for the device where a number is there."""
        return add_counts(entry for plan in self.reads for entry in plan.bytes().items())

    def held(self, seen: set[int]) -> dict[str, int]:
        """Bytes of live storages by part; storages whose address is in `seen` are skipped, the others added to it."""
        if not self.started:
            return {}
        choices = [*self.choices.get(self.plan.layer, ()), *(t for plan in self.reads for t in plan.tensors)]
        return self.storage.held(seen) | {
            "compacted": 0 if self.compacted is None else storage_bytes(self.compacted.tensors, seen),
            "choices": storage_bytes(choices, seen),
            "history": storage_bytes(self.history.tensors(), seen),
        }


def roundtrip(
    plan: LayerPlan, keys: Tensor, values: Tensor, queries: Tensor | None = None, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Keys and values [B, Hkv, N', D] as attention would see keys and values [B, Hkv, N, D] that the plan stored: what
    `Stack.roundtrip` gives."""
    store, scale = LayerStore(plan), keys.shape[-1] ** -0.5 if scale is None else scale
    if plan.joint is None:
        store.start(keys, values)
        store.write(keys, values, None, queries, scale)
        return store.dense()
    maps = plan.joint.maps(plan.layer, keys.shape[1], keys.shape[3], values.shape[3], keys.device)
    latents = maps.latents(keys, values)
    store.start(latents, latents)
    store.write(latents, latents, None, None if queries is None else maps.absorbed(queries), scale)
    return maps.expanded(store.dense()[0])
