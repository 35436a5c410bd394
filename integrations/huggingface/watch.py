"""What a model is called with, as far as its caches have to know: ids, positions and the mask."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from kvcomp.errors import KvcompError, UnsupportedError

from .arguments import token_ids
from .layer import CompressedLayer
from .rows import refuse_unmasked
from .turns import Turns, common_prefix

NAMES = ("past_key_values", "cache")  # of the cache among a forward's arguments


def watch(model: torch.nn.Module) -> None:
    """From now on caches look at what the model is called with before its first layer runs."""
    if not any(hook is _look for hook in model._forward_pre_hooks.values()):
        model.register_forward_pre_hook(_look, with_kwargs=True)


def unwatch(model: torch.nn.Module) -> None:
    """Undo `watch`."""
    for number, hook in list(model._forward_pre_hooks.items()):
        if hook is _look:
            del model._forward_pre_hooks[number]
            model._forward_pre_hooks_with_kwargs.pop(number, None)


def _look(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Tell the cache of a forward which ids come, and let it refuse positions before anything is written."""
    if torch.compiler.is_compiling():
        return
    cache: Any = next((kwargs[name] for name in NAMES if kwargs.get(name) is not None), None)
    layer = next((x for x in getattr(cache, "layers", ()) if isinstance(x, CompressedLayer)), None)
    if layer is None or layer.turns is None:
        return
    turns, ids = layer.turns, kwargs.get("input_ids", args[0] if args else None)
    turns.announce(ids)
    turns.entered = True
    positions, mask = kwargs.get("position_ids"), kwargs.get("attention_mask")
    if isinstance(positions, Tensor) and positions.dim() == 3 and positions.shape[0] == 4:
        positions = positions[0]  # those of the text, before those of images in time, height and width
    if not isinstance(positions, Tensor) or positions.dim() != 2:
        return
    n = positions.shape[1]
    if n == 1 and not turns.asked and positions.device.type != "cpu":
        return
    valid = shown = None
    again = layer.record_past and n > 1 and n >= int(layer.get_seq_length()) > 0
    if again and int(positions[0, 0]) == 0:  # assisted decoding feeds all of a second turn again
        cache.reset()
    counts, columns = layer.counted()
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] == columns + n:
        valid, shown = mask[:, columns:].bool(), mask[:, :columns].bool().sum(-1)
    elif mask is None and columns and layer.pending is None:
        refuse_unmasked(layer._store.history)
    if layer.is_initialized:
        turns.check(positions, counts, columns, valid, shown)
    elif positions.shape[0] == (rows := len(positions if ids is None else ids)):
        turns.check(positions, torch.zeros(rows, dtype=torch.int64, device="cpu"), 0, valid, shown)


def turns_of(cache: Cache) -> Turns | None:
    """The record of ids and positions that a cache keeps, where it does."""
    return next((layer.turns for layer in cache.layers if isinstance(layer, CompressedLayer)), None)


def reuse(cache: Cache, input_ids: Tensor, held: Tensor | None) -> int:
    """See `CompressedCache.reuse`."""
    token_ids("reuse(input_ids=", input_ids)
    if held is not None:
        token_ids("reuse(held=", held)
    turns, columns = turns_of(cache), int(cache.get_seq_length())
    if columns == 0:
        return 0
    if held is None and turns is not None:
        held = turns.held(columns)
    if held is None:
        raise KvcompError(
            "reuse(held=None): the cache has no record of the ids of all its tokens: pass held=, the ids that were fed "
            "to it and generated from it"
        )
    rows = next(x.batch_size for x in cache.layers if isinstance(x, CompressedLayer))
    for name, ids in (("input_ids", input_ids), ("held", held)):
        if ids.dim() != 2 or ids.shape[0] != rows or (name == "held" and ids.shape[1] < columns):
            least = f", at least {columns}" if name == "held" else ""
            raise KvcompError(
                f"reuse({name}={tuple(ids.shape)}): expected the ids of the {rows} rows that the cache holds, "
                f"[{rows}, n{least}]"
            )
    keep = min(common_prefix(input_ids.to(held.device), held[:, :columns]), input_ids.shape[1] - 1)
    if not keep or not _crop(cache, columns - keep):
        cache.reset()
        return 0
    return keep


def _crop(cache: Cache, remove: int) -> bool:
    """Crop all layers; whether that could be done. The cache is good for nothing but `reset` where not."""
    layers = [x for x in cache.layers if isinstance(x, CacheLayerMixin)]
    lengths = {int(x.get_seq_length()) for x in layers}
    if len(lengths) > 1:  # a forward was refused after its first layers ran
        return False
    if not remove:
        return True
    if not cache.is_croppable:
        return False
    try:
        cache.crop(-remove)
    except (UnsupportedError, RuntimeError):
        return False
    return True
