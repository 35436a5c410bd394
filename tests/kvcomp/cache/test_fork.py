"""Forks of a store against deep copies of it: the same content and attention whatever others do, on shared pages."""

from __future__ import annotations

import gc
import warnings
import weakref
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvcomp import KvcompWarning, Stack, UnsupportedError
from kvcomp.cache.layer import LayerStore
from kvcomp.cache.pool import PagePool, PageTable
from kvcomp.layout import Field, PageLayout

CPU = torch.device("cpu")
HEADS, DIM = 2, 32
WINDOW = " + window(sinks=2, recent=8)"
STACKS = (
    "none" + WINDOW,
    "kivi(bits=4, group=16)" + WINDOW,
    "klt(bits=2)" + WINDOW,
    "turboquant(bits=2.5)" + WINDOW,
    "streaming(sinks=2, recent=40) + none",
    "adakv(keep=0.5, window=8) + kivi(bits=2, group=16)" + WINDOW,
    "h2o(budget=70) + none" + WINDOW,
    "rkv(budget=70) + kivi(bits=4, group=16)" + WINDOW,
    "none + quest(pages=2, dense_layers=0, min_pages=1)" + WINDOW,
)


def started(spec: str, tokens: int = 0, rows: int = 1, seed: int = 0) -> LayerStore:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KvcompWarning)
        store = LayerStore(replace(Stack.parse(spec).plan(0, 1), page_size=16))
    store.start(*[torch.zeros(rows, HEADS, 0, DIM)] * 2)
    write(store, tokens, seed)
    return store


def write(store: LayerStore, tokens: int, seed: int, valid: Tensor | None = None) -> None:
    generator = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(store.rows, HEADS, tokens, DIM, generator=generator) for _ in range(2))
    store.write(k, v, valid, torch.randn(store.rows, 2 * HEADS, tokens, DIM, generator=generator), 0.3)


def decode(store: LayerStore, tokens: int, seed: int) -> Tensor:
    """Decode steps; returns what each attended to."""
    generator, outs = torch.Generator().manual_seed(seed), []
    for _ in range(tokens):
        k, v = (torch.randn(store.rows, HEADS, 1, DIM, generator=generator) for _ in range(2))
        store.append(k, v)
        outs.append(store.attend(torch.randn(store.rows, 2 * HEADS, 1, DIM, generator=generator), 0.3).out)
        store.settle()
    return torch.stack(outs) if outs else torch.zeros(0)


def content(store: LayerStore) -> list[Tensor]:
    """All that decides what a store will do: its tokens, what pages received, what its codec adapted to."""
    tokens = [t for s in range(store.rows * HEADS) for t in store._tokens(s)]
    attention = store.table.attention()
    tail = torch.tensor(-1 if store.tail is None else store.tail)
    more = [store.table.counts, store.exact.counts, store.history.counts, tail, *store.codec.state().values()]
    return [*tokens, *more, *(attention or ())]


def assert_alike(ours: LayerStore, theirs: LayerStore) -> None:
    for a, b in zip(content(ours), content(theirs), strict=True):
        assert torch.equal(a, b)


def assert_pages_are_owned_or_free(pool: PagePool) -> None:
    owned, free = set(pool.owned().tolist()), set(pool.free)
    assert len(free) == len(pool.free)
    assert not owned & free
    assert owned | free <= set(range(pool.capacity))


@pytest.mark.parametrize("spec", STACKS)
@given(data=st.data())
@settings(deadline=None, max_examples=15)
def test_forks_behave_as_deep_copies(spec: str, data: st.DataObject) -> None:
    store = started(spec, data.draw(st.sampled_from([0, 5, 70, 150])), rows=2)
    pairs = [(store, deepcopy(store))]
    del store
    for step in range(data.draw(st.integers(3, 10))):
        i = data.draw(st.integers(0, len(pairs) - 1))
        pair = pairs[i]
        match data.draw(st.sampled_from(["fork", "fork", "drop", "decode", "decode", "write", "rows", "crop"])):
            case "fork":
                pairs.append((pair[0].fork(), deepcopy(pair[1])))
            case "drop" if len(pairs) > 1:
                del pairs[i]
            case "decode":
                n = data.draw(st.integers(1, 40))
                ours, theirs = (decode(store, n, step) for store in pair)
                assert torch.equal(ours, theirs)
            case "write":
                n = data.draw(st.integers(1, 60))
                valid = torch.rand(pair[0].rows, n, generator=torch.Generator().manual_seed(step)) < 0.8
                valid = valid if data.draw(st.booleans()) else None
                for store in pair:
                    write(store, n, step, valid)
            case "rows":
                rows = data.draw(st.lists(st.integers(0, pair[0].rows - 1), min_size=1, max_size=3))
                for store in pair:
                    store.select_rows(torch.tensor(rows))
            case "crop":
                n = data.draw(st.integers(0, min(pair[0].history.length, 50)))
                refused = []
                for store in pair:
                    try:
                        store.crop(n)
                        refused.append(False)
                    except UnsupportedError:
                        refused.append(True)
                assert refused[0] == refused[1]
        for ours, theirs in pairs:
            assert_alike(ours, theirs)
            assert_pages_are_owned_or_free(ours.pool)
    assert len({id(ours.pool) for ours, _ in pairs}) == 1


@pytest.mark.parametrize("spec", STACKS)
def test_forks_from_before_the_first_page(spec: str) -> None:
    """What a codec learns from its first pages, each fork learns from its own."""
    store = started(spec, 5)
    stores, twins = [store, store.fork(), store.fork()], [deepcopy(store) for _ in range(3)]
    for seed, pair in enumerate(zip(stores, twins, strict=True)):
        for x in pair:
            write(x, 100, seed)
        assert torch.equal(*(decode(x, 40, seed) for x in pair))
    for ours, theirs in zip(stores, twins, strict=True):
        assert_alike(ours, theirs)


@pytest.mark.parametrize("spec", STACKS)
def test_a_fork_copies_no_page(spec: str) -> None:
    store = started(spec, 300)
    decode(store, 50, 1)
    fork = store.fork()
    assert fork.pool is store.pool
    assert torch.equal(fork.table.rows, store.table.rows)
    separate = [(store.exact.k, fork.exact.k), (store.table.rows, fork.table.rows)]
    assert all(a.data_ptr() != b.data_ptr() for a, b in separate)


def test_no_page_is_handed_out_twice() -> None:
    store = started("none" + WINDOW, 100)
    forks = [store, store.fork(), store.fork()]
    common = set(store.table.owned().tolist())
    for i in range(60):
        decode(forks[i % 3], 5, i)
    new = [set(fork.table.owned().tolist()) - common for fork in forks]
    assert all(new)
    assert sum(map(len, new)) == len(set.union(*new))


def test_only_a_forks_own_pages_are_saved() -> None:
    store = started("kivi(bits=4, group=16)" + WINDOW, 100)
    state, fork = deepcopy(store.state()), store.fork()
    decode(fork, 100, 1)
    for name, value in store.state().items():
        if isinstance(value, Tensor):
            assert torch.equal(value, state[name])
    decode(store, 50, 3)
    again = started("kivi(bits=4, group=16)" + WINDOW)
    again.restore(deepcopy(fork.state()), CPU)
    assert again.pool.capacity == len(fork.table.owned()) < fork.pool.capacity
    assert_alike(again, fork)
    assert torch.equal(decode(again, 50, 2), decode(fork, 50, 2))


def test_dropped_forks_give_their_pages_back() -> None:
    store, capacities = started("none" + WINDOW, 1000), []
    for i in range(20):
        fork = store.fork()
        decode(fork, 200, i)
        capacities.append(store.pool.capacity)
    assert max(capacities) == capacities[0]
    table = weakref.ref(fork.table)
    del fork
    assert table() is None  # nothing else holds it: pages are free without the garbage collector's help
    before = content(store)
    store.pool.reclaim()
    assert store.pool.capacity == len(store.table.owned()) + len(store.pool.free)
    for a, b in zip(content(store), before, strict=True):
        assert torch.equal(a, b)


def test_pages_of_many_dropped_forks_are_freed_and_the_others_renumbered() -> None:
    store = started("none" + WINDOW, 100)
    forks = [store.fork() for _ in range(6)]
    for i, fork in enumerate(forks):
        decode(fork, 100, i)
    first, last = forks[0], forks[5]
    before, large = [content(x) for x in (store, first, last)], store.pool.capacity
    del forks, fork
    decode(last.fork(), 200, 9)  # until the pages run out
    assert store.pool.capacity < large
    for fork, earlier in zip((store, first, last), before, strict=True):
        for a, b in zip(content(fork), earlier, strict=True):
            assert torch.equal(a, b)


def test_the_original_may_go_first() -> None:
    store = started("kivi(bits=4, group=16)" + WINDOW, 200)
    fork, twin = store.fork(), deepcopy(store)
    del store
    gc.collect()
    assert torch.equal(decode(fork, 100, 1), decode(twin, 100, 1))
    fork.pool.reclaim()
    assert_alike(fork, twin)


def test_a_deep_copy_of_a_fork_shares_nothing() -> None:
    store = started("none" + WINDOW, 100)
    fork = store.fork()
    decode(fork, 100, 1)
    twin, before = deepcopy(fork), content(fork)
    assert twin.pool is not fork.pool
    assert twin.pool.tables == [twin.table]
    twin.crop(150)
    decode(twin, 300, 2)
    for a, b in zip(content(fork), before, strict=True):
        assert torch.equal(a, b)
    both = deepcopy([store, fork])
    assert both[0].pool is both[1].pool


def test_shared_pages_are_counted_once() -> None:
    store = started("none" + WINDOW, 1000)
    fork = store.fork()
    decode(fork, 100, 1)
    seen: set[int] = set()
    first, second = store.held(seen), fork.held(seen)
    assert sum(first[part] for part in ("pages", "summaries", "slack")) == store.pool.data.nbytes
    assert second["pages"] == second["summaries"] == second["slack"] == 0
    alone = fork.held(set())
    assert alone["pages"] == first["pages"] == len(fork.table.owned()) * fork.layout.bytes_per_page
    del fork
    assert store.held(set())["pages"] == len(store.table.owned()) * store.layout.bytes_per_page  # the rest is slack


def test_a_store_that_has_not_started() -> None:
    store = LayerStore(Stack.parse("kivi").plan(0, 1))
    fork = store.fork()
    x = torch.zeros(1, HEADS, 9, DIM)
    fork.start(x, x)
    fork.write(x, x, None)
    assert not store.started
    assert store.history.length == 0


# -- pool and tables --------------------------------------------------------------------------------------------------

PLAIN = PageLayout(16, (Field("x", (16,), torch.uint8),))


@given(st.data())
@settings(deadline=None, max_examples=50)
def test_tables_of_one_pool_keep_their_pages(data: st.DataObject) -> None:
    pool, tables, models, fresh = PagePool(PLAIN, CPU), [], [], 0
    for _ in range(data.draw(st.integers(1, 20))):
        i = data.draw(st.integers(0, max(len(tables) - 1, 0)))
        match data.draw(st.sampled_from(["new", "fork", "gone", "append", "append", "drop", "reclaim"])):
            case "new":
                tables.append(PageTable(1, CPU, watched=True))
                models.append([])
                pool.join(tables[-1])
            case "fork" if tables:
                tables.append(deepcopy(tables[i]))
                models.append(list(models[i]))
                pool.join(tables[-1])
            case "gone" if tables:
                del tables[i], models[i]
            case "append" if tables:
                n = data.draw(st.integers(1, 8))
                ids, values = pool.allocate(n), [(fresh + j) % 256 for j in range(n)]
                fresh += n
                pool.write(ids, {"x": torch.tensor(values, dtype=torch.uint8)[:, None].expand(-1, 16)})
                tables[i].append(torch.tensor([0]), ids[None])
                models[i] += values
            case "drop" if tables:
                n = data.draw(st.integers(0, len(models[i])))
                tables[i].drop_newest(torch.tensor([n]))
                models[i] = models[i][: len(models[i]) - n]
            case "reclaim":
                pool.reclaim()
                assert len(pool.free) * 4 <= pool.capacity
                assert len(pool.free) + len(pool.owned()) == pool.capacity
        assert [pool.data[table.ids()[0].long(), 0].tolist() for table in tables] == models
