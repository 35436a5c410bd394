"""Selectors and their indexes: which pages a query reads."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from torch import Tensor

from kvcomp.attention import Part
from kvcomp.layout import Field, Summary

from .arguments import Alias
from .quantizer import PageShape
from .stage import Stage


class Summaries(NamedTuple):
    """What a selector chooses from: summary fields [S, n, ...] of pages of `page_size` tokens.

    Of a stream's n pages the first counts [S] exist. Each row has `heads` KV heads: stream = row * heads + head.
    by_tokens: single tokens are read. held: counts again, on the host; None: to look at them would be to wait.
    """

    fields: Mapping[str, Tensor]
    counts: Tensor
    heads: int
    page_size: int
    by_tokens: bool = False
    held: Tensor | None = None

    @property
    def pages(self) -> int:
        """n"""
        fields = self.fields
        return fields.ids.shape[1] if isinstance(fields, Summary) else next(iter(fields.values())).shape[1]


class Choice(NamedTuple):
    """What a step reads: positions int64 [S, k], valid ones first and ascending, and how many are `valid` [S].

    Positions of pages in each stream's list, or of tokens in those pages.
    """

    positions: Tensor
    valid: Tensor


class Index:
    """One layer's selector, as `Codec` is one layer's quantizer. A stream is row * heads + head.

    What is not overridden here is a selector that knows nothing but the summaries of pages.
    """

    def __init__(self, selector: Selector) -> None:
        self.selector = selector

    def observe(self, streams: Tensor, queries: Tensor) -> None:
        """See queries [s, R, Dk] of `streams` int64 [s], as `Codec.observe`, where the selector `needs_queries`."""

    def fit(self, streams: Tensor, keys: Tensor) -> None:
        """See keys [s, n, Dk] of `streams`, as `Codec.fit`."""

    def summarize(self, keys: Tensor, values: Tensor, streams: Tensor) -> dict[str, Tensor]:
        """Summary fields [M, ...] of M pages, from their keys [M, P, Dk] and values [M, P, Dv] before quantization; the
        stream of each is int64 [M]."""
        return self.selector.summarize(keys, values)

    def choose(self, queries: Tensor, scale: float, held: Summaries) -> Choice:
        """What queries [S, G, Dk] of each stream read, as `Selector.select`."""
        return self.selector.select(queries, scale, held)

    def rest(
        self, queries: Tensor, scale: float, held: Summaries, choice: Choice, softcap: float | None
    ) -> Part | None:
        """Attention of queries [S, G, Dk] over what stands for all that was not chosen; None: nothing does."""
        return None

    def constants(self) -> list[Tensor]:
        """Tensors that the layer holds besides summaries."""
        return []

    def adapted(self) -> list[Tensor]:
        """Those of `constants` that a decode step loads."""
        return []

    def select(self, streams: Tensor) -> None:
        """Keep, repeat and order streams (beams): int64 [S']."""

    def fork(self) -> Index:
        """An index that goes on by itself from here, as `Codec.fork`."""
        return copy(self)

    def state(self) -> dict[str, Tensor]:
        """As `Codec.state`."""
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """As `Codec.restore`."""

    def lacks(self, paged: Tensor) -> str | None:
        """What `restore` should have given for the streams of which bool [S] `paged` have pages, as `Codec.lacks`."""
        return None


@dataclass(frozen=True)
class Selector(Stage):
    """Decides which pages, or tokens, a decode query reads."""

    family: ClassVar[str] = "selector"
    aliases: ClassVar[Mapping[str, str | Alias]] = {"page_budget": "pages", "token_budget": "tokens"}  # Quest
    by_tokens: ClassVar[bool] = False  # chooses single tokens, where the fields of pages allow to read them

    @property
    def needs_queries(self) -> bool:
        """Whether `Index.observe` has to be called."""
        return False

    def index(self, shape: PageShape) -> Index:
        """What one layer needs."""
        return Index(self)

    def index_bytes(self, shape: PageShape) -> tuple[int, int]:
        """Bytes per stream of `Index.constants` and of `Index.adapted`, once the stream has pages."""
        return 0, 0

    def active(self, layer: int) -> bool:
        """Whether that layer reads selectively; an inactive layer stores no summaries."""
        return True

    @property
    def share(self) -> int:
        """How many active layers in a row read the pages that the first of them chooses; only that has summaries."""
        return 1

    @property
    def same_pages(self) -> dict[str, str]:
        """Of "heads" and "layers" those that read the same pages, which must hold the same tokens, and the argument
        that says so."""
        return {}

    def summary_fields(self, shape: PageShape) -> tuple[Field, ...]:
        """Fields of a page that hold its summary; their names begin with `SUMMARY`."""
        raise NotImplementedError

    def summarize(self, keys: Tensor, values: Tensor) -> dict[str, Tensor]:
        """Summary fields [M, ...] of M pages from their keys [M, P, Dk] (post-RoPE) and values [M, P, Dv] before
        quantization; for selectors whose `index` needs no more than that."""
        raise NotImplementedError

    def select(self, queries: Tensor, scale: float, held: Summaries) -> Choice:
        """What queries [S, G, Dk] of each stream read: pages, or, `held.by_tokens`, as many tokens as fill pages."""
        raise NotImplementedError

    def reads(self, pages: int, page_size: int) -> int:
        """How many of `pages` pages a step reads, or as many tokens, or the most; what a plan is computed from."""
        raise NotImplementedError
