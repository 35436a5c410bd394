"""An eviction policy of one's own is a score: here, tokens whose values are long are kept.

from kvcomp import KIVI, CompressedCache
cache = CompressedCache(LongValues(keep=0.5) + KIVI(bits=4), model)  # or "long_values(keep=0.5) + kivi(bits=4)"
"""

from dataclasses import dataclass

from torch import Tensor

from kvcomp.stages import Chunk, ScoredPolicy, arg, register


@register("long_values")
@dataclass(frozen=True)
class LongValues(ScoredPolicy):
    """Keeps the tokens with the longest values: score_j = |v_j|^power. Ours, an example."""

    power: float = arg(1.0, "exponent of the norm")

    def scores(self, chunk: Chunk) -> Tensor:
        """[b, Hkv, n] of values [b, Hkv, n, Dv]."""
        norms: Tensor = chunk.values.float().norm(dim=-1)
        return norms**self.power
