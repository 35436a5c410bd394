"""Attention of one layer: new tokens see each other exactly, and those before them as their pages have them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from vllm.config import get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.forward_context import get_forward_context
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionImpl, AttentionType

from kvcomp.attention import Part, attend_causal, merge
from kvcomp.errors import UnsupportedError
from kvcomp.exact import Tokens
from kvcomp.kernels.dispatch import attend_pages, attend_tokens
from kvcomp.kernels.select import regroup, token_bias
from kvcomp.pages import Summary
from kvcomp.stages import Choice, Summaries

from .decode import DecodeStep
from .keep import keep_chosen, let_go, score, watch
from .key_centres import turned_biases
from .pages import Pages
from .setup import Setup
from .step import Group, Prompt, Step
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
        config = get_current_vllm_config()
        self.setup, self.model, self.ranks = Setup.of(config), config.model_config, config.parallel_config
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
            layer = extract_layer_index(layer_name)
            biases = None
            if self.setup.by_token:
                biases = turned_biases(self.model.model, self.model.hf_text_config, layer, self.head_size)
            if biases is not None:
                ranks = self.ranks.tensor_parallel_size
                rank = get_tensor_model_parallel_rank() if ranks > 1 else 0
                biases = biases.of_rank(self.num_kv_heads, rank, ranks)
            self.pages = Pages(self.setup, layer, self.num_kv_heads, device, biases)
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
        if self.window is None:  # tokens, which share nothing, and the new one is at hand
            return group.pages.nbytes + int(pages.sum()) * (layout.body_bytes // layout.page_size)
        return size + int(exact.sum()) * 2 * self.head_size * self.setup.dtype.itemsize

    def _run(
        self, pages: Pages, step: Step, query: Tensor, key: Tensor, value: Tensor, blocks: Tensor | None, out: Tensor
    ) -> None:
        """Attention of the step's tokens without what follows it, written to `out` [T, Hq, D], and what they leave."""
        window, held = self.window, list[Tensor | None]([None] * len(step.groups))
        if window is not None and blocks is not None:
            held = [window.read(at) for at in self._starts(window, step, blocks)[1:]]
        # A request of this step may share a prefix with another one that is computed in it: write, then read.
        self._write(pages, step, key, value, held)
        for group, exact in zip(step.groups, held, strict=True):
            own = (x[group.tokens] for x in (query, key, value))
            out[group.tokens] = self._attend(pages, step, group, exact, *own).to(out.dtype)
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
            let_go(pages, leave)
        rows = step.writes[0]
        window.write(step.starts[0], key[rows], value[rows])
        if len(step.votes[0]):
            rows, requests, slots = step.votes
            window.write_queries(blocks[requests], slots, query[rows])

    def _starts(self, window: Window, step: Step, blocks: Tensor) -> list[Tensor]:
        """Where windows keep what the step writes, and hold what each of its groups reads; found out once a step."""
        if not step.starts:
            _, requests, slots = step.writes
            step.starts = [window.starts(blocks[requests], slots[:, None])[:, 0]]
            step.starts += [window.starts(blocks[group.requests], group.slots) for group in step.groups]
        return step.starts

    def _write(self, pages: Pages, step: Step, key: Tensor, value: Tensor, held: list[Tensor | None]) -> None:
        """Write the step's tokens, or the pages that they make full."""
        if self.setup.by_token:
            step.cells = step.cells or pages.cells(step.slot_mapping, step.begun)
            pages.write_tokens(key, value, step.cells)
            return
        for fill in step.fills:
            group, exact = step.groups[fill.group], held[fill.group]
            assert exact is not None
            old = exact[fill.row, :, fill.sinks : group.held[fill.row]].chunk(2, -1)
            rows = group.tokens[fill.row, fill.new_sinks :]
            k, v = (torch.cat([x, new[rows].transpose(0, 1)], 1) for x, new in zip(old, (key, value), strict=True))
            pages.write_pages(k, v, fill.pages)

    def _attend(
        self,
        pages: Pages,
        step: Step,
        group: Group,
        held: Tensor | None,
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
        exact = self._tokens(group, held, k, v)
        parts = self._attend_pages(pages, step, group, q, exact)
        groups = parts[0].groups if parts else None
        if n > 1:
            parts.append(attend_causal(q.unflatten(1, (-1, n)), k, v, self.scale, self.softcap))
        out, lse, _ = merge(parts)  # [S, G * n, D], [S, G * n]
        if groups is not None:
            watch(pages, group, groups, lse)
        return out.view(requests, self.num_heads, n, -1).transpose(1, 2)

    def _tokens(self, group: Group, held: Tensor | None, key: Tensor, value: Tensor) -> Tokens | None:
        """The exact tokens that queries read behind the pages, of held [R, H, longest + 1, 2 * D].

        key and value [S, n, D] are the group's new tokens: a single one goes behind the others.
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

    def _attend_pages(self, pages: Pages, step: Step, group: Group, q: Tensor, exact: Tokens | None) -> list[Part]:
        """Attention of queries q [S, R, D] over the group's pages, or those a selector chooses, and exact tokens."""
        pool, ids, counts = pages.pool, group.pages, group.counts
        if not ids.shape[1]:
            self._remember(group, counts, exact)
            return [] if exact is None else [attend_tokens(q, exact, self.scale, self.softcap)]
        choice, rest = self._choose(pages, step, group, q) if group.new == 1 else (None, None)
        bias = None
        if choice is not None and pages.by_tokens:
            bias = token_bias(q, pages.codec, pages.layout, pool, ids, choice.positions)
            pool, counts = regroup(pages.layout, pool, ids, choice.positions), choice.valid // pages.layout.page_size
            ids = torch.arange(len(pool), device=pool.device).view(len(ids), -1)
        elif choice is not None:
            ids, counts = ids.gather(1, choice.positions), choice.valid
        self._remember(group, counts, exact)
        watched = self.setup.most is not None
        how = pages.layout, pages.codec, self.scale, self.softcap, watched
        part = attend_pages(q, pool, ids, counts, *how, exact, self.setup.by_token, bias)
        if part.groups is not None and choice is not None:
            every = part.groups.new_full((*part.groups.shape[:2], group.pages.shape[1]), -torch.inf)
            place = choice.positions[:, None].expand_as(part.groups)  # of what is not valid: any, with -inf
            part = part._replace(groups=every.scatter_reduce(2, place, part.groups, "amax"))
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


def _of_prompt(
    step: Step, prompt: Prompt, held: Sequence[Tensor | None], new: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Keys and values [H, w, D] of a prompt that its window holds, and the step's queries, keys and values [n, ...]."""
    group, exact, row = step.groups[prompt.group], held[prompt.group], prompt.row
    assert exact is not None
    return list(exact[row, :, : group.held[row]].chunk(2, -1)), [x[group.tokens[row]] for x in new]
