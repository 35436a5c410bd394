"""Memory that decode steps keep besides pages, while vLLM measures how much is left for those."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvcomp.cache.blocks.decode import Decoder, most_channels
from kvcomp.cache.blocks.pages import Pages

_held: dict[torch.device, Tensor] = {}


def needed(config: Any, pages: Pages, query_heads: int, device: torch.device) -> int:
    """Bytes of the `Decoder` that a builder makes for the layers of an engine with this config; 0: it makes none."""
    setup = pages.setup
    if device.type == "cpu" or not setup.by_token:
        return 0
    requests, tokens = config.scheduler_config.max_num_seqs, config.model_config.max_model_len
    rows, v_dim = query_heads // pages.heads, most_channels([pages.codec], setup.dim)
    return Decoder.nbytes(requests, tokens, setup.page_size, pages.heads, rows, v_dim, device)


def reserve(nbytes: int, device: torch.device) -> None:
    """Hold so many bytes, once for all layers, until `release`."""
    held = _held.get(device)
    if nbytes and (held is None or held.numel() < nbytes):
        _held[device] = torch.empty(nbytes, dtype=torch.uint8, device=device)


def release(device: torch.device) -> None:
    """What was held is free for those who need it."""
    _held.pop(device, None)
