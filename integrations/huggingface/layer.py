"""One layer of the cache that a stack compresses."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from kvcomp.attention import Part, causal, sink_logit
from kvcomp.errors import KvcompError, KvcompWarning, UnsupportedError
from kvcomp.ledger import ReadPlan
from kvcomp.modes import normal_tensors, without_gradient

from .adapters import adapters_of
from .arriving import check_arrival, refuse_nothing
from .attention_module import AttentionModule
from .handles import Call, Handle, given_dtypes, outside_graph
from .held import HeldLayer
from .masks import Seen, read_mask
from .pending import Pending, check_pair
from .rows import WAY_ON, follow_mask


class CompressedLayer(HeldLayer):
    """A layer of full attention, and what other kinds share: translates between transformers and `LayerStore`."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        refuse_nothing(query_length)
        return super().get_mask_sizes(query_length)

    def update(  # type: ignore[override]
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Handle, Handle]:
        """Take a chunk: keys [B, Hkv, n, Dk] post-RoPE, values [B, Hkv, n, Dv]. Returns handles for all K and all V."""
        if not self.is_initialized:
            check_pair(key_states, value_states)
        new = self.as_held(key_states, value_states)
        if self.loaded:
            self.check_loaded(*((key_states, value_states) if key_states.dtype == value_states.dtype else new))
        if torch.compiler.is_compiling():
            with given_dtypes(key_states.device):
                handles: tuple[Handle, Handle] = outside_graph(self._update, *new)
                return handles
        if torch.is_autocast_enabled(key_states.device.type):
            with given_dtypes(key_states.device):
                return self._update(*new)
        return self._update(*new)

    def as_held(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """K and V in the one dtype of this layer: under autocast RoPE gives float32 K, and V is bfloat16."""
        dtype = self.dtype if self.is_initialized else torch.promote_types(keys.dtype, values.dtype)
        return (keys, values) if keys.dtype == values.dtype == dtype else (keys.to(dtype), values.to(dtype))

    def _update(self, key_states: Tensor, value_states: Tensor) -> tuple[Handle, Handle]:
        """`update`, outside of graphs."""
        n = key_states.shape[2]
        earlier = self.pending if self.waiting and (n > 1 or self.to_come is not None) else None
        if earlier is None and (self.pending is not None or self.unsettled or self.ends):
            self.commit()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        refuse_nothing(n)
        self.check_shapes(key_states, value_states)
        check_arrival(self, n)
        new = key_states, value_states
        self.pending, self.attended = Pending(*new) if earlier is None else earlier.followed_by(*new), False
        self.waiting, self.earlier = False, earlier
        self._store.reads = []  # of the step that begins
        if self.turns is not None:
            self.turns.take(self._store.rows, n)
        return self.handles(key_states.shape, value_states.shape, self.columns(self.get_seq_length() - n) + n)

    def newest(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the pending chunk, as the model has them or its latents make them."""
        assert self.pending is not None
        return self.pending.keys, self.pending.values

    def attention(self, call: Call) -> tuple[Tensor, Tensor | None]:
        """Attention of query [B, Hq, n, Dk] over all that is cached and the pending chunk, which is then committed."""
        tracked = torch.is_grad_enabled() and (call.tracked or self._tracked())
        try:
            if torch.is_inference_mode_enabled():
                with normal_tensors():
                    return self._attention(call, tracked)
            if not tracked or self.store.history.length == 0 or self.expands(call.query.shape[2], tracked):
                return self._attention(call, tracked)
            with torch.no_grad():
                out, weights = self._attention(call, tracked)
        except KvcompError:
            self._forget_newest()
            raise
        chunk = () if self.pending is None else self.pending[:2]
        return without_gradient(out, call.query, *chunk), weights

    def expands(self, n: int, tracked: bool, valid: Tensor | None = None, seen: Seen | None = None) -> bool:
        """Whether n queries after tokens that are held are answered from those in full, by the model's attention.
        tracked: a gradient is asked for. valid: which of their tokens are no padding; None: all. seen: their mask."""
        return False

    def shown(self, seen: Seen) -> Tensor | None:
        """bool [B or 1, n]: which new tokens are no padding, as a mask has it; None for all."""
        return seen.valid

    def shows_all(self, seen: Seen) -> bool:
        """Whether no new token is padding, as `shown` has it."""
        return seen.facts is None or seen.facts.whole

    def follow(self, seen: Seen | None, compare: bool) -> None:
        """Let the store follow a mask; see `follow_mask`."""
        follow_mask(self._store, seen, compare)

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
        seen = None if call.mask is None and n == 1 else read_mask(call.mask, self.columns(past), n)
        valid = None if seen is None else self.shown(seen)
        if valid is not None:
            valid = None if seen is not None and self.shows_all(seen) else valid.expand(store.rows, n)
        self._follow(call, seen, valid, past)
        if past == 0 and (n > 1 or tracked or self.to_come is not None):
            out, weights = call.dense(keys, values)
            self._hold(valid, call, scale)
            return out, weights
        if self.expands(n, tracked, valid, seen):
            out, weights = self._behind(call, keys, values)
            self._hold(valid, call, scale)
            return out, weights
        softcap = call.kwargs.get("softcap")
        weights = self._weights(call, keys, values) if call.wants_weights else None
        if n == 1 and valid is None and not self.record_past and self.to_come is None:
            store.append(keys, values)
            self.cut |= tracked
            part = store.attend(call.asked, scale, softcap)
            self.pending, self.unsettled = None, True
            if not self.lends:
                self.settle()
        else:
            own = None if seen is None or seen.visible is None else seen.visible.to(query.device)
            if call.mask is None and not call.causal:
                own = torch.ones(1, n, n, dtype=torch.bool, device=query.device)
            visible = self.pending.visible(n, own)
            part = store.attend(call.asked, scale, softcap, (keys, values, visible))
            self._hold(valid, call, scale)
        return answered(part, call), weights

    def _weights(self, call: Call, keys: Tensor, values: Tensor) -> Tensor | None:
        """What the model's own attention gives for weights [B, Hq, n, N] over all tokens, decoded, and the new ones."""
        stages = [*self.plan.policies, *([self.plan.selector] if self.plan.selector else [])]
        if stages:
            raise UnsupportedError(
                f"output_attentions=True: {stages[0].name} leaves tokens out, which have no weight in decode steps: "
                "use a stack of a quantizer alone, or generate without"
            )
        return self._behind(call, keys, values)[1]

    def _behind(self, call: Call, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor | None]:
        """The model's own attention over all tokens, decoded, and the new ones."""
        held = self._without_gradient(self.in_full())
        self._decoded_all(held[0].nbytes + (0 if self.plan.latent else held[1].nbytes))
        return call.dense_behind(torch.cat([held[0], keys], 2), torch.cat([held[1], values], 2))

    def _without_gradient(self, held: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Decoded K and V, through which no gradient flows where tokens were written that had one."""
        if not (self.cut and torch.is_grad_enabled()):
            return held
        source = torch.zeros((), dtype=torch.float32, device="cpu", requires_grad=True)
        return without_gradient(held[0], source), without_gradient(held[1], source)

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
            if (lent := self.lend_chunk(call, keys, values)) is not None:
                return lent
            visible = read_mask(call.mask, self.columns(store.history.length), n).visible
            visible = causal(n, query.device) if visible is None else visible.to(query.device)
            chunk = keys, values, visible[:, -asked:]
        reads, dense = store.reads, store.dense_read
        part = store.attend(call.asked, scale, softcap, chunk)
        store.reads = reads + store.reads
        store.dense_read += dense
        return answered(part, call), None

    def lend_chunk(self, call: Call, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor | None] | None:
        """Attention of a later layer over a chunk and what came before it, where that is the model's own; None: not."""
        return None

    def _follow(self, call: Call, seen: Seen | None, valid: Tensor | None, past: int) -> None:
        """Check that the mask and the positions of new tokens go on from the `past` columns that are held."""
        store, turns, n = self._store, self.turns, call.query.shape[2]
        assert self.pending is not None
        counts: Tensor | None = None
        if past > store.history.length:  # chunks of the same prompt wait
            counts = store.history.counts + self.pending.counts(n)
            shown = past if seen is None or seen.facts is None else seen.facts.counts
            if bool((counts[:, None] != shown).any()):
                raise UnsupportedError(
                    "the attention mask hides or shows other tokens of the prompt than those that were no padding when "
                    f"they came: {WAY_ON}"
                )
        elif past and (seen is not None or not store.history.unpadded):
            compare = turns is not None and (turns.asked or call.query.device.type == "cpu")
            self.follow(seen, compare)
        if turns is not None:
            if not turns.entered:
                counts = store.history.counts if counts is None else counts
                turns.check(call.kwargs.get("position_ids"), counts, past, valid, None)
            turns.entered = False

    def _tracked(self) -> bool:
        return self.pending is not None and (self.pending.keys.requires_grad or self.pending.values.requires_grad)

    def _forget_newest(self) -> None:
        """Go on as if the newest pending chunk had not come: those before it wait again."""
        if self.pending is not None and self.turns is not None:
            waited = 0 if self.earlier is None else self.earlier.keys.shape[2]
            self.turns.crop(self.pending.keys.shape[2] - waited)
        self.pending, self.earlier = self.earlier, None
        self.waiting = self.pending is not None

    def _hold(self, valid: Tensor | None, call: Call, scale: float) -> None:
        """Complete the pending chunk and commit it, unless a crop or a choice is announced, or more of its prompt is to
        come."""
        assert self.pending is not None
        n, queries = call.query.shape[2], call.asked if self.plan.needs_queries else None
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
        past = self._without_gradient(self.in_full())[which]
        self._decoded_all(past.nbytes)
        return torch.cat([past, new], 2)

    def _decoded_all(self, copied: int) -> None:
        """Count that all of the store was decoded, to so many bytes."""
        store, plan = self._store, ReadPlan()
        plan.add("pages", store.layout.body_bytes, store.table.total)
        plan.add("window", store.exact.token_bytes, store.exact.counts)
        plan.add("dense copy", copied)
        store.reads, store.dense_read = [*store.reads, plan], store.dense_bytes


def answered(part: Part, call: Call) -> Tensor:
    """[B, Hq, n, Dv] float32, with the model's learned sinks where it has them (gpt-oss) -> what attention functions
    return: [B, n, Hq, Dv] in the model's dtype. Outputs over latents become those over values."""
    sinks = call.kwargs.get("s_aux")
    out = (part if sinks is None else sink_logit(part, sinks.view(1, -1, 1).expand_as(part.lse))).out
    out = out if call.latent is None else call.latent.output(out)
    rows, heads, n, dim = out.shape
    out = out.transpose(1, 2) if n > 1 else out.view(rows, 1, heads, dim)
    return out.to(call.query.dtype).contiguous()
