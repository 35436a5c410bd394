"""Where the tokens of a stream lie: counts and slots, integers only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

Count = TypeVar("Count", int, Tensor)


@dataclass(frozen=True)
class Geometry:
    """How the tokens of a stream, numbered from 0, are laid out: the first `sinks`, full pages of `page_size` tokens,
    and a window of the `recent` newest tokens and those of a page that is not full yet.

    Sinks and window are exact, and have `slots` slots. Attention does not depend on the order of tokens, so the window
    is a ring: a token stays in its slot until a page is made of it, and then the slot is free. `drafts` is the number
    of newest tokens that may be rejected: pages are counted with them, and the ring still holds what was before them.
    """

    page_size: int
    sinks: int
    recent: int
    drafts: int = 0

    @property
    def ring(self) -> int:
        """Slots of the window."""
        return self.recent + self.page_size + self.drafts

    @property
    def slots(self) -> int:
        """Slots of sinks and window: more than the exact tokens that a stream ever holds between two steps."""
        return self.sinks + self.ring

    def slot(self, token: Count) -> Count:
        """The slot of a token, by its number: int, or int64 of any shape, elementwise."""
        behind = token - self.sinks
        if isinstance(token, Tensor):
            return torch.where(token < self.sinks, token, self.sinks + behind % self.ring)
        return token if behind < 0 else self.sinks + behind % self.ring

    def pages(self, tokens: int) -> int:
        """Full pages of a stream of `tokens` tokens."""
        return max(tokens - self.sinks - self.recent, 0) // self.page_size

    def exact(self, tokens: int) -> int:
        """Tokens in sinks and window of a stream of `tokens` tokens."""
        return tokens - self.pages(tokens) * self.page_size

    def due(self, before: int, after: int) -> range:
        """The tokens that become pages when a stream of `before` tokens gets as many as `after`: whole pages, oldest
        first."""
        first, last = (self.sinks + self.pages(n) * self.page_size for n in (before, after))
        return range(first, max(first, last))
