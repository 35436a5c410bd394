"""What an engine's config asks of kvcomp, and what of it cannot be done: told before any memory is taken."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import torch

from kvcomp.errors import SpecError, UnsupportedError
from kvcomp.plan import RECEIVED, LayerPlan
from kvcomp.policies.scored import ScoredPolicy
from kvcomp.policies.streaming import Streaming
from kvcomp.stack import Stack
from kvcomp.stages import PageShape, Policy

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
        setup._check_stages(config)
        setup._check_engine(config)
        return setup

    def _check_engine(self, config: VllmConfig) -> None:
        parallel, cache = config.parallel_config, config.cache_config
        if cache.cache_dtype not in ("auto", "bfloat16", "float16"):
            raise UnsupportedError(
                f"{self.stack}: --kv-cache-dtype {cache.cache_dtype} would quantize what the stack quantizes: leave "
                "it out"
            )
        if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
            raise UnsupportedError(f"{self.stack}: context parallelism splits a request's pages: leave it out")
        if cache.enable_prefix_caching and self.policy is not None:
            raise UnsupportedError(
                f"{self.stack}: {self.policy.name} rewrites the pages of a prompt, which others then cannot share: "
                "serve with --no-enable-prefix-caching"
            )
        if cache.enable_prefix_caching and self.stack_window:
            raise UnsupportedError(
                f"{self.stack} keeps {self.stack_window} in full precision per request, which a prefix found in the "
                "cache would lack: serve with --no-enable-prefix-caching, or add window(sinks=0, recent=0)"
                + (", or leave out streaming" if self.streaming else "")
            )
        if config.kv_transfer_config is not None and self.slots:
            raise UnsupportedError(
                f"{self.stack} keeps tokens of each request in a window of its own, and a KV connector moves pages "
                "alone: leave out --kv-transfer-config, or use a stack that writes token by token, such as int(bits=4) "
                "or turboquant(bits=4)"
            )
        # A block size that nobody asked for is final only once the platform has had its say.
        if cache.user_specified_block_size and cache.block_size % self.page_size:
            raise UnsupportedError(
                f"{self.stack}: --block-size {cache.block_size} is no multiple of the stack's pages of "
                f"{self.page_size} tokens: use --block-size {self.page_size}"
            )

    def _check_stages(self, config: VllmConfig) -> None:
        stack, quantizer = self.stack, self.stack.quantizer
        for policy in stack.policies:
            self._check_policy(policy, config.parallel_config.tensor_parallel_size)
        shape = self.shape(1, 0)
        if quantizer.needs_queries or quantizer.adapted_bytes(shape):
            raise UnsupportedError(
                f"{quantizer.name} fits itself to each request, which has no place in vLLM's blocks: give it a "
                "calibration file where it takes one, or use int, kivi or turboquant"
            )
        selector = stack.selector
        if selector is not None and (selector.needs_queries or any(selector.index_bytes(shape))):
            raise UnsupportedError(
                f"{selector.name} fits itself to each request, which has no place in vLLM's blocks: use quest or moba"
            )
        if config.parallel_config.tensor_parallel_size > 1 and getattr(quantizer, "calibration", None) is not None:
            raise UnsupportedError(
                f"{quantizer.name}: a calibration knows all heads, and a rank has some: use one rank"
            )

    def _check_policy(self, policy: Policy, ranks: int) -> None:
        if policy.prefill_chunk is not None:
            raise UnsupportedError(
                f"{policy.name}(chunk={policy.prefill_chunk}): vLLM decides how prompts are cut "
                "(--max-num-batched-tokens): leave chunk out"
            )
        if isinstance(policy, Streaming):
            return
        once = "use snapkv or another policy that chooses once, when the prompt is in"
        why = None
        if not isinstance(policy, ScoredPolicy) or policy.needs_model:
            why = f"needs the model beside queries, keys and values, which vLLM's attention does not see: {once}"
        elif not policy.uniform:
            why = (
                "keeps other numbers of tokens in each layer or head, and a block of vLLM serves all of them alike: "
                "use snapkv or another policy with equal budgets"
            )
        elif policy.voters is None and not policy.averages:
            why = f"scores with all queries of the prompt, and vLLM may cut it: {once}"
        elif policy.watches and self.drafts:
            why = (
                "lets pages go while generating, which a rejected draft cannot take back: set hold=false, or leave out "
                "--speculative-config"
            )
        elif len(self.stack.policies) > 1:
            why = "has to be the only policy of the stack in vLLM: leave out the others"
        elif ranks > 1 and "heads" in policy.same_tokens:
            why = "keeps the same tokens in all heads, and a rank knows its own alone: set heads=own, or use one rank"
        if why is not None:
            raise UnsupportedError(f"{policy.name} {why}")

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
