"""StreamingLLM: the first tokens and a recent window (arXiv 2309.17453)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvcomp.stages import Alias, Chunk, Held, Policy, arg
from kvcomp.stages.registry import register


@register("streaming")
@dataclass(frozen=True)
class StreamingLLM(Policy):
    """StreamingLLM: keeps the first `sinks` tokens and the last `recent` ones, in prefill and during generation.

    Tokens leave by whole pages: between `recent` and `recent` + one page are held while decoding. Keys keep the rotary
    positions they were written with. Everything in between is forgotten: do not expect it to find a needle.

    With `chunk` the prompt enters in chunks, and later ones see only sinks and recent tokens, as in the authors'
    endless streams; what a prefill keeps is then up to a page more. Without it the prompt is prefilled densely and
    dropped afterwards.

    Paper: arXiv 2309.17453.
    """

    paper: ClassVar[str] = "arXiv:2309.17453"
    aliases: ClassVar[Mapping[str, str | Alias]] = {
        "start_size": "sinks",
        "recent_size": "recent",
        "window_size": "recent",
    }

    sinks: int = arg(4, "first tokens to keep for ever, in full precision")
    recent: int = arg(1024, "last tokens to keep")
    chunk: int | None = arg(None, "tokens of prompt that enter at once (None: all, in a dense prefill)")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(self.sinks >= 0, "sinks", "zero or positive")
        self.check(self.recent > 0, "recent", "positive")
        self.check(self.chunk is None or self.chunk > 0, "chunk", "positive, or left out")

    @property
    def default_window(self) -> tuple[int, int]:
        return self.sinks, 0

    @property
    def required_sinks(self) -> int:
        return self.sinks

    @property
    def prefill_chunk(self) -> int | None:
        return self.chunk

    @property
    def keeps_newest(self) -> int:
        return self.recent

    @property
    def same_tokens(self) -> tuple[str, ...]:
        return "heads", "layers"

    def kept(self, tokens: int, sinks: int, recent: int, layer: int, layers: int) -> int:
        return min(tokens, sinks + max(self.recent, recent))

    def select(self, chunk: Chunk) -> Tensor:
        if chunk.past:
            return chunk.alive  # old pages leave next: what stays must be the newest, without a gap before this chunk
        n = chunk.keys.shape[2]
        keep = torch.zeros(n, dtype=torch.bool, device=chunk.keys.device)
        keep[: chunk.sinks] = True
        keep[max(n - max(self.recent, chunk.recent), 0) :] = True
        return chunk.alive & keep

    def expired(self, held: Held) -> Tensor | None:
        excess = (held.tokens - held.sinks - self.recent).clamp_min(0) // held.page_size
        return torch.arange(int(held.pages.max()), device="cpu") < excess.minimum(held.pages)[:, None]
