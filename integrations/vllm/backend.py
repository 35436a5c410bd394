"""The attention backend: what a block holds, and what a step's attention has to know."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any, ClassVar

import torch
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, KVCacheLayout

from kvcomp.errors import KvcompError, UnsupportedError

from .setup import Setup
from .specs import EvictingSpec
from .step import Step


class PageBackend(AttentionBackend):
    """Blocks of kvcomp's pages: in the layout LBHNC each (block, KV head) is contiguous, and is one record or several.

    `backend_for` makes one for a setup.
    """

    setup: ClassVar[Setup]

    forward_includes_kv_cache_update = True  # whole pages are encoded of more than a step's own tokens
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type:
        from .impl import PageAttention

        return PageAttention

    @classmethod
    def get_builder_cls(cls) -> type:
        return type("StepBuilder", (StepBuilder,), {"built_for": cls.setup})

    @classmethod
    def get_supported_kernel_block_sizes(cls, kv_cache_spec: Any = None) -> list[int]:
        return [cls.setup.page_size]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.LBHNC,)

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        return bool(attn_type == AttentionType.DECODER)

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """The same blocks, with the bytes of a page record in each (block, KV head)."""
        setup = cls.setup
        if not isinstance(spec, FullAttentionSpec) or spec.sliding_window is not None:
            raise UnsupportedError(
                f"{setup.stack}: the model has layers with {type(spec).__name__}, and a stack compresses full "
                "attention alone: serve this model without a stack"
            )
        if spec.block_size % setup.page_size:
            raise UnsupportedError(
                f"{setup.stack}: blocks of {spec.block_size} tokens do not hold whole pages of {setup.page_size}: "
                f"use --block-size {setup.page_size}"
            )
        if (spec.head_size, spec.head_size_v) != (setup.dim, setup.dim):
            raise UnsupportedError(
                f"{setup.stack}: the model has layers of {spec.head_size} and {spec.head_size_v} channels beside those "
                f"of {setup.dim}: serve this model without a stack"
            )
        record = setup.record_bytes(spec.num_kv_heads)
        if setup.stack.policies:
            spec = EvictingSpec.of(spec, setup)
        return replace(spec, dtype=torch.uint8, state_content_bytes=record // setup.page_size)


class StepBuilder(AttentionMetadataBuilder[Step]):
    """Turns a step's batch into what every layer needs of it."""

    built_for: ClassVar[Setup]
    _cudagraph_support = AttentionCGSupport.NEVER  # lengths are read on the host

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.setup = Setup.of(vllm_config)
        if self.setup != self.built_for:
            raise KvcompError(
                f"{self.setup.stack}: this process has built an engine with {self.built_for.stack}, and vLLM keeps the "
                "backend of the first: build the other engine in a process of its own"
            )
        if self.setup.stack.policies:  # the runners tell prompt lengths where a window behind the prompt is set alone
            model = vllm_config.model_config
            model.model_arch_config.rswa_window = model.max_model_len  # one that leaves nothing out

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Step:
        batch = common_attn_metadata
        reqs, told = batch.num_reqs, batch.rswa_prefix_lens
        if self.setup.stack.policies and told is None and bool(batch.block_table_tensor[:reqs].any()):
            raise KvcompError(f"{self.setup.stack}: this version of vLLM does not tell how long prompts are")
        prompts = [0] * reqs if told is None else told[:reqs].tolist()  # a batch without blocks is a dummy
        return Step.of(
            self.setup,
            self.kv_cache_spec.num_kv_heads,
            batch.query_start_loc[: reqs + 1].tolist(),
            batch.seq_lens[:reqs].tolist(),
            prompts,
            batch.block_table_tensor,
            batch.slot_mapping,
        )


@cache
def backend_for(setup: Setup) -> type[PageBackend]:
    """The backend of one setup: vLLM asks classes, not objects, and not always where its config is at hand."""
    return type("PageBackend", (PageBackend,), {"setup": setup})
