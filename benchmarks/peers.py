"""Attention kernels of others, timed beside ours where they are installed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kvcomp.kernels import flashinfer

TOLERANCE = 2e-3  # relative error of attention against the reference
HALF_TOLERANCE = 1e-2  # of products of 16 bits, in which kernels for GPUs multiply
PAGE = 16  # tokens of a page of FlashInfer's own cache


@dataclass(frozen=True)
class Geometry:
    """Attention of one layer: query heads, KV heads, channels of keys and values. latent: of one stream of latents and
    rotary keys, whose values are the first v_dim channels of its keys."""

    query_heads: int
    heads: int
    k_dim: int
    v_dim: int
    latent: bool = False

    @property
    def channels(self) -> int:
        """That are cached of a token."""
        return self.heads * (self.k_dim if self.latent else self.k_dim + self.v_dim)

    @property
    def cached(self) -> tuple[int, int]:
        """What plans take for channels of keys and values: of a latent, it and its rotary key."""
        return (self.v_dim, self.k_dim - self.v_dim) if self.latent else (self.k_dim, self.v_dim)


class Peer(NamedTuple):
    """Attention over an uncompressed cache by a package that may be installed, on GPUs.

    prepare: a step of query [B, Hq, 1, D] over k, v [B, Hkv, N, D]. tolerance: its relative error against torch.
    """

    label: str
    module: str
    dims: Sequence[int]
    bytes_per_number: int
    tolerance: float
    prepare: Callable[[Tensor, Tensor, Tensor], Callable[[], Tensor]]

    def obstacle(self, geometry: Geometry, dtype: torch.dtype, device: torch.device) -> str | None:
        """Why it cannot be timed; None: it can."""
        if device.type != "cuda":
            return "there is no NVIDIA GPU"
        if find_spec(self.module) is None:
            return f"{self.module} is not installed"
        if dtype not in (torch.float16, torch.bfloat16):
            return f"{dtype} is none of its dtypes: --dtype bfloat16"
        if geometry.k_dim != geometry.v_dim or geometry.k_dim not in self.dims:
            return f"it does not take heads of {geometry.k_dim} and {geometry.v_dim} channels"
        return None


def ready(peer: Peer, query: Tensor, k: Tensor, v: Tensor, right: Tensor) -> Callable[[], Tensor] | str:
    """A step of the peer, once it agrees with torch; else why there is none."""
    try:
        call = peer.prepare(query, k, v)
        error = float((call().float().reshape(right.shape) - right.float()).norm() / right.float().norm())
    except Exception as failure:  # what it compiles, or runs on, may be missing
        return f"it failed: {str(failure) or type(failure).__name__}"
    return call if error < peer.tolerance else f"it is off by {error:.2g} of torch's norm"


def _flashinfer(query: Tensor, k: Tensor, v: Tensor, dtype: torch.dtype | None = None) -> Callable[[], Tensor]:
    """FlashInfer over pages of its own, in the dtype of the query or another."""
    (batch, query_heads, _, dim), (_, heads, tokens, _) = query.shape, k.shape
    pages, dtype = -(-tokens // PAGE), dtype or query.dtype

    def paged(x: Tensor) -> Tensor:  # [B * pages, Hkv, PAGE, D]
        padded = F.pad(x, (0, 0, 0, pages * PAGE - tokens)).unflatten(2, (pages, PAGE))
        shaped: Tensor = padded.transpose(1, 2).flatten(0, 1).to(dtype).contiguous()
        return shaped

    cache, q = (paged(k), paged(v)), query[:, :, 0].contiguous()
    wrapper = flashinfer.wrapper(
        query.device, "HND", dtype != query.dtype or query_heads // heads >= flashinfer.TENSOR_CORES_FROM, "auto"
    )
    wrapper.plan(
        torch.arange(batch + 1, dtype=torch.int32, device="cpu") * pages,
        torch.arange(batch * pages, dtype=torch.int32, device=query.device),
        torch.full((batch,), tokens - (pages - 1) * PAGE, dtype=torch.int32, device="cpu"),
        query_heads,
        heads,
        dim,
        PAGE,
        q_data_type=query.dtype,
        kv_data_type=dtype,
        sm_scale=dim**-0.5,
    )
    return lambda: wrapper.run(q, cache)


def _flash_attention(query: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    attend = import_module("flash_attn").flash_attn_with_kvcache
    q, keys, values = (x.transpose(1, 2).contiguous() for x in (query, k, v))  # [B, 1 or N, heads, D]
    return partial(attend, q, keys, values, cache_seqlens=k.shape[2], softmax_scale=k.shape[3] ** -0.5)


PEERS = (
    Peer("FlashInfer", "flashinfer", flashinfer.DIMS, 2, 1e-2, _flashinfer),
    Peer("FlashInfer fp8", "flashinfer", flashinfer.DIMS, 1, 0.1, partial(_flashinfer, dtype=torch.float8_e4m3fn)),
    Peer("flash-attention", "flash_attn", range(8, 257, 8), 2, 1e-2, _flash_attention),
)
