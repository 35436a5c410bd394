"""CurDKV and Compactor against their definitions, token by token in float64."""

from __future__ import annotations

import pytest
import torch
from model_part import Rope
from torch import Tensor

from kvcomp.policies.leverage import leverages
from kvcomp.stages import Chunk
from kvcomp.stages.registry import find

D = 16


def chunk(n: int, rows: int = 2, heads: int = 2, group: int = 3, past: int = 0) -> Chunk:
    generator = torch.Generator().manual_seed(n)
    q, k, v = (torch.randn(rows, h, n, D, generator=generator) for h in (heads * group, heads, heads))
    alive = torch.ones(rows, heads, n, dtype=torch.bool)
    return Chunk(q, k, v, alive, past, 2, 5, 0.25, 1, 4, Rope(heads * group, D))


@pytest.mark.parametrize(("n", "local"), [(64, 16), (61, 16), (7, 16), (40, 3)])
def test_curdkv_is_its_definition(n: int, local: int) -> None:
    c = chunk(n)
    scores = find("curdkv")(local=local).scores(c)
    for b in range(2):
        for h in range(2):
            for t in range(n):
                window = range(t // local * local, min((t // local + 1) * local, n))
                shares = [
                    float(x[b, h, t].double().norm()) ** 2 / sum(float(x[b, h, i].double().norm()) ** 2 for i in window)
                    for x in (c.keys, c.values)
                ]
                assert float(scores[b, h, t]) == pytest.approx(1.0 if t < 4 else shares[0] * shares[1], rel=1e-4)


@pytest.mark.parametrize(("n", "size"), [(70, 32), (64, 16), (33, 200), (13, 4)])
@pytest.mark.parametrize("group", [1, 4])
def test_compactor_is_its_definition(n: int, size: int, group: int) -> None:
    c, rope = chunk(n, group=group), Rope(1, D)
    policy = find("compactor")(chunk=size, blend=0.7, sinks=3, last=2)
    scores, inner = policy.scores(c), range(3, n - 2)
    assert c.queries is not None
    for b in range(2):
        attention, leverage = torch.zeros(2, len(inner), dtype=torch.float64), []
        for h in range(2):
            plain = torch.stack([rope.matrix(D, t).T.double() @ c.keys[b, h, t].double() for t in inner])
            plain = plain - plain.mean(0)
            inverse = torch.linalg.inv(plain.T @ plain + 5e-3 * torch.eye(D, dtype=torch.float64))
            leverage.append(torch.einsum("nd,de,ne->n", plain, inverse, plain))
            for g in range(group):
                for begin in range(0, len(inner), size):
                    at = [inner[i] for i in range(begin, min(begin + size, len(inner)))]
                    q, k = c.queries[b, h * group + g, at].double(), c.keys[b, h, at].double()
                    attention[h, begin : begin + len(at)] += (q @ k.T).softmax(-1).sum(0) / group
            attention[h] *= c.values[b, h, list(inner)].double().norm(dim=-1)
        padded = torch.nn.functional.pad(attention, (1, 1))
        smooth = (padded[:, :-2] + padded[:, 1:-1] + padded[:, 2:]) / 3
        wanted = sum(w * (x - x.mean()) / x.std(correction=0) for w, x in ((1, smooth), (0.7, torch.stack(leverage))))
        assert isinstance(wanted, Tensor)
        torch.testing.assert_close(scores[b, :, 3 : n - 2].double(), wanted, rtol=1e-3, atol=1e-3)
    assert bool((scores[..., :3] > scores[..., 3 : n - 2].max()).all())


@pytest.mark.parametrize("n", [1, 2, 5, 13])
@pytest.mark.parametrize("name", ["curdkv", "compactor"])
def test_few_tokens_and_equal_ones(name: str, n: int) -> None:
    """Where nothing differs, or hardly anything is there, scores are finite and the budget holds."""
    c = chunk(n)
    for keys in (c.keys, torch.zeros_like(c.keys), torch.ones_like(c.keys)):
        same = Chunk(c.queries, keys, keys, c.alive, 0, 0, 0, 0.25, 1, 4, c.model)
        policy = find(name)(keep=0.5)
        assert bool(policy.scores(same).isfinite().all())
        assert policy.select(same).sum(-1).unique().tolist() == [policy.kept(n, 0, 0, 1, 4)]


def test_a_token_like_no_other_has_the_most_leverage() -> None:
    x = torch.randn(1, 1, 200, D, generator=torch.Generator().manual_seed(0))
    x[..., 8:] *= 0.1
    x[0, 0, 77, 12] = 10.0
    found = leverages(x)[0, 0]
    assert int(found.argmax()) == 77
    assert float(found.max()) <= 1.0
    assert float(found.sum()) == pytest.approx(D, rel=0.02)  # the trace of a projection
