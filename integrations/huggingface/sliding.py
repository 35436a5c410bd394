"""Layers with a sliding window, packed by the stack's quantizer: pages leave when the window has passed them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from kvcomp.cache import sliding
from kvcomp.cache.layer import Shared
from kvcomp.stages.plan import LayerPlan

from .arriving import refuse_nothing
from .handles import Call
from .layer import CompressedLayer
from .masks import Seen, read_mask
from .rows import follow_window

MANY = 32  # queries: for more it is no slower to decode the window, on a CPU
_known: WeakIdKeyDictionary = WeakIdKeyDictionary()  # one forward shows the same mask to every layer


class SlidingLayer(CompressedLayer):
    """A layer whose queries see the last `sliding_window` columns, their own included.

    A decode step attends to pages and exact tokens, as in layers of full attention, less what its window has passed,
    and so do drafts. Larger chunks, and those with padding, are attended to by the model's own attention, after the
    window in full: no more than so many tokens, of which every query sees others.
    """

    is_sliding = True

    def __init__(
        self,
        plan: LayerPlan,
        max_tokens: int | None,
        prefill_chunk: int | None = None,
        choices: dict[int, Shared] | None = None,
    ) -> None:
        assert plan.sliding is not None
        self.sliding_window = plan.sliding
        super().__init__(plan, max_tokens, prefill_chunk, choices)

    def columns(self, past: int) -> int:
        return min(past, self.sliding_window - 1)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        refuse_nothing(query_length)
        past = self.get_seq_length()
        held = self.columns(past)
        return held + query_length, past - held

    def get_max_length(self) -> int:
        return self.sliding_window

    def expands(self, n: int, tracked: bool, valid: Tensor | None = None, seen: Seen | None = None) -> bool:
        if tracked or valid is not None or n > MANY or not sliding.shows(self.store, n):
            return True
        return n > 1 and seen is not None and seen.facts is not None and not self._windowed(seen.facts.counts, n)

    def _windowed(self, past: Tensor, n: int) -> bool:
        """Whether the last m of n queries see as many tokens as the window has, by their mask: int64 [B or 1, m]. That
        of Moshi shows each of them all columns that transformers' own layer holds."""
        at = self.store.history.length, self.sliding_window
        known = _known.get(past)
        if known is None or known[0] != at:
            wanted = sliding.visible(self.store, n)[:, -past.shape[1] :]
            known = _known[past] = at, bool((past == wanted).all())
        windowed: bool = known[1]
        return windowed

    def in_full(self) -> tuple[Tensor, Tensor]:
        return self.store.padded(self.sliding_window - 1)

    def decoded(self, which: int) -> Tensor:
        return super().decoded(which)[:, :, 1 - self.sliding_window :]

    def shown(self, seen: Seen) -> Tensor | None:
        """What each token sees of itself: the last one may not see the first."""
        return None if seen.visible is None else seen.visible.diagonal(dim1=1, dim2=2)

    def shows_all(self, seen: Seen) -> bool:
        return seen.facts is None or seen.facts.own

    def follow(self, seen: Seen | None, compare: bool) -> None:
        follow_window(self._store, seen, self.columns(self._store.history.length))

    def lend_chunk(self, call: Call, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor | None] | None:
        assert self.pending is not None
        asked, mask = call.query.shape[2], call.mask
        tracked = torch.is_grad_enabled() and (call.tracked or self._tracked())
        seen = read_mask(mask, self.columns(self.store.history.length), keys.shape[2])
        if not self.expands(keys.shape[2], tracked, self.pending.valid, seen):
            return None
        if isinstance(mask, Tensor) and mask.dim() == 4:
            call = call._replace(mask=mask[:, :, -asked:])
        return self._behind(call, keys, values)

    @property
    def _sliding_window_tensor(self) -> Tensor:
        """What transformers' own layer says of its window, where a cache is iterated over."""
        return torch.tensor(self.sliding_window, dtype=torch.int64, device=self.device if self.is_initialized else None)
