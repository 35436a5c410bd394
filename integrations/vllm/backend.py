"""The attention backend: what a block holds, and what a step's attention has to know."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial
from typing import Any, ClassVar

import torch
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheLayout

from kvcomp.architecture import LayerKind
from kvcomp.cache.blocks.decode import Decoder, DecodeStep, most_channels, obstacle
from kvcomp.cache.blocks.pages import Pages
from kvcomp.cache.blocks.setup import Setup
from kvcomp.cache.blocks.step import Step
from kvcomp.errors import KvcompError, UnsupportedError

from .batch import Batch
from .checks import accepted, check_layer
from .config import report_prompt_lengths
from .reserve import release
from .specs import EvictingSpec, PageSpec
from .summary import announce


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
    def supports_sink(cls) -> bool:
        return not cls.setup.stack.policies

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        return bool(attn_type == AttentionType.DECODER)

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """The same blocks, with the bytes of a page record in each (block, KV head)."""
        setup, window = cls.setup, getattr(spec, "sliding_window", None)
        kind = LayerKind.FULL if window is None else LayerKind.SLIDING
        check_layer(setup, kind, spec.head_size, getattr(spec, "head_size_v", spec.head_size))
        if spec.block_size % setup.page_size and spec.block_size > 1:  # vLLM asks for the bytes of a token, too
            raise UnsupportedError(
                f"{setup.stack}: blocks of {spec.block_size} tokens do not hold whole pages of {setup.page_size}: "
                f"use --block-size {setup.page_size}"
            )
        record = setup.record_bytes(spec.num_kv_heads)
        if window is not None:
            setup.within(window).plan(0)  # refuses now what cannot be served
        elif setup.stack.policies:
            spec = EvictingSpec.of(spec, setup)
        elif setup.caching and setup.slots:
            spec = PageSpec.of(spec, setup)
        return replace(spec, dtype=torch.uint8, state_content_bytes=record // setup.page_size)


class StepBuilder(AttentionMetadataBuilder[Batch | DecodeStep]):
    """Turns a step's batch into what every layer needs of it."""

    built_for: ClassVar[Setup]
    _cudagraph_support = AttentionCGSupport.NEVER  # lengths are read on the host

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        """Of steps of single tokens, on a GPU whose kernels write and read those of every layer: see `decode`."""
        setup, model, parallel = cls.built_for, vllm_config.model_config, vllm_config.parallel_config
        if vllm_config.device_config.device_type != "cuda" or not setup.by_token or setup.hybrid:
            return cls._cudagraph_support
        heads, device = model.get_num_kv_heads(parallel), torch.device("cuda")
        rows = model.get_num_attention_heads(parallel) // heads
        if any(obstacle(Pages(setup, layer, heads), rows, device) is not None for layer in range(setup.layers)):
            return cls._cudagraph_support
        return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.setup = accepted(vllm_config)
        if self.setup != self.built_for:
            raise KvcompError(
                f"{self.setup.stack}: this process has built an engine with {self.built_for.stack}, and vLLM keeps the "
                "backend of the first: build the other engine in a process of its own"
            )
        if self.setup.stack.policies:
            report_prompt_lengths(vllm_config.model_config)
        self.setup = self.setup.within(getattr(kv_cache_spec, "sliding_window", None))
        if self.setup.sliding is None:
            announce(self.setup, vllm_config, kv_cache_spec)
        self.decoder: Decoder | None = None
        release(device)
        if self.get_cudagraph_support(vllm_config, kv_cache_spec) is not AttentionCGSupport.NEVER:
            layers = vllm_config.compilation_config.static_forward_context
            impls = {name: layers[name].impl for name in layer_names}
            bound = [impl.bind(name, device) for name, impl in impls.items()]
            pages = [layer.pages for layer in bound]  # made before a graph is recorded
            rows = max(impl.num_heads // impl.num_kv_heads for impl in impls.values())
            requests, tokens = vllm_config.scheduler_config.max_num_seqs, vllm_config.model_config.max_model_len
            sizes = (
                self.setup.page_size,
                kv_cache_spec.num_kv_heads,
                rows,
                most_channels([p.codec for p in pages], self.setup.dim),
            )
            self.decoder = Decoder.on(device, requests, tokens, *sizes, pages[0].frequencies)

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> DecodeStep:
        step = super().build_for_cudagraph_capture(common_attn_metadata)
        if not isinstance(step, DecodeStep):
            raise KvcompError(f"{self.setup.stack}: a graph would hold lengths that this step alone has")
        return step

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Batch | DecodeStep:
        batch = common_attn_metadata
        decoder, singles = self.decoder, batch.max_query_len == 1 and batch.num_actual_tokens == batch.num_reqs
        if decoder is not None and singles and batch.num_reqs <= decoder.requests:
            some = slice(batch.num_reqs)
            return decoder.plan(batch.block_table_tensor[some], batch.seq_lens[some], batch.slot_mapping[some])
        reqs, told = batch.num_reqs, batch.rswa_prefix_lens
        starts, lengths = batch.query_start_loc, batch.seq_lens
        # What the host knows is exact unless drafts were verified on the device: those steps wait for it. So do those
        # of a stack with a policy, where the runner (V2) has the prompts' lengths on the device alone.
        if not (lengths.is_cpu or self.setup.drafts or batch.seq_lens_cpu_upper_bound is None):
            starts, lengths = batch.query_start_loc_cpu, batch.seq_lens_cpu_upper_bound
        if self.setup.geometry.policies and told is None and bool(batch.block_table_tensor[:reqs].any()):
            raise KvcompError(f"{self.setup.stack}: this version of vLLM does not tell how long prompts are")
        prompts = [0] * reqs if told is None else told[:reqs].tolist()  # a batch without blocks is a dummy
        return Batch(
            partial(
                Step.of,
                self.setup,
                self.kv_cache_spec.num_kv_heads,
                starts[: reqs + 1].tolist(),
                lengths[:reqs].tolist(),
                prompts,
                batch.block_table_tensor,
                batch.slot_mapping,
            )
        )


@cache
def backend_for(setup: Setup) -> type[PageBackend]:
    """The backend of one setup: vLLM asks classes, not objects, and not always where its config is available."""
    return type("PageBackend", (PageBackend,), {"setup": setup})
