"""What policies and klt do with a prompt of 128k tokens, on a device that is not looked at: how many operators of a
layer, and how large tensors. `pytest -s` prints the table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from far_device import FAR, Counted
from torch import Tensor

from kvcomp import Stack
from kvcomp.cache.records import PageMemory, Records
from kvcomp.integrations.huggingface.handles import Call
from kvcomp.integrations.huggingface.reconstruct import RepeatLayer
from kvcomp.kernels import backends
from kvcomp.kernels.triton_backend import Triton
from kvcomp.policies.kvzip import KVzip
from kvcomp.stages import Chunk, Policy

HEADS, GROUP, DIM, TOKENS = 8, 4, 128, 128 * 1024  # Qwen3-8B's, of whose keys a layer has 256 MiB
KEYS = HEADS * TOKENS * DIM * 2


@pytest.fixture(autouse=True)
def triton() -> Iterator[None]:
    pytest.importorskip("triton")
    with backends.using(Triton(anywhere=True)), torch.no_grad():
        yield


class Rotation:
    """A model whose rotary embedding turns halves of the channels."""

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        angle = positions[:, None] * torch.linspace(1, 1e-4, DIM // 2, device=x.device)
        a, b = x.chunk(2, -1)
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

    def output(self) -> Tensor:
        raise NotImplementedError


def far(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device=FAR)


def policy(spec: str) -> Policy:
    return Stack.parse(spec).plan(0, 1).policies[0]


def scored(spec: str) -> Callable[[], None]:
    k, v, q = far(1, HEADS, TOKENS, DIM), far(1, HEADS, TOKENS, DIM), far(1, HEADS * GROUP, TOKENS, DIM)
    alive = torch.empty(1, HEADS, TOKENS, dtype=torch.bool, device=FAR)
    chunk = Chunk(keys=k, values=v, queries=q, alive=alive, scale=0.1, past=0, model=Rotation(), **SCORED)
    stage: Any = policy(spec)

    def score() -> None:
        assert stage.scores(chunk).shape == (1, HEADS, TOKENS)

    return score


def repeated() -> Callable[[], None]:
    """The first pass of kvzip, of as many as there are chunks in a prompt."""
    layer = RepeatLayer(far(1, HEADS, TOKENS, DIM), far(1, HEADS, TOKENS, DIM))
    n = KVzip().chunk + 24
    layer.start, layer.end = 0, KVzip().chunk
    layer.take(far(1, HEADS, n, DIM), far(1, HEADS, n, DIM))
    module: Any = SimpleNamespace()
    base: Any = None
    call = Call(base, module, far(1, HEADS * GROUP, n, DIM), None, 0.1, {}, "sdpa")

    def attend() -> None:
        assert layer.attention(call)[0].shape == (1, n, HEADS * GROUP, DIM)

    return attend


def encoded(spec: str) -> Callable[[], None]:
    """What writes all pages of a prompt, once its codec has adapted."""
    plan = Stack.parse(spec).plan(0, 1)
    host = plan.shape(DIM, DIM, HEADS, torch.bfloat16, torch.device("cpu"))
    here, records = Records(plan, host), Records(plan, plan.shape(DIM, DIM, HEADS, torch.bfloat16, FAR))
    streams = torch.arange(HEADS)
    if plan.quantizer.needs_queries:
        here.codec.observe(streams, torch.randn(HEADS, 64, DIM))
    here.codec.fit(streams, *torch.randn(2, HEADS, 256, DIM))
    state = here.codec.state()
    records.codec.restore({name: x if name.endswith("widths") else x.to(FAR) for name, x in state.items()})
    pages = TOKENS // plan.page_size
    pool = torch.empty(HEADS * pages, records.layout.bytes_per_page, dtype=torch.uint8, device=FAR)
    records.memory = PageMemory(records.layout, pool)
    ids = torch.empty(HEADS, pages, dtype=torch.int64, device=FAR)
    k, v = far(HEADS, TOKENS, DIM), far(HEADS, TOKENS, DIM)

    def write() -> None:
        records.encode(ids, k, v, streams.to(FAR), look=False, fit=False)

    return write


SCORED = {"sinks": 4, "recent": 0, "layer": 0, "layers": 1}
CASES: dict[str, tuple[Callable[[], Callable[[], None]], int, float]] = {
    # operators, and the largest tensor in sizes of a layer's keys, at most
    "h2o": (lambda: scored("h2o(keep=0.2)"), 6, 0.1),
    "snapkv": (lambda: scored("snapkv(keep=0.2)"), 8, 1.0),
    "expected_attention": (lambda: scored("expected_attention(keep=0.5)"), 1100, 0.5),
    "kvzip": (repeated, 25, 0.25),
    "kivi": (lambda: encoded("kivi(bits=4)"), 6, 1.0),
    "turboquant": (lambda: encoded("turboquant(bits=4)"), 8, 2.0),
    "klt": (lambda: encoded("klt(bits=4)"), 60, 2.1),
}


@pytest.mark.parametrize("name", CASES)
def test_operators_and_tensors_at_128k(name: str) -> None:
    made, operators, most = CASES[name]
    run = made()
    run()  # what is made once
    with Counted() as counted:
        run()
    size = counted.largest / KEYS
    row = f"{name:20} {counted.launches:6} launches, largest tensor {counted.largest >> 20:6} MiB ({size:.2f} of K)"
    print(f"\n{row}, made by {counted.largest_of}: {Counter(counted.operators)}")
    assert counted.launches <= operators, row
    assert size <= most, row
