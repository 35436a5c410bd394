"""The blocks of windows, as vLLM sees them: those of one more layer, out of the same pool as the pages'."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import KVCacheLayout

from kvcomp.cache.blocks.setup import Setup
from kvcomp.cache.blocks.windows import Windows
from kvcomp.errors import UnsupportedError

from .specs import WindowSpec

NAME = "kvcomp.window"


@dataclass(frozen=True)
class WindowBlocks:
    """blocks int64 [R, m]: those of each request's window. found: how many of its tokens it found in blocks of others;
    None: no request does."""

    blocks: Tensor
    found: list[int] | None


class WindowBuilder(AttentionMetadataBuilder[WindowBlocks]):
    _cudagraph_support = AttentionCGSupport.NEVER

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> WindowBlocks:
        table, blocks = common_attn_metadata.block_table_tensor, self.kv_cache_spec.blocks
        found = table[: common_attn_metadata.num_reqs, blocks].tolist() if self.kv_cache_spec.counts_found else None
        return WindowBlocks(table[:, :blocks].long(), found)


class WindowBackend(AttentionBackend):
    """Tells vLLM where windows lie; nothing attends through it."""

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type:
        raise NotImplementedError

    @staticmethod
    def get_builder_cls() -> type:
        return WindowBuilder

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.LBHNC,)


class Window(nn.Module, AttentionLayerBase):
    """A layer of its own for the windows of an attention layer: vLLM allocates only for layers."""

    def __init__(self, setup: Setup, heads: int, query_heads: int) -> None:
        super().__init__()
        self.setup, self.heads = setup, heads
        self.windows = Windows(setup, heads, query_heads)
        self.kv_cache = torch.empty(0, dtype=torch.float32, device="cpu")
        layers = get_current_vllm_config().compilation_config.static_forward_context
        self.name = f"{NAME}.{sum(name.startswith(NAME) for name in layers)}"
        layers[self.name] = self

    def get_attn_backend(self) -> type[AttentionBackend]:
        return WindowBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> WindowSpec:
        """As many blocks of the pages' size as the slots need.

        Raises:
            UnsupportedError: a block has no space for one token.
        """
        size = vllm_config.cache_config.block_size
        cell = self.setup.record_bytes(self.heads) // self.setup.page_size
        try:
            kept, more = self.windows.blocks(size * self.heads * cell)
        except UnsupportedError as error:
            raise UnsupportedError(f"{error}, --block-size {4 * size}") from None
        return WindowSpec(
            block_size=size,
            num_kv_heads=self.heads,
            head_size=self.setup.dim,
            dtype=torch.uint8,
            state_content_bytes=cell,
            blocks=kept + more,
            kept_blocks=kept,
            counts_found=self.setup.geometry.shared,
        )
