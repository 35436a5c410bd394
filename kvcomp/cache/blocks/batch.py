"""Parts of a step's batch: groups of requests, pages that become full, and what stays or leaves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class Run(NamedTuple):
    """Tokens `past` to `end` of a request (a row of the batch), which lie in the batch from row `start` on; it found
    its first `found` tokens in blocks of others."""

    request: int
    start: int
    past: int
    end: int
    prompt: int
    found: int = 0


@dataclass(frozen=True)
class Group:
    """R requests that bring n new tokens each.

    requests int64 [R]: their rows in the batch. tokens int64 [R, n]: their rows in the step's queries, keys, values;
    rows: the same, where they follow one another.
    pages int32 [R * H, m] and counts int64 [R * H]: records of the pool that each KV head reads, oldest first; counts
    of tokens, the last page filled in part, where tokens are written singly.
    exact int64 [R * H]: exact tokens, sinks and those newer than the pages; held: of each request, on the host.
    slots int64 [R, longest + 1]: slots of the window that hold the exact tokens, and one more.
    skipped int64 [R * H]: tokens at the start of the first page that the first new token does not see, where the layer
    has a sliding window; None: it sees all.
    generating bool [R * H]: whether the prompt was in before the step: only then what pages receive is watched.
    """

    requests: Tensor
    tokens: Tensor
    pages: Tensor
    counts: Tensor
    exact: Tensor
    slots: Tensor
    generating: Tensor
    held: list[int]
    rows: slice | None
    skipped: Tensor | None = None

    @property
    def new(self) -> int:
        return self.tokens.shape[1]

    def of(self, x: Tensor) -> Tensor:
        """Of x [T, ...] what these requests bring: [R, n, ...]."""
        return x[self.tokens] if self.rows is None else x[self.rows].unflatten(0, self.tokens.shape)

    def put(self, x: Tensor, new: Tensor) -> None:
        """Write new [R, n, ...] into x [T, ...]."""
        if self.rows is None:
            x[self.tokens] = new.to(x.dtype)
        else:
            x[self.rows] = new.flatten(0, 1)

    @property
    def longest(self) -> int:
        """The most exact tokens of a request."""
        return self.slots.shape[1] - 1

    @property
    def past(self) -> bool:
        """Whether any of the requests has tokens before these."""
        return self.longest + self.pages.shape[1] > 0


@dataclass(frozen=True)
class Fill:
    """Pages that a request's new tokens make full.

    group: the request's, as an index; row: its place there. old: exact tokens that it has and that are in no such page:
    sinks, and those of pages written ahead; new_sinks: new tokens that become sinks. pages int64 [H, m]: the records to
    write.
    """

    group: int
    row: int
    old: int
    new_sinks: int
    pages: Tensor


@dataclass(frozen=True)
class Sinks:
    """The sinks of a request, which are complete with its new tokens and which others may need, or which it found.

    group, row: as in `Fill`. request: its row in the batch. records int64 [H, m]: those that hold the sinks. slots
    int64 [w]: theirs in the window.
    """

    group: int
    row: int
    request: int
    records: Tensor
    slots: Tensor


@dataclass(frozen=True)
class Prompt:
    """Tokens of a prompt, of which the policy is to keep a part.

    group, row: as in `Fill`. past: how many tokens came before. old int64 [H, m]: records that hold its first tokens
    after the sinks. cells int64 [H, c]: records of all columns that its tokens, the new ones too, fall into: their
    tails have a place for a score of each, where scores are summed.
    """

    group: int
    row: int
    past: int
    old: Tensor
    cells: Tensor


@dataclass(frozen=True)
class Keep:
    """A prompt that is in with the new tokens, and what stays of it.

    request: its row in the batch. pages int64 [H, m']: records that what is kept goes to, as far as it fills whole
    pages. slots int64 [w]: slots of the window that the rest goes to, sinks first. voters: how many of the last queries
    came in steps before.
    """

    prompt: Prompt
    request: int
    pages: Tensor
    slots: Tensor
    voters: int


@dataclass(frozen=True)
class Leave:
    """Pages that leave: `count` of the records pages int64 [H, n], oldest first, of a request that has `tokens` tokens.
    Afterwards the first n - count records hold the others."""

    pages: Tensor
    tokens: int
    count: int
