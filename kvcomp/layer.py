"""One layer's store: the exact buffer (sinks and window), the pages behind it, and what is read of them.

Per stream (one KV head of one row) the kept tokens lie in this order: the sinks, then full pages, then the window.
Sinks and window share one buffer [S, sinks + recent + P, D], so a decode step reads them in one go. A window that
holds recent + P tokens gives its oldest P to a page; nothing is ever concatenated to the whole cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy, deepcopy
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from kvcomp.attention import Part, attend, attend_causal, merge
from kvcomp.compaction import Compacted, CompactSpans, match
from kvcomp.errors import KvcompError, UnsupportedError
from kvcomp.exact import ExactBuffer, Tokens
from kvcomp.finite import finite, saturated
from kvcomp.history import History
from kvcomp.kernels.dispatch import append_token, attend_pages, attend_tokens, write_pages
from kvcomp.kernels.select import regroup, token_bias
from kvcomp.ledger import storage_bytes
from kvcomp.pages import PagePool, PageTable, Summary, compact
from kvcomp.plan import LayerPlan
from kvcomp.restoring import restore
from kvcomp.stages import Choice, Chunk, Held, ModelPart, PageShape, Summaries
from kvcomp.state import State


class Shared(NamedTuple):
    """What a step of one layer reads, for those that follow it: a `Choice` among `pages` [S] (on the host)."""

    positions: Tensor
    valid: Tensor
    pages: Tensor


class LayerStore:
    """Keys and values of one layer, compressed.

    `start` fixes the shapes, `append` and `write` add tokens, `attend` reads, `settle` moves what overflows the window
    into pages and evicts. All tokens held lie in the past of the queries that `attend` is given.

    choices: by layer, what those of the current step chose that others follow; one dict for the stores of a cache.
    """

    def __init__(self, plan: LayerPlan, choices: dict[int, Shared] | None = None) -> None:
        self.plan = plan
        self.choices = {} if choices is None else choices
        self.choices.pop(plan.layer, None)
        self.started = False
        self.history = History()
        self.read: dict[str, int] = {}  # bytes that the last decode step loaded, by part
        self.dense_read = 0  # what the same step would have loaded without compression
        # While a prompt comes in chunks: tokens of each row seen, and of each stream held, before its first one.
        self.prompt: tuple[list[int], list[int]] | None = None
        self.model: ModelPart | None = None  # for policies that need it; the engine sets it

    # -- set-up ---------------------------------------------------------------------------------------------------

    def start(self, keys: Tensor, values: Tensor, centred: bool = True) -> None:
        """Take batch, heads, dimensions, dtype and device from keys [B, Hkv, n, Dk] and values [B, Hkv, n, Dv].

        centred: as in `PageShape`."""
        plan = self.plan
        self.rows, self.heads, _, self.k_dim = keys.shape
        self.v_dim = values.shape[-1]
        self.dtype, self.device = keys.dtype, keys.device
        dims = self.k_dim, self.v_dim, self.heads
        shape = PageShape(plan.page_size, *dims, self.dtype, self.device, plan.layer, centred)
        self.codec, self.layout = plan.build(shape)
        self.index = None if plan.chooser is None else plan.chooser.index(shape)
        self.by_tokens = plan.by_tokens(self.layout)
        self.exact = ExactBuffer(plan, keys, values)
        self.pool = PagePool(self.layout, self.device)
        self.table = PageTable(self.rows * self.heads, self.device, plan.watched)
        self.pool.join(self.table)
        self.history.start(self.rows)
        self.compacted: CompactSpans | None = None
        self.tail: int | None = None  # most recent tokens that are surely held; None: all of them
        self.started = True

    @property
    def kept(self) -> Tensor:
        """int64 [S]: tokens that each stream holds."""
        compact = 0 if self.compacted is None else self.compacted.bias.shape[1]
        return self.exact.counts + self.table.counts * self.plan.page_size + compact

    # -- write ----------------------------------------------------------------------------------------------------

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add one token to every row: keys [B, Hkv, 1, Dk], values [B, Hkv, 1, Dv]. The buffer has room after
        `settle`."""
        if self.prompt is not None:
            self.end_prompt()
        self.history.append(1, None)
        append_token(self.exact, keys, values)
        if self.tail is not None:
            self.tail += 1

    def end_prompt(self) -> None:
        """What comes next is no part of the last prompt: a generated token, or another turn."""
        self.prompt = None
        if not self.plan.watched and self.started:
            self.table.received = None

    def settle(self) -> None:
        """Move what overflows the windows into pages, then let the policies expire old pages."""
        if self.exact.bounds[1] == self.plan.slots:
            full = (self.exact.counts == self.plan.slots).nonzero().flatten()
            self._encode(full, *self.exact.shift(full), self.plan.page_size)
        self._expire()

    def _expire(self) -> None:
        plan, table = self.plan, self.table
        for policy in plan.policies:
            before = None
            if self.prompt is not None and policy.trims and not policy.watches:
                before = torch.tensor(self.prompt[1], dtype=torch.int64, device="cpu")
            watched = table.attention() if policy.watches or before is not None else None
            attention, queries = (None, None) if watched is None else watched
            own = attention, queries, before, plan.layer, plan.layers
            held = Held(self.kept, table.counts, plan.page_size, plan.sinks, self.heads, *own)
            gone = policy.expired(held) if table.longest else None
            if gone is not None and bool(gone.any()):
                places = torch.arange(1, gone.shape[1] + 1, device="cpu")
                last = (gone * places).amax(1)  # pages up to the newest that goes
                newest = (table.counts - last) * plan.page_size + self.exact.counts - plan.sinks
                self._limit_tail(int(newest[last > 0].min()))
                table.drop(gone)
                self.pool.reclaim()

    def _limit_tail(self, tokens: int) -> None:
        self.tail = tokens if self.tail is None else min(self.tail, tokens)

    def write(
        self,
        keys: Tensor,
        values: Tensor,
        valid: Tensor | None,
        queries: Tensor | None = None,
        scale: float = 1.0,
        chosen: Tensor | None = None,
    ) -> None:
        """Add a chunk: keys [B, Hkv, n, Dk], values [B, Hkv, n, Dv]; `valid` bool [B, n] marks tokens that are no
        padding.

        The policies choose what is kept, with queries [B, Hq, n, Dk] where they need them; chosen bool [B, Hkv, n] is
        what one that `reconstructs` did choose. Only that is encoded.
        """
        n = keys.shape[2]
        if valid is not None and bool(valid.all()):
            valid = None
        past = self.history.counts.clone()
        if self.prompt is None:
            self.prompt = past.tolist(), self.kept.tolist()
        elif self.plan.trims:
            self.table.begin_watch()
        seen = torch.stack(
            [past, past - torch.tensor(self.prompt[0], dtype=torch.int64, device="cpu")], 1
        )  # in all, and of this prompt
        self.history.append(n, valid)
        if valid is None and bool((seen == seen[0]).all()):
            rows = torch.arange(self.rows, device="cpu")
            tails = [self._write_rows(rows, keys, values, queries, chosen, seen[0].tolist(), scale)]
        else:
            tails = []
            for b in range(self.rows):
                tokens = slice(None) if valid is None else valid[b].nonzero().flatten()
                row = (slice(b, b + 1), slice(None), tokens)
                q, c = (None if x is None else x[row] for x in (queries, chosen))
                at, row_alone = seen[b].tolist(), torch.tensor([b], dtype=torch.int64, device="cpu")
                tails.append(self._write_rows(row_alone, keys[row], values[row], q, c, at, scale))
        self.tail = min((t for t in tails if t is not None), default=None)
        self._expire()

    def _write_rows(
        self,
        rows: Tensor,
        k: Tensor,
        v: Tensor,
        q: Tensor | None,
        chosen: Tensor | None,
        seen: list[int],
        scale: float,
    ) -> int | None:
        """Write a chunk of rows with the same past and without padding: k [b, H, n, Dk], v [b, H, n, Dv].

        seen: how many tokens came before, and how many of them belong to the same prompt.
        Returns how many of the newest tokens these rows surely hold (None: all).
        """
        n = k.shape[2]
        streams = (rows[:, None] * self.heads + torch.arange(self.heads, device="cpu")).flatten()
        tail = None if self.tail is None else self.tail + n
        if q is not None and n:
            self._observe(streams.to(self.device), rearrange(q, "b (h g) n d -> (b h) (g n) d", h=self.heads))
        if not self.plan.policies or n == 0:
            if n:
                self._extend(streams, k.flatten(0, 1), v.flatten(0, 1))
            return tail
        kept = self._select(k, v, q, chosen, seen, scale).flatten(0, 1)  # [s, n]
        k, v = k.flatten(0, 1), v.flatten(0, 1)
        lost = (~kept).any(0).nonzero().flatten()
        if len(lost):
            tail = n - 1 - int(lost[-1])
        counts = kept.sum(-1).cpu()
        for count in counts.unique().tolist():
            same = (counts == count).nonzero().flatten()
            on = same.to(k.device)
            index = kept[on].nonzero()[:, 1].view(len(same), count, 1)
            self._extend(streams[same], k[on].take_along_dim(index, 1), v[on].take_along_dim(index, 1))
        return tail

    def _observe(self, streams: Tensor, queries: Tensor) -> None:
        """Show queries [s, R, Dk] to what adapts to them."""
        chooser = self.plan.chooser
        by_index = chooser is not None and chooser.needs_queries
        if by_index or self.plan.quantizer.needs_queries:
            queries = finite(queries, f"queries of layer {self.plan.layer}")
        if self.plan.quantizer.needs_queries:
            self.codec.observe(streams, queries)
        if self.index is not None and by_index:
            self.index.observe(streams, queries)

    def _select(
        self, k: Tensor, v: Tensor, q: Tensor | None, chosen: Tensor | None, seen: list[int], scale: float
    ) -> Tensor:
        """bool [b, H, n]: what the policies keep of a chunk; seen: as in `_write_rows`."""
        plan, n, (past, before) = self.plan, k.shape[2], seen
        alive = torch.ones(k.shape[:3], dtype=torch.bool, device=k.device)
        sinks = min(max(plan.sinks - past, 0), n)
        recent = min(plan.recent, n - sinks)
        for policy in plan.policies:
            if policy.needs_queries and q is None:
                raise UnsupportedError(
                    f"{policy.name} scores tokens with the prompt's queries, which are not at hand here: "
                    "pass queries=, or use a policy that needs none (streaming)"
                )
            if policy.needs_model and self.model is None:
                raise UnsupportedError(f"{policy.name} needs the model's weights, which are not at hand here")
            where = plan.layer, plan.layers, self.model, chosen
            chunk = Chunk(q, k, v, alive, past, sinks, recent, scale, *where, before=before)
            alive = policy.select(chunk)
        return alive

    def _extend(self, streams: Tensor, k: Tensor, v: Tensor) -> None:
        """Add kept tokens k [s, n, Dk], v [s, n, Dv] to `streams`: to the sinks, then pages, then the window."""
        held = self.exact.counts[streams]
        if not bool((held == held[0]).all()):
            for amount in held.unique().tolist():
                same = (held == amount).nonzero().flatten()
                on = same.to(k.device)
                self._extend(streams[same], k[on], v[on])
            return
        plan, count = self.plan, int(held[0])
        taken = min(max(plan.sinks - count, 0), k.shape[1])
        if taken:
            self.exact.put(streams, count, k[:, :taken], v[:, :taken])
            k, v, count = k[:, taken:], v[:, taken:], count + taken
        if count > plan.sinks:  # less than the window and a page comes back out of the buffer
            old_k, old_v = self.exact.window(streams, count)
            k, v, count = torch.cat([old_k, k], 1), torch.cat([old_v, v], 1), plan.sinks
        paged = max(k.shape[1] - plan.recent, 0) // plan.page_size * plan.page_size
        if paged:
            self._encode(streams, k, v, paged)
        self.exact.put(streams, count, k[:, paged:], v[:, paged:])

    def _encode(self, streams: Tensor, k: Tensor, v: Tensor, tokens: int) -> None:
        """Turn the first `tokens` = m * P of what is at hand, k [s, n, Dk], v [s, n, Dv], into m pages per stream."""
        size = self.plan.page_size
        m = tokens // size
        if not self.codec.lossless:
            k, v = (finite(x, f"{name} of layer {self.plan.layer}") for name, x in (("keys", k), ("values", v)))
        on = streams.to(self.device)
        self.codec.fit(on, k, v)
        if self.index is not None:
            self.index.fit(on, k)
        k, v = (x[:, :tokens].unflatten(1, (m, size)).flatten(0, 1) for x in (k, v))  # [s * m, P, D]
        on = on.repeat_interleave(m)
        summaries = {} if self.index is None else self.index.summarize(k, v, on)
        ids = self.pool.allocate(len(k))
        write_pages(self.pool, ids, self.codec, k, v, on, summaries)
        self.table.append(streams, ids.view(len(streams), m))

    # -- read -----------------------------------------------------------------------------------------------------

    def attend(
        self,
        queries: Tensor,
        scale: float,
        softcap: float | None = None,
        chunk: tuple[Tensor, Tensor, Tensor | None] | None = None,
    ) -> Part:
        """Attention of queries [B, Hq, n, Dk] over everything held: out [B, Hq, n, Dv] and lse [B, Hq, n], float32.

        `chunk` adds tokens that are not written yet: keys [B, Hkv, c, Dk], values [B, Hkv, c, Dv] and which of them
        each query sees, bool, broadcastable to [B, n, c]; None: those up to its own, the queries being those of the
        last n <= c. Selectors act on single queries only (n = 1); more read every page.
        """
        n = queries.shape[2]
        if chunk is not None and self.prompt is not None and self.plan.trims:
            self.table.begin_watch()
        group = queries.shape[1] // self.heads
        q = queries.reshape(self.rows * self.heads, group * n, queries.shape[3])
        self.choices.pop(self.plan.layer, None)
        tokens, self.read = self.exact.tokens()
        parts, pages = self._attend_held(q, n, scale, softcap, tokens)
        groups = parts[0].groups if parts else None
        if self.compacted is not None:
            parts.append(self.compacted.attend(q, scale, softcap))
            self.read["compacted"] = self.compacted.nbytes
        if chunk is not None:
            parts.append(self._attend_chunk(q.unflatten(1, (group, n)), *chunk, scale, softcap))
            self.read["chunk"] = chunk[0].nbytes + chunk[1].nbytes
        self.dense_read = self.dense_bytes + self.read.get("chunk", 0)
        part = merge(parts)
        if groups is not None:
            mass = (groups - part.lse[..., None]).exp().unflatten(1, (group, n)).mean(1).sum(1)  # [S, k]
            mass = mass if pages is None else mass.new_zeros(len(mass), self.table.longest).scatter_add(1, pages, mass)
            self.table.watch(mass, n)
        heads = self.heads * group
        return Part(part.out.reshape(self.rows, heads, n, -1), part.lse.reshape(self.rows, heads, n))

    def _attend_chunk(
        self, q: Tensor, keys: Tensor, values: Tensor, visible: Tensor | None, scale: float, softcap: float | None
    ) -> Part:
        """Attention of q [S, G, n, Dk] over a chunk, as `attend` has it."""
        k, v = keys.flatten(0, 1), values.flatten(0, 1)
        group, n = q.shape[1:3]
        if visible is None:
            first = k.shape[1] - n
            own = attend_causal(q, k[:, first:], v[:, first:], scale, softcap)
            if not first:
                return own
            return merge([attend(q.flatten(1, 2), k[:, :first], v[:, :first], scale, None, softcap), own])
        seen = visible.expand(self.rows, n, k.shape[1])[:, None, None]  # [B, 1, 1, n, c]
        seen = seen.expand(-1, self.heads, group, -1, -1).flatten(2, 3).flatten(0, 1)
        return attend(q.flatten(1, 2), k, v, scale, seen, softcap)

    def _attend_held(
        self, q: Tensor, n: int, scale: float, softcap: float | None, tokens: Tokens | None
    ) -> tuple[list[Part], Tensor | None]:
        """Attention over exact tokens and what a selector chooses, and what it lets stand for the rest; and the places
        [S, k] of the pages read; None: all."""
        (ids, counts), pool = self.table.held(), self.pool.data
        if ids.shape[1] == 0:
            return [] if tokens is None else [attend_tokens(q, tokens, scale, softcap)], None
        total = self.table.total
        self.read["table"] = ids.nbytes
        if adapted := self.codec.adapted():
            self.read["constants"] = storage_bytes(adapted)
        choice, rest = self._choose(q, ids, counts, scale, softcap) if n == 1 else (None, None)
        more: dict[str, Any] = {}
        centres = 0
        if choice is not None:
            counts = choice.valid
            if self.by_tokens:
                counts = counts // self.layout.page_size
                if self.layout.centres:
                    more["token_bias"] = token_bias(q, self.codec, self.layout, pool, ids, choice.positions)
                    centres = total * self.layout.centre_bytes
                pool = regroup(self.layout, pool, ids, choice.positions)
                ids = torch.arange(len(pool), device=self.device).view(len(ids), -1)
            else:
                ids = ids.gather(1, choice.positions)
            total = sum(counts.tolist())
        self.read["pages"] = total * self.layout.body_bytes + centres
        args = (self.layout, self.codec, scale, softcap, self.table.received is not None, tokens)
        parts = [attend_pages(q, pool, ids, counts, *args, **more)]
        return parts if rest is None else [*parts, rest], None if choice is None else choice.positions

    def _choose(
        self, q: Tensor, ids: Tensor, counts: Tensor, scale: float, softcap: float | None = None
    ) -> tuple[Choice | None, Part | None]:
        """What single queries read (None: all pages), and attention over what stands for the rest.

        A follower reads what its leader does, if that had as many pages to choose from in every stream."""
        selector, pages = self.plan.selector, self.table.counts
        if selector is None:
            return None, None
        if self.index is None:
            shared = None if self.plan.leader is None else self.choices.get(self.plan.leader)
            if shared is None or not torch.equal(shared.pages, pages):
                return None, None
            return Choice(shared.positions.to(self.device), shared.valid.to(self.device)), None
        summary = Summary(self.layout, self.pool.data, ids, counts)
        self.read["summaries"] = self.table.total * self.layout.summary_bytes
        if adapted := self.index.adapted():
            self.read["constants"] = self.read.get("constants", 0) + storage_bytes(adapted)
        held = Summaries(summary, counts, self.heads, self.layout.page_size, self.by_tokens)
        choice = self.index.choose(q, scale, held)
        if selector.share > 1:
            self.choices[self.plan.layer] = Shared(*choice, pages.clone())
        return choice, self.index.rest(q, scale, held, choice, softcap)

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

    def padded(self) -> tuple[Tensor, Tensor]:
        """Everything seen, decoded into its logical place: keys [B, Hkv, length, Dk], values [B, Hkv, length, Dv];
        padding is 0.

        For models that insist on tensors.

        Raises:
            UnsupportedError: some tokens were evicted.
        """
        if bool((self.kept != self.history.counts.repeat_interleave(self.heads)).any()):
            raise UnsupportedError(
                "the model asks for all keys and values as a tensor, but the stack evicted some of them; "
                "use a stack without eviction policy for this model"
            )
        valid = self.history.valid()
        shape = (self.rows * self.heads, self.history.length)
        k, v = (torch.zeros(*shape, dim, dtype=self.dtype, device=self.device) for dim in (self.k_dim, self.v_dim))
        for s in range(shape[0]):
            where = slice(None) if valid is None else valid[s // self.heads].to(self.device)
            k[s, where], v[s, where] = self._tokens(s)
        return k.unflatten(0, (self.rows, self.heads)), v.unflatten(0, (self.rows, self.heads))

    def _tokens(self, stream: int) -> tuple[Tensor, Tensor]:
        """One stream's tokens, oldest first: [N', Dk], [N', Dv]."""
        ids = self.table.ids()[stream, : int(self.table.counts[stream])]
        parts = [*self.exact.of(stream)]
        parts.insert(1, self._decode(ids, stream))
        return torch.cat([k for k, _ in parts]), torch.cat([v for _, v in parts])

    def _decode(self, ids: Tensor, stream: int) -> tuple[Tensor, Tensor]:
        """A stream's pages ids [m] as tokens [m * P, Dk], [m * P, Dv] in original coordinates and the model's dtype."""
        if not len(ids):  # a codec that adapts to its first page has nothing to decode with yet
            k, v = (torch.zeros(0, dim, dtype=self.dtype, device=self.device) for dim in (self.k_dim, self.v_dim))
            return k, v
        k, v = self.codec.decode(self.layout.gather(self.pool.data, ids))
        k, v = self.codec.inverse(k, v, torch.full((len(ids),), stream, device=self.device, dtype=torch.int64))
        if not self.codec.lossless:
            k, v = saturated(k, self.dtype), saturated(v, self.dtype)
        return k.to(self.dtype).flatten(0, 1), v.to(self.dtype).flatten(0, 1)

    # -- surgery --------------------------------------------------------------------------------------------------

    def crop(self, tokens: int) -> None:
        """Forget the newest `tokens` tokens of every row.

        Exact or refused: what is to go must be held by all streams, in the window or in pages that decode exactly.

        Raises:
            KvcompError: more tokens than there are.
            UnsupportedError: it would reach into lossy pages or past evicted tokens.
        """
        if tokens > self.history.length:
            raise KvcompError(f"crop({-tokens}): the cache holds {self.history.length} tokens")
        self.end_prompt()
        self._take_back(self.history.newest(tokens), f"crop({-tokens})", self.codec.lossless)
        self.history.crop(tokens)

    def drop_newest(self, gone: Tensor) -> None:
        """Forget the newest tokens of some rows, whose columns count as padding from now on.

        gone bool [B, length], on the host: in each row the last real tokens. Those that lie in pages are taken out of
        them; what such a page keeps goes on as it decodes.

        Raises:
            UnsupportedError: it would reach past evicted tokens.
        """
        self.end_prompt()
        self._take_back(gone.sum(-1), "the attention mask hides a row's newest tokens, which", True)
        self.history.hide(gone)

    def _take_back(self, gone: Tensor, what: str, unpage: bool) -> None:
        """Remove each row's newest `gone` [B] tokens from what streams hold; out of pages only where `unpage` says."""
        remove, most = gone.repeat_interleave(self.heads), int(gone.max())
        window = (self.exact.counts - self.plan.sinks).clamp_min(0)
        deep = remove > torch.where(self.table.counts > 0, window, self.exact.counts)
        if self.tail is not None and most > self.tail:
            raise UnsupportedError(
                f"{what} reaches {most} tokens back: only the last {self.tail} are held without gaps, older ones were "
                "evicted; crop less, fork() the cache before, or reset() it and feed its tokens again"
            )
        if bool(deep.any()) and not unpage:
            raise UnsupportedError(
                f"{what} reaches into quantized pages: only the last {int(window[deep].min())} tokens are "
                f"still exact. Use a stack with window(recent={most}) or more, or fork() the cache before"
            )
        for stream in deep.nonzero().flatten().tolist():
            self._unpage(stream, int(remove[stream]))
        self.exact.recount(slice(None), self.exact.counts - remove)
        if self.tail is not None:
            self.tail -= most
        if bool(deep.any()):
            self.pool.reclaim()

    def _unpage(self, stream: int, remove: int) -> None:
        """Bring a stream's newest pages back into its buffer, so that `remove` tokens can be taken off its end."""
        plan, at = self.plan, int(self.table.counts[stream])
        window = int(self.exact.counts[stream]) - plan.sinks
        pages = min(-(-(remove - window) // plan.page_size), at)
        k, v = self._decode(self.table.ids()[stream, at - pages : at], stream)
        left = window + pages * plan.page_size - remove  # tokens that stay behind the sinks
        back = max(left, 0)
        where = torch.tensor([stream], dtype=torch.int64, device="cpu")
        self.exact.put(where, plan.sinks, k[None, :back], v[None, :back])
        self.exact.recount(stream, plan.sinks + left + remove)
        amount = torch.zeros_like(self.table.counts)
        amount[stream] = pages
        self.table.drop_newest(amount)

    def compactable(self, start: int, end: int) -> tuple[int, int]:
        """The tokens (start, end) of all whole pages between tokens `start` and `end`.

        Raises:
            UnsupportedError: tokens were evicted, or rows are padded, so that pages have no certain place.
            KvcompError: no whole page lies there, or part of it is compacted already.
        """
        plan, length = self.plan, self.history.length
        if plan.policies or self.history.valid() is not None:
            why = f"{plan.policies[0].name} may drop tokens" if plan.policies else "some rows are padded"
            raise UnsupportedError(f"compact(span=({start}, {end})): {why}, so that nothing says which pages these are")
        if not 0 <= start < end <= length:
            raise KvcompError(f"compact(span=({start}, {end})): expected 0 <= start < end <= {length}, the tokens held")
        done = () if self.compacted is None else self.compacted.columns
        for old in done:
            if start < old[1] and old[0] < end:
                raise KvcompError(f"compact(span=({start}, {end})): tokens {old[0]} to {old[1]} are compacted already")
        size, sinks = plan.page_size, plan.sinks
        paged = sinks + size * self.table.longest + sum(b - a for a, b in done)
        first = sinks + -(-max(start - sinks, 0) // size) * size
        last = sinks + max(min(end, paged) - sinks, 0) // size * size
        if last <= first:
            raise KvcompError(
                f"compact(span=({start}, {end})): no whole page of {size} tokens lies there; pages hold the tokens "
                f"{sinks} to {paged}, the others stay in full precision"
            )
        return first, last

    def compact(
        self, start: int, end: int, queries: Tensor, tokens: int, scale: float, softcap: float | None
    ) -> Compacted:
        """Replace tokens `start` to `end`, as `compactable` gives them, by `tokens` that attention takes for them.

        queries [B, Hq, m, Dk] post-RoPE, behind the span: those that attention is matched for.
        """
        plan = self.plan
        before = sum(b - a for a, b in (() if self.compacted is None else self.compacted.columns) if b <= start)
        first = (start - before - plan.sinks) // plan.page_size
        pages = slice(first, first + (end - start) // plan.page_size)
        ids = self.table.ids()[:, pages]
        decoded = [self._decode(row, stream) for stream, row in enumerate(ids)]
        k, v = (torch.stack([pair[i] for pair in decoded]) for i in (0, 1))
        q = rearrange(queries, "b (h g) n d -> (b h) (n g) d", h=self.heads)
        found = match(q, k, v, scale, tokens, softcap)
        empty = CompactSpans(k[:, :0], found.bias[:, :0], v[:, :0], ())
        self.compacted = (empty if self.compacted is None else self.compacted).extended(found, (start, end))
        gone = torch.zeros(len(ids), self.table.longest, dtype=torch.bool, device="cpu")
        gone[:, pages] = True
        self._limit_tail(self.history.length - end)
        self.table.drop(gone)
        self.pool.reclaim()
        return found

    def select_rows(self, rows: Tensor) -> None:
        """Keep, repeat and order rows (beams): int64 [B']. Pages are shared, never copied."""
        rows = rows.cpu()
        streams = (rows[:, None] * self.heads + torch.arange(self.heads, device="cpu")).flatten()
        self.exact.select(streams)
        self.table.select(streams)
        self.history.select(rows)
        if self.prompt is not None:
            seen, held = self.prompt
            self.prompt = [seen[i] for i in rows.tolist()], [held[i] for i in streams.tolist()]
        self.codec.select(streams.to(self.device))
        if self.index is not None:
            self.index.select(streams.to(self.device))
        self.compacted = None if self.compacted is None else self.compacted.select(streams)
        self.rows = len(rows)
        self.pool.reclaim()

    def fork(self, choices: dict[int, Shared] | None = None) -> LayerStore:
        """A store that goes on by itself from here, with the `choices` of its own cache. The two share the pages that
        there are, and the pool of later ones; the rest is copied."""
        twin = copy(self)
        twin.choices = {} if choices is None else choices
        twin.history, twin.read = self.history.fork(), dict(self.read)
        if self.started:
            twin.exact, twin.codec, twin.table = self.exact.fork(), self.codec.fork(), deepcopy(self.table)
            twin.index = None if self.index is None else self.index.fork()
            twin.pool.join(twin.table)
        return twin

    # -- saving ---------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """All that is held, as tensors and plain values from which `restore` makes the same store.

        The live tensors wherever nothing in them is idle. Left out is what the plan rebuilds (`Codec.constants`), and
        what the last step read.
        """
        if not self.started:
            return {}
        pages, table = compact(self.pool, self.table)
        watched = self.table.received
        return {
            "rows": self.rows,
            "heads": self.heads,
            "fields": [[f.name, *f.shape, str(f.dtype)] for f in self.layout.fields],
            "pages": pages,
            "table": table,
            "counts": self.table.counts,
            "received": None if watched is None else watched[:, : self.table.longest],
            "exact": self.exact.state(),
            "history": self.history.state(),
            "codec": self.codec.state(),
            "index": {} if self.index is None else self.index.state(),
            "compacted": None if self.compacted is None else self.compacted._asdict(),
            "tail": self.tail,
            "prompt": None if self.prompt is None else [list(numbers) for numbers in self.prompt],
        }

    def restore(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Become the store whose `state` this is, on `device`; the state's tensors lie on the host.

        Raises:
            KvcompError: pages of another layout than this plan's.
            DamagedError: the state is no store's of this plan.
        """
        if state:
            restore(self, State.of(state, f"layer {self.plan.layer}"), device)

    # -- accounting -----------------------------------------------------------------------------------------------

    def held(self, seen: set[int]) -> dict[str, int]:
        """Bytes of live storages by part; storages whose address is in `seen` are skipped, the others added to it."""
        if not self.started:
            return {}
        exact = storage_bytes(self.exact.tensors, seen)
        slots = max(self.exact.k.shape[1], 1)
        sinks = exact * min(self.plan.sinks, slots) // slots
        pool = storage_bytes([self.pool.data], seen)
        used = len(self.pool.owned()) if pool else 0
        constants = [] if self.index is None else self.index.constants()
        return {
            "pages": used * self.layout.body_bytes,
            "summaries": used * self.layout.summary_bytes,
            "slack": pool - used * self.layout.bytes_per_page,
            "sinks": sinks,
            "window": exact - sinks,
            "table": storage_bytes([*self.table.tensors(), self.exact.counts], seen),
            "compacted": 0 if self.compacted is None else storage_bytes(self.compacted.tensors, seen),
            "constants": storage_bytes([*self.codec.constants(), *constants], seen),
            "choices": storage_bytes(self.choices.get(self.plan.layer, ()), seen),
            "history": storage_bytes(self.history.tensors(), seen),
        }

    @property
    def dense_bytes(self) -> int:
        """Bytes of full-precision K and V for all tokens seen, padding excluded."""
        if not self.started:
            return 0
        return self.history.total * self.heads * (self.k_dim + self.v_dim) * self.dtype.itemsize
