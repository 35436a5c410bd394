"""Layers of an engine with a sliding window, and attention with learned sinks."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from block_engine import DIM, GROUP, HEADS, BlockEngine
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcomp.cache.blocks.setup import Setup
from kvcomp.errors import UnsupportedError

HOST = torch.device("cpu")
WINDOW = 150


def by_definition(new: list[torch.Tensor], window: int | None, sinks: torch.Tensor | None) -> torch.Tensor:
    """Attention [n, Hq, D] of all tokens, as a model computes it: the sinks are one more logit of each head."""
    q, k, v = (x.transpose(0, 1).double() for x in new)
    k, v = (x.repeat_interleave(GROUP, 0) for x in (k, v))
    n = q.shape[1]
    distance = torch.arange(n)[:, None] - torch.arange(n)
    hidden = (distance < 0) | (distance >= (window or n))
    logits = (q @ k.mT * DIM**-0.5).masked_fill(hidden, -torch.inf)
    more = torch.full((len(q), n, 1), -torch.inf, dtype=torch.float64)
    if sinks is not None:
        more[:] = sinks.double()[:, None, None]
    shares = torch.cat([logits, more], -1).softmax(-1)[..., :-1]
    return (shares @ v).transpose(0, 1).float()


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("window", [WINDOW, None])
@pytest.mark.parametrize(
    "stack", ["none", "none + window(sinks=4, recent=50)", "h2o(budget=128) + none", "snapkv(budget=64) + none"]
)
@settings(deadline=None, max_examples=6)
@given(st.lists(st.sampled_from([1, 1, 1, 2, 40, 64, 170]), min_size=2, max_size=9), st.booleans())
def test_attention_is_that_of_the_model(
    stack: str, window: int | None, learned: bool, parts: list[int], alone: bool
) -> None:
    """Whatever comes in a step, beside another request or alone, where pages lose nothing."""
    if window is None and ("snapkv" in stack or "h2o" in stack):
        return
    torch.manual_seed(len(parts))
    sinks = torch.randn(HEADS * GROUP) if learned else None
    engine = BlockEngine(stack, HOST, sliding=window, sinks=sinks)
    edges = [0, *torch.tensor(parts).cumsum(0).tolist()]
    new = [engine.random(edges[-1]) for _ in range(1 if alone else 2)]
    found = []
    for past, end in pairwise(edges):
        count = end - past
        step = engine.planned([i * count for i in range(len(new) + 1)], [end] * len(new), [10**6] * len(new))
        given = (torch.cat([one[i][past:end] for one in new]) for i in range(3))
        found.append(engine.attend(step, *given).view(len(new), count, HEADS * GROUP, DIM))
    for i, one in enumerate(new):
        torch.testing.assert_close(
            torch.cat([part[i] for part in found]), by_definition(one, window, sinks), rtol=1e-4, atol=1e-4
        )


def test_blocks_are_of_one_size_and_windows_of_enough_tokens() -> None:
    """Pages with summaries and tails in full layers leave room in those of sliding ones."""
    full = Setup("h2o(budget=128) + int(bits=4) + quest(pages=4)", 4, DIM, torch.float32)
    inside = full.within(WINDOW)
    assert inside.record_bytes(2) == full.record_bytes(2) > inside.plan(0).layout(inside.shape(2, 0)).bytes_per_page
    assert inside.by_token
    assert not full.by_token
    assert full.within(None) is full
    with pytest.raises(UnsupportedError, match=r"set window\(recent=...\) to 118 at most"):
        Setup("kivi(bits=4)", 4, DIM, torch.float32).within(WINDOW).plan(0)
    with pytest.raises(UnsupportedError, match="without a stack"):
        Setup("int8", 4, DIM, torch.float32).within(32).plan(0)
