"""The exact window: the first and the most recent tokens of every stream, in the model's dtype or a smaller one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from .arguments import Alias
from .registry import register
from .stage import Stage, arg

PACKED, DENSE = "packed", "dense"


@register("window")
@dataclass(frozen=True)
class Window(Stage):
    """Tokens kept exactly: the first `sinks` and the last `recent` (up to one page more until the page is full).

    Without this stage a stack takes the window its methods publish (KIVI: 128 recent tokens), and so it does with
    `window(sliding=dense)` or `window(bits=8)`, which say nothing of these. A stack with a quantizer packs a model's
    layers with a sliding window, too; policies and selectors leave them alone.

    `bits` make the tokens smaller. 16: float16 where the model's dtype is wider. 8: codes per token, with a float16
    scale for each 32 channels, of values and of keys less a mean key; every step decodes them. The keys of a model's
    own indexer are then held in such codes, too.

    Papers: arXiv 2309.17453, 2402.02750.
    """

    family: ClassVar[str] = "window"
    paper: ClassVar[str] = "arXiv:2309.17453, arXiv:2402.02750"
    aliases: ClassVar[Mapping[str, str | Alias]] = {
        "residual_length": "recent",  # KIVI, transformers' QuantizedCache
        "window_size": "recent",
        "recent_size": "recent",  # StreamingLLM, as start_size
        "start_size": "sinks",
        "n_sink": "sinks",
        "nbits": "bits",
    }

    sinks: int = arg(0, "first tokens kept in full precision")
    recent: int = arg(0, "last tokens kept in full precision")
    sliding: str = arg(PACKED, "layers with a sliding window: packed by the quantizer, or dense, the engine's own")
    bits: int | None = arg(None, "16 or 8 for each number of these tokens; None: the model's dtype")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(self.sinks >= 0, "sinks", "zero or positive")
        self.check(self.recent >= 0, "recent", "zero or positive")
        self.check(self.bits in (None, 16, 8), "bits", "16, 8 or None")
        self.check(self.sliding in (PACKED, DENSE), "sliding", f"{PACKED} or {DENSE}")

    @property
    def implied(self) -> tuple[str, ...]:
        new = {"sliding": self.sliding == PACKED, "bits": self.bits is None}  # hashes of before there were any stay
        counts = () if self.sets else ("sinks", "recent")
        return (*(name for name, default in new.items() if default), *counts)

    @property
    def sets(self) -> bool:
        """Whether it says how many tokens are kept."""
        return (self.sliding == PACKED and self.bits is None) or bool(self.sinks or self.recent)
