"""What the writer and the reader ask of a landlord: of whoever owns the memory that the tokens of a layer lie in."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from kvcomp.ledger import ReadPlan

from .reader import View
from .records import Records


class Storage(Protocol):
    """S streams in somebody's memory: records, ids and counts of pages, and exact tokens."""

    records: Records

    def view(self) -> View:
        """What queries may read."""

    def read_exact(self, plan: ReadPlan) -> None:
        """Add to a plan what attention reads of exact tokens."""

    def full(self) -> tuple[Tensor, Tensor | None] | None:
        """Streams int64 [s] whose window may be full, and which of them are due, bool [s] (None: all); None: none."""

    def window(self, streams: Tensor, due: Tensor | None) -> tuple[Tensor, Tensor]:
        """Keys [s, P + recent, Dk] and values [s, P + recent, Dv] after the sinks of such streams, oldest first."""

    def fresh(self, streams: Tensor) -> bool:
        """Whether some of the `streams` may have no page yet."""

    def new_pages(self, streams: Tensor, m: int, due: Tensor | None = None) -> Tensor:
        """int64 [s, m]: records for the next m pages of `streams` [s]; below 0 where they are not due."""

    def paged(self, streams: Tensor, ids: Tensor, due: Tensor | None = None) -> None:
        """Pages ids [s, m] of `streams` [s] are written, where they are due."""

    def shift(self, streams: Tensor, k: Tensor, v: Tensor, due: Tensor | None) -> None:
        """Take the oldest page of tokens out of windows k and v, as `window` gave them, where they are due."""
