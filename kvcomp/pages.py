"""The page: its layout in bytes, the pool that holds pages, and the table that says which stream owns which."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.nn import functional as F

from kvcomp.state import State

ALIGN = 16
SUMMARY = "summary."
CENTRE = ".centre"  # what names of fields end with that hold one row for all tokens of a page: see `quantizers.centred`


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


@dataclass(frozen=True)
class Field:
    """One named array of a page record; selectors read those named `summary.*`, attention the others."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class PageLayout:
    """A page record: P tokens of one stream as named fields at 16-byte-aligned offsets."""

    page_size: int
    fields: tuple[Field, ...]

    @cached_property
    def offsets(self) -> dict[str, int]:
        """Byte offset of each field in the record."""
        offsets, at = {}, 0
        for f in self.fields:
            offsets[f.name] = at
            at = round_up(at + f.nbytes, ALIGN)
        return offsets

    @cached_property
    def bytes_per_page(self) -> int:
        return sum(round_up(f.nbytes, ALIGN) for f in self.fields)

    @cached_property
    def summary_bytes(self) -> int:
        """Bytes of a page that selectors read; attention reads the rest."""
        return sum(round_up(f.nbytes, ALIGN) for f in self.fields if f.name.startswith(SUMMARY))

    @property
    def body_bytes(self) -> int:
        """Bytes of a page that attention reads."""
        return self.bytes_per_page - self.summary_bytes

    @cached_property
    def _hash(self) -> int:
        return hash((self.page_size, self.fields))

    def __hash__(self) -> int:  # computed once: kernels look up what they know of a layout in every step
        return self._hash

    def __post_init__(self) -> None:
        kinds = [f.name.startswith(SUMMARY) for f in self.fields]
        assert kinds == sorted(kinds), "summaries come last, so that attention and selectors each read one run of bytes"

    @cached_property
    def tokenwise(self) -> bool:
        """Whether attention can read single tokens: no two of a page share anything but a centre. Each other field that
        attention reads begins with a dimension of tokens, or of groups of them."""
        return all(f.shape[0] == self.page_size for f in self.token_fields)

    @cached_property
    def centres(self) -> tuple[Field, ...]:
        """Fields float16 [1, n] of numbers that are added to some coordinates of all keys of a page."""
        return tuple(f for f in self.fields if f.name.endswith(CENTRE))

    @cached_property
    def centre_bytes(self) -> int:
        """Bytes of a page's centres."""
        return sum(f.nbytes for f in self.centres)

    @cached_property
    def token_fields(self) -> tuple[Field, ...]:
        """Fields that attention reads, without centres."""
        return tuple(f for f in self.fields if not f.name.startswith(SUMMARY) and not f.name.endswith(CENTRE))

    def views(self, records: Tensor, summary: bool = False, start: int = 0) -> dict[str, Tensor]:
        """Fields of page records [..., bytes] uint8 as strided views [..., *shape], without a copy.

        Gives the fields that attention reads, or those that selectors read where `summary` is set; `start` is the
        offset of the records' first byte in a page.
        """
        out = {}
        for f in self.fields:
            if f.name.startswith(SUMMARY) is summary:
                at = self.offsets[f.name] - start
                out[f.name] = records[..., at : at + f.nbytes].view(f.dtype).unflatten(-1, f.shape)
        return out

    def gather(self, pool: Tensor, ids: Tensor, summary: bool = False) -> dict[str, Tensor]:
        """Copies of the fields [..., *shape] of pages ids [...] out of a pool [pages, bytes_per_page]; nothing else
        is read."""
        start, end = (self.body_bytes, self.bytes_per_page) if summary else (0, self.body_bytes)
        words = pool.view(torch.int64)[:, start // 8 : end // 8]  # eight bytes at a time: fields are 16-byte aligned
        records = words.index_select(0, ids.flatten()).view(torch.uint8).unflatten(0, ids.shape)
        return self.views(records, summary, start)


class Summary(Mapping[str, Tensor]):
    """Summary fields [S, n, *shape] of pages ids [S, n] of a pool, of which the first counts [S] exist: copied out when
    one is looked at, so that kernels that read them where they are need no copy."""

    def __init__(self, layout: PageLayout, pool: Tensor, ids: Tensor, counts: Tensor) -> None:
        self.layout, self.pool, self.ids, self.counts = layout, pool, ids, counts

    @cached_property
    def _copies(self) -> dict[str, Tensor]:
        return self.layout.gather(self.pool, self.ids, summary=True)

    def __getitem__(self, name: str) -> Tensor:
        return self._copies[name]

    def __iter__(self) -> Iterator[str]:
        return (f.name for f in self.layout.fields if f.name.startswith(SUMMARY))

    def __len__(self) -> int:
        return sum(1 for _ in self)


class PagePool:
    """Pages of one layer: a uint8 tensor [capacity, bytes_per_page] that grows by a sixteenth, and its free list.

    The tables that `join` share it. What a table owned that is no longer in use is found again when the pages run out.
    """

    def __init__(self, layout: PageLayout, device: torch.device) -> None:
        self.layout = layout
        self.data = torch.empty(0, layout.bytes_per_page, dtype=torch.uint8, device=device)
        self.free: list[int] = []
        self._joined: list[ref[PageTable]] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> PagePool:
        memo[id(self)] = twin = PagePool(self.layout, self.data.device)
        twin.data, twin.free = self.data.clone(), list(self.free)
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
        return torch.cat([none, *(table.owned() for table in self.tables)]).unique()

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

    def write(self, ids: Tensor, fields: dict[str, Tensor]) -> None:
        """Store encoded fields [M, *shape] in the pages `ids` [M]."""
        records = self.data.new_zeros(len(ids), self.layout.bytes_per_page)
        for summary in (False, True):
            for name, view in self.layout.views(records, summary).items():
                view.copy_(fields[name])
        self.data[ids.to(self.data.device)] = records

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
    queries.
    """

    def __init__(self, streams: int, device: torch.device, watched: bool = False) -> None:
        self.device = device
        self.rows = torch.zeros(streams, 0, dtype=torch.int32, device="cpu")
        self.counts = torch.zeros(streams, dtype=torch.int64, device="cpu")
        self.received = torch.zeros(streams, 0, 2, dtype=torch.float32, device="cpu") if watched else None
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
        """Give pages ids [s, m] to the s `streams` (host int64), behind those they have."""
        if ids.numel() == 0:
            return
        m = ids.shape[1]
        need = int((self.counts[streams] + m).max())
        if need > self.rows.shape[1]:
            wider = max(need, self.rows.shape[1] + self.rows.shape[1] // 16 + 1)
            rows = self.rows.new_zeros(self.rows.shape[0], wider)
            rows[:, : self.rows.shape[1]] = self.rows
            self.rows = rows
            if self.received is not None:
                self.received = F.pad(self.received, (0, 0, 0, wider - self.received.shape[1]))
        columns = self.counts[streams, None] + torch.arange(m, device="cpu")
        self.rows[streams[:, None], columns] = ids.to(torch.int32)
        self.counts[streams] += m
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
            self.received = self.received.gather(1, order[..., None].expand_as(self.received)) * inside[..., None]
        self._mirror = self._total = None

    def drop_newest(self, amount: Tensor) -> None:
        """Forget each stream's `amount` [S] newest pages."""
        self.counts = self.counts - amount
        inside = torch.arange(self.rows.shape[1], device="cpu") < self.counts[:, None]
        self.rows *= inside
        if self.received is not None:
            self.received *= inside[..., None]
        self._mirror = self._total = None

    def begin_watch(self) -> None:
        """From now on remember the attention that pages receive."""
        if self.received is None:
            self.received = torch.zeros(*self.rows.shape, 2, dtype=torch.float32, device="cpu")

    def watch(self, mass: Tensor, queries: int) -> None:
        """Add the attention mass [S, longest] that pages received from `queries` queries."""
        if self.received is not None:
            times = torch.full(mass.shape, float(queries), dtype=torch.float32, device="cpu")
            exists = torch.arange(mass.shape[1], device="cpu") < self.counts[:, None]
            self.received[:, : mass.shape[1]] += torch.stack([mass.cpu(), times], -1) * exists[..., None]

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
        self.received = None if self.received is None else self.received[streams]

    def owned(self) -> Tensor:
        """Sorted ids of all pages that some stream owns."""
        return self.rows[torch.arange(self.rows.shape[1], device="cpu") < self.counts[:, None]].unique().long()

    def places(self, owned: Tensor) -> Tensor:
        """int32 [S, longest]: where each page stands in the sorted ids `owned`, which name them all."""
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
        self.rows, self.counts, self.received = rows, counts, received
        self._mirror = self._total = None

    def tensors(self) -> Iterable[Tensor]:
        return [t for t in (self.rows, self.counts, self.received, *(self._mirror or ())) if t is not None]


def compact(pool: PagePool, table: PageTable) -> tuple[Tensor, Tensor]:
    """Records uint8 [n, bytes_per_page] of the n pages that some stream owns, and int32 rows [S, longest] that number
    them. The pool's own records where it holds no others."""
    owned = table.owned()
    if len(owned) == pool.capacity:
        return pool.data, table.rows[:, : table.longest]
    return pool.data[owned.to(pool.data.device)], table.places(owned)
