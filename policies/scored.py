"""Policies that keep the best scored tokens: a method is a score, and the budget is common to all."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import ClassVar

import torch
from torch import Tensor

from kvcomp.stages import Chunk, Held, Policy, arg

from .budgets import in_spans, keep_best, keep_best_of_heads, keep_count, pyramid, refined

LAYERS = ("uniform", "pyramid")
HEADS = ("own", "common", "adaptive")
ROUND = 512  # tokens of a prompt from which a policy chooses at least, after its first chunk
SHORT = 64  # tokens that may all stay after others of their prompt, where there is a budget: a question, say
TURN = 128  # tokens of a later turn that all stay, whatever the share: a question about what was compressed


@dataclass(frozen=True)
class ScoredPolicy(Policy):
    """Keeps the tokens of a prompt whose `scores` are best, as many as the budget allows.

    A subclass overrides `scores`, and the defaults that its method publishes. Sinks, the exact window and `newest`
    tokens are kept whatever their score, and count. Tokens generated later are kept, unless an absolute budget is to
    `hold`: then the pages that are worth least (`page_scores`) leave, young ones and the newest tokens' last, and
    between the budget and a page more is held.

    A prompt that comes in chunks is chosen from in rounds: the first chunk, then `gathers` tokens or more. Each keeps
    its share, or the part of an absolute budget that it has of the prompt so far, or all if it is short; what exceeds
    the budget leaves in whole pages. Of a share, a later turn of at most 128 tokens stays whole.
    """

    scores_within: ClassVar[tuple[float, float]] = (-1e30, 1e30)  # what `scores` are at least and at most
    layers_among: ClassVar[tuple[str, ...]] = LAYERS

    keep: float | None = arg(None, "share of the prompt to keep, protected tokens included, 0 < keep <= 1")
    budget: int | None = arg(None, "tokens to keep per KV head, alike (none of the three: keep=0.25, or as published)")
    threshold: float | None = arg(None, "keep what scores at least so much, however many; a plan counts all tokens")
    layers: str = arg("uniform", "uniform, or pyramid: the first layers keep most, at the same sum")
    heads: str = arg("own", "own choice of each KV head, a common one, or adaptive: heads share a layer's budget")
    span: int = arg(1, "neighbouring tokens that stay or leave together")
    floor: float = arg(
        0.2, "adaptive heads: the share of the budget, besides protected tokens, that each keeps at least"
    )
    beta: int = arg(20, "pyramid: the last layer keeps 1 / beta of the mean, behind the protected tokens")
    critical: bool = arg(False, "choose half by the score, then by the score times |W_o v|, as CriticalKV does")
    hold: bool = arg(False, "keep within an absolute budget while generating, too")

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = {name: getattr(self, name) for name in ("keep", "budget", "threshold")}
        given = [name for name, size in sizes.items() if size is not None]
        if not given:
            object.__setattr__(self, self.default[0], self.default[1])
        for other in given[1:]:
            self.check(False, other, f"left out where {given[0]} is given")
        self.check_share("keep")
        self.check(self.budget is None or self.budget > 0, "budget", "positive")
        self.check(self.layers in self.layers_among, "layers", " or ".join(self.layers_among))
        self.check(self.heads in HEADS, "heads", "own, common or adaptive")
        self.check(self.span > 0, "span", "positive")
        self.check(0 <= self.floor <= 1, "floor", "in [0, 1]")
        self.check(self.beta >= 1, "beta", "at least 1")
        self.check(not self.critical or self.needs_queries, "critical", "false: this score is no share of attention")
        self.check(not self.critical or self.span == 1, "span", "1 where critical is true")
        if self.threshold is not None:
            least, most = self.scores_within
            self.check(least < self.threshold <= most, "threshold", f"more than {least:g} and at most {most:g}")
            self.check(self.layers == "uniform", "layers", "uniform with a threshold, which sets no sizes")
            self.check(self.heads != "adaptive", "heads", "own or common with a threshold, which sets no sizes")
            self.check(not self.critical, "critical", "false with a threshold, which sets no sizes")

    @property
    def default(self) -> tuple[str, float]:
        """Argument and value of the budget where none is given."""
        return "keep", 0.25

    def newest(self, count: int) -> int:
        """How many of the last tokens are kept in any case, of `count` in all."""
        return 0

    def scores(self, chunk: Chunk) -> Tensor:
        """[b, Hkv, n] float: how much each token of the chunk is worth; with queries, the share of attention it gets
        of one."""
        raise NotImplementedError

    def page_scores(self, held: Held) -> Tensor:
        """float32 [S, n], from -1 to 1: what each page is worth while a budget is to hold, by default the attention
        that it received."""
        assert held.attention is not None
        return held.attention

    @property
    def uniform(self) -> bool:
        return self.threshold is None and self.layers == "uniform" and self.heads != "adaptive"

    @property
    def needs_model(self) -> bool:
        return self.critical

    def kept(self, tokens: int, sinks: int, recent: int, layer: int, layers: int) -> int:
        if self.threshold is not None:
            return tokens
        first, last = self._protected(tokens, sinks, recent)
        count = keep_count(tokens, self.keep, self.budget, first + last)
        if self.layers == "pyramid":
            rest = tokens - first - last
            count = first + last + pyramid(count - first - last, rest, self.beta, layer, layers)
        return count

    @property
    def same_tokens(self) -> tuple[str, ...]:
        return ("heads",) if self.heads == "common" and not self.critical else ()

    def gathers(self, sinks: int, recent: int) -> int:
        """As many tokens as let the protected ones be a part of the share that is kept."""
        protected = sinks + max(self.newest(1), recent)
        return ROUND if self.keep is None else max(ROUND, ceil(protected / self.keep))

    @property
    def trims(self) -> bool:
        return self.budget is not None

    def select(self, chunk: Chunk) -> Tensor:
        n = chunk.keys.shape[2]
        first, last = self._protected(n, chunk.sinks, chunk.recent)
        count = self._count(n, chunk, first + last)
        if count >= n and self.threshold is None:
            return chunk.alive
        scores = (self.scores(chunk) if chunk.scored is None else chunk.scored).float()
        if self.heads == "common":
            scores = scores.mean(1, keepdim=True).expand_as(chunk.alive)
        open_ = chunk.alive.clone()
        open_[..., :first] = open_[..., n - last :] = False
        if self.threshold is not None:
            return chunk.alive & (~open_ | (scores >= self.threshold))
        ranked = in_spans(scores.masked_fill(~open_, -float("inf")), self.span, first)
        if self.heads == "adaptive":
            kept = keep_best_of_heads(ranked, chunk.alive, count, first, last, int(self.floor * (count - first - last)))
        else:
            kept = keep_best(ranked, chunk.alive, count, first, last)
        return refined(kept, scores, output_norms(chunk), chunk.alive, first, last) if self.critical else kept

    @property
    def watches(self) -> bool:
        return self.hold and self.budget is not None

    @property
    def limit(self) -> int | None:
        return self.budget if self.watches else None

    @property
    def expires(self) -> bool:
        return self.watches

    def expired(self, held: Held) -> Tensor | None:
        """bool [S, n]: the pages with the least of `page_scores`, of streams, or rows where heads share, that exceed
        the budget of the layer; of a prompt that comes in chunks, where nothing is to `hold`, its own pages.

        A mean over few queries says little, so a page that fewer queries have seen than it has tokens is young: it
        stays as long as older pages can go, and of young pages those leave first that most queries have seen. Pages
        with tokens among the `newest` stay longest.
        """
        if held.attention is None or held.queries is None or self.budget is None:
            return None
        size, limit, over, count = held.page_size, self.budget, held.tokens, held.pages
        if self.layers == "pyramid":
            limit = self.kept(1 << 40, held.sinks, 0, held.layer, held.layers)
        page = torch.arange(held.attention.shape[1], device="cpu")
        fixed = page < 0
        if held.before is not None:
            older_pages = -(-(held.before - held.sinks).clamp_min(0) // size)
            over, count = over - held.before, (count - older_pages).clamp_min(0)
            fixed = page < older_pages[:, None]
        over = over - limit
        if self.heads == "adaptive":
            over, count = over.view(-1, held.heads).sum(-1), count.view(-1, held.heads).sum(-1)
        excess = (over.clamp_min(0) // size).minimum(count)
        if not bool(excess.any()):
            return None
        scores, queries = self.page_scores(held).cpu(), held.queries.cpu()  # only now, as that waits for a GPU
        paged = held.pages * size
        older = held.tokens - self.newest(limit) - held.sinks  # tokens of the pages that may go
        newest = (page + 1) * size > older.minimum(paged)[:, None]
        youth = 2.0 * (size - queries).clamp_min(0)  # more than any score for each query that is missing
        worth = scores + youth + 2.0 * (size + 1) * newest
        worth = worth.masked_fill(fixed | (page >= held.pages[:, None]), torch.inf)
        rows = worth.unflatten(0, (-1, held.heads))
        if self.heads == "common":
            worth = rows.mean(1, keepdim=True).expand_as(rows).flatten(0, 1)
        if self.heads == "adaptive":
            worth = rows.flatten(1)
        rank = worth.argsort(dim=-1, stable=True).argsort(-1)
        return (rank < excess[:, None]).view_as(held.attention)

    def _count(self, n: int, chunk: Chunk, protected: int) -> int:
        """How many of a chunk's n tokens to keep per head: with `before` others of its prompt, what is its part."""
        own, before, whole = (
            self.kept(tokens, chunk.sinks, chunk.recent, chunk.layer, chunk.layers)
            for tokens in (n, chunk.before, chunk.before + n)
        )
        if self.keep is not None and not chunk.before and chunk.past and n <= TURN:
            return n
        if not chunk.before or self.threshold is not None:
            return own
        if self.keep is not None:
            return min(max(whole - before, protected, 1), n)
        return own if n <= SHORT else min(own, max(round(whole * n / (chunk.before + n)), protected, 1))

    def _protected(self, tokens: int, sinks: int, recent: int) -> tuple[int, int]:
        """First and last tokens that are kept in any case."""
        first = min(tokens, sinks)
        wanted = round(self.keep * tokens) if self.keep is not None else self.budget or 0
        return first, min(max(self.newest(wanted), recent), tokens - first)


def output_norms(chunk: Chunk) -> Tensor:
    """[b, Hkv, n]: the L1 norm of W_o v, averaged over the query heads of a KV head."""
    assert chunk.model is not None
    weight = chunk.model.output().float()  # [Hq, Dv, M]
    group = len(weight) // chunk.values.shape[1]
    norms = torch.stack(
        [(chunk.values[:, h // group].float() @ w).abs().sum(-1) for h, w in enumerate(weight)], 1
    )  # a head at a time: [b, n, M] is as large as the hidden states
    means: Tensor = norms.unflatten(1, (-1, group)).mean(2)
    return means
