"""StreamingLLM: the first tokens and a recent window (arXiv 2309.17453)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvcomp.registry import register
from kvcomp.stages import Chunk, Policy, arg


@register("streaming")
@dataclass(frozen=True)
class Streaming(Policy):
    """StreamingLLM: keeps the first `sinks` tokens and the last `recent` ones, in prefill and during generation.

    Tokens leave by whole pages: between `recent` and `recent` + one page are held while decoding. Keys keep the rotary
    positions they were written with. Everything in between is forgotten: do not expect it to find a needle.
    """

    paper: ClassVar[str] = "arXiv:2309.17453"

    sinks: int = arg(4, "first tokens to keep for ever, in full precision")
    recent: int = arg(1024, "last tokens to keep")

    def __post_init__(self) -> None:
        self.check(self.sinks >= 0, "sinks", "zero or positive")
        self.check(self.recent > 0, "recent", "positive")

    @property
    def default_window(self) -> tuple[int, int]:
        return self.sinks, 0

    @property
    def required_sinks(self) -> int:
        return self.sinks

    def kept(self, tokens: int, sinks: int, recent: int) -> int:
        return min(tokens, sinks + max(self.recent, recent))

    def select(self, chunk: Chunk) -> Tensor:
        n = chunk.keys.shape[2]
        keep = torch.zeros(n, dtype=torch.bool, device=chunk.keys.device)
        keep[: chunk.sinks] = True
        keep[max(n - max(self.recent, chunk.recent), 0) :] = True
        return chunk.alive & keep

    def expired(self, kept: Tensor, pages: Tensor, page_size: int) -> Tensor | None:
        return ((kept - self.recent).clamp_min(0) // page_size).minimum(pages)
