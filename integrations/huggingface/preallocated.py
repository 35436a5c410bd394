"""A full-attention layer whose decode steps graphs take whole."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from kvcomp.architecture import LayerKind
from kvcomp.attention import Part
from kvcomp.cache.fixed import FixedStore, why_not
from kvcomp.cache.operator import decode_step
from kvcomp.cache.reader import Shared
from kvcomp.errors import KvcompError, KvcompWarning, UnsupportedError
from kvcomp.ledger import add_parts
from kvcomp.modes import outside_inference, without_gradient
from kvcomp.stages.plan import LayerPlan
from kvcomp.stages.stack import Stack
from kvcomp.text import quote

from ..configs import cache_layers, layer_kinds
from .arguments import is_count
from .handles import Call, Handle, given_dtypes
from .layer import CompressedLayer, Pending, answered
from .masks import columns


def check_room(stack: Stack, config: PreTrainedConfig, tokens: int, max_tokens: int | None) -> None:
    """Raise an error unless a model can have a cache with space for so many tokens, compressed by this stack."""
    if stack.latent is not None:
        raise UnsupportedError(
            f"preallocate={tokens}: steps over latents, which {stack.latent.name} makes, are not of fixed shape here: "
            "leave preallocate= out"
        )
    if not is_count(tokens) or (max_tokens is not None and tokens > max_tokens):
        most = "" if max_tokens is None else f", at most the model's max_position_embeddings={max_tokens}"
        raise KvcompError(f"preallocate={quote(tokens)}: expected a positive number of tokens{most}")
    each = zip(cache_layers(config)[0], layer_kinds(config), strict=True)
    latent = "latent attention (MLA)"
    others = sorted({latent if kind is LayerKind.LATENT else of for of, kind in each if not kind.traits.fixed})
    if others:
        raise UnsupportedError(
            f"preallocate={tokens}: {config.model_type} has other layers than full attention ({', '.join(others)}), "
            "whose steps are not of fixed shape here: leave preallocate= out"
        )
    if "flex_attention" in (config._attn_implementation or ""):
        raise UnsupportedError(
            f"preallocate={tokens}: transformers' generate has no block masks for caches of fixed room: load the model "
            "with attn_implementation='sdpa', or leave preallocate= out"
        )


class PreallocatedLayer(CompressedLayer):
    """A `CompressedLayer` with space for `tokens` columns per row.

    Between forwards all tokens lie in the preallocated store, where single tokens are added and attended to by one
    operator. Whatever else comes, a prompt or surgery, finds them in `store`.
    """

    gathers = False  # steps that graphs take must find the prompt written
    is_compileable = True

    def __init__(
        self, plan: LayerPlan, tokens: int, prefill_chunk: int | None = None, choices: dict[int, Shared] | None = None
    ) -> None:
        plan = plan.within(tokens)
        why = why_not(plan)
        if why is not None:
            raise UnsupportedError(f"preallocate={tokens}: {why}; leave one of the two out")
        self.preallocated = FixedStore(plan, tokens)
        super().__init__(plan, None, prefill_chunk, choices)

    def reset(self) -> None:
        super().reset()
        self.preallocated.live = False

    def activate_past_recording(self) -> None:
        raise UnsupportedError(
            "assisted decoding takes tokens back in every step, which a preallocated cache cannot: leave preallocate= "
            "out"
        )

    def get_seq_length(self) -> Any:
        """A tensor while steps may be a graph's, as of transformers' static layers: graphs are made for each int."""
        return self.preallocated.length if self.preallocated.live else super().get_seq_length()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if not self.preallocated.live:
            return super().get_mask_sizes(query_length)
        single = query_length == 1
        return self.preallocated.tokens if single else int(self.preallocated.length) + query_length, 0

    def get_max_length(self) -> int:
        return self.preallocated.tokens

    def update(  # type: ignore[override]
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Handle, Handle]:
        if not self._steps(key_states):
            return super().update(key_states, value_states)
        if self.loaded:
            self.check_loaded(key_states, value_states)
        self.check_shapes(key_states, value_states)
        self.pending = Pending(*self.as_held(key_states, value_states))
        return self.handles(key_states.shape, value_states.shape, self.preallocated.tokens)

    def _steps(self, new: Tensor) -> bool:
        """Whether tokens [B, H, n, D] that come are a step of the preallocated store."""
        return self.preallocated.live and new.shape[2] == 1

    @outside_inference
    def _update(self, key_states: Tensor, value_states: Tensor) -> tuple[Handle, Handle]:
        n, ahead = key_states.shape[2], self.preallocated
        alone = n > 1 and self.to_come is None and ahead.live and int(ahead.length) == self.store.history.length
        if alone and n < self.plan.gathers:
            warnings.warn(
                f"{n} more tokens of a prompt came to a preallocated cache, where {self.plan.policies[0].name} chooses "
                f"from each chunk by itself: use kvcomp.prefill(chunk={n}), or chunks of {self.plan.gathers}",
                KvcompWarning,
                stacklevel=2,
            )
        tokens = int(self.get_seq_length()) + n
        if tokens > self.preallocated.tokens:
            raise KvcompError(
                f"{tokens} tokens exceed preallocate={self.preallocated.tokens}, the room of this cache: ask for more"
            )
        self._give()
        return super()._update(key_states, value_states)

    def answer(self, call: Call) -> tuple[Tensor, Tensor | None]:
        if self._steps(call.query):
            with given_dtypes(call.query.device):
                return self._step(call)
        return super().answer(call)

    def attention(self, call: Call) -> tuple[Tensor, Tensor | None]:
        if self._steps(call.query):
            return self._step(call)
        result = super().attention(call)
        if self.pending is None and self.to_come is None and not self.preallocated.live:  # one token was the prompt
            self.preallocated.take(self.store)
        return result

    def _step(self, call: Call) -> tuple[Tensor, None]:
        """Attention of a step, which the preallocated store takes."""
        assert self.pending is not None
        if call.wants_weights:
            raise UnsupportedError(
                f"output_attentions=True: steps of preallocate={self.preallocated.tokens} give none: leave one of the "
                "two out"
            )
        (keys, values, *_), self.pending, ahead = self.pending, None, self.preallocated
        tracked = False
        if not torch.compiler.is_compiling():
            self._check_step(call)
            tracked = torch.is_grad_enabled() and any(x.requires_grad for x in (call.query, keys, values))
        scale = call.query.shape[-1] ** -0.5 if call.scaling is None else call.scaling
        softcap = call.kwargs.get("softcap") or 0.0
        mask = columns(call.mask, ahead.tokens)
        q, k, v = (x.detach() for x in (call.query, keys, values)) if tracked else (call.query, keys, values)
        part = decode_step(q, k, v, mask, ahead.length, ahead.name, scale, softcap)
        ahead.length.add_(1)
        out = answered(Part(*part), call)
        return without_gradient(out, call.query, keys, values) if tracked else out, None

    def _check_step(self, call: Call) -> None:
        """Check that a step's position goes on from what is held, outside of graphs."""
        turns, ahead = self.turns, self.preallocated
        if turns is None:
            return
        if not turns.entered and (turns.asked or call.query.device.type == "cpu"):
            turns.check(call.kwargs.get("position_ids"), ahead.seen.cpu(), int(ahead.length), None, None)
        turns.entered = False

    def commit(self) -> None:
        """Write the pending chunk to the store, and let the preallocated one take it over."""
        new = self.pending is not None
        super().commit()
        if new and self.to_come is None:  # all of a prompt that was announced
            self.preallocated.take(self.store)

    def counted(self) -> tuple[Tensor, int]:
        live = self.preallocated
        return (live.seen.cpu(), int(live.length)) if live.live else super().counted()

    def decoded(self, which: int) -> Tensor:
        with self._given():
            return super().decoded(which)

    def dense(self, which: int) -> Tensor:
        raise UnsupportedError(
            "this model reads keys and values as tensors instead of through its attention function, which a "
            "preallocated cache cannot serve: leave preallocate= out"
        )

    def _give(self) -> bool:
        """Let `store` hold all tokens; whether it did not."""
        if self.preallocated.live:
            self.preallocated.give(self.store)
            return True
        return False

    @contextmanager
    def _given(self) -> Iterator[bool]:
        """Inside, `store` holds all tokens; whether it did not before."""
        given = self._give()
        try:
            yield given
        finally:
            if given:
                self.preallocated.take(self.store)

    @outside_inference
    def crop(self, tokens_to_remove: int) -> None:
        with self._given():
            super().crop(tokens_to_remove)

    @outside_inference
    def select_rows(self, rows: Tensor) -> None:
        with self._given():
            super().select_rows(rows)

    @outside_inference
    def fork(self, choices: dict[int, Shared]) -> CompressedLayer:
        """As without preallocation, but the twin has room and pages of its own."""
        with self._given() as given:
            twin = super().fork(choices)
            assert isinstance(twin, PreallocatedLayer)
            twin.preallocated = FixedStore(self.plan, self.preallocated.tokens)
        if given:
            twin.preallocated.take(twin.store)
        return twin

    def state(self) -> dict[str, Any]:
        with self._given():
            return super().state()

    def restore(self, state: Mapping[str, Any], device: torch.device) -> None:
        super().restore(state, device)
        if self.is_initialized and self.pending is None:
            self.preallocated.take(self.store)

    def check_room(self) -> None:
        held = int(self.get_seq_length())
        if held > self.preallocated.tokens:
            raise KvcompError(
                f"preallocate={self.preallocated.tokens}: the cache holds {held} tokens per row: ask for more room"
            )

    @property
    def dense_bytes(self) -> int:
        return self.preallocated.dense_bytes if self.preallocated.live else super().dense_bytes

    def read(self) -> tuple[dict[str, int], int]:
        """Bytes that attention over what is held loads, by part: steps keep no record."""
        if not self.preallocated.live:
            return super().read()
        return self.preallocated.read(), self.preallocated.dense_bytes

    def held(self, seen: set[int]) -> dict[str, int]:
        return add_parts([super().held(seen), self.preallocated.held(seen)])
