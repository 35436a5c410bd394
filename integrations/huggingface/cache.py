"""`CompressedCache`: a stack as a transformers cache."""

from __future__ import annotations

import weakref
from copy import copy, deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from kvcomp.architecture import obstacle
from kvcomp.cache import saving
from kvcomp.cache.layer import Shared
from kvcomp.cache.saving import FilePath
from kvcomp.errors import KvcompError, UnsupportedError
from kvcomp.files import named
from kvcomp.ledger import Memory, Traffic
from kvcomp.modes import outside_inference
from kvcomp.stages.stack import Stack, StackLike
from kvcomp.text import quote

from ..configs import decoder_config, layer_kinds, max_positions
from .accounting import compressed, library, memory_of, report, traffic
from .arguments import CheckedRows, is_count
from .build import layers_of
from .compact import Compaction, compact
from .fingerprint import fingerprint
from .hook import base_name, hook
from .indexed import IndexerPositions
from .interface import outside_interface
from .layer import CompressedLayer
from .preallocated import PreallocatedLayer
from .saving import (
    check_kinds,
    dense_windows,
    devices_of,
    differences,
    digests,
    essentials,
    layer_state,
    restore_layers,
)
from .surface import Surface
from .watch import reuse, turns_of, unwatch, watch


class CompressedCache(Surface, IndexerPositions, CheckedRows):
    """A stack as the cache of any decoder model whose attention goes through transformers' attention interface.

    Hand it to a forward or to `generate` as `cache=`, or before transformers 5.24 as `past_key_values=`.

    Layers of full attention are compressed, and by stacks with a quantizer those with a sliding window; linear and
    convolutional layers stay the library's own. The model is hooked on construction (its config names kvcomp's
    attention function) and keeps working with every other cache; `detach` undoes that.

    Args:
        stack: a Stack such as SnapKV(keep=0.5) + KIVI(bits=4), a stage, or the spec "snapkv(keep=0.5) + kivi(bits=4)".
        model_or_config: the model, or the very config object that it was built from.
        max_tokens: refuse to grow beyond this many tokens per row; default max_position_embeddings of the config.
        preallocate: reserve memory for so many tokens per row, padding included, when the prompt comes, so that decode
            steps have fixed shapes and addresses: `generate` compiles them on accelerators, as with transformers' own
            static cache, and CUDA graphs can record them. Not for selectors, nor for policies that act while decoding.

    Raises:
        SpecError: a bad spec.
        UnsupportedError: a model whose attention cannot be hooked, or a stack that cannot serve it, or not so.
        KvcompError: a calibration file of another model, or more room than the model has positions.
    """

    def __init__(
        self,
        stack: StackLike,
        model_or_config: PreTrainedModel | PreTrainedConfig,
        max_tokens: int | None = None,
        preallocate: int | None = None,
    ) -> None:
        self.stack = Stack.parse(stack)
        if max_tokens is not None and not is_count(max_tokens):
            raise KvcompError(f"max_tokens={quote(max_tokens)}: expected a positive number of tokens")
        config = self._check(model_or_config)
        for stage in self.stack.stages:
            stage.serves(partial(fingerprint, model_or_config))
        if max_tokens is None:
            max_tokens = max_positions(config)
        layers, self._max_tokens = layers_of(self.stack, config, max_tokens, preallocate), max_tokens
        if isinstance(model_or_config, torch.nn.Module) and any(isinstance(x, CompressedLayer) for x in layers):
            watch(model_or_config)
        hook(config)
        self._config = weakref.ref(config)
        self._model, self._source = essentials(config), weakref.ref(model_or_config)
        super().__init__(layers=layers)

    def _check(self, model_or_config: PreTrainedModel | PreTrainedConfig) -> PreTrainedConfig:
        """The decoder's config, if this stack can serve it."""
        config = getattr(model_or_config, "config", model_or_config)
        if not isinstance(config, PreTrainedConfig):
            told = quote(model_or_config)
            raise KvcompError(f"CompressedCache(model_or_config={told}): expected a transformers model or its config")
        decoder = decoder_config(config)
        alone = outside_interface(model_or_config)
        if alone is not None:
            raise UnsupportedError(
                f"{alone} does not go through transformers' attention interface, so {type(model_or_config).__name__} "
                "cannot be hooked: use the model's own cache"
            )
        if (why := obstacle(layer_kinds(decoder), self.stack)) is not None:
            raise UnsupportedError(f"{decoder.model_type} {why}")
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
            device: where the cache will lie; default where the model's layers do, and the CPU for a config.
            preallocate: as for a new cache.

        Raises:
            KvcompError: no such file, an incomplete or damaged one, or one that holds no cache; the cache of another
                model, dtype, version of the format or meaning of the stack; more tokens than `max_tokens` or
                `preallocate`; no such device.
            SpecError: the stack has stages that are not installed.
        """
        asked = f"load({named(path)}"
        with saving.opened(path) as file:
            saved = file.outline
            cache = cls(saved.stack, model_or_config, max_tokens, preallocate)
            found = differences(saved, cache._model, model_or_config)
            if found:
                raise KvcompError(f"{asked}): the cache is of another model: {', '.join(found)}")
            if dense := dense_windows(saved):  # of versions that left layers with a window to transformers
                config = cache._check(model_or_config)
                cache.layers = layers_of(cache.stack, config, cache._max_tokens, preallocate, dense)
            check_kinds(cache.layers, saved)
            on = devices_of(f"{asked}, device={quote(device)})", model_or_config, device, len(cache.layers))
            restore_layers(cache.layers, file.saved(), on)
        return cache

    def reuse(self, input_ids: Tensor, held: Tensor | None = None) -> int:
        """Make the cache one that `generate(input_ids, past_key_values=cache)` goes on from, whatever it holds now.

        The cache is cropped to the tokens that it has in common with the ids from the start, but for the last one,
        which has to be fed. Where that cannot be done exactly (quantized or evicted tokens, layers that forget), the
        cache is reset, and `generate` feeds all of the ids.

        Args:
            input_ids: [B, n], all ids of the next turn, from the first token of the conversation.
            held: [B, m], the ids that the cache holds, more after them allowed: the output of the last `generate`.
                Needed where the cache did not see or keep them: it was made from a config, loaded from a file, fed
                embeddings, preallocated, or its stack evicts tokens while decoding.

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

    _compressed, _library, _turns = compressed, library, turns_of

    def __repr__(self) -> str:
        rows, ours = max(self.batch_size, 0), len(self._compressed())
        size = f"{rows} x {int(self.get_query_offset())} tokens" if rows else "empty"
        return f"<CompressedCache {self.stack}: {size}, {ours} of {len(self.layers)} layers compressed>"

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
        return traffic(self)

    def report(self) -> str:
        """The figures of `memory` and `traffic` as a few lines of text."""
        return report(self, self.stack, self._config())
