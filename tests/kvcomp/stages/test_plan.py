"""Plans: what a layer is going to hold, from its stages alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcomp import Stack
from kvcomp.cache.layer import LayerStore
from kvcomp.stages.plan import held_by_stream


@given(sinks=st.integers(0, 20), recent=st.integers(0, 70), tokens=st.integers(1, 300), quest=st.booleans())
@settings(deadline=None, max_examples=40)
def test_pages_of_a_prefill(sinks: int, recent: int, tokens: int, quest: bool) -> None:
    spec = f"window(sinks={sinks}, recent={recent})" + (" + quest(dense_layers=0)" if quest else "")
    plan = Stack.parse(spec).plan(0, 1)
    store = LayerStore(plan)
    x = torch.zeros(1, 1, tokens, 16)
    store.start(x, x)
    store.write(x, x, None)
    assert store.table.counts.tolist() == [plan.pages_of(tokens)]
    assert store.pool.capacity == plan.pages_of(tokens)
    assert store.kept.tolist() == [tokens]
    # the window holds at least what it promises, and less than a page more
    assert min(tokens, sinks + recent) <= int(store.exact.counts) < max(sinks + recent, 1) + plan.page_size
    assert int(store.exact.counts) <= plan.slots


@pytest.mark.parametrize("dims", [(64, 64), (128, 64), (96, 128)])
def test_keys_and_values_may_differ_in_width(dims: tuple[int, int]) -> None:
    """By hand for the dense stack: full pages of 64, space for 64 of the 84 exact tokens, 4 bytes of table a page,
    counters."""
    k, v = dims
    plan = Stack.parse("window(sinks=4, recent=16)").plan(0, 1)
    pages = (1000 - 20) // 64
    expected = pages * (64 * (k + v) * 2 + 4) + 64 * (k + v) * 2 + 16
    assert held_by_stream(plan, k, v, 1000, torch.bfloat16) == expected


@pytest.mark.parametrize("first", ["snapkv(keep=0.5)", "streaming(recent=300)"])
@pytest.mark.parametrize("second", ["snapkv(keep=0.25, window=16)", "streaming(recent=100)", "snapkv(budget=400)"])
def test_a_plan_of_several_policies_never_promises_less_than_is_held(first: str, second: str) -> None:
    plan = Stack.parse(f"{first} + {second} + window(sinks=4)").plan(0, 1)
    torch.manual_seed(0)
    k, v, q = torch.randn(3, 1, 1, 1000, 32).unbind()
    store = LayerStore(plan)
    store.start(k, v)
    store.write(k, v, None, q, 32**-0.5)
    held = sum(t.untyped_storage().nbytes() for t in (store.exact.k, store.exact.v, store.pool.data, store.table.rows))
    assert held <= held_by_stream(plan, 32, 32, 1000, torch.float32)


def test_selective_layers_alone_store_summaries() -> None:
    stack = Stack.parse("quest(dense_layers=2) + kivi")
    plans = [stack.plan(i, 4) for i in range(4)]
    assert [p.selector is not None for p in plans] == [False, False, True, True]
    assert [p.layer for p in plans] == [0, 1, 2, 3]
    sizes = [held_by_stream(p, 64, 64, 4000, torch.bfloat16) for p in plans]
    assert sizes[0] == sizes[1] < sizes[2] == sizes[3]
    assert not any(p.needs_queries for p in plans)
    assert Stack.parse("streaming + snapkv").plan(0, 1).needs_queries
