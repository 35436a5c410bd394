"""What one layer holds, and what of it is sure: shared by all that write, read, change and save it."""

from __future__ import annotations

import torch
from torch import Tensor

from kvcomp.errors import UnsupportedError
from kvcomp.layout import PageLayout
from kvcomp.stages import Codec, ModelPart
from kvcomp.stages.plan import LayerPlan

from .compaction import CompactSpans
from .exact import ExactBuffer
from .growing import Growing
from .history import History
from .pool import PagePool, PageTable
from .reader import Shared
from .records import Records


class LayerContent:
    """Keys and values of one layer, compressed, in a `storage`; and their `history`.

    prompt: while a prompt comes in chunks, tokens of each row seen, and of each stream held, before its first one.
    tail: most recent tokens that are surely held; None: all of them. compacted: what stands for spans of tokens.
    model: for policies that need it; the engine sets it. choices: by layer, what those of the current step chose that
    others follow; one dict for the stores of a cache.
    """

    def __init__(self, plan: LayerPlan, choices: dict[int, Shared] | None = None) -> None:
        self.plan = plan
        self.choices = {} if choices is None else choices
        self.choices.pop(plan.layer, None)
        self.started = False
        self.history = History()
        self.prompt: tuple[list[int], list[int]] | None = None
        self.model: ModelPart | None = None

    def start(self, keys: Tensor, values: Tensor, centred: bool | None = None) -> None:
        """Take batch, heads, dimensions, dtype and device from keys [B, Hkv, n, Dk] and values [B, Hkv, n, Dv].

        centred: as in `LayerPlan.shape`.

        Raises:
            UnsupportedError: the plan makes latents, and these are none.
        """
        plan = self.plan
        self.rows, self.heads, _, self.k_dim = keys.shape
        self.v_dim = values.shape[-1]
        if plan.joint is not None and (self.heads, self.k_dim) != (1, self.v_dim):
            raise UnsupportedError(
                f"{plan.joint.name} makes one latent of a layer's K and V, and these are of {self.heads} heads of "
                f"{self.k_dim} and {self.v_dim} channels: give them to CompressedCache or Stack.roundtrip, or leave "
                f"{plan.joint.name} out"
            )
        self.dtype, self.device = keys.dtype, keys.device
        shape = plan.shape(self.k_dim, self.v_dim, self.heads, self.dtype, self.device, centred)
        self.storage = Growing.empty(Records(plan, shape), keys, values)
        self.history.start(self.rows)
        self.compacted: CompactSpans | None = None
        self.tail: int | None = None
        self.started = True

    @property
    def records(self) -> Records:
        return self.storage.records

    @property
    def exact(self) -> ExactBuffer:
        return self.storage.exact

    @property
    def table(self) -> PageTable:
        return self.storage.table

    @property
    def pool(self) -> PagePool:
        return self.storage.pool

    @property
    def codec(self) -> Codec:
        return self.records.codec

    @property
    def layout(self) -> PageLayout:
        return self.records.layout

    @property
    def kept(self) -> Tensor:
        """int64 [S]: tokens that each stream holds."""
        compact = 0 if self.compacted is None else self.compacted.bias.shape[1]
        return self.storage.kept + compact

    def end_prompt(self) -> None:
        """What comes next is no part of the last prompt: a generated token, or another turn."""
        self.prompt = None
        if not self.plan.watched and self.started:
            self.table.received = None

    def limit_tail(self, tokens: int) -> None:
        """Older tokens than the newest `tokens` are no longer surely held."""
        self.tail = tokens if self.tail is None else min(self.tail, tokens)

    # -- decoded --------------------------------------------------------------------------------------------------

    def dense(self) -> tuple[Tensor, Tensor]:
        """Everything held, decoded: keys [B, Hkv, N', Dk] and values [B, Hkv, N', Dv] in the model's dtype, oldest
        first.

        For round trips; never on the way of attention.

        Raises:
            UnsupportedError: rows or heads hold different numbers of tokens, or a span was compacted.
        """
        kept = self.kept
        if self.compacted is not None:
            raise UnsupportedError("a span was compacted: its tokens have biases, which keys and values alone lack")
        if not bool((kept == kept[0]).all()):
            raise UnsupportedError(f"streams hold different numbers of tokens ({int(kept.min())} to {int(kept.max())})")
        streams = [self._tokens(s) for s in range(len(kept))]
        k, v = (torch.stack([s[i] for s in streams]).unflatten(0, (self.rows, self.heads)) for i in (0, 1))
        return k, v

    def padded(self, columns: int | None = None) -> tuple[Tensor, Tensor]:
        """Everything seen, decoded into its logical place: keys [B, Hkv, length, Dk], values [B, Hkv, length, Dv];
        padding is 0. columns: the newest ones alone.

        For models that insist on tensors.

        Raises:
            UnsupportedError: some tokens were evicted.
        """
        history = self.history
        length = history.length if columns is None else min(columns, history.length)
        counts = history.counts if length == history.length else history.newest(length)
        if bool((self.kept < counts.repeat_interleave(self.heads)).any()):
            raise UnsupportedError(
                "the model asks for all keys and values as a tensor, but the stack evicted some of them; "
                "use a stack without eviction policy for this model"
            )
        valid = history.valid()
        shape = (self.rows * self.heads, length)
        k = torch.zeros(*shape, self.k_dim, dtype=self.dtype, device=self.device)
        v = k[..., : self.v_dim] if self.plan.latent else k.new_zeros(*shape, self.v_dim)
        for s in range(shape[0]):
            row = s // self.heads
            where = slice(None) if valid is None else valid[row, history.length - length :].to(self.device)
            keys, values = (x[len(x) - int(counts[row]) :] for x in self._tokens(s))
            k[s, where] = keys
            if not self.plan.latent:
                v[s, where] = values
        return k.unflatten(0, (self.rows, self.heads)), v.unflatten(0, (self.rows, self.heads))

    def _tokens(self, stream: int) -> tuple[Tensor, Tensor]:
        """One stream's tokens, oldest first: [N', Dk], [N', Dv]."""
        ids = self.table.ids()[stream, : int(self.table.counts[stream])]
        parts = [*self.exact.of(stream)]
        parts.insert(1, self.storage.decode(ids, stream))
        return torch.cat([k for k, _ in parts]), torch.cat([v for _, v in parts])

    def page_keys(self) -> Tensor:
        """Keys [S, longest, P, Dk] of all pages, decoded; anything past the pages that a stream has."""
        ids = self.table.ids()
        streams = torch.arange(len(ids), device=ids.device).repeat_interleave(ids.shape[1])
        keys: Tensor = self.records.decode(ids.flatten(), streams)[0].unflatten(0, ids.shape)
        return keys

    @property
    def dense_bytes(self) -> int:
        """Bytes of full-precision K and V for all tokens seen, or those of a window that slides; padding excluded."""
        if not self.started:
            return 0
        history, window = self.history, self.plan.sliding
        if window is not None and history.length > window:
            seen = self.rows * window if history.unpadded else int(history.newest(window).sum())
        else:
            seen = history.total
        return seen * self.heads * self.records.shape.channels * self.dtype.itemsize
