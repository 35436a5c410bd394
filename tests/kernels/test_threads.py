"""Caches of their own in threads of their own, on one model: what each gets is what it gets alone."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from generation import greedy, tokens
from tiny_models import make

from kvcomp import CompressedCache, Stack, prefill
from kvcomp.kernels import backends, cpu, dispatch
from kvcomp.kernels.cpu import encode
from kvcomp.segments import memo
from kvcomp.stages import PageShape

THREADS = 4
SPECS = [
    "none",
    "int(bits=4, basis=hadamard)",
    "kivi(bits=2)",
    "turboquant(bits=2.5)",
    "klt(bits=2) + sketch(keep=0.3)",
    "snapkv(keep=0.5) + int8",
    "quest(pages=2, dense_layers=0) + int(bits=4)",
    "h2o(budget=96) + klt(bits=4)",
]


def together(work: Callable[[int], object]) -> list[object]:
    """What the work of each thread gives; all begin at once."""
    barrier = threading.Barrier(THREADS)

    def begin(i: int) -> object:
        barrier.wait()
        return work(i)

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(begin, range(THREADS)))


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.filterwarnings("ignore:snapkv drops")
def test_threads_answer_as_one_after_the_other(spec: str) -> None:
    model = make("llama", num_hidden_layers=2)

    def answer(i: int) -> list[list[int]]:
        ids, cache = tokens(1, 150 + i, seed=i), CompressedCache(spec, model)
        if i % 2:  # half of them through the prefill of many caches
            prefill(model, ids[:, :-1], [cache])
        found: list[list[int]] = greedy(model, ids, cache, 16).sequences.tolist()
        return found

    serial = [answer(i) for i in range(THREADS)]
    for _ in range(2):
        assert together(answer) == serial


@pytest.mark.skipif(cpu.library() is None, reason="the C kernel is not installed: no compiler")
@pytest.mark.parametrize("described", [cpu.described, encode.described])
def test_what_c_may_be_reading_is_never_replaced(described: Callable[..., object]) -> None:
    """Codecs of many layers share a side, each with a layout of its own: none takes away what another was given."""
    plan = Stack.parse("klt(bits=2) + window(recent=0)").plan(0, 1)
    built = [plan.build(PageShape(plan.page_size, 64, 64, 1, torch.float32, torch.device("cpu"), 0)) for _ in range(3)]
    keys = torch.randn(1, 300, 64)
    for codec, _ in built:
        codec.fit(torch.zeros(1, dtype=torch.int64), keys, keys)
    sides = built[0][0].kernel_layouts()
    first = described(sides, built[0][1])
    for _, layout in built:
        described(sides, layout)
    assert described(sides, built[0][1]) is first


def test_what_is_known_of_a_side_goes_with_it() -> None:
    plan = Stack.parse("turboquant(bits=2) + window(recent=0)").plan(0, 1)
    codec, layout = plan.build(PageShape(plan.page_size, 64, 64, 1, torch.float32, torch.device("cpu"), 0))
    sides = tuple(type(side)(side.segments, side.gain) for side in codec.kernel_layouts())
    made = [weakref.ref(one) for side in (cpu, encode) for one in side.described(sides, layout)]
    assert len(memo(sides)) == 2
    del sides
    gc.collect()
    assert [ref() for ref in made] == [None] * 4


def test_a_thread_that_asks_for_the_reference_leaves_the_others_alone() -> None:
    inside, done = threading.Event(), threading.Event()
    seen = []

    def ask() -> None:
        with dispatch.reference_only():
            inside.set()
            done.wait(10)
            seen.append(backends._order.get())

    other = threading.Thread(target=ask)
    other.start()
    inside.wait(10)
    with dispatch.reference_only():
        pass
    seen.append(backends._order.get())
    done.set()
    other.join()
    assert seen == [backends.ALL, (backends.REFERENCE,)]
