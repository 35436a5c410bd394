"""How a store comes back from a state: field by field, each checked against the plan before anything reads it."""

from __future__ import annotations

from collections.abc import Mapping
from reprlib import repr as short

import torch

from kvcomp.errors import KvcompError
from kvcomp.layout import CENTRE
from kvcomp.state import FLOATS, State, described, learned

from .compaction import CompactSpans
from .content import LayerContent

NAMES = (
    *("rows", "heads", "fields", "pages", "table", "counts", "received"),
    *("exact", "history", "codec", "index", "compacted", "tail", "prompt"),
)
OLD_CENTRE = "k.centre."  # of names of a codec's state
WIDEST = 2048  # channels of a head that a file may have: bases are square matrices of so many


def restore(store: LayerContent, state: State, device: torch.device) -> None:
    """`LayerStore.restore` of a state that is not empty."""
    plan = store.plan
    state.only(*NAMES, *(() if plan.sliding is None else ("left",)))
    rows, heads = state.integer("rows", 0), state.integer("heads", 1)
    exact = state.part("exact")
    keys = exact.tensor("k", (rows * heads, None, None), *FLOATS)
    values = exact.tensor("v", (rows * heads, None, None), keys.dtype)
    dims = keys.shape[2], values.shape[2]
    state.require(0 < max(dims) <= WIDEST, f"heads have {dims[0]} and {dims[1]} channels")
    keys, values = (x[:, :0].unflatten(0, (rows, heads)).to(device) for x in (keys, values))
    if plan.latent:
        keys, values = torch.cat([keys, values], -1), keys
    for field in state.sequence("fields"):
        plain = isinstance(field, list) and all(type(part) in (str, int) for part in field)
        state.require(plain and len(field) > 0, f"fields have {described(field)}")
    codec = state.get("codec")
    if isinstance(codec, Mapping) and any(str(name).startswith(OLD_CENTRE) for name in codec):
        raise KvcompError(
            f"layer {plan.layer} was saved with one mean key a stream, which is no longer read: save the cache anew"
        )
    # Caches that were saved before pages had centres go on without.
    store.start(keys, values, any(str(field[0]).endswith(CENTRE) for field in state["fields"]))
    fields = [[f.name, *f.shape, str(f.dtype)] for f in store.layout.fields]
    if state["fields"] != fields:
        held = short(state["fields"])
        raise KvcompError(f"layer {plan.layer} holds pages of {held}, but the stack makes {short(fields)}")
    pages = state.tensor("pages", (None, store.layout.bytes_per_page), torch.uint8)
    store.exact.restore(exact, device)
    if state.get("prompt") is not None and plan.trims:
        store.table.begin_watch()
    store.table.restore(state, len(pages))
    store.pool.data = pages.to(device)
    store.history.restore(state.part("history"))
    store.prompt = _prompt(store, state)
    for name, adapted in (("codec", store.codec), ("index", store.records.index)):
        given = State({} if state.get(name) is None else state[name], f"{state.where}.{name}")
        if adapted is None:
            given.only()
        else:
            adapted.restore(learned(given, adapted.state(), rows * heads, device))
            why = adapted.lacks(store.table.counts > 0)
            given.require(why is None, f"{why}")
    if state.get("compacted") is not None:
        state.require(not plan.policies, "compacted is there, but the stack has a policy")
        like = keys.flatten(0, 1), values.flatten(0, 1)[..., : 0 if plan.latent else None]
        store.compacted = CompactSpans.restored(state.part("compacted"), like, plan.page_size, device)
    store.tail = None if state["tail"] is None else state.integer("tail", 0, store.history.length)
    _check_kept(store, state)


def _prompt(store: LayerContent, state: State) -> tuple[list[int], list[int]] | None:
    """What `LayerStore.prompt` was, if a prompt had begun; files of the first kvcomp do not tell."""
    if state.get("prompt") is None:
        return None
    given = State(dict(zip(("seen", "held"), state.sequence("prompt", 2), strict=True)), f"{state.where}.prompt")
    seen, held = given.sequence("seen", store.rows), given.sequence("held", store.rows * store.heads)
    limits = store.history.counts.tolist()
    for name, numbers, most in (("seen", seen, limits), ("held", held, [n for n in seen for _ in range(store.heads)])):
        fits = all(type(n) is int and 0 <= n <= limit for n, limit in zip(numbers, most, strict=True))
        given.require(fits, f"{name} has {short(numbers)}, expected integers from 0 to {short(most)}")
    return seen, held


def _check_kept(store: LayerContent, state: State) -> None:
    """Raise a DamagedError unless the tokens held are tokens that were seen."""
    paged, sinks = store.table.counts > 0, store.plan.sinks
    state.require(not (store.exact.counts[paged] < sinks).any(), f"streams have pages, but less than {sinks} sinks")
    seen = store.history.counts.repeat_interleave(store.heads)
    kept = store.kept
    if store.compacted is not None:
        replaced = sum(b - a for a, b in store.compacted.columns)
        kept = kept + replaced - store.compacted.bias.shape[1]
        end = max((b for _, b in store.compacted.columns), default=0)
        state.require(end <= store.history.length, f"compacted ends at {end} of {store.history.length} tokens")
    if store.table.left is not None:
        kept = kept + store.table.left * store.plan.page_size
        alone = (store.table.left * store.plan.page_size > seen).any()
        state.require(not alone, "more pages have left than tokens were seen")
    state.require(not (kept > seen).any(), "more tokens are held than were seen")
    surely = seen if store.tail is None else seen.clamp_max(store.tail)
    state.require(not (kept < surely).any(), "fewer tokens are held than were seen and not evicted")
