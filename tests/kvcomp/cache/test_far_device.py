"""Decode steps on a device that is not looked at, as a GPU must not be: in growing and in fixed memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from far_device import FAR, FarDevice
from torch import Tensor

from kvcomp import Stack
from kvcomp.cache.fixed import FixedStore
from kvcomp.cache.layer import LayerStore

pytestmark = pytest.mark.filterwarnings("ignore:.*same redundancy")
ROWS, HEADS, GROUP, DIM, PROMPT = 2, 2, 3, 64, 150
WINDOW = "window(sinks=3, recent=20)"
QUANTIZERS = ["none", "int(bits=4)", "kivi(bits=2, group=16)", "turboquant(bits=4)", "nvfp4", "int8"]
SELECTORS = [
    "quest(pages=3, dense_layers=0)",
    "quest(keep=0.3, dense_layers=0, heads=common)",
    "moba(tokens=64)",
    "sketch(tokens=48)",
    "nsa(pages=3, block=16)",
    "quest(top_p=0.9, dense_layers=0)",
    "moba(threshold=0.1)",
]
WATCHING = ["h2o(budget=150)", "tova(budget=150)", "snapkv(budget=150, hold=true)"]


def far(spec: str, prompt: int = PROMPT) -> LayerStore:
    """A store of rows of `prompt` and prompt - 40 tokens, after its prompt, on the far device."""
    torch.manual_seed(0)
    plan = replace(Stack.parse(f"{spec} + {WINDOW}").plan(0, 1), page_size=16)
    here = LayerStore(plan)
    k, v = torch.randn(2, ROWS, HEADS, prompt, DIM).unbind()
    here.start(k, v)
    valid = torch.arange(prompt) >= torch.tensor([[0], [40]])
    here.write(k, v, valid, torch.randn(ROWS, HEADS * GROUP, prompt, DIM))
    here.end_prompt()
    there = LayerStore(plan)
    there.restore(here.state(), FAR)
    there.append(*token()[1:])  # what is made once may be copied
    there.attend(token()[0], 0.1)
    there.settle()
    return there


def token() -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.empty(ROWS, heads, 1, DIM, device=FAR) for heads in (HEADS * GROUP, HEADS, HEADS))
    return q, k, v


def steps(store: LayerStore, count: int) -> Iterator[int]:
    for i in range(count):
        q, k, v = token()
        with FarDevice():
            store.append(k, v)
            part = store.attend(q, 0.1)
            store.settle()
        assert part.out.shape == (ROWS, HEADS * GROUP, 1, DIM)
        yield i


@pytest.mark.parametrize("spec", [*QUANTIZERS, *SELECTORS, f"kivi(bits=2, group=16) + {SELECTORS[0]}"])
def test_steps_in_growing_memory_do_not_wait(spec: str) -> None:
    store = far(spec)
    pages = store.table.counts.clone()
    for _ in steps(store, store.plan.page_size + 1):
        pass
    assert (store.table.counts > pages).all()  # every window gave a page away
    assert store.dense_read > 0  # who asks for bytes may wait


@pytest.mark.parametrize("spec", WATCHING)
def test_received_attention_is_read_only_where_pages_leave(spec: str) -> None:
    store = far(f"{spec} + int(bits=4)")
    assert store.table.received is not None
    assert store.table.received.device == FAR
    room = 150 + store.plan.page_size - int(store.kept.max())  # then a page is over
    taken = steps(store, room)
    for _ in range(room - 1):
        next(taken)
    with pytest.raises((RuntimeError, NotImplementedError)):  # the policy has to know
        next(taken)


@pytest.mark.parametrize("spec", [*QUANTIZERS[:4], "snapkv(budget=64) + int(bits=4)"])
def test_steps_in_fixed_memory_do_not_wait(spec: str) -> None:
    store = far(spec)
    ahead = FixedStore(store.plan, PROMPT + 80)
    ahead.take(store)
    assert not ahead.host
    mask = torch.empty(ROWS, 1, 1, PROMPT + 80, device=FAR, dtype=torch.bool)
    for _ in range(store.plan.page_size + 2):
        q, k, v = token()
        with FarDevice():
            ahead.step(q, k, v, mask, ahead.length, 0.1)
            ahead.length += 1


def test_what_waits_is_seen() -> None:
    store = far("int(bits=4)")
    store.table.received = torch.zeros(ROWS * HEADS, 9, 2, device=FAR)
    with FarDevice(), pytest.raises((RuntimeError, NotImplementedError)):
        store.table.received.cpu()
    with FarDevice(), pytest.raises(RuntimeError, match="item"):
        int(store.table.received.sum())
