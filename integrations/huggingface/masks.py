"""Attention masks: what they say of new and of cached tokens, and how not to build the large ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function

from kvcomp.attention import causal
from kvcomp.errors import UnsupportedError


class Seen(NamedTuple):
    """What a forward's mask says of n new tokens and those before."""

    valid: Tensor | None  # bool [B or 1, n]: which new tokens are no padding; None for all
    visible: Tensor | None  # bool [B or 1, n, n]: which new tokens each query sees; None for those up to its own
    past: Tensor | None  # int64 [B or 1, n or 1]: how many earlier tokens each query sees; None for all
    shown: Tensor | None = None  # bool [B or 1, past]: the earlier tokens that all queries see; None where they differ


_read_masks: WeakIdKeyDictionary = WeakIdKeyDictionary()  # one forward hands the same mask to every layer


def read_mask(mask: Tensor | None, past: int, n: int) -> Seen:
    """Interpret the mask of n queries behind `past` cached columns: None, [B, past + n], or [B, 1, n, past + n].

    Raises:
        UnsupportedError: an additive bias, or a mask that differs between heads.
    """
    if mask is None:
        return Seen(None, None, None)
    known = _read_masks.get(mask)
    if known is not None and known[0] == (past, n):
        return known[1]
    if mask.shape[-1] != past + n:
        raise UnsupportedError(f"attention mask of length {mask.shape[-1]} for {past} cached and {n} new tokens")
    if mask.dtype == torch.bool or mask.dim() == 2:
        allowed = mask.bool()
    else:
        low = torch.finfo(mask.dtype).min / 2
        allowed = mask > low
        if bool((allowed & (mask != 0)).any()):
            raise UnsupportedError("the attention mask adds a position bias to the logits, which compressed pages lack")
    if allowed.dim() == 2:
        valid = allowed[:, past:].clone()  # no view: what is remembered must not keep the mask alive
        visible, earlier = causal(n, mask.device) & valid[:, None], allowed[:, :past]
        seen = Seen(valid, visible, earlier.sum(-1, keepdim=True), earlier.clone())
    elif allowed.shape[1] == 1:
        rows = allowed[:, 0]  # [B, n, past + n]
        earlier, last = rows[:, :, :past], rows[:, -1, :past]
        shown = last.clone() if bool((earlier == last[:, None]).all()) else None
        seen = Seen(rows[:, -1, past:].clone(), rows[:, :, past:].clone(), earlier.sum(-1), shown)
    else:
        raise UnsupportedError(f"attention mask {tuple(mask.shape)} differs between heads")
    _read_masks[mask] = ((past, n), seen)
    return seen


def _takes_rows(config: Any) -> bool:
    """Whether the model takes rows of its masks, for layers that share keys and values: those have to be whole."""
    return "reuse" in (getattr(config, "kv_sharing_modes", None) or ())


def mask_function(base: str) -> Callable[..., Any]:
    own: Any = AttentionMaskInterface._global_mapping[base]

    def kvcomp_mask(
        batch_size: int,
        q_length: int,
        kv_length: int,
        q_offset: int = 0,
        kv_offset: int = 0,
        mask_function: Callable[..., Any] = causal_mask_function,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor | None:
        """A causal chunk behind a cache needs no q x kv mask: only the padding is passed on. Everything else as the
        base does, and where the model itself reads the mask; of a cache with idle room behind the chunk it is whole."""
        if q_length > 1 and kv_offset + kv_length > q_offset + q_length:
            kwargs["allow_is_causal_skip"] = False
        ours = mask_function is causal_mask_function and kwargs.get("allow_is_causal_skip", True)
        ours = ours and not _takes_rows(kwargs.get("config"))
        if ours and q_length > 1 and q_offset > 0 and kv_offset == 0:
            return attention_mask
        return own(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            **kwargs,
        )

    return kvcomp_mask
