"""What vLLM's memory manager has to know: blocks of a request's exact window, those that requests share, and those that
a request frees.

Importing this module registers the specs and their managers, in every process.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import CircularBufferManager, FullAttentionManager
from vllm.v1.kv_cache_interface import AttentionSpec, CircularBufferSpec, FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry, register_kv_cache_spec

from kvcomp.cache.blocks.setup import Setup

if TYPE_CHECKING:
    from vllm.config import VllmConfig


KVCacheSpecRegistry._ensure_registered()  # it registers vLLM's own only while nothing is registered


class WindowManager(CircularBufferManager):
    """Gives a request all blocks of its window when it is admitted. Those for queries go once the prompt is in.

    Where prefixes are cached, one more entry of a request's table is no block but a number: of the tokens that it found
    in blocks of others. vLLM tells workers in no other way where a request began.
    """

    def __init__(self, kv_cache_spec: WindowSpec, **more: Any) -> None:
        super().__init__(kv_cache_spec, **more)
        self.found: dict[str, int] = {}

    def add_local_computed_blocks(
        self,
        request_id: str,
        new_computed_blocks: Sequence[KVCacheBlock],
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
    ) -> None:
        self.found[request_id] = num_local_computed_tokens

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        self.found.pop(request_id, None)
        blocks: list[KVCacheBlock] = super().pop_blocks_for_free(request_id)[: self.kv_cache_spec.blocks]
        return blocks

    def get_num_blocks_to_allocate(
        self, request_id: str, num_tokens: int, new_computed_blocks: Sequence[KVCacheBlock], *args: Any, **kwargs: Any
    ) -> int:
        return 0 if self.req_to_blocks.get(request_id) else self.kv_cache_spec.blocks

    def _claim_ring_block(self, request_id: str, record_for_zeroing: bool = True) -> list[KVCacheBlock]:
        held = self.req_to_blocks[request_id]
        if held:
            return []
        held.extend(self.block_pool.get_new_blocks(self.kv_cache_spec.blocks))
        if self.kv_cache_spec.counts_found:
            held.append(KVCacheBlock(self.found.get(request_id, 0), is_null=True))
        return list(held)

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        if num_prompt_tokens is not None and processed_computed_tokens >= num_prompt_tokens:
            self._remove_blocks_in_range(request_id, self.kv_cache_spec.kept_blocks, self.kv_cache_spec.blocks)


@register_kv_cache_spec(manager_class=WindowManager, uniform_type_base_spec=CircularBufferSpec)
@dataclass(frozen=True, kw_only=True)
class WindowSpec(CircularBufferSpec):
    """`blocks` blocks per request, each of as many bytes as a block of pages: both kinds come out of one pool.

    The first `kept_blocks` hold tokens, the others what a cut prompt's last queries were. counts_found: whether a
    request's table says how many tokens it found in blocks of others.
    """

    blocks: int = 1
    kept_blocks: int = 1
    counts_found: bool = False

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        size: int = self.blocks * self.page_size_bytes
        return size

    def max_num_blocks_per_req(self, vllm_config: VllmConfig, max_len: int) -> int:
        return self.blocks + self.counts_found


class PageManager(FullAttentionManager):
    """Lets requests begin with as many blocks of others as `Extents.found` says."""

    supports_fine_grained_hash_lookup: ClassVar[bool] = False

    def _has_partial_local_hit(
        self, new_computed_blocks: Sequence[KVCacheBlock], num_local_computed_tokens: int
    ) -> bool:
        return False  # the block in which the found tokens end is written no more: sinks shift what blocks hold

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: Any,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: Any,
        kv_cache_spec: PageSpec,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        setup = kv_cache_spec.setup
        if not setup.geometry.shared:
            return tuple([] for _ in kv_cache_group_ids), 0
        longest = max(
            max_length - max(setup.voters - 1, 0), 0
        )  # of a prompt of one more token, whose last queries vote
        blocks, _ = super().find_longest_cache_hit(
            block_hashes, longest, kv_cache_group_ids, block_pool, kv_cache_spec, *args, **kwargs
        )
        each = kv_cache_spec.block_size // setup.page_size
        columns, tokens = setup.geometry.found(len(blocks[0]) * each, each)
        for found in blocks:
            del found[columns // each :]
        return blocks, tokens


@register_kv_cache_spec(manager_class=PageManager, uniform_type_base_spec=FullAttentionSpec)
@dataclass(frozen=True, kw_only=True)
class PageSpec(FullAttentionSpec):
    """Pages of a stack with a window in full precision, which a request that begins with blocks of others lacks."""

    setup: Setup

    @classmethod
    def merge(cls, specs: list[Any]) -> Any:
        """The spec of all layers of a group, which must be equal; the inherited one forgets our fields."""
        assert all(spec == specs[0] for spec in specs[1:])
        return specs[0]

    @classmethod
    def of(cls, spec: AttentionSpec, setup: Setup) -> PageSpec:
        return cls(**{f.name: getattr(spec, f.name) for f in fields(spec) if f.init}, setup=setup)


class EvictingManager(PageManager):
    """Frees the blocks that `Extents.extent` leaves out, and allocates those that what is chosen of a prompt goes to,
    where its own are shared."""

    def __init__(self, kv_cache_spec: EvictingSpec, **more: Any) -> None:
        super().__init__(kv_cache_spec, **more)
        self.prompts: dict[str, int] = {}

    def get_num_blocks_to_allocate(self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any) -> int:
        count: int = super().get_num_blocks_to_allocate(
            request_id, self._reach(request_id, num_tokens), *args, **kwargs
        )
        return count

    def allocate_new_blocks(self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any) -> list[KVCacheBlock]:
        new: list[KVCacheBlock] = super().allocate_new_blocks(
            request_id, self._reach(request_id, num_tokens), *args, **kwargs
        )
        return new

    def cache_blocks(self, request: Any, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """Let others find the prompt: what is written after it saw only what the policy left of it."""
        if not self.kv_cache_spec.setup.geometry.shared:
            return
        prompt = request.num_prompt_tokens
        if num_tokens >= prompt:
            # Preempted, it is chosen from anew: with the last queries of its prompt, which no block holds.
            request.skip_reading_prefix_cache = True
        super().cache_blocks(request, min(num_tokens, prompt), *args, **kwargs)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        self.prompts.pop(request_id, None)
        blocks: list[KVCacheBlock] = super().pop_blocks_for_free(request_id)
        return blocks

    def _reach(self, request_id: str, tokens: int) -> int:
        """The end of the last page that a request of so many tokens has written, as a number of tokens."""
        setup = self.kv_cache_spec.setup
        reach: int = setup.geometry.columns(tokens, self.prompts.get(request_id, tokens)) * setup.page_size
        return reach

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        if num_prompt_tokens is not None:
            self.prompts[request_id] = num_prompt_tokens
        if num_prompt_tokens is None or processed_computed_tokens < num_prompt_tokens:
            return
        setup = self.kv_cache_spec.setup
        first, last = (
            page * setup.page_size for page in setup.geometry.extent(processed_computed_tokens, num_prompt_tokens).gap
        )
        self._remove_blocks_in_range(request_id, -(-first // self.block_size), last // self.block_size)


@register_kv_cache_spec(manager_class=EvictingManager, uniform_type_base_spec=FullAttentionSpec)
@dataclass(frozen=True, kw_only=True)
class EvictingSpec(PageSpec):
    """Pages of a stack with a policy, some of which no query reads once the prompt is in."""

    @property
    def prefix_cacheable(self) -> bool:
        return self.setup.caching

    def max_num_blocks_per_req(self, vllm_config: VllmConfig, max_len: int) -> int:
        """As many as one needs whose prompt is all of it; others have no more of it and what follows together."""
        setup = self.setup
        columns = setup.geometry.columns(max_len, max_len) + (2 if setup.caching else 0)
        blocks: int = -(-columns * setup.page_size // self.block_size)
        return blocks

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        blocks = self.max_num_blocks_per_req(vllm_config, vllm_config.model_config.max_model_len)
        size: int = blocks * self.page_size_bytes
        return size
