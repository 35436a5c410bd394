"""The exact window of every request in one layer: sinks, recent tokens and a page that is not full yet.

vLLM allocates only for layers, so a window is one of its own: it lives in blocks of the same pool as the pages do.
"""

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

from kvcomp.errors import UnsupportedError

from .setup import Setup
from .specs import WindowSpec

NAME = "kvcomp.window"


@dataclass(frozen=True)
class WindowBlocks:
    """blocks int64 [R, m]: those of each request's window."""

    blocks: Tensor


class WindowBuilder(AttentionMetadataBuilder[WindowBlocks]):
    _cudagraph_support = AttentionCGSupport.NEVER

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> WindowBlocks:
        table = common_attn_metadata.block_table_tensor
        return WindowBlocks(table[:, : self.kv_cache_spec.blocks].long())


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
    """The windows of one layer: `setup.slots` slots per request, each K and V [H, D] in the model's dtype."""

    def __init__(self, setup: Setup, heads: int) -> None:
        super().__init__()
        self.setup, self.heads = setup, heads
        self.kv_cache = torch.empty(0)
        layers = get_current_vllm_config().compilation_config.static_forward_context
        self.name = f"{NAME}.{sum(name.startswith(NAME) for name in layers)}"
        layers[self.name] = self

    @property
    def token_bytes(self) -> int:
        return self.heads * 2 * self.setup.dim * self.setup.dtype.itemsize

    def get_attn_backend(self) -> type[AttentionBackend]:
        return WindowBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> WindowSpec:
        """As many blocks of the pages' size as the slots need.

        Raises:
            UnsupportedError: a block has no room for one token.
        """
        size = vllm_config.cache_config.block_size
        cell = self.setup.record_bytes(self.heads) // self.setup.page_size
        per_block = size * self.heads * cell // self.token_bytes
        if not per_block:
            raise UnsupportedError(
                f"{self.setup.stack}: a block of {size} tokens is smaller than one token in full precision: use "
                f"--block-size {4 * size}"
            )
        return WindowSpec(
            block_size=size,
            num_kv_heads=self.heads,
            head_size=self.setup.dim,
            dtype=torch.uint8,
            state_content_bytes=cell,
            blocks=-(-self.setup.slots // per_block),
        )

    @property
    def cells(self) -> Tensor:
        """[blocks, tokens per block, H, 2 D], K before V: a view of the pool."""
        block = self.kv_cache.view(len(self.kv_cache), -1)
        room = block.shape[1] // self.token_bytes
        return block[:, : room * self.token_bytes].view(self.setup.dtype).unflatten(1, (room, self.heads, -1))

    def read(self, blocks: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [R, n, H, D] in slots [R, n] of requests whose blocks are [R, m]."""
        cells = self.cells
        found = cells[blocks.gather(1, slots // cells.shape[1]), slots % cells.shape[1]]
        k, v = found.chunk(2, -1)
        return k, v

    def write(self, blocks: Tensor, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Keep keys and values [w, H, D] in slots [w] of windows whose blocks are [w, m]."""
        cells = self.cells
        block = blocks.gather(1, (slots // cells.shape[1])[:, None])[:, 0]
        cells[block, slots % cells.shape[1]] = torch.cat([keys, values], -1)
