"""What a request holds of its tokens where policies evict, by counting: an engine's manager and its workers, which do
not talk to each other about it, agree on these numbers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from kvcomp.geometry import Geometry
from kvcomp.stages import Policy


class Extent(NamedTuple):
    """What a request holds, and where.

    held: how many tokens pages and window are laid out for. pages: how many are read; gap: the columns (from, to) of
    the block table between, before or after them, whose blocks are free. exact: tokens in the window alone, sinks
    among them. written: pages read, those that left since, and those `ahead`, which are written while their tokens
    are still read from the window.
    """

    held: int
    pages: int
    gap: tuple[int, int]
    exact: int
    written: int
    ahead: int = 0

    def column(self, page: int) -> int:
        """The column of the block table that page number `page` of those read is in, or comes to."""
        first, last = self.gap
        return page if page < first else page + last - first


@dataclass(frozen=True)
class Extents(Geometry):
    """The geometry of requests in a model of `layers` layers, whose streams all hold the same number of tokens: what
    `policies` say of that number, in their integer methods.

    caching: whether the engine lets requests begin with blocks of others that have the same first tokens. What is in a
    block must follow from these tokens alone, so that
    - a page is written as soon as it is full, although its tokens may still be in the window;
    - pages lie `shift` columns later in the block table: page i holds tokens from sinks + i * page_size on, all of them
      known when the block of column i + shift is full. The first `shift` columns hold the sinks;
    - what a policy chooses of a prompt goes to columns after those of the prompt, which stay as they are.
    """

    policies: tuple[Policy, ...] = ()
    layers: int = 1
    caching: bool = False
    sink_columns: int | None = None

    @cached_property
    def newest(self) -> int | None:
        """How many of the newest tokens stay, where policies drop all older ones; None: none does."""
        return min((p.keeps_newest for p in self.policies if p.keeps_newest is not None), default=None)

    @cached_property
    def policy(self) -> Policy | None:
        """What chooses, once a prompt is in, which of its tokens stay; None: nothing does."""
        return next((p for p in self.policies if p.keeps_newest is None), None)

    @cached_property
    def limit(self) -> int | None:
        """Tokens that a request holds after its prompt, a page more at times: what is over leaves in whole pages.
        None: nothing leaves then."""
        if self.policy is None or self.policy.limit is None:
            return None
        return max(self.policy.limit, self.sinks + self.recent)

    @cached_property
    def shared(self) -> bool:
        """Whether requests begin with blocks of others. They cannot where a policy scores tokens with all queries of a
        prompt, or evicts pages while generating: the blocks of a prompt hold what came of it then."""
        return self.caching and self.limit is None and (self.policy is None or self.policy.voters is not None)

    @property
    def shift(self) -> int:
        """Columns of the block table before that of the first page of a prompt; they hold the sinks."""
        if not self.shared or not self.sinks:
            return 0
        return max(-(-self.sinks // self.page_size), self.sink_columns or 0)

    def found(self, columns: int, each: int) -> tuple[int, int]:
        """Of the first `columns` columns of another request, in blocks of `each`, those that a request begins with, and
        the number of tokens in them. It computes the next ones again, as many as are to be exact."""
        held = (columns - -(-self.recent // self.page_size)) // each * each
        pages = held - self.shift
        return (held, self.sinks + pages * self.page_size) if pages > 0 else (0, 0)

    def chosen(self, tokens: int, prompt: int) -> bool:
        """Whether a policy has chosen a part of a prompt, once a request has so many tokens."""
        return tokens >= prompt and self.kept(prompt) < prompt

    def columns(self, tokens: int, prompt: int) -> int:
        """Columns of the block table that a request of so many tokens has written to."""
        size = self.page_size
        if not self.shared or not self.chosen(tokens, prompt):
            return -(-tokens // size)
        return -(-prompt // size) + self.extent(tokens, prompt).written

    def kept(self, prompt: int) -> int:
        """How many tokens of a prompt each head of each layer keeps, once it is in."""
        return prompt if self.policy is None else self.policy.kept(prompt, self.sinks, self.recent, 0, self.layers)

    def split_points(self, past: int, end: int, prompt: int) -> list[int]:
        """Numbers of tokens between `past` and `end` at which another step has to begin, for a request to be treated
        as if it had come token by token: at the end of its prompt, of which some goes, or what leaves later begins to
        be watched; and after that where a page is written or leaves."""
        points = []
        limit, kept = self.limit, self.kept(prompt)
        if past < prompt < end and (kept < prompt or limit is not None):
            points.append(prompt)
        if limit is not None:
            phases = {(n + prompt - kept) % self.page_size for n in (self.sinks + self.recent, limit)}
            points += [t for t in range(max(past, prompt) + 1, end) if t % self.page_size in phases]
        return points

    def extent(self, tokens: int, prompt: int, found: int = 0) -> Extent:
        """What a request holds of its first `tokens` tokens, `prompt` of which are its prompt, and `found` of which it
        found in blocks of others: none of those is in its window, but for the sinks.

        Until the prompt is in, everything is held.
        """
        size = self.page_size
        gone = prompt - self.kept(prompt) if tokens >= prompt else 0
        held = tokens - gone
        paged = self.pages(held)
        ahead = 0
        if self.shared and not gone:
            paged = max(paged, (found - self.sinks) // size)
            ahead = max((held - self.sinks) // size, paged) - paged
        exact = held - paged * size
        if self.newest is not None and tokens >= prompt:
            expired = min(max(tokens - self.sinks - self.newest, 0) // size, paged)
            return Extent(held, paged - expired, (0, expired + self.shift), exact, paged + ahead, ahead)
        if self.limit is not None and tokens >= prompt:
            left = max(held - self.limit, 0) // size
            room = self.pages(self.limit + size)  # pages stay in these columns: those that leave make room in them
            return Extent(held, paged - left, (room, max(-(-tokens // size), room)), exact, paged)
        if self.shared:
            return Extent(held, paged, (0, -(-prompt // size) if gone else self.shift), exact, paged + ahead, ahead)
        first = self.pages(prompt - gone)
        spare = -(-(gone + self.sinks + self.recent) // size) if gone else 0  # no token comes earlier into its column
        return Extent(held, paged, (first, first + spare), exact, paged)
