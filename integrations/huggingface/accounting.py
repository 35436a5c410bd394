"""What caches hold and what their last step read: the figures of `CompressedCache.memory`, `traffic` and `report`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache

from kvcomp.errors import KvcompError
from kvcomp.ledger import MIB, Memory, Traffic, add_parts, storage_bytes
from kvcomp.stages.stack import Stack

from .layer import CompressedLayer


def compressed(cache: Cache) -> list[CompressedLayer]:
    """The layers of a cache that a stack compresses."""
    return [layer for layer in cache.layers if isinstance(layer, CompressedLayer)]


def library(cache: Cache) -> list[Tensor]:
    """Tensors of the layers that are the library's own, and what ours hold as those would."""
    own = [layer.library() if isinstance(layer, CompressedLayer) else vars(layer) for layer in cache.layers]
    return list(_tensors(own))


def memory_of(caches: Sequence[Cache]) -> Memory:
    """What caches hold together: what forks share counts once, while dense is what they would hold without sharing."""
    seen: set[int] = set()
    layers = [layer for cache in caches for layer in compressed(cache)]
    parts = [layer.held(seen) for layer in layers]
    packed = sum(sum(p.values()) for p in parts)
    dense = [layer.dense_bytes for layer in layers]
    elements = sum(n // x.dtype.itemsize for n, x in zip(dense, layers, strict=True) if x.is_initialized)
    rest = storage_bytes((tensor for cache in caches for tensor in library(cache)), seen)
    return Memory(
        held=packed + rest,
        dense=sum(dense)
        + sum(storage_bytes(library(cache)) for cache in caches)
        + sum(layer.decoded_library()[1] for layer in layers),
        effective_bits=8 * packed / elements if elements else 0.0,
        parts=add_parts([*parts, {"library": rest}]),
    )


def traffic(cache: Cache) -> Traffic:
    """See `CompressedCache.traffic`."""
    layers = compressed(cache)
    found = [layer.read() for layer in layers]
    if not any(read for read, _ in found):
        raise KvcompError("no decode step has read this cache yet: generate at least one token from it first")
    rest = storage_bytes(_tensors([vars(layer) for layer in cache.layers if not isinstance(layer, CompressedLayer)]))
    index = sum(x.nbytes for layer in layers for x in layer.library())  # without the room after them
    copied, saved = (sum(sizes) for sizes in zip(*(layer.decoded_library() for layer in layers), strict=True))
    rows = {"library": rest, "index keys": index, "dense copy": copied}
    parts = add_parts([*(read for read, _ in found), rows])
    rest += index + saved
    return Traffic(read=sum(parts.values()), dense=sum(dense for _, dense in found) + rest, parts=parts)


def report(cache: Cache, stack: Stack, config: PreTrainedConfig | None) -> str:
    """See `CompressedCache.report`."""
    memory, ours = memory_of([cache]), compressed(cache)
    lines = [
        f"{stack}",
        f"  tokens  {int(cache.get_seq_length())} x {max(cache.batch_size, 0)} rows, "
        f"{len(ours)} of {len(cache.layers)} layers compressed",
        f"  held    {memory.held / MIB:9.2f} MiB  {memory.ratio:5.2f}x smaller than dense, "
        f"{memory.effective_bits:.2f} effective bits",
        "          " + ", ".join(f"{name} {size / MIB:.2f}" for name, size in memory.parts.items()),
    ]
    limit = getattr(config, "original_max_position_embeddings", None)
    if limit is not None and 0 < int(cache.get_seq_length()) <= limit:
        lines.append(
            f"  note    when a text grows past {limit} tokens, transformers drops this cache and goes on with one "
            "of its own (longrope): these figures are from before"
        )
    if any(layer.read()[0] for layer in ours):
        last = traffic(cache)
        lines += [
            f"  read    {last.read / MIB:9.2f} MiB  {last.ratio:5.2f}x less than dense in the last step",
            "          " + ", ".join(f"{name} {size / MIB:.2f}" for name, size in last.parts.items()),
        ]
    return "\n".join(lines)


def _tensors(thing: Any) -> Iterator[Tensor]:
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, dict):
        for value in thing.values():
            yield from _tensors(value)
    elif isinstance(thing, list | tuple):
        for value in thing:
            yield from _tensors(value)
