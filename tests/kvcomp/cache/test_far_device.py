"""Decode steps on a device that is not looked at, as a GPU must not be: in growing and in fixed memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from far_device import FAR, Counted, FarDevice
from torch import Tensor

from kvcomp import Stack
from kvcomp.cache.fixed import FixedStore
from kvcomp.cache.layer import LayerStore
from kvcomp.kernels import backends
from kvcomp.kernels.triton_backend import Triton

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
WATCHING = ["h2o(budget=150)", "tova(budget=150)", "snapkv(budget=150, hold=true)", "rkv(budget=150)"]


def far(spec: str, prompt: int = PROMPT, layer: int = 0) -> LayerStore:
    """A store of rows of `prompt` and prompt - 40 tokens, after its prompt, on the far device."""
    torch.manual_seed(0)
    plan = replace(Stack.parse(f"{spec} + {WINDOW}").plan(layer, 2), page_size=16)
    here = LayerStore(plan)
    k, v = torch.randn(2, ROWS, HEADS, prompt, DIM).unbind()
    here.start(k, v)
    valid = torch.arange(prompt) >= torch.tensor([[0], [40]])
    with backends.using(*backends.ALL[:-1]):
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


LAUNCHES = [  # of a layer and step, at most: with a window, on a GPU with Triton
    ("none", 6),
    ("int8", 6),
    ("int(bits=4)", 6),
    ("kivi(bits=4, group=16)", 6),
    ("fp8", 6),
    ("nvfp4", 6),
    ("mxfp4", 6),
    ("snapkv(budget=64) + kivi(bits=4, group=16)", 6),
    ("turboquant(bits=4)", 8),
    ("turboquant(bits=2)", 8),
    ("int(bits=4, basis=hadamard)", 8),
    ("klt(bits=4)", 8),
    ("klt(bits=2)", 8),
    ("kivi(bits=4, group=16) + quest(pages=3, dense_layers=0)", 14),
    ("kivi(bits=4, group=16) + quest(keep=0.3, dense_layers=0)", 14),
    ("int(bits=4) + moba(tokens=64)", 14),
]


@pytest.fixture
def triton() -> Iterator[None]:
    """As on a GPU: operators are Triton's, which on the far device say what they would launch."""
    pytest.importorskip("triton")
    with backends.using(Triton(anywhere=True)):
        yield


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize(("spec", "most"), LAUNCHES)
@torch.no_grad()
def test_a_step_in_growing_memory_launches_few_kernels(spec: str, most: int) -> None:
    """With the cast that its caller makes. Steps at the end of a page write it, and the next copy what changed on the
    host: twice in P steps here, and without a wait."""
    store, counts, changed = far(spec), [], True
    for _ in range(store.plan.page_size + 1):
        q, k, v = token()
        with Counted() as counted:
            store.append(k, v)
            store.attend(q, 0.1).out.to(torch.bfloat16)
            full = store.storage.full() is not None
            store.settle()
        if not (full or changed):
            counts.append((counted.launches, counted.operators))
        changed = full
    assert len(counts) > store.plan.page_size // 2
    assert max(counts)[0] <= most, max(counts)
    assert min(counts)[0] >= 4


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("spec", [spec for spec, most in LAUNCHES if most == 6])
@torch.no_grad()
def test_a_step_in_fixed_memory_launches_few_kernels(spec: str) -> None:
    """Every step, whether a page is full or not; the first layer of a cache looks at the mask besides."""
    stores = [far(spec, layer=layer) for layer in range(2)]
    stores[1].choices = stores[0].choices
    ahead = [FixedStore(store.plan, PROMPT + 80) for store in stores]
    for fixed, store in zip(ahead, stores, strict=True):
        fixed.take(store)
    for _ in range(3):
        mask = torch.empty(ROWS, 1, 1, PROMPT + 80, device=FAR, dtype=torch.bool)
        found = []
        for fixed in ahead:
            q, k, v = token()
            with Counted() as counted:
                fixed.step(q, k, v, mask, fixed.length, 0.1).out.to(torch.bfloat16)
            found.append(counted)
        assert found[1].launches <= 6, found[1].operators
        checks = [name for name in found[0].operators if name == "_assert_async"]
        assert len(checks) == 2
        assert found[0].launches <= 6 + 7, found[0].operators


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("spec", ["turboquant(bits=4)", "int(bits=3)", "int(bits=4, basis=hadamard)"])
@torch.no_grad()
def test_a_step_of_other_stacks_in_fixed_memory(spec: str) -> None:
    store = far(spec)
    ahead = FixedStore(store.plan, PROMPT + 80)
    ahead.take(store)
    q, k, v = token()
    with Counted() as counted:
        ahead.step(q, k, v, None, ahead.length, 0.1)
    assert "index_put_" not in counted.operators, counted.operators
    assert counted.launches <= 14, counted.operators


def test_what_waits_is_seen() -> None:
    store = far("int(bits=4)")
    store.table.received = torch.zeros(ROWS * HEADS, 9, 2, device=FAR)
    with FarDevice(), pytest.raises((RuntimeError, NotImplementedError)):
        store.table.received.cpu()
    with FarDevice(), pytest.raises(RuntimeError, match="item"):
        int(store.table.received.sum())
