"""Attention of one layer: new tokens see each other exactly, and those before them as their pages have them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from kvcomp.attention import Tokens, attend, attend_causal, merge
from kvcomp.ledger import ReadPlan

from .. import reader
from ..reader import View
from .batch import Group, Prompt
from .decode import DecodeStep
from .keep import evict_pages, keep_chosen, score
from .pages import Pages
from .step import Step
from .windows import Windows


class BlockLayer:
    """One layer of an engine that owns a pool of blocks: writes what a step brings, and attends to what requests hold.

    pages: the layer's, and `windows` of its requests where the stack needs them; both are bound to the pool before a
    step. query_heads: Hq. sinks [Hq]: learned logits of no token, which take a share of each softmax (gpt-oss).
    """

    def __init__(
        self,
        pages: Pages,
        windows: Windows | None,
        query_heads: int,
        scale: float,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> None:
        self.pages, self.windows, self.setup = pages, windows, pages.setup
        self.query_heads, self.scale, self.softcap = query_heads, scale, softcap
        self.sinks = sinks
        self.last_step: ReadPlan | DecodeStep | None = None

    def attend(
        self,
        step: Step | DecodeStep,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        blocks: Tensor | None = None,
    ) -> None:
        """Attention of query [T, Hq, D] over what each request holds, written to out [T, Hq, D].

        key and value [T, H, D] are the step's new tokens, all requests in a row. blocks int64 [R, m]: those of each
        request's window, where there are windows.
        """
        if isinstance(step, DecodeStep):
            self.last_step = step
            step.attend(self.pages, query, key, value, self.scale, self.softcap, out, self.sinks)
            return
        part: Step | None = step
        while part is not None:
            self._run(part, query, key, value, blocks, out)
            part = part.then

    def read(self) -> int:
        """Bytes of the cache that the last step of single tokens loaded: pages, their ids, summaries, exact tokens."""
        if self.last_step is None:
            return 0
        if isinstance(self.last_step, DecodeStep):
            return self.last_step.read(self.pages.layout)
        return sum(self.last_step.bytes().values())

    def _run(self, step: Step, query: Tensor, key: Tensor, value: Tensor, blocks: Tensor | None, out: Tensor) -> None:
        """Attention of the step's tokens without what follows it, written to `out` [T, Hq, D], and what they leave."""
        pages, window, held = self.pages, self.windows, list[Tensor | None]([None] * len(step.groups))
        if window is not None and blocks is not None:
            held = [window.read(at) for at in self._starts(window, step, blocks)[1:]]
        # A request of this step may share a prefix with another one that is computed in it: write, then read.
        self._write(step, key, value, held)
        if window is not None and blocks is not None and step.found_sinks:
            for sinks in step.found_sinks:
                k, v = pages.sinks(sinks.records, len(sinks.slots))
                window.write(window.starts(blocks[sinks.request, None], sinks.slots[None])[0], k, v)
            held = [window.read(at) for at in self._starts(window, step, blocks)[1:]]
        for group, exact in zip(step.groups, held, strict=True):
            group.put(out, self._attend(step, group, exact, *map(group.of, (query, key, value))))
        if window is None or blocks is None:
            return
        new = query, key, value
        for prompt in step.scores:
            score(pages, prompt, *_of_prompt(step, prompt, held, new), self.scale)
        for keep in step.keeps:
            old_new = _of_prompt(step, keep.prompt, held, new)
            keep_chosen(pages, window, keep, blocks[keep.request], *old_new, self.scale)
        if len(step.fresh):
            pages.forget(step.fresh)
        for leave in step.leaves:
            evict_pages(pages, leave)
        rows = step.writes[0]
        window.write(step.starts[0], key[rows], value[rows])
        if len(step.votes[0]):
            rows, requests, slots = step.votes
            window.write_queries(blocks[requests], slots, query[rows])

    def _starts(self, window: Windows, step: Step, blocks: Tensor) -> list[Tensor]:
        """Where windows keep what the step writes, and hold what each of its groups reads; found out once a step."""
        if not step.starts:
            _, requests, slots = step.writes
            step.starts = [window.starts(blocks[requests], slots[:, None])[:, 0]]
            step.starts += [window.starts(blocks[group.requests], group.slots) for group in step.groups]
        return step.starts

    def _write(self, step: Step, key: Tensor, value: Tensor, held: list[Tensor | None]) -> None:
        """Write the step's tokens, or the pages that they make full."""
        pages = self.pages
        if self.setup.by_token:
            step.cells = step.cells or pages.cells(step.slot_mapping, step.begun)
            pages.write_tokens(key, value, step.cells)
            return
        for fill in step.fills:
            group, exact = step.groups[fill.group], held[fill.group]
            assert exact is not None
            old = exact[fill.row, :, fill.old : group.held[fill.row]].chunk(2, -1)
            rows = group.tokens[fill.row, fill.new_sinks :]
            k, v = (torch.cat([x, new[rows].transpose(0, 1)], 1) for x, new in zip(old, (key, value), strict=True))
            pages.write_pages(k, v, fill.pages)
        for sinks in step.kept_sinks:
            group, exact = step.groups[sinks.group], held[sinks.group]
            assert exact is not None
            count, rows = len(sinks.slots), group.tokens[sinks.row]
            old = exact[sinks.row, :, : min(count, group.held[sinks.row])].chunk(2, -1)
            k, v = (torch.cat([x, new[rows].transpose(0, 1)], 1) for x, new in zip(old, (key, value), strict=True))
            pages.put_sinks(sinks.records, k[:, :count], v[:, :count])

    def _attend(
        self, step: Step, group: Group, held: Tensor | None, query: Tensor, key: Tensor, value: Tensor
    ) -> Tensor:
        """[R, n, Hq, D] float32 of query [R, n, Hq, D] and the group's own key and value [R, n, H, D]."""
        requests, n = group.tokens.shape
        heads, queries = self.pages.heads, self.query_heads // self.pages.heads * n
        seen = self.setup.sliding
        if n > 1 and seen is not None and (group.past or n > seen):
            return self._within(group, held, query, key, value)
        if n > 1 and not group.past and self.softcap is None and self.sinks is None:
            q, k, v = (x.transpose(1, 2) for x in (query, key, value))
            dense = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale, enable_gqa=True)
            return dense.transpose(1, 2)
        q = query.transpose(1, 2).reshape(requests * heads, queries, -1)  # [S, G * n, D]
        k, v = (x.transpose(1, 2).flatten(0, 1) for x in (key, value))  # [S, n, D]
        view, watched = self._view(group, self._tokens(group, held, k, v)), self.setup.geometry.limit is not None
        what = self.pages.records, view, q, self.scale, self.softcap
        read = reader.attend(*what, single=n == 1, watched=watched, choices=step.choices)
        if n == 1:
            self.last_step = read.plan
            if self.windows is not None and view.tokens is not None:
                read.plan.add("window", 2 * self.setup.dim * self.setup.exact_dtype.itemsize, view.tokens.counts)
        parts = read.parts
        if n > 1:
            parts = [*parts, attend_causal(q.unflatten(1, (-1, n)), k, v, self.scale, self.softcap)]
        out, lse, _ = merge(parts)  # [S, G * n, D], [S, G * n]
        places = group.pages.shape[1]
        if self.sinks is not None:
            out, lse = attenuated(out, lse, self.sinks, n)
        if (mass := reader.received(read, lse, n, places)) is not None:
            page = torch.arange(places, device=mass.device)
            self.pages.receive(group.pages, mass, n, page < (group.counts * group.generating)[:, None])
        return out.view(requests, self.query_heads, n, -1).transpose(1, 2)

    def _within(self, group: Group, held: Tensor | None, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """As `_attend`, of several queries a request under a sliding window, each of which sees other tokens: over all
        that the first one sees, as pages have it, and the new ones."""
        n, heads, rows = group.new, self.pages.heads, self.query_heads // self.pages.heads
        found = []
        assert group.skipped is not None
        for r, (q, k, v) in enumerate(zip(query, key, value, strict=True)):
            some = slice(r * heads, (r + 1) * heads)
            count, skipped = (int(x[r * heads]) for x in (group.counts, group.skipped))
            tokens = count if self.setup.by_token else count * self.setup.page_size
            records = group.pages[some, : -(-tokens // self.setup.page_size)].long()
            parts = [[x[:, skipped:tokens]] for x in self.pages.tokens(records)] if tokens else [[], []]
            exact = None if held is None else held[r, :, : group.held[r]].chunk(2, -1)
            for i, (part, new) in enumerate(zip(parts, (k, v), strict=True)):
                part += [] if exact is None else [exact[i].to(new.dtype)]
                part.append(new.transpose(0, 1))
            keys, values = (torch.cat(part, 1) for part in parts)  # [H, past + n, D]
            past = keys.shape[1] - n
            distance = past + torch.arange(n, device=keys.device)[:, None] - torch.arange(past + n, device=keys.device)
            assert self.setup.sliding is not None
            visible = (distance >= 0) & (distance < self.setup.sliding)
            queries = q.transpose(0, 1).reshape(heads, rows * n, -1)
            out, lse, _ = attend(queries, keys, values, self.scale, visible.repeat(rows, 1)[None], self.softcap)
            if self.sinks is not None:
                out, lse = attenuated(out, lse, self.sinks, n)
            found.append(out.view(self.query_heads, n, -1).transpose(0, 1))
        return torch.stack(found)

    def _view(self, group: Group, exact: Tokens | None) -> View:
        """What a group's queries may read."""
        counts = group.counts
        what = counts, exact, self.pages.heads, counts, counts, self.setup.by_token
        return View(group.pages, *what, group.skipped if group.new == 1 else None)

    def _tokens(self, group: Group, held: Tensor | None, key: Tensor, value: Tensor) -> Tokens | None:
        """The exact tokens that queries read besides pages, of held [R, H, longest + 1, 2 * D].

        key and value [S, n, D] are the group's new tokens: a single one is appended to the others.
        """
        if group.new > 1:
            if held is None or not group.longest:
                return None
            k, v = held[:, :, :-1].flatten(0, 1).chunk(2, -1)
            return Tokens(k, v, group.exact)
        if held is None:
            return Tokens(key, value, torch.ones_like(group.exact))
        held = held.flatten(0, 1)
        every = torch.arange(len(held), device=held.device)
        held[every, group.exact] = torch.cat([key[:, 0], value[:, 0]], -1).to(held.dtype)
        k, v = held.chunk(2, -1)
        return Tokens(k, v, group.exact + 1)


def attenuated(out: Tensor, lse: Tensor, sinks: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Attention out [S, G * n, D], lse [S, G * n] of n queries a head beside learned logits sinks [Hq] of value 0:
    out * exp(lse) / (exp(lse) + exp(sink)), log(exp(lse) + exp(sink))."""
    logits = sinks.to(lse.device, lse.dtype).view(-1, lse.shape[1] // n)  # [H, G]
    logits = logits.repeat(len(lse) // len(logits), 1).repeat_interleave(n, 1)
    whole = torch.logaddexp(lse, logits)
    return out * (lse - whole).exp()[..., None], whole


def _of_prompt(
    step: Step, prompt: Prompt, held: Sequence[Tensor | None], new: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Keys and values [H, w, D] of a prompt that its window holds, and the step's queries, keys and values [n, ...]."""
    group, exact, row = step.groups[prompt.group], held[prompt.group], prompt.row
    assert exact is not None
    return list(exact[row, :, : group.held[row]].chunk(2, -1)), [x[group.tokens[row]] for x in new]
