"""Selectors that rank pages by the attention they promise: a method is a summary, and the rules are common to all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kvcomp.stages import Selector, arg

RULES = ("pages", "keep", "top_p", "threshold")
HEADS = ("own", "common")


@dataclass(frozen=True)
class RankedSelector(Selector):
    """A decode query reads the pages that its rule takes, by the share of attention that summaries promise.

    The share of a page is softmax(scale * logits) over the pages of its stream, averaged over the query heads of the KV
    head. A subclass overrides `summary_fields`, `summarize` and `logits`, and the defaults that its method publishes.
    The `first` and `last` pages are read in any case and count; sinks and the exact window are read besides. Queries
    that come in chunks (prefill, verification) read every page.

    With heads=common the KV heads of a row choose by the mean of their shares; a row whose heads hold different numbers
    of pages falls back to own choices, as there no page is the same tokens in all heads. With `share` a layer's choice
    serves the next ones, too (CLSA, arXiv 2606.06467): those store no summaries and scan none, and read all of their
    pages should they hold other numbers of them. Both need pages that hold the same tokens, so policies that choose
    by head or layer are refused.
    """

    pages: int | None = arg(None, "pages that a query reads (none of the four: as published)")
    keep: float | None = arg(None, "share of the pages that a query reads, at least one, 0 < keep <= 1")
    top_p: float | None = arg(None, "as few pages as reach this share of the attention; a plan counts all pages")
    threshold: float | None = arg(None, "pages of at least this share of the attention; a plan counts all pages")
    heads: str = arg("own", "own choice of each KV head, or a common one")
    first: int = arg(0, "oldest pages, read in any case")
    last: int = arg(0, "newest pages, read in any case")
    min_pages: int = arg(0, "pages read at least")
    dense_layers: int = arg(0, "first layers that read everything")
    summary_bits: int = arg(16, "bits per channel of a summary, 16 or 8")
    share: int = arg(1, "layers in a row that read what the first of them chooses")

    def __post_init__(self) -> None:
        given = [name for name in RULES if getattr(self, name) is not None]
        if not given:
            object.__setattr__(self, self.default[0], self.default[1])
        for other in given[1:]:
            self.check(False, other, f"left out where {given[0]} is given")
        self.check(self.pages is None or self.pages > 0, "pages", "positive")
        for name in ("keep", "top_p", "threshold"):
            value = getattr(self, name)
            self.check(value is None or 0 < value <= 1, name, "in (0, 1]")
        self.check(self.heads in HEADS, "heads", " or ".join(HEADS))
        for name in ("first", "last", "min_pages", "dense_layers"):
            self.check(getattr(self, name) >= 0, name, "zero or positive")
        self.check(self.summary_bits in (8, 16), "summary_bits", "8 or 16")
        self.check(self.share > 0, "share", "positive")

    @property
    def default(self) -> tuple[str, float]:
        """Argument and value of the rule where none is given."""
        raise NotImplementedError

    def logits(self, queries: Tensor, summary: Mapping[str, Tensor]) -> Tensor:
        """[S, G, n] float32: the estimate of q . k, unscaled, for queries [S, G, D] and pages with fields [S, n, ...].

        What there is of pages that do not exist may be anything.
        """
        raise NotImplementedError

    def active(self, layer: int) -> bool:
        return layer >= self.dense_layers

    @property
    def same_pages(self) -> dict[str, str]:
        common = {"heads": "heads=common"} if self.heads == "common" else {}
        return common | ({"layers": f"share={self.share}"} if self.share > 1 else {})

    def reads(self, pages: int) -> int:
        """How many of `pages` pages a step reads: exact for pages and keep; all, the most, for top_p and threshold."""
        return int(self._wanted(torch.tensor(pages)))

    def _wanted(self, counts: Tensor) -> Tensor:
        """`reads` of many."""
        wanted = counts
        if self.pages is not None:
            wanted = torch.full_like(counts, self.pages)
        elif self.keep is not None:
            wanted = (counts.double() * self.keep).round().long().clamp_min(1)
        return self._bounded(wanted, counts)

    def _bounded(self, wanted: Tensor, counts: Tensor) -> Tensor:
        return wanted.clamp_min(max(self.min_pages, self.first + self.last)).minimum(counts)

    def select(
        self, queries: Tensor, summary: Mapping[str, Tensor], counts: Tensor, scale: float, heads: int = 1
    ) -> tuple[Tensor, Tensor]:
        n = next(iter(summary.values())).shape[1]
        page, held = torch.arange(n, device=counts.device), counts[:, None]
        exists = page < held  # [S, n]
        logits = (self.logits(queries, summary) * scale).masked_fill(~exists[:, None], -torch.inf)
        shares = logits.softmax(-1).nan_to_num(0).mean(1)  # [S, n]; a stream without pages gives nan
        if self.heads == "common":
            shares = _common(shares, counts, heads)
        forced = exists & ((page < self.first) | (page >= held - self.last))
        ranks = (shares + 2.0 * forced).masked_fill(~exists, -1)
        top = ranks.topk(self.reads(n), -1).indices  # the best first
        best = shares.gather(1, top)
        valid = self._wanted(counts)
        if self.top_p is not None:
            valid = self._bounded((best.cumsum(-1) < self.top_p).sum(-1) + 1, counts)
        elif self.threshold is not None:
            valid = self._bounded(((best >= self.threshold) | forced.gather(1, top)).sum(-1), counts)
        top = top[:, : max(int(valid.max()), 1)]
        surplus = torch.arange(top.shape[1], device=top.device) >= valid[:, None]
        return top.masked_fill(surplus, n).sort(-1).values.clamp_max(n - 1), valid


def _common(shares: Tensor, counts: Tensor, heads: int) -> Tensor:
    """Shares [S, n] averaged over the `heads` streams of each row that holds as many pages in all of them."""
    rows, held = shares.unflatten(0, (-1, heads)), counts.view(-1, heads)
    alike = (held == held[:, :1]).all(-1)[:, None, None]
    return torch.where(alike, rows.mean(1, keepdim=True), rows).flatten(0, 1)
