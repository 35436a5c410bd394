"""What a query reads: chosen pages or all of them, exact tokens, and what stands for the rest."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import NamedTuple

import torch
from torch import Tensor

from kvcomp.attention import Part, Tokens
from kvcomp.kernels.dispatch import attend_chosen, attend_pages, attend_tokens
from kvcomp.kernels.select import few_centres
from kvcomp.layout import Summary
from kvcomp.ledger import ReadPlan, storage_bytes
from kvcomp.stages import Choice, Summaries

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
    in_tokens: counts are of tokens, and a stream's last page may be filled in part. skipped: as in `PagesView`.
    """

    ids: Tensor
    counts: Tensor
    tokens: Tokens | None
    heads: int
    held: Tensor
    total: int | Tensor
    in_tokens: bool = False
    skipped: Tensor | None = None


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
    ids, counts, data = view.ids, view.counts, records.data
    host = records.memory.host or not data.is_cpu
    if not ids.shape[1]:
        return Read([] if tokens is None else [attend_tokens(q, tokens, scale, softcap, host=host)], None, plan)
    plan.add("table", ids.nbytes)
    if adapted := records.adapted_bytes():
        plan.add("constants", adapted)
    choice = rest = None
    if single and records.plan.selector is not None:
        choice, rest = choose(records, view, q, scale, softcap, choices, plan)
    how = layout, records.codec, scale, softcap, watched, tokens
    if choice is None:
        size = layout.token_bytes if view.in_tokens else layout.body_bytes
        plan.add("pages", size, view.total)
        if view.in_tokens and layout.centres:
            plan.add("pages", layout.centre_bytes, (counts + layout.page_size - 1) // layout.page_size)
        part = attend_pages(q, data, ids, counts, *how, view.in_tokens, host=host, skipped=view.skipped)
        return Read([part], None, plan)
    pages = choice.valid // layout.page_size if records.by_tokens else choice.valid
    plan.add("pages", layout.body_bytes, pages)
    if records.by_tokens and layout.centres:
        few = few_centres(ids.shape[1], choice.positions.shape[1])
        plan.add("pages", layout.centre_bytes, choice.valid if few else view.total)
    part = attend_chosen(q, data, ids, choice.positions, choice.valid, *how, by_tokens=records.by_tokens, host=host)
    return Read([part] if rest is None else [part, rest], choice.positions, plan)


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
    on_host = view.held if view.held.is_cpu and not view.in_tokens else None
    held = Summaries(summary, view.counts, view.heads, layout.page_size, records.by_tokens, on_host)
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
