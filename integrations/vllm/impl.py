"""vLLM's attention of one layer: it reads the config, and hands steps to the layer of blocks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.forward_context import get_forward_context
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionImpl, AttentionType

from kvcomp.architecture import LayerKind
from kvcomp.cache.blocks.decode import DecodeStep
from kvcomp.cache.blocks.layer import BlockLayer
from kvcomp.cache.blocks.pages import Pages
from kvcomp.errors import UnsupportedError

from .batch import Batch
from .checks import accepted, check_layer
from .key_centres import turned_biases
from .reserve import needed, reserve
from .window import Window


class PageAttention(AttentionImpl[Batch | DecodeStep]):
    """The attention of one layer over pages, a window where the stack needs one, and the step's own tokens."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        **more: Any,
    ) -> None:
        config = get_current_vllm_config()
        setup, self.model, self.ranks = accepted(config), config.model_config, config.parallel_config
        self.setup, self.sinks = setup.within(sliding_window), more.get("sinks")
        refused = {
            "position biases (ALiBi)": alibi_slopes,
            "another kind than decoding": attn_type != AttentionType.DECODER or None,
            "learned sinks, which policies do not know of": self.sinks if setup.stack.policies else None,
        }
        kinds = {LayerKind.SLIDING: sliding_window, LayerKind.SHARED: kv_sharing_target_layer_name}
        kind = next((kind for kind, given in kinds.items() if given is not None), LayerKind.FULL)
        check_layer(self.setup, kind, head_size, head_size)
        for what, given in refused.items():
            if given is not None:
                raise UnsupportedError(
                    f"{self.setup.stack}: the model has attention with {what}, which compressed pages do not serve in "
                    "vLLM: serve this model without a stack"
                )
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.softcap = logits_soft_cap or None
        self.layer: BlockLayer | None = None  # which layer this is shows at the first call
        self.window: Window | None = None
        if self.setup.slots:
            self.window = Window(self.setup, self.num_kv_heads, num_heads)
        self.config = config
        self.of_queries = self.num_heads, self.scale, self.softcap
        ranks = self.ranks.tensor_parallel_size
        self.rank = (get_tensor_model_parallel_rank() if ranks > 1 else 0, ranks)
        self.any_pages = Pages(self.setup, 0, self.num_kv_heads, rank=self.rank)  # refuses now what cannot be served

    def bind(self, layer_name: str, device: torch.device) -> BlockLayer:
        """The layer, for a pool on `device`."""
        if self.layer is None:
            layer = extract_layer_index(layer_name)
            biases = None
            if self.setup.by_token:
                biases = turned_biases(self.model.model, self.model.hf_text_config, layer, self.head_size)
            if biases is not None:
                biases = biases.of_rank(self.num_kv_heads, *self.rank)
            pages = Pages(self.setup, layer, self.num_kv_heads, device, biases, self.rank)
            windows = None if self.window is None else self.window.windows
            self.layer = BlockLayer(pages, windows, *self.of_queries, sinks=self.sinks)
        return self.layer

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Batch | DecodeStep | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Attention of query [T, Hq, D] over what each request holds, written to output [T, Hq, D].

        key and value [T, Hkv, D] are the step's new tokens, all requests in a row; kv_cache uint8 [blocks, Hkv, P, C].
        """
        if attn_metadata is None:  # vLLM measures memory, and there is no cache yet
            reserve(needed(self.config, self.any_pages, self.num_heads, output.device), output.device)
            return output.zero_()
        bound, blocks, found = self.bind(layer.layer_name, kv_cache.device), None, None
        bound.pages.at(kv_cache)
        if self.window is not None:
            self.window.windows.at(self.window.kv_cache)
            window = get_forward_context().attn_metadata[self.window.name]
            blocks, found = window.blocks, window.found
        step = attn_metadata.step(found) if isinstance(attn_metadata, Batch) else attn_metadata
        bound.attend(step, query, key, value, output.view(len(output), self.num_heads, -1), blocks)
        return output

    def read(self) -> int:
        """Bytes of the cache that the last step of single tokens loaded."""
        return 0 if self.layer is None else self.layer.read()
