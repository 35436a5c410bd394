"""Memory of fixed size in the hands of a store that grows: for prompts and surgery."""

from __future__ import annotations

import torch
from torch import Tensor

from kvcomp.layout import PageLayout

from .growing import Growing
from .pool import PagePool, compact


class FixedPool(PagePool):
    """Memory for `each` pages of each stream, those of a stream one after another. It neither grows nor moves."""

    def __init__(self, layout: PageLayout, streams: int, each: int, device: torch.device, host: bool) -> None:
        super().__init__(layout, device)
        self.data = self.data.new_zeros(streams * each, layout.bytes_per_page)
        self.each, self._host = each, host

    def reclaim(self) -> None:
        """What is no longer owned is written again when its stream needs it."""
        self._joined = [joined for joined in self._joined if joined() is not None]


class Lent(Growing):
    """The memory of a fixed landlord, with counts on the host, for prompts and surgery."""

    pool: FixedPool

    def new_pages(self, streams: Tensor, m: int, due: Tensor | None = None) -> Tensor:
        first = self.table.counts[streams]
        assert not len(first) or int(first.max()) + m <= self.pool.each, "more pages than the room that was made"
        return (streams * self.pool.each + first)[:, None] + torch.arange(m, device="cpu")

    def in_place(self) -> bool:
        """Whether each stream's pages are its first ones: not after streams were selected."""
        rows, place = self.table.rows, torch.arange(self.table.rows.shape[1], device="cpu")
        own = torch.arange(len(rows), device="cpu")[:, None] * self.pool.each + place
        inside = place < self.table.counts[:, None]
        return len(rows) * self.pool.each == self.pool.capacity and bool((rows == own)[inside].all())

    def fork(self) -> Growing:
        """As `Growing.fork`, but the twin has pages of its own."""
        data, rows = compact(self.pool, self.table)
        pool = PagePool(self.records.layout, self.pool.data.device)
        pool.data = data.clone() if data is self.pool.data else data
        twin = Growing(self.records.fork(), self.exact.fork(), pool)
        twin.table.append(torch.arange(len(rows), device="cpu"), rows)
        twin.table.drop_newest(self.table.longest - self.table.counts)
        return twin
