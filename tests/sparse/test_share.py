"""One layer's choice of pages serves the next ones: followers read just these, and neither hold nor scan summaries."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import tiny_models as models
import torch
from generation import assert_same, greedy, left_padded, tokens
from reachable import reachable_bytes
from torch import Tensor

import kvcomp.cache.reader
from kvcomp import CompressedCache, KvcompWarning, Stack, prefill
from kvcomp.architecture import LayerShape, Matrices, ModelShape
from kvcomp.cache.layer import LayerStore
from kvcomp.cost.bill import bill
from kvcomp.errors import SpecError
from kvcomp.integrations.huggingface.lockstep import lockstep
from kvcomp.ledger import add_parts
from kvcomp.stages import Choice
from kvcomp.stages.plan import held_parts, read_parts

SPEC = "kivi(bits=4, group=16) + moba(pages=3, share=3) + window(sinks=2, recent=8)"
ROWS, HEADS, DIM = 2, 2, 32


def stores_of(spec: str, layers: int, lengths: tuple[int, ...] = (200, 150)) -> list[LayerStore]:
    """The stores of a cache whose layers hold the same numbers of tokens."""
    stack, choices, n = Stack.parse(spec), dict[int, Choice](), max(lengths)
    stores = [LayerStore(stack.plan(i, layers), choices) for i in range(layers)]
    valid = torch.arange(n) >= n - torch.tensor(lengths)[:, None]
    for i, store in enumerate(stores):
        k, v = _kv(n, i)
        store.start(k, v)
        store.write(k, v, valid)
    return stores


def _kv(n: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(ROWS, HEADS, n, DIM, generator=generator) for _ in range(2))
    return k, v


def step(stores: list[LayerStore], seed: int) -> list[Tensor]:
    """A decode step through all layers, as an engine does it; returns what each attended to."""
    outs = []
    for i, store in enumerate(stores):
        k, v = (x[: store.rows] for x in _kv(1, 1000 * seed + i))
        store.append(k, v)
        q = torch.randn(store.rows, 4, 1, DIM, generator=torch.Generator().manual_seed(1000 * seed + i))
        outs.append(store.attend(q, 0.3).out)
        store.settle()
    return outs


def test_plans_name_the_leader_among_the_layers_that_choose() -> None:
    stack = Stack.parse("quest(pages=3, dense_layers=2, share=3)")
    assert [stack.plan(i, 9).leader for i in range(9)] == [None, None, None, 2, 2, None, 5, 5, None]
    full = [1, 3, 5, 7, 9]  # the others are sliding windows, which choose nothing
    assert [stack.plan(i, 10, full).leader for i in full] == [None, None, 3, 3, None]
    assert [Stack.parse("quest").plan(i, 9).leader for i in range(9)] == [None] * 9


@pytest.mark.parametrize(
    "spec", [SPEC, "streaming(recent=100) + quest(pages=2, dense_layers=0, share=3) + kivi(group=16) + window(sinks=4)"]
)
@pytest.mark.filterwarnings("ignore:.*same redundancy")
def test_followers_read_the_pages_of_their_leader(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stores = stores_of(spec, 5)
    handed: list[Tensor] = []
    attend_chosen = kvcomp.cache.reader.attend_chosen

    def watched(q: Tensor, pool: Tensor, ids: Tensor, places: Tensor, valid: Tensor, *rest: Any, **options: Any) -> Any:
        handed.append(torch.cat([ids.gather(1, places), valid[:, None]], 1))
        return attend_chosen(q, pool, ids, places, valid, *rest, **options)

    monkeypatch.setattr("kvcomp.cache.reader.attend_chosen", watched)
    for i in range(40):  # over the ends of pages, which then begin or leave
        handed.clear()
        choices, tables = [], []
        for store in stores:
            tables.append(store.table.ids().clone())
            step([store], i)
            choices.append(store.choices.get(store.plan.leader if store.plan.leader is not None else store.plan.layer))
        for at, store in enumerate(stores):
            choice = choices[at]
            assert choice is choices[at - at % 3]
            assert choice is not None
            expected = tables[at].gather(1, choice.positions)
            assert torch.equal(handed[at], torch.cat([expected, choice.valid[:, None]], 1))
            assert store.read["pages"] == int(choice.valid.sum()) * store.layout.body_bytes
            assert bool((choice.valid <= choice.pages).all())
            assert ("summaries" in store.read) is (at % 3 == 0) is (store.held(set())["summaries"] > 0)


def test_a_follower_never_reads_past_its_pages() -> None:
    stores = stores_of(SPEC, 2)
    leader, follower = stores
    gone = torch.zeros(ROWS * HEADS, follower.table.longest, dtype=torch.bool)
    gone[1, 3:] = True
    follower.table.drop(gone)
    follower.pool.reclaim()
    follower.pool.data[follower.pool.free] = 0xFF
    held = [store.table.total for store in stores]
    out = step(stores, 0)[1]
    assert bool(out.isfinite().all())
    assert follower.read["pages"] == held[1] * follower.layout.body_bytes  # all that it has
    assert leader.read["pages"] < held[0] * leader.layout.body_bytes


def test_a_choice_serves_one_step() -> None:
    leader, follower = stores_of(SPEC, 2)
    step([leader, follower], 0)
    assert leader.choices
    q = torch.randn(ROWS, 4, 3, DIM)
    for store in (leader, follower):  # several queries read everything, and leave no choice after
        store.attend(q, 0.3)
        assert not store.choices
        assert store.read["pages"] == store.table.total * store.layout.body_bytes
    held = follower.table.total
    step([follower], 1)  # without its leader
    assert follower.read["pages"] == held * follower.layout.body_bytes


def test_rows_are_taken_out_and_repeated() -> None:
    stores, alone = stores_of(SPEC, 4), stores_of(SPEC, 4)
    for at in range(3):
        step(stores, at)
        step(alone, at)
    for store in stores:
        store.select_rows(torch.tensor([1, 0]))
        store.select_rows(torch.tensor([1, 0]))
    for at in range(3, 20):
        for ours, theirs in zip(step(stores, at), step(alone, at), strict=True):
            assert torch.equal(ours, theirs)
    for store in stores:
        store.select_rows(torch.tensor([1]))
    assert all(bool(out.isfinite().all()) for out in step(stores, 30))
    assert stores[1].read["pages"] == stores[0].read["pages"]


# -- what cannot line up ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("pyramidkv + quest(share=2)", r"quest\(share=2\).*pyramidkv.*leave out share=2, or pyramidkv"),
        ("adakv + moba(share=4)", r"moba\(share=4\).*adakv"),
        ("snapkv(threshold=0.1) + moba(share=4)", r"moba\(share=4\).*snapkv"),
        ("snapkv(heads=common) + moba(share=4)", r"moba\(share=4\).*snapkv"),
        ("kvzip + quest(share=2)", "kvzip"),
        ("h2o(budget=200) + quest(share=2)", "h2o"),
        ("snapkv + quest(heads=common)", r"quest\(heads=common\) lets heads read.*leave out heads=common, or snapkv"),
        ("streaming + adakv + quest(heads=common)", "adakv"),
    ],
)
def test_pages_that_hold_other_tokens_are_refused(spec: str, words: str) -> None:
    with pytest.raises(SpecError, match=words):
        Stack.parse(spec)


@pytest.mark.parametrize("spec", ["streaming + quest(share=2, heads=common)", "tova + moba(heads=common)"])
def test_pages_that_hold_the_same_tokens_are_not(spec: str) -> None:
    with pytest.warns(KvcompWarning, match="same redundancy"):
        Stack.parse(spec)


# -- through a model --------------------------------------------------------------------------------------------------

SHARED = "kivi(bits=4, group=16) + quest(pages=3, min_pages=0, dense_layers=1, share=2) + window(recent=16)"


def filled(
    spec: str, name: str = "llama", length: int = 200, rows: int = 1
) -> tuple[models.PreTrainedModel, CompressedCache]:
    model = models.make(name, "eager" if name in models.EAGER_ONLY else "sdpa")
    cache = CompressedCache(spec, model)
    prefill(model, tokens(rows, length), [cache])
    return model, cache


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("length", [10, 200, 500])
def test_a_models_bytes_are_planned(name: str, length: int) -> None:
    spec = SHARED.replace("dense_layers=1", "dense_layers=0")
    model, cache = filled(spec, name, length, rows=2)
    ours = cache._compressed()
    assert [layer.plan.leader for layer in ours] == ([None, 0, None, 2] if name == "llama" else [None, 1])
    dim, dtype = ours[0].store.k_dim, torch.float32
    for planned, found in (
        (held_parts, [layer.held(set()) for layer in ours]),
        (read_parts, []),
    ):
        if not found:
            with torch.no_grad():
                model(tokens(2, 1), past_key_values=cache)
            found = [layer.store.read for layer in ours]
        told = [planned(layer.plan, dim, dim, length, dtype) for layer in ours]
        expected = {name: 2 * 2 * size for name, size in add_parts(told).items()}
        got = add_parts(found)
        told, held = ({k: v for k, v in x.items() if k not in ("constants", "history")} for x in (expected, got))
        assert held == told
    assert cache.memory().held == reachable_bytes(cache)
    cache.reset()
    assert cache.memory().held == reachable_bytes(cache)


def test_sharing_saves_what_followers_do_not_hold_and_scan() -> None:
    shape = ModelShape("", (LayerShape(2, 64, 64, 8, 128, 128),) * 6, Matrices(1000, 2000.0))
    alone, shared = (bill(shape, Stack.parse(f"quest(pages=4, share={n})"), 3000) for n in (1, 4))
    assert shared.held_parts["summaries"] == alone.held_parts["summaries"] / 4
    assert shared.read_parts["summaries"] == alone.read_parts["summaries"] / 4
    assert shared.read_parts["pages"] == alone.read_parts["pages"]


@pytest.mark.parametrize("name", ["llama", "gemma3", "gptoss", "qwen3next"])
def test_enough_pages_are_dense_attention(name: str) -> None:
    model = models.make(name, "eager" if name in models.EAGER_ONLY else "sdpa")
    ids, mask = left_padded([150, 90])
    outputs = [
        greedy(model, ids, CompressedCache(f"none{more} + window(recent=16)", model), 40, attention_mask=mask)
        for more in ("", " + quest(pages=99, dense_layers=0, share=2)", " + moba(keep=1.0, share=3, heads=common)")
    ]
    for output in outputs[1:]:
        assert_same(output, outputs[0])


def logits_of(model: models.PreTrainedModel, cache: CompressedCache, steps: int = 40) -> Tensor:
    fed = tokens(max(cache.batch_size, 1), steps, seed=9)
    with torch.no_grad():
        return torch.stack([model(fed[:, i : i + 1], past_key_values=cache).logits for i in range(steps)])


def test_caches_that_part_choose_apart(tmp_path: Path) -> None:
    """Forks, copies and loaded caches go on as the cache would have, and none hears of another's choices."""

    def loaded(cache: CompressedCache) -> CompressedCache:
        cache.save(tmp_path / "cache")
        return CompressedCache.load(tmp_path / "cache", model)

    ways: tuple[Callable[[CompressedCache], CompressedCache], ...] = (CompressedCache.fork, deepcopy, loaded)
    model, cache = filled(SHARED)
    logits_of(model, cache, 3)  # a choice was made
    caches = [*(way(cache) for way in ways), cache]
    dicts = [{id(layer.store.choices) for layer in each._compressed()} for each in caches]
    assert [len(own) for own in dicts] == [1] * 4
    assert len(set.union(*dicts)) == 4
    with torch.no_grad():  # in turns
        for i in range(30):
            rows = [model(tokens(1, 1, seed=i), past_key_values=each).logits for each in caches]
            assert all(torch.equal(row, rows[0]) for row in rows)
    assert all(each.traffic() == cache.traffic() for each in caches)


def test_lockstep_rows_keep_to_their_own_choices() -> None:
    model = models.make("llama")
    stacks = (SHARED, SHARED.replace("quest", "moba"), "none")
    together, alone = ([CompressedCache(stack, model) for stack in stacks] for _ in range(2))
    for caches in (together, alone):
        prefill(model, tokens(1, 200), caches)
    batch, fed = lockstep(together), tokens(3, 25, seed=3)
    with torch.no_grad():
        for at in range(25):
            rows = model(fed[:, at : at + 1], past_key_values=batch).logits[:, -1]
            each = [model(fed[i : i + 1, at : at + 1], past_key_values=c).logits[0, -1] for i, c in enumerate(alone)]
            torch.testing.assert_close(rows, torch.stack(each), rtol=1e-4, atol=1e-4)
    for one, other in zip(together, alone, strict=True):
        assert one.memory() == other.memory()
        assert one.traffic() == other.traffic()


def test_beams_and_chunks_after_a_choice() -> None:
    model, cache = filled(SHARED)
    logits_of(model, cache, 2)
    with torch.no_grad():
        model(tokens(1, 5), past_key_values=cache)  # a later turn reads everything
    cache.batch_repeat_interleave(3)
    assert bool(logits_of(model, cache, 30).isfinite().all())
    assert cache.memory().held == reachable_bytes(cache)
