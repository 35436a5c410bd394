"""What a step of fixed size asserts of its mask and of its room, once for all layers of a cache."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from kvcomp.errors import KvcompError, UnsupportedError

HIDDEN = (
    "the attention mask hides or shows other cached tokens than those that were written as no padding; "
    "compressed pages cannot follow a mask that changes later"
)
_checked: WeakIdKeyDictionary = WeakIdKeyDictionary()  # masks: caches whose layers have looked at one, and which did


def check(
    mask: Tensor | None, length: Tensor, seen: Tensor, tokens: int, host: bool, layer: int, cache: object
) -> None:
    """Assert that a row of `length` [] columns is shorter than its `tokens`, and that a mask [B or 1, 1, 1, N],
    bool or additive, shows as many of them as were `seen` [B], and the new one.

    host: whether the host may look; where not, the device stops at an assertion. All layers of a cache hold the same
    columns, so that the first one that is given a mask in a step looks at it.

    Raises:
        KvcompError: the row is full.
        UnsupportedError: a mask that shows other tokens.
    """
    if not host and mask is not None and _known(mask, layer, cache):
        return
    room = f"the cache has room for preallocate={tokens} tokens per row, and all is taken: ask for more"
    _require(length < tokens, KvcompError, room, host)
    if mask is not None:
        allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        _require((allowed.flatten(1).sum(-1) == seen + 1).all(), UnsupportedError, HIDDEN, host)


def _known(mask: Tensor, layer: int, cache: object) -> bool:
    """Whether another layer of the cache has looked at this mask in this step: since this one did, or it changed."""
    caches: dict[int, tuple[object, int | None, set[int]]] = _checked.setdefault(mask, {})
    version = None if mask.is_inference() else mask._version
    known = caches.get(id(cache))
    if known is None or known[1] != version or layer in known[2]:
        caches[id(cache)] = cache, version, {layer}
        return False
    known[2].add(layer)
    return True


def _require(fulfilled: Tensor, error: type[KvcompError], message: str, host: bool) -> None:
    if not host:
        torch._assert_async(fulfilled, message)
    elif not fulfilled:
        raise error(message)
