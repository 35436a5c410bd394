"""How a later attention mask changes what rows hold: a row that ended early goes on without its padding."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kvcomp.cache.history import History
from kvcomp.cache.layer import LayerStore
from kvcomp.errors import UnsupportedError

from .masks import Seen, on_host

WAY_ON = "pass the mask of the whole conversation, or reset() the cache and feed it again"


def refuse_unmasked(history: History) -> None:
    """Raise an UnsupportedError where no mask came, which shows all columns, though some hold padding."""
    if history.unpadded:
        return
    if history.total != len(history.counts) * history.length:
        raise UnsupportedError(
            "no attention mask came, or one of ones alone, which shows padding that an earlier mask hid and the cache "
            f"never stored: {WAY_ON}"
        )


def follow_mask(store: LayerStore, seen: Seen | None, compare: bool) -> None:
    """Let a store that holds tokens follow the mask of the next ones, or refuse.

    A row's newest tokens that the mask hides, such as the padding after its end, are dropped. Counts are compared at
    every call, columns where `compare` says so.

    Raises:
        UnsupportedError: the mask shows what an earlier one hid, or hides tokens that cannot be dropped.
    """
    history = store.history
    if seen is None or seen.facts is None:
        refuse_unmasked(history)
        return
    if not bool((seen.facts.counts != history.counts[:, None]).any()) and not compare:
        return
    shown = None if seen.shown is None else on_host(seen.shown)
    _drop_hidden(store, _held(history, history.length), shown)


def follow_window(store: LayerStore, seen: Seen | None, columns: int) -> None:
    """As `follow_mask`, of a mask of the newest `columns` columns, those that the first of the next tokens sees."""
    history = store.history
    first = None if seen is None else seen.first
    if history.unpadded and (seen is None or seen.facts is None or seen.facts.first):
        return
    held = _held(history, columns)
    if first is None and bool((~held).any()):
        refuse_unmasked(history)
    _drop_hidden(store, held, torch.ones_like(held) if first is None else on_host(first))


def _held(history: History, columns: int) -> Tensor:
    """bool [B, columns]: which of the newest columns are no padding."""
    valid = history.valid()
    if valid is None:
        return torch.ones(len(history.counts), columns, dtype=torch.bool, device="cpu")
    return valid[:, history.length - columns :]


def _drop_hidden(store: LayerStore, held: Tensor, shown: Tensor | None) -> None:
    """Drop the tokens of the newest columns that are `held`, bool [B, n], and not `shown`, bool [B or 1, n]."""
    if shown is None or bool((shown & ~held).any()):
        raise UnsupportedError(
            "the attention mask hides or shows other cached tokens than those that were written as no padding; "
            f"compressed pages cannot follow a mask that changes later: {WAY_ON}"
        )
    gone, n = held & ~shown, held.shape[1]
    if bool(gone.any()):
        first = torch.where(gone.any(1), gone.int().argmax(1), n)
        stay = held & ~gone & (torch.arange(n, device="cpu") > first[:, None])
        if bool(stay.any()):
            row = int(stay.any(1).int().argmax())
            raise UnsupportedError(
                f"the attention mask hides or shows other cached tokens than those that were written as no padding: in "
                f"row {row} it hides tokens before some that it shows, and only the newest of a row can be dropped: "
                f"{WAY_ON}"
            )
        store.drop_newest(F.pad(gone, (store.history.length - n, 0)))
