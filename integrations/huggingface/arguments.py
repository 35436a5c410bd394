"""Arguments of a cache's methods, checked before anything changes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from operator import index
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from kvcomp.errors import KvcompError
from kvcomp.state import described
from kvcomp.text import quote

from .held import HeldLayer

IDS = (torch.int64, torch.int32)


def is_count(value: Any, least: int = 1) -> bool:
    """Whether a value is a whole number of at least `least`; True and False are none."""
    try:
        return not isinstance(value, bool) and index(value) >= least
    except TypeError:
        return False


def token_ids(asked: str, ids: Any, least: int = 1) -> Tensor:
    """Ids [B, n] of at least one row and `least` tokens.

    Raises:
        KvcompError: they are none; `asked` is the call as the message shows it, up to the ids.
    """
    said = tuple(ids.shape) if isinstance(ids, Tensor) else quote(ids)
    tokens = "one token" if least == 1 else f"{least} tokens"
    if not isinstance(ids, Tensor) or ids.dim() != 2 or not len(ids) or ids.shape[1] < least:
        raise KvcompError(f"{asked}{said}): expected [B, n] with at least {tokens}")
    if ids.dtype not in IDS:
        raise KvcompError(f"{asked}{said} of {ids.dtype}): expected int64 or int32")
    return ids


class CheckedRows(Cache):
    """A cache whose rows are chosen by numbers of rows that it has."""

    def reorder_cache(self, beam_idx: Tensor) -> None:
        rows: Any = self._rows("reorder_cache", beam_idx, 0)  # int64, which transformers annotates as LongTensor
        super().reorder_cache(rows)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(self._rows("batch_select_indices", indices, None))

    def batch_repeat_interleave(self, repeats: int) -> None:
        if not is_count(repeats, 0):
            raise KvcompError(f"batch_repeat_interleave({quote(repeats)}): expected a whole number, 0 or more")
        super().batch_repeat_interleave(index(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        if not is_count(tokens_to_remove, -sys.maxsize) or tokens_to_remove > 0:
            told = "pass a negative number, the tokens to remove from the end"
            raise KvcompError(f"crop({quote(tokens_to_remove)}): {told}")
        super().crop(index(tokens_to_remove))

    def _rows(self, asked: str, rows: Tensor | Sequence[int], lowest: int | None) -> Tensor:
        """Numbers of rows, or which rows as bool [B], as they were given. lowest: of one; None: -1 is the last row.

        Raises:
            KvcompError: rows that the cache does not have, or no numbers of rows.
        """
        held = next((x.batch_size for x in self.layers if isinstance(x, HeldLayer) and x.is_initialized), None)
        try:
            given = rows if isinstance(rows, Tensor) else torch.tensor(rows, dtype=torch.int64, device="cpu")
        except (TypeError, ValueError, RuntimeError, OverflowError):
            raise KvcompError(f"{asked}({quote(rows)}): expected numbers of rows, int64 [n]") from None
        found = given.detach().cpu()
        if found.dim() != 1 or found.is_floating_point() or found.is_complex():
            raise KvcompError(f"{asked}({described(given)}): expected numbers of rows, int64 [n]")
        if held is None or not len(found):
            return given
        low = -held if lowest is None else lowest
        fits = len(found) == held if found.dtype == torch.bool else bool(low <= found.min() and found.max() < held)
        if not fits:
            raise KvcompError(f"{asked}({quote(found.tolist())}): the cache holds {held} rows")
        return given
