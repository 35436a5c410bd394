"""The exact window: the first and the most recent tokens of every stream, kept in the model's dtype."""

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
    `window(sliding=dense)`, which says nothing of these. A stack with a quantizer packs a model's layers with a sliding
    window, too; policies and selectors leave them alone.

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
    }

    sinks: int = arg(0, "first tokens kept in full precision")
    recent: int = arg(0, "last tokens kept in full precision")
    sliding: str = arg(PACKED, "layers with a sliding window: packed by the quantizer, or dense, the engine's own")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(self.sinks >= 0, "sinks", "zero or positive")
        self.check(self.recent >= 0, "recent", "zero or positive")
        self.check(self.sliding in (PACKED, DENSE), "sliding", f"{PACKED} or {DENSE}")

    @property
    def implied(self) -> tuple[str, ...]:
        if self.sliding == PACKED:  # of old, when there was no choice: hashes stay
            return ("sliding",)
        return () if self.sets else ("sinks", "recent")

    @property
    def sets(self) -> bool:
        """Whether it says how many tokens are kept."""
        return self.sliding == PACKED or bool(self.sinks or self.recent)
