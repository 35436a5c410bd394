"""A landlord whose memory grows: for decoding eagerly, with counts on the host and pages that forks share."""

from __future__ import annotations

from copy import copy, deepcopy

import torch
from torch import Tensor

from kvcomp.ledger import ReadPlan

from .exact import ExactBuffer
from .pool import PagePool, PageTable
from .reader import View
from .records import Records


class Growing:
    """S = rows * heads streams: `exact` tokens (sinks and window), and pages of a `pool` that a `table` lists.

    Per stream the tokens held lie in this order: the sinks, then full pages, then the window.
    """

    def __init__(self, records: Records, exact: ExactBuffer, pool: PagePool) -> None:
        """Without pages: those come from the pool, which is from now on the records' memory."""
        self.records, self.exact, self.pool = records, exact, pool
        plan = records.plan
        self.table = PageTable(len(exact.counts), pool.data.device, plan.watched, plan.sliding is not None)
        records.memory = pool
        pool.join(self.table)

    @classmethod
    def empty(cls, records: Records, keys: Tensor, values: Tensor) -> Growing:
        """For streams, dimensions, dtype and device of keys [B, Hkv, n, Dk] and values [B, Hkv, n, Dv]."""
        return cls(records, ExactBuffer(records.plan, keys, values), PagePool(records.layout, keys.device))

    @property
    def kept(self) -> Tensor:
        """int64 [S]: tokens that each stream holds."""
        return self.exact.counts + self.table.counts * self.records.plan.page_size

    def view(self) -> View:
        """What queries may read."""
        table, exact = self.table, self.exact
        tokens = exact.tokens if exact.bounds[1] else None
        return View(*table.held(), tokens, self.records.shape.heads, table.counts, table.total)

    def read_exact(self, plan: ReadPlan) -> None:
        """Add to a plan what attention reads of exact tokens: the slots up to the end of the longest stream."""
        longest = self.exact.bounds[1]
        if longest:
            sinks, column = min(self.records.plan.sinks, longest), self.exact.token_bytes * self.exact.k.shape[0]
            plan.add("sinks", column, sinks)
            plan.add("window", column, longest - sinks)

    # -- what the writer asks -------------------------------------------------------------------------------------

    def full(self) -> tuple[Tensor, Tensor | None] | None:
        """Streams int64 [s] whose window is full, and which of them really are, bool [s] (None: all); None: none."""
        plan = self.records.plan
        if self.exact.bounds[1] < plan.slots:
            return None
        return (self.exact.counts == plan.slots).nonzero().flatten(), None

    def window(self, streams: Tensor, due: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.exact.window(streams, self.records.plan.slots)

    def fresh(self, streams: Tensor) -> bool:
        return not bool(self.table.counts[streams].all())

    def new_pages(self, streams: Tensor, m: int, due: Tensor | None = None) -> Tensor:
        """int64 [s, m]: records for the next pages of `streams` int64 [s]; below 0 where none are `due`."""
        return self.pool.allocate(len(streams) * m).view(len(streams), m)

    def paged(self, streams: Tensor, ids: Tensor, due: Tensor | None = None) -> None:
        """Pages ids [s, m] of streams [s] are written."""
        self.table.append(streams, ids)

    def shift(self, streams: Tensor, k: Tensor, v: Tensor, due: Tensor | None) -> None:
        plan = self.records.plan
        self.exact.put(streams, plan.sinks, k[:, plan.page_size :], v[:, plan.page_size :])

    # -- surgery --------------------------------------------------------------------------------------------------

    def decode(self, ids: Tensor, stream: int) -> tuple[Tensor, Tensor]:
        """A stream's pages ids [m] as tokens [m * P, Dk], [m * P, Dv] in original coordinates and the model's dtype."""
        streams = torch.full((1,), stream, device=self.records.data.device, dtype=torch.int64)
        k, v = self.records.decode(ids, streams)
        return k.flatten(0, 1), v.flatten(0, 1)

    def select(self, streams: Tensor) -> None:
        """Keep, repeat and order streams. Pages are shared, never copied."""
        self.exact.select(streams)
        self.table.select(streams)
        self.records.select(streams)

    def fork(self) -> Growing:
        """Streams that go on by themselves from here. The two share the pages that there are, and the pool of later
        ones; the rest is copied."""
        twin = copy(self)
        twin.exact, twin.records, twin.table = self.exact.fork(), self.records.fork(), deepcopy(self.table)
        twin.pool.join(twin.table)
        return twin

    def held(self, seen: set[int]) -> dict[str, int]:
        """Bytes of live storages by part, as `Records.held`."""
        table = [*self.table.tensors(), self.exact.counts, self.exact.mean]
        return self.records.held(seen, self.exact.tensors, table, lambda: len(self.pool.owned()))
