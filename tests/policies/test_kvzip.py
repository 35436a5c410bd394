"""kvzip: the budget that all heads of all layers share, and what comes after the prompt."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcomp import Stack
from kvcomp.cache.layer import LayerStore
from kvcomp.errors import UnsupportedError
from kvcomp.policies.kvzip import KVzip


@settings(deadline=None, max_examples=50)
@given(
    n=st.integers(1, 60),
    keep=st.floats(0.05, 1),
    sinks=st.integers(0, 4),
    recent=st.integers(0, 9),
    uniform=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_the_best_of_all_heads_are_kept(n: int, keep: float, sinks: int, recent: int, uniform: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    received = [torch.rand(1, heads, n, generator=generator) for heads in (2, 3, 1)]
    policy = KVzip(keep=keep, layers="uniform" if uniform else "adaptive")
    chosen = policy.choose(received, sinks, recent)
    count = min(max(round(keep * n), sinks + recent, 1), n)
    assert policy.kept(n, sinks, recent, 0, 3) == count
    for group in [[0], [1], [2]] if uniform else [[0, 1, 2]]:
        scores = torch.cat([received[i] for i in group], 1).clone()
        kept = torch.cat([chosen[i] for i in group], 1)
        scores[..., :sinks] = scores[..., max(n - recent, 0) :] = torch.inf
        assert int(kept.sum()) == count * kept.shape[1]
        assert not bool((~kept).any()) or scores[kept].min() >= scores[~kept].max()
        assert bool(kept[scores.isinf()].all())


def test_what_follows_the_prompt_is_kept_and_the_prompt_needs_its_pass() -> None:
    k, v = torch.randn(2, 1, 2, 100, 8)
    store = LayerStore(Stack.parse("kvzip(keep=0.2)").plan(0, 1))
    store.start(k, v)
    with pytest.raises(UnsupportedError, match=r"kvcomp\.prefill"):
        store.write(k, v, None)
    store = LayerStore(Stack.parse("kvzip(keep=0.2)").plan(0, 1))
    store.start(k, v)
    chosen = torch.zeros(1, 2, 100, dtype=torch.bool)
    chosen[0, 0, :30] = chosen[0, 1, 40:50] = True
    store.write(k, v, None, chosen=chosen)
    assert store.kept.tolist() == [30, 10]
    store.write(k[:, :, :7], v[:, :, :7], None)
    assert store.kept.tolist() == [37, 17]
