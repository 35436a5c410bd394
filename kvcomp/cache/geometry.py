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
    among them. written: pages read, and those that left since.
    """

    held: int
    pages: int
    gap: tuple[int, int]
    exact: int
    written: int

    def column(self, page: int) -> int:
        """The column of the block table that page number `page` of those read is in, or comes to."""
        first, last = self.gap
        return page if page < first else page + last - first


@dataclass(frozen=True)
class Extents(Geometry):
    """The geometry of requests in a model of `layers` layers, whose streams all hold the same number of tokens: what
    `policies` say of that number, in their integer methods."""

    policies: tuple[Policy, ...] = ()
    layers: int = 1

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

    def extent(self, tokens: int, prompt: int) -> Extent:
        """What a request holds of its first `tokens` tokens, `prompt` of which are its prompt.

        Until the prompt is in, everything is held.
        """
        size = self.page_size
        gone = prompt - self.kept(prompt) if tokens >= prompt else 0
        held = tokens - gone
        paged, exact = self.pages(held), self.exact(held)
        if self.newest is not None and tokens >= prompt:
            expired = min(max(tokens - self.sinks - self.newest, 0) // size, paged)
            return Extent(held, paged - expired, (0, expired), exact, paged)
        if self.limit is not None and tokens >= prompt:
            left = max(held - self.limit, 0) // size
            room = self.pages(self.limit + size)  # pages stay in these columns: those that leave make room in them
            return Extent(held, paged - left, (room, max(-(-tokens // size), room)), exact, paged)
        first = self.pages(prompt - gone)
        spare = -(-(gone + self.sinks + self.recent) // size) if gone else 0  # no token comes earlier into its column
        return Extent(held, paged, (first, first + spare), exact, paged)
