"""The page record: named fields at fixed offsets, and views of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from torch import Tensor

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
        """Bytes of the field in a page, without the padding to 16."""
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
        """Bytes of a record: every field, padded to 16 bytes."""
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

    @property
    def token_bytes(self) -> int:
        """Bytes of a token that attention reads, where the layout is `tokenwise`; without the page's centres."""
        return (self.body_bytes - self.centre_bytes) // self.page_size

    @cached_property
    def token_fields(self) -> tuple[Field, ...]:
        """Fields that attention reads, without centres."""
        return tuple(f for f in self.fields if not f.name.startswith(SUMMARY) and not f.name.endswith(CENTRE))

    def view(self, records: Tensor, field: Field, start: int = 0) -> Tensor:
        """A field of page records [..., bytes] uint8 as a strided view [..., *shape]; start: as of `views`."""
        at = self.offsets[field.name] - start
        view: Tensor = records[..., at : at + field.nbytes].view(field.dtype).unflatten(-1, field.shape)
        return view

    def views(self, records: Tensor, summary: bool = False, start: int = 0) -> dict[str, Tensor]:
        """Fields of page records [..., bytes] uint8 as strided views [..., *shape], without a copy.

        Gives the fields that attention reads, or those that selectors read where `summary` is set; `start` is the
        offset of the records' first byte in a page.
        """
        wanted = (f for f in self.fields if f.name.startswith(SUMMARY) is summary)
        return {f.name: self.view(records, f, start) for f in wanted}

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
