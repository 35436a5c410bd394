"""What a stack asks of an engine's blocks, in a model of so many layers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from kvcomp.errors import UnsupportedError
from kvcomp.stages import PageShape, Policy
from kvcomp.stages.plan import RECEIVED, LayerPlan, exact_dtype
from kvcomp.stages.stack import Stack, StackLike

from ..geometry import Extents

HOST = torch.device("cpu")


@dataclass(frozen=True)
class Setup:
    """A stack in an engine of `layers` layers, with heads of `dim` channels in `dtype`.

    Where every field of a page has a row per token, and nothing is asked of the newest tokens, a token is written into
    its page at once: `by_token`. Otherwise each request has a window in full precision (sinks, recent tokens, a page
    that is not full yet and `drafts` that may be rejected), out of which whole pages are encoded.

    caching: whether requests may begin with blocks of others that have the same first tokens, see `Extents`. hybrid:
    whether layers of the model have sliding windows. sliding: how many tokens a query sees, its own among them, of the
    layers that this is about: the quantizer alone packs them; None: all tokens.
    """

    stack: Stack
    layers: int
    dim: int
    dtype: torch.dtype
    drafts: int = 0
    caching: bool = False
    hybrid: bool = False
    sliding: int | None = None

    if TYPE_CHECKING:

        def __init__(
            self,
            stack: StackLike,
            layers: int,
            dim: int,
            dtype: torch.dtype,
            drafts: int = 0,
            caching: bool = False,
            hybrid: bool = False,
            sliding: int | None = None,
        ) -> None: ...

    def __post_init__(self) -> None:
        object.__setattr__(self, "stack", Stack.parse(self.stack))

    def within(self, tokens: int | None) -> Setup:
        """The setup of layers whose queries see so many tokens; None: all."""
        return self if tokens is None else replace(self, sliding=tokens)

    @cached_property
    def geometry(self) -> Extents:
        """Counts of tokens and pages of a request."""
        window = self.stack.window
        if self.sliding is not None:
            return Extents(self.page_size, 0, window.recent, self.drafts, layers=self.layers)
        sizes = self.page_size, window.sinks, window.recent, self.drafts
        columns = -(-window.sinks // self.sinks_of_record) if self.caching and window.sinks else None
        policies = self.stack.policies
        # Blocks of sliding layers end where tokens do, and those of other layers where the sinks have them.
        caching = self.caching and not self.hybrid
        return Extents(*sizes, policies=policies, layers=self.layers, caching=caching, sink_columns=columns)

    @cached_property
    def sinks_of_record(self) -> int:
        """Exact tokens for which a record has space: K and V of its head."""
        return max(self._page_bytes(1) // (2 * self.dim * self.exact_dtype.itemsize), 1)

    @property
    def exact_dtype(self) -> torch.dtype:
        """Of the tokens in sinks and window: the model's, or float16 where that has more bits than are asked for."""
        return exact_dtype(self.stack.window.bits, self.dtype)

    @property
    def page_size(self) -> int:
        """Tokens of a block: the stack's page."""
        return self.stack.page_size

    @property
    def policy(self) -> Policy | None:
        """What chooses, once a prompt is in, which of its tokens stay; None: nothing does."""
        return self.geometry.policy

    @property
    def voters(self) -> int:
        """Of how many of a prompt's last tokens the policy needs the queries."""
        return 0 if self.policy is None else self.policy.voters or 0

    @property
    def sums(self) -> bool:
        """Whether scores of a prompt that is cut are added up over its parts."""
        return self.policy is not None and self.policy.voters is None

    @cached_property
    def by_token(self) -> bool:
        """Whether a token can be written into its page by itself."""
        window = self.stack.window
        asks = window.recent or (self.sliding is None and (window.sinks or self.stack.selector or self.stack.policies))
        return not asks and self.plan(0).layout(self.shape(1, 0)).tokenwise

    @property
    def slots(self) -> int:
        """Tokens that the window of a request can hold; 0 where it needs none."""
        return 0 if self.by_token else self.geometry.slots

    def plan(self, layer: int) -> LayerPlan:
        """The stages of one layer.

        Raises:
            UnsupportedError: queries see fewer tokens than those that are exact and a page.
        """
        if self.sliding is None:
            return self.stack.plan(layer, self.layers)
        window, size = self.stack.window, self.page_size
        if window.recent + size > self.sliding:
            most = self.sliding - size
            way = "serve this model without a stack" if most < 0 else f"set window(recent=...) to {most} at most"
            raise UnsupportedError(
                f"{self.stack}: queries of a layer see {self.sliding} tokens, fewer than {window.recent} recent ones "
                f"and a page of {size}: {way}"
            )
        exact = 0, window.recent, size, layer, self.layers
        return LayerPlan(self.stack.quantizer, (), None, *exact, sliding=self.sliding, exact_bits=window.bits)

    def shape(self, heads: int, layer: int) -> PageShape:
        """What the codec of a layer is made for, where `heads` KV heads of it are on this rank; on the host: `Pages`
        has it on the device of the pool."""
        return PageShape(self.page_size, self.dim, self.dim, heads, self.dtype, HOST, layer)

    @property
    def tail_bytes(self) -> int:
        """Bytes at the end of a cell for a float32 per token, where `sums`, and then the attention that a page received
        and of how many queries, where pages leave."""
        scores = self.page_size * torch.float32.itemsize if self.sums else 0
        return max(scores, 0 if self.geometry.limit is None else RECEIVED)

    def record_bytes(self, heads: int) -> int:
        """Bytes of a (block, head) cell: the largest page of any layer and a tail, filled up to a whole number a
        token. The same for layers with sliding windows: all blocks are of one size."""
        if self.sliding is not None:
            return replace(self, sliding=None).record_bytes(heads)
        most = self._page_bytes(heads) + self.tail_bytes
        return -(-most // self.page_size) * self.page_size

    def _page_bytes(self, heads: int) -> int:
        layouts = (self.plan(i).layout(self.shape(heads, i)) for i in range(self.layers))
        return max(layout.bytes_per_page for layout in layouts)
