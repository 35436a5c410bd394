"""The line that an engine with a stack prints when it starts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvcomp.cache.blocks.setup import Setup

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def announce(setup: Setup, config: VllmConfig, spec: Any) -> None:
    """Print it, once a process and on the first rank alone, for the layers that attend to all tokens."""
    blocks = config.cache_config.num_gpu_blocks
    if not blocks or config.parallel_config.rank:
        return
    from vllm.logger import init_logger

    size = spec.page_size_bytes * max(config.cache_config.block_size // spec.block_size, 1)  # kernels may see parts
    init_logger("vllm.kvcomp").info_once(line(setup, spec.num_kv_heads, blocks * size))


def line(setup: Setup, heads: int, nbytes: int) -> str:
    """Of a pool with so many bytes for each layer of `heads` KV heads."""
    token = setup.record_bytes(heads) / setup.page_size * heads
    dense = 2 * setup.dim * heads * 2
    packed = int(nbytes / token)
    return (
        f"kvcomp: {setup.stack}: {16 * token / dense:.2f} bits a number, {packed:,} tokens in the pool, "
        f"{dense / token:.2f}x the {nbytes // dense:,} of 16 bits"
        + (f"; each request keeps {setup.slots} of its tokens in 16 bits or more" if setup.slots else "")
    )
