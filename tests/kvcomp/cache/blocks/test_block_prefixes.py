"""Blocks that requests share: their bytes follow from their tokens alone, and whoever finds them reads these tokens."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from block_engine import DIM, GROUP, HEADS, BlockEngine
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcomp.attention import attend_causal
from kvcomp.cache.geometry import Extents
from kvcomp.stages.stack import Stack

HOST = torch.device("cpu")
STACKS = [
    "none + window(sinks=4, recent=40)",
    "none + window(sinks=70, recent=0)",
    "kivi(bits=2, group=64) + window(sinks=3, recent=100)",
    "int(bits=4) + quest(pages=4)",
    "snapkv(budget=100, window=16) + none + window(sinks=2, recent=8)",
    "streaming(sinks=4, recent=80) + none",
]


def run(engine: BlockEngine, row: int, tokens: list[torch.Tensor], edges: list[int], found: int = 0) -> torch.Tensor:
    """Outputs of a request's tokens from its first edge on, which come in steps that end at the others."""
    prompt, out = len(tokens[0]), []
    for past, end in pairwise(edges):
        lengths = [0] * row + [end]
        starts = [0] * (row + 1) + [end - past]
        step = engine.planned(starts, lengths, [prompt] * (row + 1), [0] * row + [found])
        out.append(engine.attend(step, *(x[past:end] for x in tokens)))
    return torch.cat(out)


@pytest.mark.parametrize("stack", STACKS)
@settings(deadline=None, max_examples=8)
@given(st.integers(100, 250), st.lists(st.integers(1, 249), max_size=5), st.integers(0, 60))
def test_bytes_follow_from_tokens(stack: str, tokens: int, cuts: list[int], more: int) -> None:
    """However the tokens come, and whatever comes after them."""
    one, other = (BlockEngine(stack, HOST, caching=True) for _ in range(2))
    other.table = one.table
    new = one.random(tokens + more)
    engines = ((one, tokens, []), (other, tokens + more, cuts))
    for engine, end, inside in engines:
        edges = sorted({0, *(cut for cut in inside if cut < end), end})
        run(engine, 0, [x[:end] for x in new], edges)
    full = one.table[0, : tokens // one.setup.page_size].long()
    assert torch.equal(*(engine.pool.flatten(1)[full] for engine in (one, other)))


@pytest.mark.parametrize("stack", [stack for stack in STACKS if "none" in stack])
def test_found_tokens_are_read(stack: str) -> None:
    """Where pages lose nothing, attention after a found prefix is that over all tokens; also if those that write it
    come in the same step."""
    engine = BlockEngine(stack, HOST, caching=True)
    geometry = engine.setup.geometry
    tokens = 400
    new = engine.random(tokens)
    columns, found = geometry.found((tokens - engine.setup.voters) // engine.setup.page_size, 1)
    assert geometry.sinks < found < tokens
    engine.table[1, :columns] = engine.table[0, :columns]
    step = engine.planned([0, tokens, 2 * tokens - found], [tokens] * 2, [tokens] * 2, [0, found])
    together = engine.attend(step, *(torch.cat([x, x[found:]]) for x in new))
    apart = run(engine, 1, new, [found, found + 1, found + 30, tokens], found)
    q, k, v = (x.transpose(0, 1) for x in new)
    part = attend_causal(q.unflatten(0, (HEADS, GROUP)), k, v, DIM**-0.5)
    exact = part.out.view(HEADS * GROUP, tokens, DIM).transpose(0, 1)
    torch.testing.assert_close(together, torch.cat([exact, exact[found:]]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(apart, exact[found:], rtol=1e-4, atol=1e-4)


@settings(deadline=None)
@given(st.integers(0, 9), st.integers(0, 200), st.sampled_from([16, 64]), st.integers(1, 4), st.integers(1, 900))
def test_what_is_found_is_held(sinks: int, recent: int, size: int, each: int, tokens: int) -> None:
    """All tokens are sinks, in pages or in the window, and each page lies in a block that is full when it is."""
    geometry = Extents(size, sinks, recent, policies=Stack.parse("int8").policies, caching=True)
    columns, found = geometry.found(tokens // size // each * each, each)
    assert found <= tokens
    assert columns % each == 0
    if found:
        assert found == sinks + (columns - geometry.shift) * size
        assert found > tokens - recent - (2 * each + 1 + geometry.shift) * size
    for at in range(found, tokens):
        extent = geometry.extent(at, 0, found)
        assert extent.pages * size + extent.exact == at
        assert extent.exact <= sinks + recent + size
        if not extent.written:
            continue
        last = extent.column(extent.pages + extent.ahead) - 1  # the column of the last page written
        assert sinks + (last - geometry.shift + 1) * size <= min(at, (last + 1) * size)
