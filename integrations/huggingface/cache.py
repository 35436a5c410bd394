"""`CompressedCache`: a stack as a transformers cache."""

from __future__ import annotations

import os
import warnings
import weakref
from collections.abc import Iterator, Sequence
from copy import copy, deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache

from kvcomp import saving
from kvcomp.errors import KvcompError, KvcompWarning, UnsupportedError
from kvcomp.layer import Shared
from kvcomp.ledger import MIB, Memory, Traffic, add_parts, storage_bytes
from kvcomp.modes import normal_tensors, outside_inference
from kvcomp.saving import FilePath
from kvcomp.stack import Stack

from ..configs import cache_layers, caches_latents, decoder_config, field, library_layer, max_positions
from .compact import Compaction, compact
from .contents import Contents
from .fingerprint import fingerprint
from .hook import base_name, hook
from .indexed import IndexedLayer
from .interface import outside_interface
from .layer import CompressedLayer
from .preallocated import PreallocatedLayer, check_room
from .saving import check_kinds, differences, digests, essentials, layer_state, restore_layers, usable_device
from .turns import Turns
from .watch import reuse, unwatch, watch

OURS = {"full_attention": CompressedLayer, "indexed_attention": IndexedLayer}


class CompressedCache(Cache):
    """A stack as the cache of any decoder model whose attention goes through transformers' attention interface.

    Hand it to a forward or to `generate` as `cache=`, or before transformers 5.24 as `past_key_values=`.

    Full-attention layers are compressed; sliding, linear and convolutional layers stay the library's own. The model is
    hooked on construction (its config names kvcomp's attention function) and keeps working with every other cache;
    `detach` undoes that.

    Args:
        stack: a spec such as "snapkv(keep=0.25) + kivi(bits=2)", or a Stack.
        model_or_config: the model, or the very config object that it was built from.
        max_tokens: refuse to grow beyond this many tokens per row; default max_position_embeddings of the config.
        preallocate: reserve room for so many tokens per row, padding included, when the prompt comes, so that decode
            steps have fixed shapes and addresses: `generate` compiles them on accelerators, as with transformers' own
            static cache, and CUDA graphs can record them. Not for selectors, nor for policies that act while decoding.

    Raises:
        SpecError: a bad spec.
        UnsupportedError: a model whose attention cannot be hooked, or a stack that cannot serve it, or not so.
        KvcompError: a calibration file of another model, or more room than the model has positions.
    """

    def __init__(
        self,
        stack: str | Stack,
        model_or_config: PreTrainedModel | PreTrainedConfig,
        max_tokens: int | None = None,
        preallocate: int | None = None,
    ) -> None:
        self.stack = Stack.parse(stack)
        config = self._check(model_or_config)
        for stage in self.stack.stages:
            stage.serves(partial(fingerprint, model_or_config))
        if max_tokens is None:
            max_tokens = max_positions(config)
        types, kwargs = cache_layers(config)
        if preallocate is not None:
            check_room(config, types, preallocate, max_tokens)
        full = [i for i, kind in enumerate(types) if kind in OURS]
        choices: dict[int, Shared] = {}
        layers: list[Any] = []
        for i, (kind, options) in enumerate(zip(types, kwargs, strict=True)):
            if kind in OURS:
                plan = self.stack.plan(i, len(types), full)
                if preallocate is not None:
                    layers.append(PreallocatedLayer(plan, preallocate, self.stack.prefill_chunk, choices))
                else:
                    layers.append(OURS[kind](plan, max_tokens, self.stack.prefill_chunk, choices))
            else:
                layers.append(library_layer(kind, options))
        if not any(isinstance(layer, CompressedLayer) for layer in layers):
            warnings.warn(
                f"no layer of this {config.model_type} is full attention ({', '.join(sorted(set(types)))}): "
                "nothing is compressed",
                KvcompWarning,
                stacklevel=2,
            )
        modes = field(config, "kv_sharing_modes") or ()
        for layer, mode in zip(layers, modes, strict=False):
            if isinstance(layer, CompressedLayer):
                layer.lends = mode == "store"
        first = next((layer for layer in layers if isinstance(layer, CompressedLayer)), None)
        if first is not None:
            flat = any(policy.expires for policy in self.stack.policies)  # memory that does not grow with the text
            first.turns = Turns(record=not flat and preallocate is None)  # whose steps a graph may take
            if isinstance(model_or_config, torch.nn.Module):
                watch(model_or_config)
        hook(config)
        self._config = weakref.ref(config)
        self._model, self._source = essentials(config), weakref.ref(model_or_config)
        super().__init__(layers=layers)

    def _check(self, model_or_config: PreTrainedModel | PreTrainedConfig) -> PreTrainedConfig:
        """The decoder's config, if this stack can serve it."""
        config = getattr(model_or_config, "config", model_or_config)
        if not isinstance(config, PreTrainedConfig):
            raise KvcompError(
                f"CompressedCache(model_or_config={model_or_config!r}): expected a transformers model or its config"
            )
        decoder = decoder_config(config)
        alone = outside_interface(model_or_config)
        if alone is not None:
            raise UnsupportedError(
                f"{alone} does not go through transformers' attention interface, so {type(model_or_config).__name__} "
                "cannot be hooked: use the model's own cache"
            )
        own = "caches latents (MLA)" if caches_latents(decoder) else None
        if own is None and "indexed_attention" in (field(decoder, "layer_types") or ()):
            own = "chooses tokens by an indexer of its own"
        if own is not None and (self.stack.policies or self.stack.selector):
            names = " and ".join(s.name for s in (*self.stack.policies, self.stack.selector) if s is not None)
            raise UnsupportedError(
                f"{decoder.model_type} {own}, which {names} cannot score yet: use a stack of a quantizer alone"
            )
        return decoder

    def detach(self) -> None:
        """Give the model its own attention back. Caches that are still in use with it stop working."""
        config, model = self._config(), self._source()
        if isinstance(model, torch.nn.Module):
            unwatch(model)
        base = None if config is None else base_name(config._attn_implementation or "")
        if config is not None and base is not None:
            config._attn_implementation = base

    def save(self, path: FilePath) -> None:
        """Write the cache to one safetensors file, whole or not at all; the cache stays as it is. `load` reads it.

        The file's tensors take exactly the bytes that the loaded cache holds, apart from constants that the stack alone
        determines (rotations, codebooks). Of what this cache holds they lack, besides those, only what is idle: free
        pages and those of its forks, spare columns of page tables and their copies on the device, what views leave
        unused, and which pages the last step chose.

        Raises:
            KvcompError: the file cannot be written.
            UnsupportedError: a layer of the library's own holds something else than tensors and plain values.
        """
        dtype = next((str(x.dtype).removeprefix("torch.") for x in self._compressed() if x.is_initialized), "")
        model = {**self._model, **digests(self._source())}
        saving.write(path, saving.Saved(self.stack, dtype, model, [layer_state(x) for x in self.layers]))

    @classmethod
    @outside_inference
    def load(
        cls,
        path: FilePath,
        model_or_config: PreTrainedModel | PreTrainedConfig,
        max_tokens: int | None = None,
        device: torch.device | str | None = None,
        preallocate: int | None = None,
    ) -> CompressedCache:
        """The cache that `save` wrote, with its stack: generation goes on as from the one that was saved.

        The file knows its model by the config and by samples of the weights.

        Args:
            path: the file.
            model_or_config: as for a new cache.
            max_tokens: as for a new cache.
            device: where the cache will lie; default the model's own, and the CPU for a config.
            preallocate: as for a new cache.

        Raises:
            KvcompError: no such file, an incomplete or damaged one, or one that holds no cache; the cache of another
                model, dtype, version of the format or meaning of the stack; more tokens than `max_tokens` or
                `preallocate`; no such device.
            SpecError: the stack has stages that are not installed.
        """
        asked = f"load({os.fspath(path)!r}"
        with saving.opened(path) as file:
            saved = file.outline
            cache = cls(saved.stack, model_or_config, max_tokens, preallocate)
            found = differences(saved, cache._model, model_or_config)
            if found:
                raise KvcompError(f"{asked}): the cache is of another model: {', '.join(found)}")
            check_kinds(cache.layers, saved)
            on = usable_device(f"{asked}, device={device!r})", model_or_config, device)
            restore_layers(cache.layers, file.saved(), on)
        return cache

    def reuse(self, input_ids: Tensor, held: Tensor | None = None) -> int:
        """Make the cache one that `generate(input_ids, past_key_values=cache)` goes on from, whatever it holds now.

        The cache is cropped to the tokens that it has in common with the ids from the start, but for the last one,
        which has to be fed. Where that cannot be done exactly (quantized or evicted tokens, layers that forget), the
        cache is reset, and `generate` feeds all of the ids.

        Args:
            input_ids: [B, n], all ids of the next turn, from the first token of the conversation.
            held: [B, m], the ids that the cache holds, more behind them allowed: the output of the last `generate`.
                Needed where the cache did not see or keep them: it was made from a config, loaded from a file, fed
                embeddings, preallocated, or its stack lets tokens go while decoding.

        Returns:
            how many of the tokens are still in the cache.

        Raises:
            KvcompError: other rows than the cache has, no ids, or no `held` where it is needed.
        """
        return reuse(self, input_ids, held)

    def fork(self) -> CompressedCache:
        """A cache that goes on by itself from what this one holds: one prefill, many continuations.

        The two share the pages that there are; sinks, window, tables and the layers that are the library's own are
        copied. Pages of a fork that is no longer in use are taken by those that are. Forks are not to be used from
        several threads at a time.
        """
        twin, choices = copy(self), dict[int, Shared]()
        twin.layers = [x.fork(choices) if isinstance(x, CompressedLayer) else deepcopy(x) for x in self.layers]
        return twin

    @outside_inference
    def compact(
        self, span: tuple[int, int], input_ids: Tensor, tokenizer: Any, keep: float = 0.1, model: Any = None
    ) -> Compaction:
        """Replace old tokens by fewer ones that attention takes for them, say the first turns of a long chat.

        Of every KV head, a share `keep` of the span's keys stays, with a bias on its logit and a new value, fitted so
        that queries get the output and the weight that all of the span gave them: those of the model while it repeats
        the span, in a pass of its own. They are held in full precision. Sinks, the exact window and pages that reach
        out of the span stay as they are. Attention matching, arXiv 2602.16284.

        Args:
            span: (start, end) among the tokens that the cache holds.
            input_ids: [B, n], all tokens that the cache holds.
            tokenizer: the model's, for the request to repeat.
            keep: share of the span's tokens, between 0 and 1.
            model: the model; needed where the cache was made from a config.

        Raises:
            KvcompError: a span without a whole page, outside of the cache or compacted already, or a bad argument.
            UnsupportedError: a stack with an eviction policy, padded rows, MLA, or a preallocated cache.
        """
        if any(isinstance(layer, PreallocatedLayer) for layer in self.layers):
            raise UnsupportedError("compact(): a preallocated cache has no place for biases: leave preallocate= out")
        source = self._source() if model is None else model
        if not isinstance(source, PreTrainedModel):
            raise KvcompError("compact(model=None): the cache was made from a config, so pass the model")
        return compact(self, source, input_ids, span, keep, tokenizer)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens of a row, padding included. `generate` asks when a turn begins."""
        turns = self._turns()
        if turns is not None:
            turns.asked = True
        return super().get_seq_length(layer_idx)

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return super().get_seq_length(layer_idx)

    def _turns(self) -> Turns | None:
        """The record of ids and positions, where there is one."""
        return next((layer.turns for layer in self.layers if isinstance(layer, CompressedLayer)), None)

    @property
    def position_ids(self) -> Tensor:
        """int64 [dims, B, n]: positions of all tokens, which Qwen4 of transformers 5.19 keeps here if there are any
        already, and later versions in the first indexed layer."""
        held = next((x.indexer_position_ids for x in self.layers if isinstance(x, IndexedLayer)), None)
        if held is None:
            raise AttributeError("position_ids: no model has left any here")
        return held

    @position_ids.setter
    def position_ids(self, positions: Tensor) -> None:
        first = next((x for x in self.layers if isinstance(x, IndexedLayer)), None)
        if first is None:
            raise UnsupportedError(
                "the model leaves position_ids on its cache, which follow crops and files only in layers with an "
                "indexer: use the model's own cache"
            )
        first.indexer_position_ids = positions

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        """Per layer, as of DynamicCache: all keys and values as tensors, and the sliding window where it has one."""
        for layer in self.layers:
            both = getattr(layer, "keys", None), getattr(layer, "values", None)
            keys, values = (x.dense() if isinstance(x, Contents) else x for x in both)
            yield keys, values, getattr(layer, "_sliding_window_tensor", None)

    @property
    def max_cache_len(self) -> int:
        """Only static caches have it; PEFT asks for it where it is about to put a cache of its own in place."""
        raise _NoAttribute(
            "max_cache_len: PEFT's prefix tuning replaces an empty past_key_values by its own cache, so nothing "
            "would be compressed: generate without past_key_values, or use LoRA or prompt tuning"
        )

    def __copy__(self) -> CompressedCache:
        twin = type(self).__new__(type(self))
        vars(twin).update(vars(self))
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> CompressedCache:
        memo[id(self)] = twin = type(self).__new__(type(self))
        with normal_tensors():
            vars(twin).update({name: deepcopy(value, memo) for name, value in vars(self).items()})
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise KvcompError(
            "a CompressedCache cannot be pickled, as it belongs to a model: use cache.save(path) and "
            "CompressedCache.load(path, model)"
        )

    def _compressed(self) -> list[CompressedLayer]:
        return [layer for layer in self.layers if isinstance(layer, CompressedLayer)]

    def _library(self) -> list[Tensor]:
        """Tensors of the layers that are the library's own, and what ours hold as those would."""
        own = [layer.library() if isinstance(layer, CompressedLayer) else vars(layer) for layer in self.layers]
        return list(_tensors(own))

    def memory(self) -> Memory:
        """Bytes held, dense equivalent, effective bits and breakdown of the whole cache as it is now.

        Pages that it shares with forks count in full, also those that only they use: `memory_of` counts them together.
        """
        return memory_of([self])

    def traffic(self) -> Traffic:
        """Bytes of the cache that the last forward over it loaded, beside what a dense cache would have loaded.

        Raises:
            KvcompError: nothing was decoded from this cache yet.
        """
        layers = self._compressed()
        found = [layer.read() for layer in layers]
        if not any(read for read, _ in found):
            raise KvcompError("no decode step has read this cache yet: generate at least one token from it first")
        library = storage_bytes(self._library())
        parts = add_parts([*(read for read, _ in found), {"library": library}])
        return Traffic(read=sum(parts.values()), dense=sum(dense for _, dense in found) + library, parts=parts)

    def report(self) -> str:
        """The figures of `memory` and `traffic` as a few lines of text."""
        memory, ours = self.memory(), self._compressed()
        lines = [
            f"{self.stack}",
            f"  tokens  {int(self.get_seq_length())} x {max(self.batch_size, 0)} rows, "
            f"{len(ours)} of {len(self.layers)} layers compressed",
            f"  held    {memory.held / MIB:9.2f} MiB  {memory.ratio:5.2f}x smaller than dense, "
            f"{memory.effective_bits:.2f} effective bits",
            "          " + ", ".join(f"{name} {size / MIB:.2f}" for name, size in memory.parts.items()),
        ]
        limit = getattr(self._config(), "original_max_position_embeddings", None)
        if limit is not None and 0 < int(self.get_seq_length()) <= limit:
            lines.append(
                f"  note    when a text grows past {limit} tokens, transformers drops this cache and goes on with one "
                "of its own (longrope): these figures are from before"
            )
        if any(layer.read()[0] for layer in ours):
            traffic = self.traffic()
            lines += [
                f"  read    {traffic.read / MIB:9.2f} MiB  {traffic.ratio:5.2f}x less than dense in the last step",
                "          " + ", ".join(f"{name} {size / MIB:.2f}" for name, size in traffic.parts.items()),
            ]
        return "\n".join(lines)


class _NoAttribute(UnsupportedError, AttributeError):
    """An attribute that is missing for a reason."""


def memory_of(caches: Sequence[CompressedCache]) -> Memory:
    """What caches hold together: what forks share counts once, while dense is what they would hold without sharing."""
    seen: set[int] = set()
    layers = [layer for cache in caches for layer in cache._compressed()]
    parts = [layer.held(seen) for layer in layers]
    compressed = sum(sum(p.values()) for p in parts)
    dense = [layer.dense_bytes for layer in layers]
    elements = sum(n // x.dtype.itemsize for n, x in zip(dense, layers, strict=True) if x.is_initialized)
    library = storage_bytes((tensor for cache in caches for tensor in cache._library()), seen)
    return Memory(
        held=compressed + library,
        dense=sum(dense) + sum(storage_bytes(cache._library()) for cache in caches),
        effective_bits=8 * compressed / elements if elements else 0.0,
        parts=add_parts([*parts, {"library": library}]),
    )


def _tensors(thing: Any) -> Iterator[Tensor]:
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, dict):
        for value in thing.values():
            yield from _tensors(value)
    elif isinstance(thing, list | tuple):
        for value in thing:
            yield from _tensors(value)
