"""The exact window of every request in one layer: sinks, recent tokens and a page that is not full yet.

vLLM allocates only for layers, so a window is one of its own: it lives in blocks of the same pool as the pages do.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
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
from kvcomp.kernels.dispatch import runs

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
    """The windows of one layer: `setup.slots` slots per request, each K and V [H, D] in the model's dtype.

    Where a policy has voters, as many slots behind those for their queries [Hq, D], which go once the prompt is in.
    """

    def __init__(self, setup: Setup, heads: int, query_heads: int) -> None:
        super().__init__()
        self.setup = setup
        self.token, self.query = (heads, 2 * setup.dim), (query_heads, setup.dim)  # what slots hold
        self.kv_cache = torch.empty(0, dtype=torch.float32, device="cpu")
        layers = get_current_vllm_config().compilation_config.static_forward_context
        self.name = f"{NAME}.{sum(name.startswith(NAME) for name in layers)}"
        layers[self.name] = self

    def get_attn_backend(self) -> type[AttentionBackend]:
        return WindowBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> WindowSpec:
        """As many blocks of the pages' size as the slots need.

        Raises:
            UnsupportedError: a block has no room for one token.
        """
        size, heads = vllm_config.cache_config.block_size, self.token[0]
        cell = self.setup.record_bytes(heads) // self.setup.page_size
        block = size * heads * cell
        most = max(self.token, self.query, key=prod) if self.setup.voters else self.token
        if block < self._bytes(most):
            raise UnsupportedError(
                f"{self.setup.stack}: a block of {size} tokens is smaller than one token in full precision: use "
                f"--block-size {4 * size}"
            )
        kept, more = (
            -(-slots // (block // self._bytes(slot)))
            for slots, slot in ((self.setup.slots, self.token), (self.setup.voters, self.query))
        )
        return WindowSpec(
            block_size=size,
            num_kv_heads=heads,
            head_size=self.setup.dim,
            dtype=torch.uint8,
            state_content_bytes=cell,
            blocks=kept + more,
            kept_blocks=kept,
        )

    def starts(self, blocks: Tensor, slots: Tensor) -> Tensor:
        """int64 [R, n]: where slots [R, n] of requests whose blocks are [R, m] begin, in every layer alike."""
        return self._starts(self.token, blocks, slots)

    def read(self, starts: Tensor) -> Tensor:
        """Keys and values [R, H, n, 2 * D], side by side, of slots that begin at starts [R, n]."""
        heads, width = self.token
        head = torch.arange(0, heads * width, width, device=starts.device)
        return runs(self._flat, starts[:, None] + head[:, None], width)

    def write(self, starts: Tensor, keys: Tensor, values: Tensor) -> None:
        """Keep keys and values [w, H, D] in slots that begin at starts [w]."""
        self._put(starts, torch.cat([keys, values], -1))

    def read_queries(self, blocks: Tensor, slots: Tensor) -> Tensor:
        """Queries [n, Hq, D] in slots [n] of a request whose blocks are [m]."""
        starts = self._starts(self.query, self._behind(blocks[None]), slots[None])[0]
        return runs(self._flat, starts, prod(self.query)).unflatten(1, self.query)

    def write_queries(self, blocks: Tensor, slots: Tensor, queries: Tensor) -> None:
        """Keep queries [w, Hq, D] in slots [w] of requests whose blocks are [w, m]."""
        self._put(self._starts(self.query, self._behind(blocks), slots[:, None])[:, 0], queries)

    def _put(self, starts: Tensor, slots: Tensor) -> None:
        slots = slots.flatten(1)
        self._flat[starts[:, None] + torch.arange(slots.shape[1], device=starts.device)] = slots

    def _behind(self, blocks: Tensor) -> Tensor:
        """Those of a request's blocks [R, m] that are for queries."""
        return blocks[:, -(-self.setup.slots // self._room(self.token)) :]

    def _bytes(self, slot: tuple[int, int]) -> int:
        return prod(slot) * self.setup.dtype.itemsize

    @property
    def _flat(self) -> Tensor:
        """The pool's elements in the model's dtype."""
        return self.kv_cache.view(-1).view(self.setup.dtype)

    def _room(self, slot: tuple[int, int]) -> int:
        """Slots in a block."""
        return self.kv_cache[0].nbytes // self._bytes(slot)

    def _starts(self, slot: tuple[int, int], blocks: Tensor, slots: Tensor) -> Tensor:
        room, block = self._room(slot), self.kv_cache[0].nbytes // self.setup.dtype.itemsize
        return blocks.gather(1, slots // room) * block + slots % room * prod(slot)
