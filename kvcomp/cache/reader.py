"""What a query reads: chosen pages or all of them, exact tokens, and what stands for the rest."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvcomp.attention import Part, Tokens
from kvcomp.attention import attend as attend_exactly
from kvcomp.kernels import reference
from kvcomp.kernels.dispatch import attend_pages, attend_tokens, obstacle
from kvcomp.kernels.select import regroup, token_bias
from kvcomp.layout import PageLayout, Summary
from kvcomp.ledger import ReadPlan, storage_bytes
from kvcomp.stages import Choice, Codec, Summaries

from .records import Records


class Shared(NamedTuple):
    """What a step of one layer reads, for those that follow it: a `Choice` among `pages` [S], of each stream."""

    positions: Tensor
    valid: Tensor
    pages: Tensor


class View(NamedTuple):
    """What S streams of `heads` KV heads a row hold, for one step.

    ids int [S, n]: records, oldest first, of which a stream's first counts int64 [S] exist, on the records' device.
    tokens: exact ones; None: there are none. held: counts again, by which followers compare their pages with their
    leader's: on the host, or the very same tensor for all layers. total: pages of all streams, if it is known.
    in_tokens: counts are of tokens, and a stream's last page may be filled in part.
    """

    ids: Tensor
    counts: Tensor
    tokens: Tokens | None
    heads: int
    held: Tensor
    total: int | Tensor
    in_tokens: bool = False


class Read(NamedTuple):
    """Attention over what is held, in parts to merge; the first has the lse of pages where they are watched.

    positions int64 [S, k]: the places of the pages read; None: all, in order. plan: bytes of pages, ids and summaries.
    """

    parts: list[Part]
    positions: Tensor | None
    plan: ReadPlan


def attend(
    records: Records,
    view: View,
    q: Tensor,
    scale: float,
    softcap: float | None = None,
    *,
    single: bool = True,
    watched: bool = False,
    choices: MutableMapping[int, Shared] | None = None,
) -> Read:
    """Attention of q [S, R, Dk] over a view: over exact tokens and the pages that the selector chooses, and over what
    stands for the others.

    single: the R queries are of one token; more read every page. watched: give the lse of each page. choices: what
    layers of this step chose that others follow, by layer.
    """
    layout, plan, tokens = records.layout, ReadPlan(), view.tokens
    ids, counts, data, count = view.ids, view.counts, records.data, view.total
    pages = ids.shape[1] > 0
    unseen = data.is_cpu and not records.memory.host
    unseen = unseen and obstacle(records.codec, layout, data.device, q.shape[1]) is not None
    if not (pages or unseen):
        return Read([] if tokens is None else [attend_tokens(q, tokens, scale, softcap)], None, plan)
    choice = rest = None
    biased: dict[str, Any] = {}
    if pages:
        plan.add("table", ids.nbytes)
        if adapted := records.adapted_bytes():
            plan.add("constants", adapted)
        if single and records.plan.selector is not None:
            choice, rest = choose(records, view, q, scale, softcap, choices, plan)
        if choice is not None:
            counts = choice.valid
            if records.by_tokens:
                counts = counts // layout.page_size
                if layout.centres:
                    biased["token_bias"] = token_bias(q, records.codec, layout, data, ids, choice.positions)
                    plan.add("pages", layout.centre_bytes, view.total)
                data = regroup(layout, data, ids, choice.positions)
                ids = torch.arange(len(data), device=data.device).view(len(ids), -1)
            else:
                ids = ids.gather(1, choice.positions)
            count = counts
        plan.add("pages", layout.token_bytes if view.in_tokens else layout.body_bytes, count)
        if view.in_tokens and layout.centres:
            plan.add("pages", layout.centre_bytes, (counts + layout.page_size - 1) // layout.page_size)
    how = q, data, ids, counts, layout, records.codec, scale, softcap, watched, tokens, view.in_tokens
    parts = _unseen(*how, **biased) if unseen else [attend_pages(*how, **biased)]
    return Read(parts if rest is None else [*parts, rest], None if choice is None else choice.positions, plan)


def choose(
    records: Records,
    view: View,
    q: Tensor,
    scale: float,
    softcap: float | None = None,
    choices: MutableMapping[int, Shared] | None = None,
    plan: ReadPlan | None = None,
) -> tuple[Choice | None, Part | None]:
    """What single queries read of a view (None: all pages), and attention over what stands for the rest.

    A follower reads what its leader does, if that had as many pages to choose from in every stream. What a leader of
    others chooses is left in `choices`, and what is read for that in `plan`.
    """
    layout, stages, index = records.layout, records.plan, records.index
    choices, plan = {} if choices is None else choices, ReadPlan() if plan is None else plan
    if index is None:
        shared = None if stages.leader is None else choices.get(stages.leader)
        if shared is None or not _same(shared.pages, view.held):
            return None, None
        device = records.data.device
        return Choice(shared.positions.to(device), shared.valid.to(device)), None
    plan.add("summaries", layout.summary_bytes, view.total)
    if adapted := index.adapted():
        plan.add("constants", storage_bytes(adapted))
    summary = Summary(layout, records.data, view.ids, view.counts)
    held = Summaries(summary, view.counts, view.heads, layout.page_size, records.by_tokens)
    choice = index.choose(q, scale, held)
    assert stages.selector is not None
    if stages.selector.share > 1:
        choices[stages.layer] = Shared(*choice, view.held.clone() if view.held.is_cpu else view.held)
    return choice, index.rest(q, scale, held, choice, softcap)


def received(read: Read, lse: Tensor, queries: int, places: int) -> Tensor | None:
    """float32 [S, places]: the attention that pages received of `queries` queries a head, over which it is summed, and
    averaged over the query heads of a KV head; None where nothing was watched.

    lse [S, G * queries]: of all that the queries attended to, heads first. places: pages of the longest stream.
    """
    groups = read.parts[0].groups if read.parts else None
    if groups is None:
        return None
    mass: Tensor = (groups - lse[..., None]).exp().unflatten(1, (-1, queries)).mean(1).sum(1)  # [S, k]
    if read.positions is None:
        return mass
    return mass.new_zeros(len(mass), places).scatter_add(1, read.positions, mass)


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether counts are equal, as far as that can be known without waiting for a device."""
    return one is other or (one.is_cpu and other.is_cpu and torch.equal(one, other))


def _unseen(
    q: Tensor,
    data: Tensor,
    ids: Tensor,
    counts: Tensor,
    layout: PageLayout,
    codec: Codec,
    scale: float,
    softcap: float | None,
    watched: bool,
    tokens: Tokens | None,
    in_tokens: bool,
    token_bias: Tensor | None = None,
) -> list[Part]:
    """As `attend_pages` on the host, whose numbers are not looked at either: by the specification, behind masks."""
    parts = []
    if ids.shape[1]:
        how = data, ids, counts, layout, codec, scale, softcap, watched, True, in_tokens, token_bias
        parts.append(reference.attend_pages(q, *how))
    if tokens is not None:
        seen = torch.arange(tokens.keys.shape[1], device=q.device) < tokens.counts[:, None]
        values = tokens.values.masked_fill(~seen[..., None], 0)
        parts.append(attend_exactly(q, tokens.keys, values, scale, seen[:, None], softcap))
    return parts
