"""Steps over an engine's blocks on a device that is not looked at, as a GPU must not be, and what graphs can hold."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from block_engine import COLUMNS, DIM, GROUP, HEADS, REQUESTS, BlockEngine
from far_device import FAR, Counted, FarDevice

from kvcomp.cache.blocks.centres import turned
from kvcomp.cache.blocks.decode import Decoder
from kvcomp.cache.blocks.step import Step
from kvcomp.cache.layer import LayerStore
from kvcomp.kernels import backends, dispatch
from kvcomp.kernels.triton_backend import Triton

HOST = torch.device("cpu")


@pytest.mark.parametrize(
    "stack",
    [
        "int(bits=4)",
        "int(bits=3, group=4)",
        "turboquant(bits=4)",
        "kivi(bits=2)",
        "nvfp4",
        "int8 + window(sinks=4, recent=70)",
        "streaming(sinks=4, recent=64) + int8",
        "int(bits=4, basis=hadamard) + quest(pages=2)",
    ],
)
def test_a_step_does_not_wait(stack: str) -> None:
    """Prompts, parts of prompts, single tokens, several pages' ends in a step: few copies of what is planned."""
    engine = BlockEngine(stack, FAR)
    past = [0, 0, 0]
    for new in ([150, 70, 1], [40, 1, 1], [1, 1, 1], [62, 30, 5], [1, 1, 1]):
        starts = [0, *torch.tensor(new).cumsum(0).tolist()]
        past = [a + b for a, b in zip(past, new, strict=True)]
        tokens = engine.random(sum(new))
        with FarDevice() as seen:
            step = engine.planned(starts, past)
            assert seen.moved <= 2 + len(step.groups) + 3  # table and slots, groups, writes, votes, pages that begin
            before = seen.moved
            out = engine.attend(step, *tokens)
            assert seen.moved == before
        assert out.shape == (sum(new), HEADS * GROUP, DIM)


LAUNCHES = [  # of the first layer of a step, at most, which finds out where all layers write, and of later layers
    ("none", 22, 8),
    ("int(bits=4)", 27, 13),
    ("fp8", 27, 13),
    ("mxfp4", 27, 13),
    ("turboquant(bits=4)", 31, 17),
    ("int(bits=4, basis=hadamard)", 31, 17),
    ("kivi(bits=4)", 35, 21),
    ("nvfp4", 35, 21),
    ("int8 + window(recent=70)", 35, 21),
    ("int(bits=4) + quest(pages=2, dense_layers=0)", 43, 29),
]


@pytest.mark.parametrize(("stack", "first", "later"), LAUNCHES)
@torch.no_grad()
def test_a_step_launches_few_kernels(stack: str, first: int, later: int) -> None:
    """Single tokens that fill no page, planned on the host, as on a GPU with Triton; one launch makes `out`."""
    pytest.importorskip("triton")
    with backends.using(Triton(anywhere=True)):
        engine = BlockEngine(stack, FAR)
        engine.attend(engine.planned([0, 150, 290], [150, 140]), *engine.random(290))
        for more in range(3):
            new = engine.random(2)
            step = engine.planned([0, 1, 2], [151 + more, 141 + more], [150, 140])
            for most in (first, later):
                with Counted() as counted:
                    engine.attend(step, *new)
                assert not step.fills
                assert counted.moved == 0
                if more:  # what is made once is there
                    assert counted.launches <= most, counted.operators


def decoded(engine: BlockEngine, prompts: list[int], steps: int) -> Iterator[Step]:
    """Steps of single tokens after such prompts, one after another."""
    starts = list(range(len(prompts) + 1))
    for more in range(1, steps + 1):
        step, tokens = engine.planned(starts, [n + more for n in prompts], prompts), engine.random(len(prompts))
        yield step
        engine.attend(step, *tokens)


@pytest.mark.parametrize(
    "policy", ["h2o(budget=128)", "snapkv(budget=128, window=16, hold=true)", "snapkv(budget=128)", "rkv(budget=128)"]
)
def test_what_pages_receive_stays_on_the_device(policy: str) -> None:
    """From a prompt's end until pages leave, over the end of a page."""
    engine = BlockEngine(f"{policy} + int8 + window(sinks=4, recent=30)", FAR)
    for step in decoded(engine, [150, 140], 50):
        new = engine.random(2)
        with FarDevice() as seen:
            engine.attend(step, *new)
            assert seen.moved == 0
        assert not step.leaves


def test_what_pages_receive() -> None:
    """A share of each query's attention, from the step on that wrote the page."""
    engine, prompts = BlockEngine("h2o(budget=128) + int8 + window(sinks=4, recent=30)", HOST), [150, 140]
    engine.attend(engine.planned([0, 150, 290], prompts, prompts), *engine.random(290))
    *_, step = decoded(engine, prompts, 50)
    (group,) = step.groups
    mass, queries = engine.pages.received(group.pages.long()).unbind(-1)
    assert queries.tolist() == [[50.0, 50.0 - 34]] * 4  # 128 tokens stay, and another page is full with 162
    assert (mass > 0).all()
    assert (mass < queries).all()


@pytest.mark.parametrize("policy", ["h2o(budget=128)", "tova(budget=128)", "rkv(budget=128)"])
def test_pages_leave_that_leave_a_growing_store(policy: str) -> None:
    """Token by token the attention of each request is that of its own store."""
    engine, prompts = BlockEngine(f"{policy} + int8 + window(sinks=4, recent=30)", HOST), [150, 90]
    new = engine.random(sum(prompts))
    engine.attend(engine.planned([0, 150, 240], prompts, prompts), *new)
    stores = []
    for q, k, v in zip(*(x.transpose(0, 1)[None].split(prompts, 2) for x in new), strict=True):
        store = LayerStore(engine.pages.plan)
        store.start(k, v)
        store.write(k, v, None, q, DIM**-0.5)
        stores.append(store)
    left = 0
    for more in range(1, 260):
        lengths, tokens = [n + more for n in prompts], engine.random(2)
        step = engine.planned([0, 1, 2], lengths, prompts)
        left += len(step.leaves)
        out = engine.attend(step, *tokens)
        for r, store in enumerate(stores):
            q, k, v = (x[r : r + 1, :, None] for x in tokens)
            store.append(k, v)
            torch.testing.assert_close(out[r], store.attend(q, DIM**-0.5).out[0, :, 0], rtol=1e-4, atol=1e-4)
            store.settle()
    assert left >= 4


@pytest.mark.parametrize("device", [HOST, FAR])
def test_followers_read_what_their_leader_chose(device: torch.device) -> None:
    """Without a wait; a follower's pages have no summaries."""
    stack = "int8 + quest(pages=2, share=2)"
    leader, follower = engines = [BlockEngine(stack, device, layer) for layer in (2, 3)]
    follower.table = leader.table
    starts, past = [0, 300, 510], [300, 210]
    for engine in engines:
        engine.attend(engine.planned(starts, past), *engine.random(510))
    tokens = [engine.random(2) for engine in engines]
    with FarDevice() if device == FAR else nullcontext():
        step = leader.planned([0, 1, 2], [n + 1 for n in past])
        for engine, new in zip(engines, tokens, strict=True):
            engine.attend(step, *new)
    layout = follower.pages.layout
    assert layout.summary_bytes == 0 < leader.pages.layout.summary_bytes
    if device == FAR:
        return
    read = [engine.layer.last_step.bytes() for engine in engines]
    assert read[0].pop("summaries") > 0
    assert read[1] == read[0]
    chosen, held = (int(counts.sum()) for counts in (step.choices[2].valid, step.groups[0].counts))
    assert read[1]["pages"] == chosen * layout.body_bytes < held * layout.body_bytes


def test_what_waits_is_seen() -> None:
    """A look at a count, and a tensor that was left on the host."""
    engine = BlockEngine("kivi(bits=2)", FAR)
    step, new = engine.planned([0, 1], [130]), engine.random(1)
    with FarDevice():
        with pytest.raises(RuntimeError, match="item"):
            int(step.groups[0].counts.max())
        object.__setattr__(step.groups[0], "exact", torch.zeros(HEADS, dtype=torch.int64))
        with pytest.raises(RuntimeError, match="host and of the device"):
            engine.attend(step, *new)


@pytest.mark.parametrize("stack", ["none", "int(bits=4)", "int(bits=2, basis=hadamard)", "turboquant(bits=3)", "mxfp4"])
@pytest.mark.parametrize("biased", [None, 5, 11, 15])
def test_a_decode_step_is_a_step(stack: str, biased: int | None) -> None:
    """Planned on the device, with padding after the requests, or on the host: the same attention, the same pool, to
    the bit: centres do not depend on how many pages begin at once. biased: the seed of the keys' biases."""
    of_keys = None
    if biased is not None:
        drawn = torch.randn(HEADS, DIM, generator=torch.Generator().manual_seed(biased))
        of_keys = turned(30 * drawn, torch.linspace(1, 0.001, DIM // 2), 1.0)
    engine = BlockEngine(stack, HOST, biases=of_keys)
    lengths = [1, 63, 64, 65, 200]
    pages, past = engine.pages, [n - 1 for n in lengths]
    first = engine.planned([0, *torch.tensor(past).cumsum(0).tolist()], past)
    pages.write_tokens(*engine.random(sum(past))[1:], pages.cells(first.slot_mapping, first.begun))
    starts = list(range(len(lengths) + 1))
    new, before = engine.random(REQUESTS), engine.pool.clone()
    expected = engine.attend(engine.planned(starts, lengths), *(x[: len(lengths)] for x in new))
    written = engine.pool.clone()
    engine.pool.copy_(before)
    decoder = Decoder(REQUESTS, COLUMNS - 1, engine.setup.page_size, HEADS, torch.zeros(1), pages.frequencies)
    slots = torch.cat([engine.slots(starts, lengths), torch.tensor([-1])])
    with dispatch.reference_only():
        found = engine.attend(decoder.plan(engine.table, torch.tensor([*lengths, 0]), slots), *new)
    torch.testing.assert_close(found[:-1], expected, rtol=1e-4, atol=1e-4)
    assert (found[-1] == 0).all()
    assert torch.equal(engine.pool[1:], written[1:])  # padding has gone to block 0, which is nobody's
