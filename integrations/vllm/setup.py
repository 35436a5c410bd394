"""What an engine's config asks of kvcomp, and what of it cannot be done: told before any memory is taken."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import torch

from kvcomp.errors import SpecError, UnsupportedError
from kvcomp.policies.scored import ScoredPolicy
from kvcomp.policies.streaming import Streaming
from kvcomp.stages import PageShape
from kvcomp.stages.plan import RECEIVED, LayerPlan
from kvcomp.stages.stack import Stack

from .checks import check_engine, check_stages
from .plugin import VARIABLE

if TYPE_CHECKING:
    from vllm.config import VllmConfig

OPTION = "kvcomp"
HOST = torch.device("cpu")


def stack_of(config: VllmConfig) -> Stack | None:
    """The stack of `--additional-config '{"kvcomp": {"stack": ...}}'`, or of KVCOMP_STACK; None where neither is."""
    given = config.additional_config
    options = given.get(OPTION) if isinstance(given, dict) else None
    if options is not None and (not isinstance(options, dict) or set(options) != {"stack"}):
        raise SpecError(f'additional_config["{OPTION}"]={options!r}: expected {{"stack": "kivi(bits=2)"}}')
    spec = options["stack"] if options is not None else os.environ.get(VARIABLE)
    return Stack.parse(spec) if spec else None


class Extent(NamedTuple):
    """What a request holds, and where.

    held: how many tokens pages and window are laid out for. pages: how many are read; gap: the columns (from, to) of
    the block table between, before or behind them, whose blocks are free. exact: tokens in the window alone, sinks
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
class Setup:
    """A stack in an engine of `layers` layers, with heads of `dim` channels in `dtype`.

    Where every field of a page has a row per token, and nothing is asked of the newest tokens, a token is written into
    its page at once: `by_token`. Otherwise each request has a window in full precision (sinks, recent tokens, a page
    that is not full yet and `drafts` that may be rejected), out of which whole pages are encoded.
    """

    stack: Stack
    layers: int
    dim: int
    dtype: torch.dtype
    drafts: int

    @classmethod
    def of(cls, config: VllmConfig) -> Setup:
        """What `config` asks for.

        Raises:
            SpecError, UnsupportedError: what cannot be done, and what to change.
        """
        stack = stack_of(config)
        assert stack is not None
        model, speculative = config.model_config, config.speculative_config
        drafts = 0 if speculative is None else speculative.num_speculative_tokens or 0
        if model.use_mla:
            raise UnsupportedError(
                f"{stack}: the model's attention is latent (MLA), its cache has no KV heads to compress: serve it "
                "without a stack"
            )
        setup = cls(stack, model.get_total_num_hidden_layers(), model.get_head_size(), model.dtype, drafts)
        check_stages(setup, config.parallel_config.tensor_parallel_size)
        check_engine(setup, config)
        return setup

    # -- what follows from the stack ------------------------------------------------------------------------------

    @property
    def page_size(self) -> int:
        return self.stack.page_size

    @property
    def sinks(self) -> int:
        return self.stack.window.sinks

    @property
    def recent(self) -> int:
        return self.stack.window.recent

    @property
    def stack_window(self) -> str:
        """The exact tokens that the stack asks for, in words; empty where it asks for none."""
        parts = [f"{n} {what}" for n, what in ((self.sinks, "sinks"), (self.recent, "recent tokens")) if n]
        return " and ".join(parts)

    @property
    def streaming(self) -> int | None:
        """How many recent tokens stay; None: all do."""
        kept = [p.recent for p in self.stack.policies if isinstance(p, Streaming)]
        return min(kept) if kept else None

    @property
    def policy(self) -> ScoredPolicy | None:
        """What chooses, once a prompt is in, which of its tokens stay; None: nothing does."""
        return next((p for p in self.stack.policies if isinstance(p, ScoredPolicy)), None)

    @property
    def voters(self) -> int:
        """Of how many of a prompt's last tokens the policy needs the queries."""
        return 0 if self.policy is None else self.policy.voters or 0

    @property
    def sums(self) -> bool:
        """Whether scores of a prompt that is cut are added up over its parts."""
        return self.policy is not None and self.policy.voters is None

    def kept(self, prompt: int) -> int:
        """How many tokens of a prompt each head of each layer keeps, once it is in."""
        return prompt if self.policy is None else self.policy.kept(prompt, self.sinks, self.recent, 0, self.layers)

    @property
    def most(self) -> int | None:
        """Tokens that a request holds behind its prompt, a page more at times: what is over leaves in whole pages.
        None: nothing leaves then."""
        if self.policy is None or self.policy.budget is None or not self.policy.watches:
            return None
        return max(self.policy.budget, self.sinks + self.recent)

    def turns(self, past: int, end: int, prompt: int) -> list[int]:
        """Numbers of tokens between `past` and `end` at which another step has to begin, for a request to be treated
        as if it had come token by token: at the end of its prompt, of which some goes, or what leaves later begins to
        be watched; and behind that where a page is written or leaves."""
        turns = []
        most, kept = self.most, self.kept(prompt)
        if past < prompt < end and (kept < prompt or most is not None):
            turns.append(prompt)
        if most is not None:
            phases = {(n + prompt - kept) % self.page_size for n in (self.sinks + self.recent, most)}
            turns += [t for t in range(max(past, prompt) + 1, end) if t % self.page_size in phases]
        return turns

    @cached_property
    def by_token(self) -> bool:
        """Whether a token can be written into its page by itself."""
        asks = self.sinks or self.recent or self.stack.selector or self.stack.policies
        return not asks and self.plan(0).layout(self.shape(1, 0)).tokenwise

    @property
    def ring(self) -> int:
        """Slots of a request's window behind its sinks."""
        return self.recent + self.page_size + self.drafts

    @property
    def slots(self) -> int:
        """Tokens that the window of a request has room for; 0 where it needs none."""
        return 0 if self.by_token else self.sinks + self.ring

    def paged(self, tokens: int) -> int:
        """How many pages of a request's first `tokens` tokens are encoded."""
        return max(tokens - self.sinks - self.recent, 0) // self.page_size

    def extent(self, tokens: int, prompt: int) -> Extent:
        """What a request holds of its first `tokens` tokens, `prompt` of which are its prompt.

        Follows from these numbers alone: the workers know what vLLM's manager frees without being told. Until the
        prompt is in, everything is held.
        """
        size = self.page_size
        gone = prompt - self.kept(prompt) if tokens >= prompt else 0
        held = tokens - gone
        paged = self.paged(held)
        exact = held - paged * size
        if self.streaming is not None and tokens >= prompt:
            expired = min(max(tokens - self.sinks - self.streaming, 0) // size, paged)
            return Extent(held, paged - expired, (0, expired), exact, paged)
        if self.most is not None and tokens >= prompt:
            left = max(held - self.most, 0) // size
            room = self.paged(self.most + size)  # pages stay in these columns: those that leave make room in them
            return Extent(held, paged - left, (room, max(-(-tokens // size), room)), exact, paged)
        first = self.paged(prompt - gone)
        spare = -(-(gone + self.sinks + self.recent) // size) if gone else 0  # no token comes earlier into its column
        return Extent(held, paged, (first, first + spare), exact, paged)

    def plan(self, layer: int) -> LayerPlan:
        return self.stack.plan(layer, self.layers)

    def shape(self, heads: int, layer: int) -> PageShape:
        """What the codec of a layer is made for, where `heads` KV heads of it are on this rank; on the host: `Pages`
        has it on the device of the pool."""
        return PageShape(self.page_size, self.dim, self.dim, heads, self.dtype, HOST, layer)

    @property
    def tail_bytes(self) -> int:
        """Bytes at the end of a cell for a float32 per token, where `sums`, and then the attention that a page received
        and of how many queries, where pages leave."""
        scores = self.page_size * torch.float32.itemsize if self.sums else 0
        return max(scores, 0 if self.most is None else RECEIVED)

    def record_bytes(self, heads: int) -> int:
        """Bytes of a (block, head) cell: the largest page of any layer and a tail, filled up to a whole number a
        token."""
        layouts = (self.plan(i).layout(self.shape(heads, i)) for i in range(self.layers))
        most = max(layout.bytes_per_page for layout in layouts) + self.tail_bytes
        return -(-most // self.page_size) * self.page_size
