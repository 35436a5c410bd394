"""Attention masks: what they say of new and of cached tokens, and how not to build the large ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_mask
from torch.utils.weak import WeakIdKeyDictionary
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function

from kvcomp.attention import causal
from kvcomp.errors import UnsupportedError
from kvcomp.state import FLOATS, described


class Facts(NamedTuple):
    """What layers ask of a mask, on the host: one copy from the device for all of them."""

    counts: Tensor  # int64 [B or 1, n or 1]: how many earlier tokens each query sees
    whole: bool  # no new token is padding
    own: bool  # each new token sees itself
    first: bool  # the first query sees all earlier tokens


class Seen(NamedTuple):
    """What a forward's mask says of n new tokens and those before."""

    valid: Tensor | None  # bool [B or 1, n]: which new tokens are no padding; None for all
    visible: Tensor | None  # bool [B or 1, n, n]: which new tokens each query sees; None for those up to its own
    past: Tensor | None  # int64 [B or 1, n or 1]: how many earlier tokens each query sees; None for all
    shown: Tensor | None = None  # bool [B or 1, past]: the earlier tokens that all queries see; None where they differ
    first: Tensor | None = None  # bool [B or 1, past]: those that the first query sees; None for all
    facts: Facts | None = None  # None where all of the above are


BIASED = "the attention mask adds a position bias to the logits, which compressed pages lack"
Mask = Tensor | BlockMask  # [B, N], [B, 1 or Hq, n, N], or flex attention's
_read_masks: WeakIdKeyDictionary = WeakIdKeyDictionary()  # one forward hands the same mask to every layer
_on_host: WeakIdKeyDictionary = WeakIdKeyDictionary()
_causal_masks: WeakIdKeyDictionary = WeakIdKeyDictionary()  # causal masks of ours: their padding [B, N], in a tuple


def on_host(x: Tensor) -> Tensor:
    """A part of what a mask says, copied from the device once for all layers."""
    if x.is_cpu:
        return x
    found: Tensor | None = _on_host.get(x)
    if found is None:
        found = _on_host[x] = x.cpu()
    return found


def dense_mask(mask: BlockMask) -> Tensor:
    """What a block mask shows, bool [B, H, n, N].

    Raises:
        UnsupportedError: a part of another block mask, which no longer tells which tokens its blocks show.
    """
    try:
        rows, heads, n, length = mask.shape
        shown = create_mask(mask.mask_mod, rows, heads, n, length, device=mask.kv_indices.device)
    except (RuntimeError, NotImplementedError) as error:
        raise UnsupportedError(
            f"attention_mask=BlockMask{tuple(mask.shape)}: its mask_mod does not say which tokens it shows ({error}); "
            "pass a block mask from create_block_mask, or a tensor"
        ) from None
    q_block, kv_block = mask.BLOCK_SIZE

    def blocks(x: Tensor) -> Tensor:
        return x.bool().repeat_interleave(q_block, -2).repeat_interleave(kv_block, -1)[..., :n, :length]

    shown = shown & blocks(mask.to_dense())
    if mask.full_kv_num_blocks is not None and mask.full_kv_indices is not None:
        # flex attention does not ask mask_mod there
        whole = BlockMask.from_kv_blocks(mask.full_kv_num_blocks, mask.full_kv_indices, BLOCK_SIZE=mask.BLOCK_SIZE)
        shown = shown | blocks(whole.to_dense())
    return shown


def read_mask(mask: Mask | None, past: int, n: int) -> Seen:
    """Interpret the mask of n queries after `past` cached columns: None, [B, past + n], [B, 1, n, past + n], or a
    block mask of that shape.

    Raises:
        UnsupportedError: an additive bias, or a mask that differs between heads.
    """
    if mask is not None and (padding := _causal_masks.get(mask)) is not None:
        (mask,) = padding
    if mask is None:
        return Seen(None, None, None)
    known = _read_masks.get(mask)
    if known is not None and known[0] == (past, n):
        seen: Seen = known[1]
        return seen
    if mask.shape[-1] != past + n:
        raise UnsupportedError(f"attention mask of length {mask.shape[-1]} for {past} cached and {n} new tokens")
    biased: Tensor | None = None
    if isinstance(mask, BlockMask):
        allowed = dense_mask(mask)
    elif mask.dtype == torch.bool or mask.dim() == 2:
        allowed = mask.bool()
    elif mask.dtype not in FLOATS:
        raise UnsupportedError(
            f"attention_mask: {described(mask)}: expected bool, True where a token is seen, or a dtype that computes, "
            "whose numbers are added to the logits"
        )
    else:
        allowed = mask > torch.finfo(mask.dtype).min / 2
        biased = (allowed & (mask != 0)).any()
        if allowed.shape[1] != 1 and bool(biased):
            raise UnsupportedError(BIASED)
    if allowed.dim() == 2:
        valid = allowed[:, past:].clone()  # no view: what is remembered must not keep the mask alive
        visible, first = causal(n, allowed.device) & valid[:, None], allowed[:, :past].clone()
        shown, counts, same = first, first.sum(-1, keepdim=True), None
    elif allowed.shape[1] == 1:
        rows = allowed[:, 0]  # [B, n, past + n]
        earlier, last = rows[:, :, :past], rows[:, -1, :past]
        valid, visible = rows[:, -1, past:].clone(), rows[:, :, past:].clone()
        first, shown, counts = earlier[:, 0].clone(), last.clone(), earlier.sum(-1)
        same = (earlier == last[:, None]).all() if n > 1 else None
    else:
        raise UnsupportedError(f"attention mask {tuple(mask.shape)} differs between heads")
    asked = valid.all(), visible.diagonal(dim1=1, dim2=2).all(), first.all(), biased, same
    flags = torch.stack([asked[0] if x is None else x for x in asked])
    known_here = torch.cat([flags.long(), counts.flatten()]).cpu()  # one copy for all, and for all layers
    whole, own, every, *others = map(bool, known_here[: len(asked)].tolist())
    if biased is not None and others[0]:
        raise UnsupportedError(BIASED)
    facts = Facts(known_here[len(asked) :].view(counts.shape), whole, own, every)
    seen = Seen(valid, visible, counts, shown if same is None or others[1] else None, first, facts)
    _read_masks[mask] = ((past, n), seen)
    return seen


def columns(mask: Mask | None, length: int) -> Tensor | None:
    """A single query's mask over `length` columns, as [B, 1, 1, length]; what [B, N] does not reach is hidden."""
    if isinstance(mask, BlockMask):
        return dense_mask(mask)
    if mask is None or mask.dim() == 4:
        return mask
    return torch.nn.functional.pad(mask.bool(), (0, length - mask.shape[1]))[:, None, None]


def chunk_mask(base: str, query: Tensor, length: int, padding: Any, whole: bool = False) -> Any:
    """The mask of causal queries [B, Hq, n, D], the newest of `length` tokens, in the form of implementation `base`.

    padding: bool [B, length], False where padding; None for none. whole: also where attention knows it without.
    """
    own: Any = AttentionMaskInterface._global_mapping.get(base)
    if own is None:
        return padding
    n = query.shape[2]
    return own(
        batch_size=query.shape[0],
        q_length=n,
        kv_length=length,
        q_offset=length - n,
        attention_mask=padding,
        allow_is_causal_skip=not whole,
        dtype=query.dtype,
        device=query.device,
    )


@torch.compiler.disable
def _no_padding(rows: int, length: int, device: torch.device) -> Tensor:
    """bool [rows, length]: None would say to attention that its own arguments decide what is seen."""
    mask = torch.ones(rows, length, dtype=torch.bool, device=device)
    _causal_masks[mask] = (None,)
    return mask


def _takes_rows(config: Any) -> bool:
    """Whether the model takes rows of its masks, for layers that share keys and values: those have to be whole."""
    return "reuse" in (getattr(config, "kv_sharing_modes", None) or ())


def mask_function(base: str) -> Callable[..., Any]:
    """The mask function of a hooked model whose implementation is `base`."""
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
    ) -> Mask | None:
        """A causal chunk after a cache needs no q x kv mask: only the padding is passed on, [B, kv].

        Everything else as the base does, and where the model itself reads the mask; of a cache with idle memory after
        the chunk it is whole.
        """
        if q_length > 1 and kv_offset + kv_length > q_offset + q_length:
            kwargs["allow_is_causal_skip"] = False
        ours = mask_function is causal_mask_function and kwargs.get("allow_is_causal_skip", True)
        ours = ours and not _takes_rows(kwargs.get("config"))
        if ours and q_length > 1 and q_offset > 0 and kv_offset == 0:
            return (
                attention_mask if attention_mask is not None else _no_padding(batch_size, kv_length, kwargs["device"])
            )
        made: Mask | None = own(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            **kwargs,
        )
        told = attention_mask is None or attention_mask.shape[1] == kv_length
        if ours and told and isinstance(made, BlockMask) and kv_offset == 0:
            _causal_masks[made] = (attention_mask,)
        return made

    return kvcomp_mask
