"""Selectors that rank what they may read by the attention it promises: a method is a summary, the rules are common."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kvcomp.kernels.select import by_unit, choose, forced, largest, shares
from kvcomp.stages import Choice, Selector, Summaries, arg

RULES = ("pages", "tokens", "keep", "top_p", "threshold")
HEADS = ("own", "common")


@dataclass(frozen=True)
class RankedSelector(Selector):
    """A decode query reads what its rule takes, by the share of attention that summaries promise.

    The share of a page, or of a token, is softmax(scale * logits) over those of its stream, averaged over the query
    heads of the KV head. A subclass overrides `summary_fields`, `summarize` and `logits`, and the defaults that its
    method publishes. The `first` and `last` pages are read in any case and count; sinks and the exact window are read
    besides. Queries that come in chunks (prefill, verification) read every page.

    With heads=common the KV heads of a row choose by the mean of their shares; a row whose heads hold different numbers
    of pages falls back to own choices, as there no page is the same tokens in all heads. With `share` a layer's choice
    serves the next ones, too (CLSA, arXiv 2606.06467): those store no summaries and scan none, and read all of their
    pages should they hold other numbers of them. Both need pages that hold the same tokens, so policies that choose
    by head or layer are refused.
    """

    pages: int | None = arg(None, "pages that a query reads (none of the five: as published)")
    tokens: int | None = arg(None, "tokens that a query reads, in full pages")
    keep: float | None = arg(None, "share of the pages that a query reads, at least one, 0 < keep <= 1")
    top_p: float | None = arg(None, "as few as reach this share of the attention; a plan counts all pages")
    threshold: float | None = arg(None, "those of at least this share of the attention; a plan counts all pages")
    heads: str = arg("own", "own choice of each KV head, or a common one")
    first: int = arg(0, "oldest pages, read in any case")
    last: int = arg(0, "newest pages, read in any case")
    min_pages: int = arg(0, "pages read at least")
    dense_layers: int = arg(0, "first layers that read everything")
    share: int = arg(1, "layers in a row that read what the first of them chooses")

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [name for name in RULES if getattr(self, name) is not None]
        if not given:
            object.__setattr__(self, self.default[0], self.default[1])
        for other in given[1:]:
            self.check(False, other, f"left out where {given[0]} is given")
        for name in ("pages", "tokens"):
            value = getattr(self, name)
            self.check(value is None or value > 0, name, "positive")
        for name in ("keep", "top_p", "threshold"):
            self.check_share(name)
        self.check(self.heads in HEADS, "heads", " or ".join(HEADS))
        for name in ("first", "last", "min_pages", "dense_layers"):
            self.check(getattr(self, name) >= 0, name, "zero or positive")
        self.check(self.share > 0, "share", "positive")

    @property
    def default(self) -> tuple[str, float]:
        """Argument and value of the rule where none is given."""
        raise NotImplementedError

    def logits(self, queries: Tensor, summary: Mapping[str, Tensor]) -> Tensor:
        """[S, G, n * u] float32: estimates of q . k, unscaled, for queries [S, G, D] and pages with fields [S, n, ...]:
        u in a row for each page, such as one for each of its tokens.

        What there is of pages that do not exist may be anything.
        """
        raise NotImplementedError

    def active(self, layer: int) -> bool:
        return layer >= self.dense_layers

    @property
    def same_pages(self) -> dict[str, str]:
        common = {"heads": "heads=common"} if self.heads == "common" else {}
        return common | ({"layers": f"share={self.share}"} if self.share > 1 else {})

    def reads(self, pages: int, page_size: int) -> int:
        """How many of `pages` pages a step reads, or as many tokens: exact for pages, tokens and keep; all, the most,
        for top_p and threshold."""
        wanted = pages
        if self.pages is not None:
            wanted = self.pages
        elif self.tokens is not None:
            wanted = -(-self.tokens // page_size)
        elif self.keep is not None:
            wanted = max(round(pages * self.keep), 1)
        return min(max(wanted, self._least), pages)

    @property
    def _least(self) -> int:
        """Pages that are read in any case."""
        return max(self.min_pages, self.first + self.last)

    def _reads(self, held: Summaries, most: int, unit: int) -> Tensor:
        """int64 [S]: `reads` of the pages held, of which `most` is the largest, in units; nothing waits for a GPU."""
        counts = held.counts
        known = counts if counts.is_cpu else held.held
        if known is not None:  # each operation on a tensor costs more than all of this
            each = [unit * self.reads(count, held.page_size) for count in known.tolist()]
            return torch.tensor(each, dtype=torch.int64, device="cpu").to(counts.device, non_blocking=True)
        if self.keep is None:
            return unit * counts.long().clamp_max(most)
        return unit * self._bounded((counts.double() * self.keep).round().long().clamp_min(1), counts)

    def _bounded(self, wanted: Tensor, counts: Tensor) -> Tensor:
        return wanted.clamp_min(self._least).minimum(counts.long())

    def select(self, queries: Tensor, scale: float, held: Summaries) -> Choice:
        return self.best(self.logits(queries, held.fields), scale, held)

    def best(self, logits: Tensor, scale: float, held: Summaries) -> Choice:
        """What the rule takes by estimates of logits [S, G, n * u], to be multiplied with scale."""
        pages, counts, ends = held.pages, held.counts, (self.first, self.last)
        unit = held.page_size if held.by_tokens else 1  # how many of what is chosen a page holds
        most = max(self.reads(pages, held.page_size), 1)
        if self.top_p is None and self.threshold is None and self.heads == "own":
            valid = self._reads(held, most, unit)
            return Choice(choose(logits, scale, counts, unit, valid, unit * most, pages, ends), valid)
        each = logits.shape[-1] // pages
        share = by_unit(shares(logits * scale, counts * each), pages, unit)  # [S, n * unit]
        if self.heads == "common":
            share = _common(share, counts, held.heads)
        ranks = forced(share, counts, unit, ends)
        if self.top_p is not None:
            ordered = share.gather(1, ranks.sort(-1, descending=True).indices)
            enough = (ordered.cumsum(-1) < self.top_p).sum(-1) + 1
        elif self.threshold is not None:
            enough = ((share >= self.threshold) | (ranks >= 2)).sum(-1)  # what does not exist has no share
        else:
            valid = self._reads(held, most, unit)
            return Choice(largest(ranks, valid, unit * most), valid)
        valid = unit * self._bounded((enough + unit - 1) // unit, counts)
        width = max(int(valid.max()), unit) if valid.is_cpu else unit * pages  # to read it would wait for a GPU
        return Choice(largest(ranks, valid, width), valid)


def _common(share: Tensor, counts: Tensor, heads: int) -> Tensor:
    """Shares [S, n] averaged over the `heads` streams of each row that holds as many pages in all of them."""
    rows, held = share.unflatten(0, (-1, heads)), counts.view(-1, heads)
    alike = (held == held[:, :1]).all(-1)[:, None, None]
    return torch.where(alike, rows.mean(1, keepdim=True), rows).flatten(0, 1)
