"""SimLayerKV: what lazy layers keep, by row."""

from __future__ import annotations

import pytest
import torch

from kvcomp import Stack
from kvcomp.cache.layer import LayerStore
from kvcomp.stages import Chunk
from kvcomp.stages.registry import find

D = 16


def rows(n: int, recent: int, group: int = 2) -> Chunk:
    """Row 0 looks at its newest tokens, row 1 at token n // 2, which is none of them."""
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, h, n, D, generator=generator) for h in (2 * group, 2, 2))
    k, look = k * 0.1, torch.zeros(D)
    look[0] = 8.0
    q[:, :, -1] = look
    k[0, :, n - recent :] += look
    k[1, :, n // 2] += look
    return Chunk(q, k, v, torch.ones(2, 2, n, dtype=torch.bool), 0, 2, 5, 0.25, 1, 4)


@pytest.mark.parametrize("group", [1, 4])
def test_a_lazy_layer_keeps_its_first_and_newest_tokens(group: int) -> None:
    n, recent = 120, 30
    c = rows(n, recent, group)
    kept = find("simlayerkv")(recent=recent, threshold=0.8).select(c)
    token = torch.arange(n)
    assert kept[0].eq((token < 4) | (token >= n - recent)).all()
    assert kept[1].all()


def test_the_share_is_that_of_the_definition() -> None:
    n, recent = 90, 20
    generator = torch.Generator().manual_seed(5)
    q, k = torch.randn(3, 6, n, D, generator=generator), torch.randn(3, 2, n, D, generator=generator)
    c = Chunk(q, k, k, torch.ones(3, 2, n, dtype=torch.bool), 0, 0, 0, 0.3, 1, 4)
    logits = q[:, :, -4:].double().unflatten(1, (2, 3)) @ k.double().mT[:, :, None] * 0.3
    mask = torch.arange(n) > torch.arange(n - 4, n)[:, None]
    weights = logits.masked_fill(mask, -torch.inf).softmax(-1)
    shares = (weights[..., :4].sum(-1) + weights[..., n - recent :].sum(-1)).mean((1, 2, 3)).tolist()
    for row, share in enumerate(shares):
        for threshold, all_stay in ((share - 1e-4, False), (share + 1e-4, True)):
            policy = find("simlayerkv")(recent=recent, threshold=threshold, window=4)
            assert bool(policy.select(c)[row].all()) is all_stay


def test_short_prompts_stay_and_rows_of_a_batch_choose_alone() -> None:
    policy = find("simlayerkv")(recent=30, threshold=0.8)
    assert bool(policy.select(rows(34, 10)).all())
    c = rows(120, 30)
    plan = Stack.parse("simlayerkv(recent=30, threshold=0.8) + int(bits=8)").plan(1, 4)
    store = LayerStore(plan)
    store.start(c.keys, c.values)
    store.write(c.keys, c.values, None, c.queries, 0.25)
    assert store.kept.tolist() == [34, 34, 120, 120]
