"""Attention over tokens that a model's own indexer chose: those alone are read, of pages and exact ones alike."""

from __future__ import annotations

import torch
from torch import Tensor

from kvcomp.attention import Part, Tokens
from kvcomp.kernels.dispatch import attend_chosen, attend_tokens
from kvcomp.kernels.select import few_centres
from kvcomp.ledger import ReadPlan
from kvcomp.stages import Choice
from kvcomp.stages.plan import TABLE_ENTRY

from .reader import View
from .records import Records


def attend(
    records: Records, view: View, q: Tensor, scale: float, softcap: float | None, choice: Choice, plan: ReadPlan
) -> Part:
    """Attention of q [S, R, Dk] over chosen tokens alone; what is read is added to `plan`.

    choice: places int64 [S, k] among all tokens that a stream holds, oldest first (sinks, pages, window): valid ones
    ascending, and only then others. Where fields are per token, single tokens of pages are read; elsewhere the pages
    that they lie in are decoded.
    """
    layout, sinks, places = records.layout, records.plan.sinks, choice.positions
    every = torch.arange(places.shape[1], device=places.device)
    there = every < choice.valid[:, None]
    held = view.counts[:, None] * layout.page_size
    before = (there & (places < sinks)).sum(1, keepdim=True)  # sinks, then those in pages, then those of the window
    inside = (there & (places >= sinks) & (places < sinks + held)).sum(1, keepdim=True)
    outside = choice.valid[:, None] - inside
    known = torch.stack([inside, outside])[..., 0].cpu()
    (width, slots), (paged, exact) = known.amax(1).tolist(), known.sum(1).tolist()
    last = max(places.shape[1] - 1, 0)
    host = records.memory.host or not records.data.is_cpu
    tokens = None
    if slots:
        assert view.tokens is not None
        at = places.gather(1, (every[:slots] + (every[:slots] >= before) * inside).clamp_max(last))
        at = torch.where(at < sinks, at, at - held).clamp(0, view.tokens.keys.shape[1] - 1)
        keys, values, shared = view.tokens.keys, view.tokens.values, records.plan.latent
        k = keys.take_along_dim(at[..., None], 1)
        v = k[..., : values.shape[-1]] if shared else values.take_along_dim(at[..., None], 1)
        tokens = Tokens(k, v, known[1])
        plan.add("window", (k.shape[-1] + (0 if shared else v.shape[-1])) * k.itemsize, exact)
    if not width:
        if tokens is None:
            return Part(q.new_zeros(*q.shape[:2], records.shape.v_dim), q.new_full(q.shape[:2], -torch.inf))
        return attend_tokens(q, tokens, scale, softcap, host=host)
    if adapted := records.adapted_bytes():
        plan.add("constants", adapted)
    at = places.gather(1, (every[:width] + before).clamp_max(last)) - sinks
    at = at.masked_fill(every[:width] >= inside, 0)
    plan.add("table", TABLE_ENTRY.itemsize, paged)
    if not _by_tokens(records):
        return attend_tokens(q, _decoded(records, view, at, inside, tokens, plan), scale, softcap, host=host)
    plan.add("pages", layout.token_bytes, paged)
    if layout.centres:
        few = few_centres(view.ids.shape[1], width)
        plan.add("pages", layout.centre_bytes, paged if few else view.total)
    how = layout, records.codec, scale, softcap
    return attend_chosen(
        q, records.data, view.ids, at, inside[:, 0], *how, tokens=tokens, by_tokens=True, partial=True, host=host
    )


def _by_tokens(records: Records) -> bool:
    """Whether attention can read single tokens of pages."""
    layout, centred = records.layout, bool(records.layout.centres)
    return layout.tokenwise and not (centred and (records.plan.latent or records.codec.kernel_layouts() is None))


def _decoded(records: Records, view: View, at: Tensor, inside: Tensor, tokens: Tokens | None, plan: ReadPlan) -> Tokens:
    """Tokens at places [S, w] of pages, of which a stream's first `inside` [S, 1] are chosen, before exact `tokens`.
    The pages that they lie in are decoded once."""
    size, pages = records.layout.page_size, view.ids.shape[1]
    stream, place = (torch.arange(at.shape[1], device=at.device) < inside).nonzero(as_tuple=True)
    where = at[stream, place]
    found, each = (stream * pages + where // size).unique(return_inverse=True)
    plan.add("pages", records.layout.body_bytes, len(found))
    k, v = records.decode(view.ids.flatten()[found].long(), found // pages)
    slots = 0 if tokens is None else tokens.keys.shape[1]
    both = []
    for x, exact in zip((k, v), (None, None) if tokens is None else tokens[:2], strict=True):
        made = x.new_zeros(len(at), at.shape[1] + slots, x.shape[-1])
        made[stream, place] = x.flatten(0, 1)[each * size + where % size]
        if exact is not None:
            after = inside + torch.arange(slots, device=at.device)
            made.scatter_(1, after[..., None].expand_as(exact), exact)
        both.append(made)
    counts = inside[:, 0].cpu() + (0 if tokens is None else tokens.counts)
    return Tokens(both[0], both[1], counts)
