"""One full-attention layer of the cache."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from copy import copy
from typing import Any

import torch
from torch import Tensor

from kvcomp.attention import Part, causal, sink_logit
from kvcomp.cache.layer import LayerStore, Shared
from kvcomp.errors import KvcompError, KvcompWarning, UnsupportedError
from kvcomp.ledger import ReadPlan, storage_bytes
from kvcomp.modes import normal_tensors, outside_inference, without_gradient
from kvcomp.stages.plan import LayerPlan
from kvcomp.state import State

from .adapters import adapters_of
from .attention_module import AttentionModule
from .contents import Contents
from .handles import Call, Handle, HandleLayer, apart, given_dtypes
from .masks import Seen, read_mask
from .pending import Pending
from .rows import WAY_ON, follow_mask
from .turns import Turns


class CompressedLayer(HandleLayer):
    """One full-attention layer: translates between transformers and the core's `LayerStore`."""

    gathers = True  # whether small chunks wait for more of a prompt that nobody announced
    is_compileable = False
    is_croppable = True
    supports_early_init = False

    def __init__(
        self,
        plan: LayerPlan,
        max_tokens: int | None,
        prefill_chunk: int | None = None,
        choices: dict[int, Shared] | None = None,
    ) -> None:
        super().__init__()
        self.plan, self.max_tokens, self.prefill_chunk, self.choices = plan, max_tokens, prefill_chunk, choices
        self.record_past = False
        self.warned = False
        self.lends = False  # later layers of the model attend to this one's keys and values
        self.turns: Turns | None = None  # of the first compressed layer of a cache
        self.reset()

    def reset(self) -> None:
        self.store = LayerStore(self.plan, self.choices)
        self.pending: Pending | None = None
        self.earlier: Pending | None = None  # what waited when a chunk came, until attention ran over that
        self.to_come: int | None = None  # of a prompt that was announced
        self.ends = False  # whether the pending chunk is the last of an announced prompt
        self.attended = False  # the pending chunk's own layer did
        self.unsettled = False  # a step's token is in the store, which has not settled yet
        self.cut = False  # tokens were written that gradients would flow through
        self.is_initialized = False
        self.adapters: tuple[tuple[str, ...], ...] | None = None  # that the last chunk came through
        self.loaded = False  # from a file, and not compared with the model's keys and values yet
        if self.turns is not None:
            self.turns.reset()

    @property
    def store(self) -> LayerStore:
        """All that is held. To look at it while chunks wait lets the policies choose from those."""
        if self.waiting:
            self.commit()
        return self._store

    @store.setter
    def store(self, store: LayerStore) -> None:
        self.waiting, self._store = False, store  # waiting: `pending` is to be chosen from with more of its prompt

    def expect(self, tokens: int) -> None:
        """Announce a prompt: the next `tokens` tokens are its, also those that come one at a time."""
        self.to_come = tokens if self.plan.gathers else None

    @property  # type: ignore[override]
    def keys(self) -> Contents | None:
        """All K that is held, [B, Hkv, N, Dk], decoded only where its content is asked for; None while empty."""
        return Contents(self, 0) if self.is_initialized else None

    @keys.setter
    def keys(self, value: Any) -> None:
        """transformers' own constructor clears it."""

    @property  # type: ignore[override]
    def values(self) -> Contents | None:
        """All V that is held, [B, Hkv, N, Dv], as `keys`."""
        return Contents(self, 1) if self.is_initialized else None

    @values.setter
    def values(self, value: Any) -> None:
        """transformers' own constructor clears it."""

    @property
    def batch_size(self) -> int:
        return self._store.rows if self.is_initialized else -1

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.store.start(key_states, value_states)
        super().lazy_initialization(key_states, value_states)

    def activate_past_recording(self) -> None:
        """From now on a chunk is committed at the following `crop` (or the next update), so that a crop is exact."""
        self.record_past = True

    # Lengths are logical: transformers derives positions and the tokens still to be fed from them.
    def get_seq_length(self) -> int:
        return self._store.history.length + (self.pending.keys.shape[2] if self.pending else 0)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        _refuse_nothing(query_length)
        return super().get_mask_sizes(query_length)

    def update(  # type: ignore[override]
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Handle, Handle]:
        """Take a chunk: keys [B, Hkv, n, Dk] post-RoPE, values [B, Hkv, n, Dv]. Returns handles for all K and all V."""
        new = self.as_held(key_states, value_states)
        if self.loaded:
            self.check_loaded(*((key_states, value_states) if key_states.dtype == value_states.dtype else new))
        if torch.compiler.is_compiling():
            with given_dtypes(key_states.device):
                return apart(self._update, *new)
        if torch.is_autocast_enabled(key_states.device.type):
            with given_dtypes(key_states.device):
                return self._update(*new)
        return self._update(*new)

    def as_held(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """K and V in the one dtype of this layer: under autocast RoPE gives float32 K, and V is bfloat16."""
        dtype = self.dtype if self.is_initialized else torch.promote_types(keys.dtype, values.dtype)
        return (keys, values) if keys.dtype == values.dtype == dtype else (keys.to(dtype), values.to(dtype))

    @outside_inference
    def _update(self, key_states: Tensor, value_states: Tensor) -> tuple[Handle, Handle]:
        """`update`, outside of graphs."""
        n = key_states.shape[2]
        earlier = self.pending if self.waiting and (n > 1 or self.to_come is not None) else None
        if earlier is None and (self.pending is not None or self.unsettled or self.ends):
            self.commit()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        _refuse_nothing(n)
        self.check_rows(key_states)
        length = self.get_seq_length()
        if self.max_tokens is not None and length + n > self.max_tokens:  # padding counts there
            seen = int(self.counted()[0].max()) + n
            if seen > self.max_tokens:
                raise KvcompError(
                    f"{seen} tokens exceed the model's max_position_embeddings={self.max_tokens}: shorten the prompt "
                    "or the generation, or pass max_tokens= to CompressedCache if the model's positions do reach "
                    "further"
                )
        if self.prefill_chunk is not None and n > self.prefill_chunk:
            warnings.warn(
                f"{n} tokens came at once to a stack that takes its prompt in chunks of {self.prefill_chunk}, so they "
                f"see each other densely: use kvcomp.prefill, or generate(prefill_chunk_size={self.prefill_chunk})",
                KvcompWarning,
                stacklevel=2,
            )
        if n == 1 and not length and self.plan.gathers and self.to_come is None:
            warnings.warn(
                "the first token came alone, as generated tokens do: if all of the prompt comes so, "
                f"{self.plan.policies[0].name} evicts nothing of it: use kvcomp.prefill(chunk=1), or larger chunks",
                KvcompWarning,
                stacklevel=2,
            )
        new = key_states, value_states
        self.pending, self.attended = Pending(*new) if earlier is None else earlier.followed_by(*new), False
        self.waiting, self.earlier = False, earlier
        self._store.reads = []  # of the step that begins
        if self.turns is not None:
            self.turns.take(self._store.rows, n)
        return self.handles(key_states.shape, value_states.shape, self.get_seq_length())

    def check_rows(self, new: Tensor) -> None:
        """Raise a KvcompError unless new [B, ...] has the rows that are held."""
        if new.shape[0] != self._store.rows:
            raise KvcompError(
                f"the cache holds {self._store.rows} rows, but the batch has {new.shape[0]}: use a new cache, reset() "
                "this one, or batch_repeat_interleave / batch_select_indices"
            )

    def attention(self, call: Call) -> tuple[Tensor, Tensor | None]:
        """Attention of query [B, Hq, n, Dk] over all that is cached and the pending chunk, which is then committed."""
        tracked = torch.is_grad_enabled() and (call.query.requires_grad or self._tracked())
        try:
            if torch.is_inference_mode_enabled():
                with normal_tensors():
                    return self._attention(call, tracked)
            if not tracked or self.store.history.length == 0:
                return self._attention(call, tracked)
            with torch.no_grad():
                out, weights = self._attention(call, tracked)
        except KvcompError:
            self._forget_newest()
            raise
        chunk = () if self.pending is None else self.pending[:2]
        return without_gradient(out, call.query, *chunk), weights

    def _attention(self, call: Call, tracked: bool) -> tuple[Tensor, Tensor | None]:
        if self.pending is None or self.attended:
            return self._lend(call)
        self.attended = True
        store, (keys, values, *_), query = self.store, self.pending, call.query
        if self.plan.needs_model and store.model is None:
            store.model = AttentionModule(call.module, query.shape[1], values.shape[-1])
        n = query.shape[2]
        past = store.history.length + keys.shape[2] - n
        if n > 1:
            self._notice(adapters_of(call.module), past)
        scale = query.shape[-1] ** -0.5 if call.scaling is None else call.scaling
        seen = None if call.mask is None and n == 1 else read_mask(call.mask, past, n)
        valid = seen.valid if seen is not None else None
        if valid is not None:
            valid = valid.expand(store.rows, n)
            if bool(valid.all()):
                valid = None
        self._follow(call, seen, valid, past)
        if past == 0 and (n > 1 or tracked or self.to_come is not None):
            out, weights = call.dense(keys, values)
            self._hold(valid, query, scale)
            return out, weights
        softcap = call.kwargs.get("softcap")
        weights = self._weights(call, keys, values) if call.wants_weights else None
        if n == 1 and valid is None and not self.record_past and self.to_come is None:
            store.append(keys, values)
            self.cut |= tracked
            part = store.attend(query, scale, softcap)
            self.pending, self.unsettled = None, True
            if not self.lends:
                self.settle()
        else:
            own = None if seen is None or seen.visible is None else seen.visible.to(query.device)
            if call.mask is None and not call.causal:
                own = torch.ones(1, n, n, dtype=torch.bool, device=query.device)
            visible = self.pending.visible(n, own)
            part = store.attend(query, scale, softcap, (keys, values, visible))
            self._hold(valid, query, scale)
        return answered(part, call), weights

    def _weights(self, call: Call, keys: Tensor, values: Tensor) -> Tensor | None:
        """What the model's own attention gives for weights [B, Hq, n, N] over all tokens, decoded, and the new ones."""
        stages = [*self.plan.policies, *([self.plan.selector] if self.plan.selector else [])]
        if stages:
            raise UnsupportedError(
                f"output_attentions=True: {stages[0].name} leaves tokens out, which have no weight in decode steps: "
                "use a stack of a quantizer alone, or generate without"
            )
        held = self.store.padded()
        return call.dense_behind(torch.cat([held[0], keys], 2), torch.cat([held[1], values], 2))[1]

    def _notice(self, adapters: tuple[tuple[str, ...], ...], past: int) -> None:
        """Warn where a chunk comes through other adapters than those before it."""
        if past and self.adapters not in (None, adapters):
            warnings.warn(
                "other adapters are active than when the cache was filled: its keys and values stay those of the "
                "former. reset() it, and feed the prompt again, for those of the adapters that are active now",
                KvcompWarning,
                stacklevel=2,
            )
        self.adapters = adapters

    def _lend(self, call: Call) -> tuple[Tensor, Tensor | None]:
        """Attention of a later layer over the keys and values of this one, whose own attention came before."""
        if not self.lends:
            raise UnsupportedError(
                f"{type(call.module).__name__} attends a second time to keys and values that are compressed by now: "
                "use the model's own cache"
            )
        store, query, softcap = self.store, call.query, call.kwargs.get("softcap")
        scale = query.shape[-1] ** -0.5 if call.scaling is None else call.scaling
        if self.pending is None:
            chunk = None
        else:
            keys, values, *_ = self.pending
            n, asked = keys.shape[2], query.shape[2]  # a model may leave queries out whose logits nobody asks for
            if store.history.length == 0:
                last = causal(n, query.device)[None, :, -asked:] if call.mask is None and asked < n else call.mask
                return call._replace(mask=last).dense(keys, values)
            visible = read_mask(call.mask, store.history.length, n).visible
            visible = causal(n, query.device) if visible is None else visible.to(query.device)
            chunk = keys, values, visible[:, -asked:]
        reads, dense = store.reads, store.dense_read
        part = store.attend(query, scale, softcap, chunk)
        store.reads = reads + store.reads
        store.dense_read += dense
        return answered(part, call), None

    def _follow(self, call: Call, seen: Seen | None, valid: Tensor | None, past: int) -> None:
        """Check that the mask and the positions of new tokens go on from the `past` columns that are held."""
        store, turns, n = self._store, self.turns, call.query.shape[2]
        assert self.pending is not None
        counts: Tensor | None = None
        if past > store.history.length:  # chunks of the same prompt wait
            counts = store.history.counts + self.pending.counts(n)
            shown = past if seen is None or seen.past is None else seen.past.cpu()
            if bool((counts[:, None] != shown).any()):
                raise UnsupportedError(
                    "the attention mask hides or shows other tokens of the prompt than those that were no padding when "
                    f"they came: {WAY_ON}"
                )
        elif past and (seen is not None or not store.history.unpadded):
            compare = turns is not None and (turns.asked or call.query.device.type == "cpu")
            follow_mask(store, seen, compare)
        if turns is not None:
            if not turns.entered:
                counts = store.history.counts if counts is None else counts
                turns.check(call.kwargs.get("position_ids"), counts, past, valid, None)
            turns.entered = False

    def counted(self) -> tuple[Tensor, int]:
        """Real tokens of each row, int64 [B], and columns, those of pending chunks included, which go on waiting."""
        history, pending = self._store.history, self.pending
        if pending is None:
            return history.counts, history.length
        return history.counts + pending.counts(0), history.length + pending.keys.shape[2]

    def _tracked(self) -> bool:
        return self.pending is not None and (self.pending.keys.requires_grad or self.pending.values.requires_grad)

    def _forget_newest(self) -> None:
        """Go on as if the newest pending chunk had not come: those before it wait again."""
        if self.pending is not None and self.turns is not None:
            waited = 0 if self.earlier is None else self.earlier.keys.shape[2]
            self.turns.crop(self.pending.keys.shape[2] - waited)
        self.pending, self.earlier = self.earlier, None
        self.waiting = self.pending is not None

    def settle(self) -> None:
        """Let the store settle after a step, where that waited for the layers that attend to the same tokens."""
        if self.unsettled:
            self.unsettled = False
            self._store.settle()

    def finish(self) -> None:
        """Write what waits for nothing but other layers of a forward that is over."""
        if self.lends and self.attended and not self.record_past:
            self.commit()

    def _hold(self, valid: Tensor | None, query: Tensor, scale: float) -> None:
        """Complete the pending chunk and commit it, unless a crop or a choice is announced, or more of its prompt is to
        come."""
        assert self.pending is not None
        n, queries = query.shape[2], query if self.plan.needs_queries else None
        self.pending, self.earlier = self.pending.completed(n, valid, queries, scale), None
        waits = self.plan.reconstructs and self.store.history.length == 0  # until the prompt was repeated
        announced, more = self.to_come is not None, self.gathers if self.to_come is None else self.to_come > n
        self.to_come = self.to_come - n if self.to_come is not None and more else None
        self.ends = announced and not more
        if self.record_past or waits or self.lends:
            return
        least = min(self.plan.gathers, self.prefill_chunk or self.plan.gathers)
        first = self.store.prompt is None  # that may be all of the prompt
        self.waiting = more and not first and self.pending.keys.shape[2] < least
        if not self.waiting:
            self.commit()

    def commit(self) -> None:
        """Write the pending chunk to the store."""
        self.waiting, self.earlier = False, None
        if self.pending is not None:
            chunk, self.pending = self.pending.whole(), None
            if chunk.keys.shape[2]:
                self.cut |= chunk.keys.requires_grad or chunk.values.requires_grad
                scale = chunk.keys.shape[-1] ** -0.5 if chunk.scale is None else chunk.scale
                with normal_tensors(), torch.no_grad(), given_dtypes(chunk.keys.device):
                    self.store.write(chunk.keys, chunk.values, chunk.valid, chunk.queries, scale, chunk.chosen)
                    if self.record_past or self.ends:  # drafts come in chunks, too
                        self.store.end_prompt()
        self.ends = False
        self.settle()

    def decoded(self, which: int) -> Tensor:
        """All K (0) or V (1) that is held, [B, Hkv, N, D], a pending chunk included."""
        if self.pending is None:
            return self._store.padded()[which]
        new = (self.pending.keys, self.pending.values)[which]
        return new if self._store.history.length == 0 else torch.cat([self._store.padded()[which], new], 2)

    def dense(self, which: int) -> Tensor:
        """All K (0) or V (1) as a tensor, for models that do not attend through the attention interface."""
        assert self.pending is not None
        new = (self.pending.keys, self.pending.values)[which]
        if self.plan.policies or self.plan.selector:
            raise UnsupportedError(
                "this model reads keys and values as tensors instead of through its attention function, which an "
                "eviction policy or a selector cannot serve: use a stack of a quantizer alone"
            )
        if self.store.history.length == 0:
            return new
        if not self.warned:
            warnings.warn(
                "the model reads the cache as dense tensors: every step decodes all of it, so memory held is "
                "compressed but traffic is not",
                KvcompWarning,
                stacklevel=2,
            )
            self.warned = True
        store = self.store
        past, plan = store.padded()[which], ReadPlan()
        if self.cut and torch.is_grad_enabled():
            past = without_gradient(past, torch.zeros((), dtype=torch.float32, device="cpu", requires_grad=True))
        plan.add("pages", store.layout.body_bytes, store.table.total)
        plan.add("window", store.exact.token_bytes, store.exact.counts)
        plan.add("dense copy", past.nbytes)
        store.reads, store.dense_read = [*store.reads, plan], store.dense_bytes
        return torch.cat([past, new], 2)

    @outside_inference
    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens; `tokens_to_remove` is negative, as in transformers. Exact, or refused."""
        if tokens_to_remove > 0:
            raise KvcompError(f"crop({tokens_to_remove}): pass a negative number, the tokens to remove from the end")
        remove = -tokens_to_remove
        if remove > self.get_seq_length():
            raise KvcompError(f"crop({tokens_to_remove}): the cache holds {self.get_seq_length()} tokens")
        if self.waiting:
            self.commit()
        self.settle()
        columns = remove
        if self.pending is not None:
            here = min(remove, self.pending.keys.shape[2])
            self.pending = self.pending.without_last(here)
            remove -= here
            if remove:
                self.pending = None
            else:
                self.commit()
        if remove:
            self.store.crop(remove)
        if self.turns is not None:
            self.turns.crop(columns)

    @outside_inference
    def select_rows(self, rows: Tensor) -> None:
        if self.is_initialized:
            self.settle()
            self.store.select_rows(rows)
            self.pending = None if self.pending is None else self.pending.rows(rows)
            if self.turns is not None:
                self.turns.select(rows)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.select_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.select_rows(torch.arange(max(self.batch_size, 0), device="cpu").repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.select_rows(torch.arange(max(self.batch_size, 0), device="cpu")[indices.cpu()])

    @outside_inference
    def fork(self, choices: dict[int, Shared]) -> CompressedLayer:
        """A layer that goes on by itself from here, among those with the same `choices`, and shares the pages that
        there are."""
        self.finish()
        store = self.store.fork(choices)
        twin = copy(self)
        twin.choices, twin.store = choices, store
        twin.turns = None if self.turns is None else self.turns.fork()
        return twin

    def offload(self) -> None:
        raise UnsupportedError(
            "a compressed cache cannot be offloaded: it is small enough to stay; drop the offloading option"
        )

    prefetch = offload

    def state(self) -> dict[str, Any]:
        """All that the layer holds, as tensors and plain values: what `restore` takes."""
        self.finish()
        pending = None if self.pending is None else tuple(self.pending)
        flags = {name: getattr(self, name) for name in ("record_past", "warned", "waiting")}
        positions = None if self.turns is None else self.turns.state()
        return {"store": self._store.state(), "pending": pending, **flags, "positions": positions}

    @outside_inference
    def restore(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Become the layer whose `state` this is, on `device`; the state's tensors lie on the host.

        Raises:
            KvcompError: more tokens than there is room for, or pages of another layout.
            DamagedError: the state is no layer's of this plan.
        """
        state = State.of(state, f"layer {self.plan.layer}")
        self.store.restore(state.part("store"), device)
        if self.store.started:
            self.dtype, self.device, self.is_initialized = self.store.dtype, self.store.device, True
        if state["pending"] is not None:
            self.pending = Pending.restored(state, self.store, device)
        self.record_past, self.warned = state.flag("record_past"), state.flag("warned")
        self.waiting = "waiting" in state and state.flag("waiting")  # caches saved before chunks waited have none
        self.loaded = True
        self.check_room()
        if self.turns is not None:
            rows = self._store.rows if self.is_initialized else 0
            known = state.get("positions") is not None  # caches saved before positions were followed have none
            self.turns.restore(state.part("positions") if known else None, rows)

    def check_loaded(self, keys: Tensor, values: Tensor) -> None:
        """Raise a KvcompError unless a model's keys [B, Hkv, n, Dk] and values [B, Hkv, n, Dv] are like those held."""
        if self.is_initialized:
            store = self.store
            held = (store.heads, store.k_dim, store.v_dim, store.dtype)
            given = (keys.shape[1], keys.shape[3], values.shape[3], keys.dtype)
            if given != held:
                raise KvcompError(
                    "the cache holds {} KV heads of {} and {} channels in {}, but the model has {} of {} and {} in {}: "
                    "it was saved by another model, or its file is damaged".format(*held, *given)
                )
        self.loaded = False

    def check_room(self) -> None:
        """Raise a KvcompError where a layer that was loaded holds more tokens than `max_tokens`."""
        held = 0 if self.pending is None else self.pending.keys.shape[2]
        held += int(self._store.history.counts.max()) if self.batch_size > 0 else 0
        if self.max_tokens is not None and held > self.max_tokens:
            raise KvcompError(
                f"max_tokens={self.max_tokens}: the cache holds {held} tokens, and with the next one {held + 1} tokens "
                "exceed it. The default is the model's max_position_embeddings: load the cache with a larger "
                "max_tokens= if the model's positions do reach further"
            )

    def library(self) -> list[Tensor]:
        """What the layer holds as transformers would, beside keys and values."""
        return []

    @property
    def dense_bytes(self) -> int:
        """Bytes of full-precision K and V for all tokens seen, padding that is written excluded."""
        self.finish()
        written = self.store.dense_bytes
        return written + (0 if self.pending is None else self.pending.keys.nbytes + self.pending.values.nbytes)

    def read(self) -> tuple[dict[str, int], int]:
        """Bytes that the last decode step loaded, by part, and what it would have loaded without compression."""
        return self.store.read, self.store.dense_read

    def held(self, seen: set[int]) -> dict[str, int]:
        self.finish()
        parts = self.store.held(seen)
        if self.pending is not None:
            parts["pending"] = storage_bytes([x for x in self.pending if isinstance(x, Tensor)], seen)
        return parts


def _refuse_nothing(tokens: int) -> None:
    if tokens == 0:
        raise KvcompError("the cache was given 0 new tokens: the prompt is empty, or all of it is cached already")


def answered(part: Part, call: Call) -> Tensor:
    """[B, Hq, n, Dv] float32, with the model's learned sinks where it has them (gpt-oss) -> what attention functions
    return: [B, n, Hq, Dv] in the model's dtype."""
    sinks = call.kwargs.get("s_aux")
    out = (part if sinks is None else sink_logit(part, sinks.view(1, -1, 1).expand_as(part.lse))).out
    rows, heads, n, dim = out.shape
    out = out.transpose(1, 2) if n > 1 else out.view(rows, 1, heads, dim)
    return out.to(call.query.dtype).contiguous()
