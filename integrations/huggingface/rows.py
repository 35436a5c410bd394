"""How a later attention mask changes what rows hold: a row that ended early goes on without its padding."""

from __future__ import annotations

import torch

from kvcomp.cache.history import History
from kvcomp.cache.layer import LayerStore
from kvcomp.errors import UnsupportedError

from .masks import Seen

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
    if seen is None or seen.past is None:
        refuse_unmasked(history)
        return
    if not bool((seen.past.cpu() != history.counts[:, None]).any()) and not compare:
        return
    past = history.length
    valid, shown = history.valid(), None if seen.shown is None else seen.shown.cpu()
    held = torch.ones(len(history.counts), past, dtype=torch.bool, device="cpu") if valid is None else valid
    if shown is None or bool((shown & ~held).any()):
        raise UnsupportedError(
            "the attention mask hides or shows other cached tokens than those that were written as no padding; "
            f"compressed pages cannot follow a mask that changes later: {WAY_ON}"
        )
    gone = held & ~shown
    if bool(gone.any()):
        first = torch.where(gone.any(1), gone.int().argmax(1), past)
        stay = held & ~gone & (torch.arange(past, device="cpu") > first[:, None])
        if bool(stay.any()):
            row = int(stay.any(1).int().argmax())
            raise UnsupportedError(
                f"the attention mask hides or shows other cached tokens than those that were written as no padding: in "
                f"row {row} it hides tokens before some that it shows, and only the newest of a row can be dropped: "
                f"{WAY_ON}"
            )
        store.drop_newest(gone)
