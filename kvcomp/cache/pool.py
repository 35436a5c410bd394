"""Memory for pages: the pool that holds them, and the table that says which stream owns which."""

from __future__ import annotations

from collections.abc import Iterable
from copy import copy, deepcopy
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.nn import functional as F

from kvcomp.layout import PageLayout
from kvcomp.state import State

from .records import PageMemory

MOST_LEFT = 1 << 40  # pages that a file may say have left


class PagePool(PageMemory):
    """Pages of one layer: records uint8 [capacity, bytes_per_page] that grow by a sixteenth, and their free list.

    The tables that `join` share it. What a table owned that is no longer in use is found again when the pages run out.
    """

    def __init__(self, layout: PageLayout, device: torch.device) -> None:
        super().__init__(layout, torch.empty(0, layout.bytes_per_page, dtype=torch.uint8, device=device))
        self.free: list[int] = []
        self._joined: list[ref[PageTable]] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> PagePool:
        memo[id(self)] = twin = copy(self)
        twin.data, twin.free, twin._joined = deepcopy(self.data, memo), list(self.free), []
        for table in self.tables:
            twin.join(deepcopy(table, memo))
        return twin

    @property
    def capacity(self) -> int:
        return self.data.shape[0]

    def join(self, table: PageTable) -> None:
        """Spare the pages that `table` owns, for as long as somebody else holds it."""
        self._joined.append(ref(table))

    @property
    def tables(self) -> list[PageTable]:
        """Those that joined and are still in use."""
        return [table for joined in self._joined if (table := joined()) is not None]

    def owned(self) -> Tensor:
        """Sorted ids of all pages that some stream of some table owns."""
        none = torch.zeros(0, dtype=torch.int64, device="cpu")
        owned: Tensor = torch.cat([none, *(table.owned() for table in self.tables)]).unique()
        return owned

    def allocate(self, n: int) -> Tensor:
        """int64 [n] page ids (host). Their bytes are undefined until written.

        The first allocation is exact (a prefill knows what it needs), later ones grow by at least a sixteenth, so that
        a token costs O(1) copied bytes and slack stays under 7 %.
        """
        missing = n - len(self.free)
        if missing > 0 and len(self.tables) < len(self._joined):
            self.reclaim()
            missing = n - len(self.free)
        if missing > 0:
            old = self.capacity
            data = self.data.new_empty(old + max(missing, old // 16), self.layout.bytes_per_page)
            data[:old] = self.data
            self.data = data
            self.free.extend(range(self.capacity - 1, old - 1, -1))
        ids = self.free[-n:][::-1] if n else []
        del self.free[len(self.free) - n :]
        return torch.tensor(ids, dtype=torch.int64, device="cpu")

    def reclaim(self) -> None:
        """Free the pages that no stream owns; give the memory back where more than a quarter of the pool would lie
        idle. Pages then have new ids, in all tables."""
        self._joined = [joined for joined in self._joined if joined() is not None]
        owned = self.owned()
        if (self.capacity - len(owned)) * 4 > self.capacity:
            self.data, self.free = self.data[owned.to(self.data.device)], []
            for table in self.tables:
                table.renumber(owned)
        else:
            unused = torch.ones(self.capacity, dtype=torch.bool, device="cpu")
            unused[owned] = False
            self.free = unused.nonzero().flatten().flip(0).tolist()


class PageTable:
    """Which pages each stream owns, oldest first: int32 [S, capacity] with a count per stream.

    Kept on the host, where allocation happens; `ids` hands out a copy on the pages' device that is renewed on change.
    A page may belong to several streams (beams, repeated rows) or tables (forks): pages are never changed once written.

    received: float32 [S, capacity, 2] where a policy watches: the attention that each page received, and of how many
    queries. On the pages' device: steps add to it, and the host reads it only where pages are to leave.
    left: int64 [S] where a window slides: each stream's oldest pages that it no longer owns, or never had written.
    """

    def __init__(self, streams: int, device: torch.device, watched: bool = False, sliding: bool = False) -> None:
        self.device = device
        self.rows = torch.zeros(streams, 0, dtype=torch.int32, device="cpu")
        self.counts = torch.zeros(streams, dtype=torch.int64, device="cpu")
        self.received = torch.zeros(streams, 0, 2, dtype=torch.float32, device=device) if watched else None
        self.left = torch.zeros(streams, dtype=torch.int64, device="cpu") if sliding else None
        self._fewest_left: int | None = None
        self._mirror: tuple[Tensor, Tensor] | None = None
        self._total: int | None = None

    @property
    def longest(self) -> int:
        return int(self.counts.max()) if self.counts.numel() else 0

    @property
    def total(self) -> int:
        """Pages over all streams, shared ones counted once per stream."""
        if self._total is None:
            self._total = int(self.counts.sum())
        return self._total

    def ids(self) -> Tensor:
        """int32 [S, longest] page ids on the pages' device; entries past a stream's count are 0."""
        return self.held()[0]

    def held(self) -> tuple[Tensor, Tensor]:
        """`ids`, and the counts int64 [S], on the pages' device."""
        if self._mirror is None:
            self._mirror = self.rows[:, : self.longest].to(self.device), self.counts.to(self.device)
        return self._mirror

    def append(self, streams: Tensor, ids: Tensor) -> None:
        """Give pages ids [s, m] to the s `streams` (host int64), after those they have."""
        if ids.numel() == 0:
            return
        m = ids.shape[1]
        ends = self.counts[streams] + m
        need = int(ends.max())
        if need > self.rows.shape[1]:
            wider = max(need, self.rows.shape[1] + self.rows.shape[1] // 16 + 1)
            rows = self.rows.new_zeros(self.rows.shape[0], wider)
            rows[:, : self.rows.shape[1]] = self.rows
            self.rows = rows
            if self.received is not None:
                self.received = F.pad(self.received, (0, 0, 0, wider - self.received.shape[1]))
        if int(ends.min()) == need:
            self.rows[streams, need - m : need] = ids.to(torch.int32)
        else:
            self.rows[streams[:, None], ends[:, None] - m + torch.arange(m, device="cpu")] = ids.to(torch.int32)
        self.counts[streams] = ends
        self._mirror = self._total = None

    def drop(self, gone: Tensor) -> None:
        """Forget pages: bool [S, longest]; those that stay keep their order."""
        n = self.rows.shape[1]
        gone = F.pad(gone, (0, n - gone.shape[1])) & (torch.arange(n, device="cpu") < self.counts[:, None])
        order = gone.int().argsort(dim=1, stable=True)
        self.counts = self.counts - gone.sum(1)
        inside = torch.arange(n, device="cpu") < self.counts[:, None]
        self.rows = (self.rows.gather(1, order) * inside).to(torch.int32)
        if self.received is not None:
            order, inside = order.to(self.device), inside.to(self.device)
            self.received = self.received.gather(1, order[..., None].expand_as(self.received)) * inside[..., None]
        self._mirror = self._total = None

    @property
    def fewest_left(self) -> int:
        """The least number of pages that `left` a stream."""
        if self._fewest_left is None:
            self._fewest_left = 0 if self.left is None or not self.left.numel() else int(self.left.min())
        return self._fewest_left

    def count_left(self, streams: Tensor | slice, amount: Tensor | int) -> None:
        """So many more of the oldest pages of `streams` have left."""
        assert self.left is not None
        self.left[streams] += amount
        self._fewest_left = None

    def drop_oldest(self, amount: Tensor) -> None:
        """Forget each stream's `amount` [S] oldest pages, which `left`."""
        self.drop(torch.arange(self.longest, device="cpu") < amount[:, None])
        self.count_left(slice(None), amount)

    def drop_newest(self, amount: Tensor) -> None:
        """Forget each stream's `amount` [S] newest pages."""
        self.counts = self.counts - amount
        inside = torch.arange(self.rows.shape[1], device="cpu") < self.counts[:, None]
        self.rows *= inside
        if self.received is not None:
            self.received *= inside[..., None].to(self.device)
        self._mirror = self._total = None

    def begin_watch(self) -> None:
        """From now on remember the attention that pages receive."""
        if self.received is None:
            self.received = torch.zeros(*self.rows.shape, 2, dtype=torch.float32, device=self.device)

    def watch(self, mass: Tensor, queries: int) -> None:
        """Add the attention mass [S, longest] that pages received from `queries` queries."""
        if self.received is not None:
            times = torch.full_like(mass, float(queries))
            exists = torch.arange(mass.shape[1], device=self.device) < self.held()[1][:, None]
            self.received[:, : mass.shape[1]] += torch.stack([mass, times], -1) * exists[..., None]

    def attention(self) -> tuple[Tensor, Tensor] | None:
        """float32 [S, longest]: mean attention that each page received of a query, 0 before any, and the number of
        queries; None if unwatched."""
        if self.received is None:
            return None
        mass, queries = self.received[:, : self.longest].unbind(-1)
        return mass / queries.clamp_min(1), queries

    def select(self, streams: Tensor) -> None:
        """Keep (and repeat, and order) the given streams."""
        self.rows, self.counts = self.rows[streams], self.counts[streams]
        self._mirror = self._total = None
        self.received = None if self.received is None else self.received[streams.to(self.device)]
        self.left, self._fewest_left = None if self.left is None else self.left[streams], None

    def owned(self) -> Tensor:
        """Sorted ids of all pages that some stream owns."""
        ids: Tensor = self.rows[torch.arange(self.rows.shape[1], device="cpu") < self.counts[:, None]].unique().long()
        return ids

    def places(self, owned: Tensor) -> Tensor:
        """int32 [S, longest]: where each page is among the sorted ids `owned`, which name them all."""
        rows = self.rows[:, : self.longest]
        inside = torch.arange(rows.shape[1], device="cpu") < self.counts[:, None]
        return (torch.searchsorted(owned, rows.long()) * inside).to(torch.int32)

    def renumber(self, owned: Tensor) -> None:
        """Make each page's place in the sorted ids `owned` its id."""
        self.rows, self._mirror = self.places(owned), None  # as many of them
        self.received = None if self.received is None else self.received[:, : self.longest].clone()

    def restore(self, state: State, pages: int) -> None:
        """Become the table of as many streams whose `table`, `counts` and `received` a state has, for a pool of
        `pages` pages, all of which are some stream's.

        Raises:
            DamagedError: the state is none of such a table.
        """
        streams = len(self.counts)
        longest = state.tensor("table", (streams, None), torch.int32).shape[1]
        counts = state.numbers("counts", (streams,), torch.int64, 0, longest)
        rows = state.numbers("table", (streams, longest), torch.int32, 0, max(pages - 1, 0))
        inside = torch.arange(longest, device="cpu") < counts[:, None]
        state.require(bool(inside.any(0).all()), f"table has {longest} columns, of which some are no stream's")
        state.require(not rows[~inside].any(), "table has pages behind a stream's last one")
        owned = len(rows[inside].unique())
        state.require(owned == pages, f"there are {pages} pages, but the table has {owned}")
        received = state.get("received")
        if received is not None:  # caches saved before policies watched have none
            state.require(self.received is not None, "received is there, but nothing watches")
            received = state.finite("received", (streams, longest, 2), torch.float32)
            state.require(not (received < 0).any(), "received has negative numbers")
        if self.left is not None:
            self.left, self._fewest_left = state.numbers("left", (streams,), torch.int64, 0, MOST_LEFT), None
        self.rows, self.counts = rows, counts
        self.received = None if received is None else received.to(self.device)
        self._mirror = self._total = None

    def tensors(self) -> Iterable[Tensor]:
        held = self.rows, self.counts, self.received, self.left, *(self._mirror or ())
        return [t for t in held if t is not None]


def compact(pool: PagePool, table: PageTable) -> tuple[Tensor, Tensor]:
    """Records uint8 [n, bytes_per_page] of the n pages that some stream owns, and int32 rows [S, longest] that number
    them. The pool's own records where it holds no others."""
    owned = table.owned()
    if len(owned) == pool.capacity:
        return pool.data, table.rows[:, : table.longest]
    return pool.data[owned.to(pool.data.device)], table.places(owned)
