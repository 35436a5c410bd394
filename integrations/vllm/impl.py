"""Attention of one layer: new tokens see each other exactly, and those before them as their pages have them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionImpl, AttentionType

from kvcomp.attention import Part, attend_causal, merge
from kvcomp.errors import UnsupportedError
from kvcomp.exact import Tokens
from kvcomp.kernels.dispatch import attend_pages, attend_tokens
from kvcomp.kernels.select import regroup
from kvcomp.pages import Summary
from kvcomp.stages import Choice, Summaries

from .decode import DecodeStep
from .keep import keep_chosen
from .pages import Pages
from .setup import Setup
from .step import Group, Step
from .window import Window


class PageAttention(AttentionImpl[Step | DecodeStep]):
    """The attention of one layer over pages, a window where the stack needs one, and the step's own tokens."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        **more: Any,
    ) -> None:
        self.setup = Setup.of(get_current_vllm_config())
        refused = {
            "position biases (ALiBi)": alibi_slopes,
            "a sliding window": sliding_window,
            "another kind than decoding": attn_type != AttentionType.DECODER or None,
            "the cache of another layer": kv_sharing_target_layer_name,
            "learned sinks": more.get("sinks"),
        }
        for what, given in refused.items():
            if given is not None:
                raise UnsupportedError(
                    f"{self.setup.stack}: the model has attention with {what}, which compressed pages do not serve in "
                    "vLLM: serve this model without a stack"
                )
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.softcap = logits_soft_cap or None
        self.pages: Pages | None = None  # which layer this is shows at the first call
        self.window: Window | None = None
        self.handed: tuple[Group, Tensor, Tensor] | DecodeStep | None = None
        if self.setup.slots:
            self.window = Window(self.setup, self.num_kv_heads, num_heads)
        Pages(self.setup, 0, self.num_kv_heads)  # refuses what cannot be served before there is anything to serve

    def bind(self, layer_name: str, device: torch.device) -> Pages:
        """The layer's pages, for a pool on `device`."""
        if self.pages is None:
            self.pages = Pages(self.setup, extract_layer_index(layer_name), self.num_kv_heads, device)
        return self.pages

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Step | DecodeStep | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Attention of query [T, Hq, D] over what each request holds, written to output [T, Hq, D].

        key and value [T, Hkv, D] are the step's new tokens, all requests in a row; kv_cache uint8 [blocks, Hkv, P, C].
        """
        if attn_metadata is None:  # vLLM measures memory, and there is no cache yet
            return output.zero_()
        pages = self.bind(layer.layer_name, kv_cache.device).at(kv_cache)
        if isinstance(attn_metadata, DecodeStep):
            self.handed = attn_metadata
            out = output.view(len(output), self.num_heads, -1)
            attn_metadata.attend(pages, query, key, value, self.scale, self.softcap, out)
            return output
        blocks = None
        if self.window is not None:
            blocks = get_forward_context().attn_metadata[self.window.name].blocks
        out = output.view(len(output), self.num_heads, -1)
        part: Step | None = attn_metadata
        while part is not None:
            self._run(pages, part, query, key, value, blocks, out)
            part = part.then
        return output

    def read(self) -> int:
        """Bytes of the cache that the last step of single tokens loaded: pages, their ids, summaries, exact tokens."""
        if self.handed is None or self.pages is None:
            return 0
        if isinstance(self.handed, DecodeStep):
            return self.handed.read(self.pages.layout)
        group, pages, exact = self.handed
        layout = self.pages.layout
        size = group.pages.nbytes + int(pages.sum()) * layout.body_bytes
        if self.pages.index is not None:
            size += int(group.counts.sum()) * layout.summary_bytes
        if self.window is None:  # the page that is not full yet is decoded, and the new token is at hand
            size += int(group.exact.count_nonzero()) * self.num_kv_heads * layout.body_bytes
            exact = exact - group.exact.repeat_interleave(self.num_kv_heads)
        return size + int(exact.sum()) * 2 * self.head_size * self.setup.dtype.itemsize

    def _run(
        self, pages: Pages, step: Step, query: Tensor, key: Tensor, value: Tensor, blocks: Tensor | None, out: Tensor
    ) -> None:
        """Attention of the step's tokens without what follows it, written to `out` [T, Hq, D], and what they leave."""
        held = [self._exact(pages, group, blocks) for group in step.groups]
        # A request of this step may share a prefix with another one that is computed in it: write, then read.
        self._write(pages, step, key, value, held)
        for group, exact in zip(step.groups, held, strict=True):
            new = (x[group.tokens] for x in (query, key, value))
            out[group.tokens] = self._attend(pages, step, group, exact, *new).to(out.dtype)
        if self.window is None or blocks is None:
            return
        for keep in step.keeps:
            group, exact = step.groups[keep.group], held[keep.group]
            assert exact is not None
            old = [x[keep.row, : group.held[keep.row]] for x in exact]
            ended = [x[group.tokens[keep.row]] for x in (query, key, value)]
            keep_chosen(pages, self.window, keep, blocks[keep.request], old, ended, self.scale)
        rows, requests, slots = step.writes
        self.window.write(blocks[requests], slots, key[rows], value[rows])
        if len(step.votes[0]):
            rows, requests, slots = step.votes
            self.window.write_queries(blocks[requests], slots, query[rows])

    def _exact(self, pages: Pages, group: Group, blocks: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """Keys and values [R, n, H, D] of the tokens behind the pages; None where they are read once all is written."""
        if self.window is None or blocks is None:
            return None
        return self.window.read(blocks[group.requests], group.slots)

    def _write(
        self, pages: Pages, step: Step, key: Tensor, value: Tensor, held: list[tuple[Tensor, Tensor] | None]
    ) -> None:
        """Write the step's tokens, or the pages that they make full."""
        if self.setup.by_token:
            step.cells = step.cells or pages.cells(step.slot_mapping)
            pages.write_tokens(key, value, step.cells)
            return
        for fill in step.fills:
            group, exact = step.groups[fill.group], held[fill.group]
            assert exact is not None
            behind = slice(fill.sinks, group.held[fill.row])
            rows = group.tokens[fill.row, fill.new_sinks :]
            k, v = (torch.cat([old[fill.row, behind], new[rows]]) for old, new in zip(exact, (key, value), strict=True))
            pages.write_pages(k.transpose(0, 1), v.transpose(0, 1), fill.pages)

    def _attend(
        self,
        pages: Pages,
        step: Step,
        group: Group,
        held: tuple[Tensor, Tensor] | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
    ) -> Tensor:
        """[R, n, Hq, D] float32 of query [R, n, Hq, D] and the group's own key and value [R, n, H, D]."""
        requests, n = group.tokens.shape
        heads, queries = self.num_kv_heads, self.num_heads // self.num_kv_heads * n
        if n > 1 and not group.past and self.softcap is None:
            q, k, v = (x.transpose(1, 2) for x in (query, key, value))
            dense = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale, enable_gqa=True)
            return dense.transpose(1, 2)
        q = query.transpose(1, 2).reshape(requests * heads, queries, -1)  # [S, G * n, D]
        k, v = (x.transpose(1, 2).flatten(0, 1) for x in (key, value))  # [S, n, D]
        exact = self._tokens(pages, group, held, k, v)
        parts = self._attend_pages(pages, step, group, q, exact)
        if n > 1:
            parts.append(attend_causal(q.unflatten(1, (-1, n)), k, v, self.scale, self.softcap))
        out = merge(parts).out  # [S, G * n, D]
        return out.view(requests, self.num_heads, n, -1).transpose(1, 2)

    def _tokens(
        self, pages: Pages, group: Group, held: tuple[Tensor, Tensor] | None, key: Tensor, value: Tensor
    ) -> Tokens | None:
        """What queries read behind the pages: exact tokens or, where there is no window, the page not full yet.

        key and value [S, n, D] are the group's new tokens: a single one goes behind the others.
        """
        counts = group.exact.repeat_interleave(self.num_kv_heads)
        longest, alone = group.longest, group.new == 1
        if not longest:
            return Tokens(key.contiguous(), value.contiguous(), counts + 1) if alone else None
        if held is not None:
            k, v = (x.transpose(1, 2).flatten(0, 1) for x in held)  # [S, longest, D]
        else:
            k, v = (x[:, :longest] for x in pages.decode(group.tail))
        beyond = (torch.arange(longest, device=counts.device) >= counts[:, None])[..., None]
        k, v = (x.masked_fill(beyond, 0) for x in (k, v))  # what lies there may be anything
        if alone:
            every = torch.arange(len(counts), device=counts.device)
            k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
            k[every, counts], v[every, counts] = key[:, 0].to(k.dtype), value[:, 0].to(v.dtype)
            counts = counts + 1
        return Tokens(k.contiguous(), v.contiguous(), counts)

    def _attend_pages(self, pages: Pages, step: Step, group: Group, q: Tensor, exact: Tokens | None) -> list[Part]:
        """Attention of queries q [S, R, D] over the group's pages, or those a selector chooses, and exact tokens."""
        pool, ids, counts = pages.pool, group.pages, group.counts
        if not ids.shape[1]:
            self._remember(group, counts, exact)
            return [] if exact is None else [attend_tokens(q, exact, self.scale, self.softcap)]
        choice, rest = self._choose(pages, step, group, q) if group.new == 1 else (None, None)
        if choice is not None and pages.by_tokens:
            pool, counts = regroup(pages.layout, pool, ids, choice.positions), choice.valid // pages.layout.page_size
            ids = torch.arange(len(pool), device=pool.device).view(len(ids), -1)
        elif choice is not None:
            ids, counts = ids.gather(1, choice.positions), choice.valid
        self._remember(group, counts, exact)
        part = attend_pages(q, pool, ids, counts, pages.layout, pages.codec, self.scale, self.softcap, False, exact)
        return [part] if rest is None else [part, rest]

    def _remember(self, group: Group, pages: Tensor, exact: Tokens | None) -> None:
        """Keep what `read` counts: a step of single tokens reads so many pages [S], and exact tokens."""
        if exact is not None and group.new == 1:
            self.handed = group, pages, exact.counts

    def _choose(self, pages: Pages, step: Step, group: Group, q: Tensor) -> tuple[Choice | None, Part | None]:
        """What single queries q [S, G, D] read of the pages (None: all), and attention over what stands for others."""
        plan, index = pages.plan, pages.index
        if index is None:
            return (None, None) if plan.leader is None else (step.choices.get(plan.leader), None)
        summary = Summary(pages.layout, pages.pool, group.pages, group.counts)
        held = Summaries(summary, group.counts, self.num_kv_heads, pages.layout.page_size, pages.by_tokens)
        choice = step.choices[plan.layer] = index.choose(q, self.scale, held)
        return choice, index.rest(q, self.scale, held, choice, self.softcap)
