"""What vLLM's memory manager has to know: blocks of a request's exact window, and blocks that a request frees.

Importing this module registers the specs and their managers, in every process.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import CircularBufferManager, FullAttentionManager
from vllm.v1.kv_cache_interface import AttentionSpec, CircularBufferSpec, FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry, register_kv_cache_spec

from kvcomp.cache.blocks.setup import Setup

if TYPE_CHECKING:
    from vllm.config import VllmConfig


KVCacheSpecRegistry._ensure_registered()  # it registers vLLM's own only while nothing is registered


class WindowManager(CircularBufferManager):
    """Gives a request all blocks of its window when it is admitted. Those for queries go once the prompt is in."""

    def get_num_blocks_to_allocate(
        self, request_id: str, num_tokens: int, new_computed_blocks: Sequence[KVCacheBlock], *args: Any, **kwargs: Any
    ) -> int:
        return 0 if self.req_to_blocks.get(request_id) else self.kv_cache_spec.blocks

    def _claim_ring_block(self, request_id: str, record_for_zeroing: bool = True) -> list[KVCacheBlock]:
        held = self.req_to_blocks[request_id]
        if held:
            return []
        held.extend(self.block_pool.get_new_blocks(self.kv_cache_spec.blocks))
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

    The first `kept_blocks` hold tokens, the others what a cut prompt's last queries were.
    """

    blocks: int = 1
    kept_blocks: int = 1

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        size: int = self.blocks * self.page_size_bytes
        return size

    def max_num_blocks_per_req(self, vllm_config: VllmConfig, max_len: int) -> int:
        return self.blocks


class EvictingManager(FullAttentionManager):
    """Frees the blocks that `Extents.extent` leaves out."""

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        if num_prompt_tokens is None or processed_computed_tokens < num_prompt_tokens:
            return
        setup = self.kv_cache_spec.setup
        first, last = (
            page * setup.page_size for page in setup.geometry.extent(processed_computed_tokens, num_prompt_tokens).gap
        )
        self._remove_blocks_in_range(request_id, -(-first // self.block_size), last // self.block_size)


@register_kv_cache_spec(manager_class=EvictingManager, uniform_type_base_spec=FullAttentionSpec)
@dataclass(frozen=True, kw_only=True)
class EvictingSpec(FullAttentionSpec):
    """Pages of a stack with a policy, some of which no query reads once the prompt is in."""

    setup: Setup

    @property
    def prefix_cacheable(self) -> bool:
        return False

    @classmethod
    def merge(cls, specs: list[EvictingSpec]) -> EvictingSpec:
        """The spec of all layers of a group, which must be equal; the inherited one forgets our fields."""
        assert all(spec == specs[0] for spec in specs[1:])
        return specs[0]

    @classmethod
    def of(cls, spec: AttentionSpec, setup: Setup) -> EvictingSpec:
        return cls(**{f.name: getattr(spec, f.name) for f in fields(spec) if f.init}, setup=setup)
