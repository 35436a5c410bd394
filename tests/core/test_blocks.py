"""Steps over an engine's blocks on a device that is not looked at, as a GPU must not be, and what graphs can hold."""

from __future__ import annotations

import pytest
import torch
from block_engine import COLUMNS, DIM, GROUP, HEADS, REQUESTS, BlockEngine
from far_device import FAR, FarDevice

from kvcomp.cache.blocks.decode import Decoder
from kvcomp.kernels import dispatch

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
            assert seen.moved <= 2 + len(step.groups) + 2  # table and slots, groups, writes and votes
            before = seen.moved
            out = engine.attend(step, *tokens)
            assert seen.moved == before
        assert out.shape == (sum(new), HEADS * GROUP, DIM)


def test_what_waits_is_seen() -> None:
    """A look at a count, and a tensor that was left on the host."""
    engine = BlockEngine("kivi(bits=2)", FAR)
    step, new = engine.planned([0, 1], [130]), engine.random(1)
    with FarDevice():
        with pytest.raises(RuntimeError, match="item"):
            int(step.groups[0].counts.max())
        object.__setattr__(step.groups[0], "tokens", torch.zeros(1, 1, dtype=torch.int64))
        with pytest.raises(RuntimeError, match="host and of the device"):
            engine.attend(step, *new)


@pytest.mark.parametrize("stack", ["none", "int(bits=4)", "int(bits=2, basis=hadamard)", "turboquant(bits=3)", "mxfp4"])
def test_a_decode_step_is_a_step(stack: str) -> None:
    """Planned on the device, with padding behind the requests, or on the host: the same attention, the same pool."""
    engine = BlockEngine(stack, HOST)
    lengths = [1, 63, 64, 65, 200]
    pages, past = engine.pages, [n - 1 for n in lengths]
    before_them = engine.slots([0, *torch.tensor(past).cumsum(0).tolist()], past)
    pages.write_tokens(*engine.random(sum(past))[1:], pages.cells(before_them))
    starts = list(range(len(lengths) + 1))
    new, before = engine.random(REQUESTS), engine.pool.clone()
    expected = engine.attend(engine.planned(starts, lengths), *(x[: len(lengths)] for x in new))
    written = engine.pool.clone()
    engine.pool.copy_(before)
    decoder = Decoder(REQUESTS, COLUMNS - 1, engine.setup.page_size, HEADS, torch.zeros(1))
    slots = torch.cat([engine.slots(starts, lengths), torch.tensor([-1])])
    with dispatch.reference_only():
        found = engine.attend(decoder.plan(engine.table, torch.tensor([*lengths, 0]), slots), *new)
    torch.testing.assert_close(found[:-1], expected, rtol=1e-4, atol=1e-4)
    assert (found[-1] == 0).all()
    assert torch.equal(engine.pool[1:], written[1:])  # padding has gone to block 0, which is nobody's
