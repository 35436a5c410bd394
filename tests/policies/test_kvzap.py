"""kvzap: its score is its definition, its fit is the regression, and it does not go by positions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from scored import spec_of
from synthetic import Still, chunk, write
from torch import Tensor

from kvcomp import Stack
from kvcomp.calibration.file import CalibrationError, load
from kvcomp.errors import SpecError
from kvcomp.policies.kvzap import LEAST, KVzap, Repetitions
from kvcomp.stages import Chunk

D = 8


class Turning(Still):
    """Rotary embedding of channel pairs (i, i + D / 2), from fast to slow."""

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        angle = positions[:, None] / 1000 ** (torch.arange(half) / half)
        one, two = x.split(half, -1)
        return torch.cat([one * angle.cos() - two * angle.sin(), two * angle.cos() + one * angle.sin()], -1)


def prompt(n: int, heads: int, group: int = 2, v_dim: int = D, past: int = 0, layer: int = 1) -> Chunk:
    generator = torch.Generator().manual_seed(n)
    sizes = ((heads * group, D), (heads, D), (heads, v_dim))
    q, k, v = (torch.randn(2, h, n, dim, generator=generator) for h, dim in sizes)
    return Chunk(q, k, v, torch.ones(2, heads, n, dtype=torch.bool), past, 2, 5, 0.25, layer, 4)


@pytest.mark.parametrize(("heads", "group", "v_dim"), [(1, 1, D), (2, 3, D), (3, 2, 12)])
@pytest.mark.parametrize("past", [0, 3, 50])
def test_the_score_is_its_definition(tmp_path: Path, heads: int, group: int, v_dim: int, past: int) -> None:
    path = write(tmp_path / "zap", "kvzap", heads, D, v_dim, layers=4)
    c = prompt(40, heads, group, v_dim, past)
    scores = KVzap(calibration=str(path)).scores(c)
    file = {name: x.double() for name, x in load(path, "kvzap").tensors.items()}
    for b in range(2):
        for h in range(heads):
            for t in range(40):
                k, v = c.keys[b, h, t].double(), c.values[b, h, t].double()
                linear = file["1.key"][h] @ k + file["1.square"][h] @ k**2 + file["1.value"][h] @ v
                wanted = float("inf") if past + t < 4 else float(linear + file["1.bias"][h])
                assert float(scores[b, h, t]) == pytest.approx(wanted, rel=1e-4, abs=1e-3)


def test_a_token_is_scored_by_itself(tmp_path: Path) -> None:
    """Whatever comes with it: chunks, rows and orders change nothing, nor does the number of other tokens."""
    policy = KVzap(keep=0.3, calibration=str(write(tmp_path / "zap", "kvzap", 2, D, layers=4)))
    c = prompt(60, 2)
    whole = policy.scores(c)
    for size in (1, 7, 59):
        parts = [
            policy.scores(replace(c, keys=k, values=v, alive=c.alive[..., : k.shape[2]], past=at * size))
            for at, (k, v) in enumerate(zip(c.keys.split(size, 2), c.values.split(size, 2), strict=True))
        ]
        torch.testing.assert_close(torch.cat(parts, -1), whole)


@pytest.mark.parametrize("heads_choose", ["own", "common"])
def test_a_threshold_keeps_what_scores_so_much(tmp_path: Path, heads_choose: str) -> None:
    path = write(tmp_path / "zap", "kvzap", 2, D, layers=4)
    c = prompt(200, 2)
    scores = KVzap(calibration=str(path)).scores(c)
    scores = scores.mean(1, keepdim=True).expand_as(scores) if heads_choose == "common" else scores
    middle = min(float(scores[..., 4:].median()), 0.0)
    kept = KVzap(threshold=middle, heads=heads_choose, calibration=str(path)).select(c)
    wanted = scores >= middle
    wanted[..., :4] = wanted[..., -5:] = True
    assert torch.equal(kept, wanted)
    counts = kept.sum(-1).flatten().tolist()
    assert len(set(counts)) > 1
    assert max(counts) < 200


def test_the_fit_is_the_ridge_regression() -> None:
    """Against normal equations of standardized features, written out, over all contexts and heads."""
    heads, n, ridge = 2, 64, 0.03
    seen, rows, logs = Repetitions(), [], []
    for seed in range(5):
        queries, keys, values = chunk(heads, D, 12, tokens=n, seed=seed)
        received = torch.rand(1, heads, n, generator=torch.Generator().manual_seed(seed)) ** 8
        received[..., 0] = 0  # has no logarithm
        seen.add(queries, keys, values)
        seen.repeated(received, Still())
        rows.append(torch.cat([keys, keys**2, values], -1)[0].double())
        logs.append(received[0].double().clamp_min(LEAST).log())
    found = KVzap.calibrate(seen.result(None), ridge=ridge)
    for h in range(heads):
        x, y = torch.cat([row[h] for row in rows]), torch.cat([log[h] for log in logs])
        z = (x - x.mean(0)) / x.std(0, correction=0)
        matrix = z.T @ z / len(z) + ridge * torch.eye(z.shape[1], dtype=z.dtype)
        weight = torch.linalg.solve(matrix, z.T @ (y - y.mean()) / len(z)) / x.std(0, correction=0)
        got = torch.cat([found[name][h] for name in ("key", "square", "value")])
        torch.testing.assert_close(got, weight, rtol=1e-5, atol=1e-8)
        assert float(found["bias"][h]) == pytest.approx(float(y.mean() - x.mean(0) @ weight))


def test_a_score_holds_at_positions_that_no_context_had() -> None:
    """What makes a token important is in its key before the rotary embedding; and attention grows towards the end, by
    which a fit to plain keys would go."""
    model, n = Turning(), 64
    generator, seen = torch.Generator().manual_seed(0), Repetitions()
    mean = 3 * torch.randn(D, generator=generator)

    def drawn(first: int) -> tuple[Tensor, Tensor, Tensor]:
        loud = torch.rand(1, 1, n, 1, generator=generator)
        plain = torch.randn(1, 1, n, D, generator=generator) * loud * 3 + mean
        keys = model.rotate(plain, first + torch.arange(n))
        return loud[..., 0], keys, torch.randn(1, 1, n, D, generator=generator)

    for _ in range(60):
        loud, keys, values = drawn(0)
        seen.add(keys, keys, values)
        seen.repeated((-8 + 3 * loud + torch.arange(n) / 32).exp(), model)
    found = {name: x.float() for name, x in KVzap.calibrate(seen.result(None)).items()}

    def scored(first: int) -> tuple[Tensor, Tensor]:
        pairs = [drawn(first) for _ in range(30)]
        loud, keys, values = (torch.cat(x, 2) for x in zip(*pairs, strict=True))
        k, v = keys[0, 0], values[0, 0]
        return loud[0, 0], k @ found["key"][0] + k**2 @ found["square"][0] + v @ found["value"][0]

    at = {first: scored(first) for first in (0, 5000, 20000)}
    means = [float(scores.mean()) for _, scores in at.values()]
    spread = float(at[0][1].std())
    assert max(means) - min(means) < spread
    for loud, scores in at.values():
        assert float(torch.corrcoef(torch.stack([loud, scores]))[0, 1]) > 0.4


@pytest.mark.parametrize("keep", [0.05, 0.25, 0.5, 0.9])
def test_layers_share_what_is_kept_by_one_threshold(tmp_path: Path, keep: float) -> None:
    """Of normal scores, as many in each layer as exceed the number that a share `keep` of all exceeds."""
    path, layers, n = write(tmp_path / "zap", "kvzap", 2, D, layers=6), 6, 20_000
    policy = KVzap(keep=keep, calibration=str(path))
    file, generator = load(path, "kvzap").tensors, torch.Generator().manual_seed(0)
    scores = torch.stack(
        [
            file[f"{i}.mean"][:, None] + file[f"{i}.spread"][:, None] * torch.randn(2, n, generator=generator)
            for i in range(layers)
        ]
    )
    at = scores.flatten().kthvalue(round((1 - keep) * scores.numel())).values
    counts = [policy.kept(n, 0, 0, i, layers) for i in range(layers)]
    wanted = (scores > at).float().mean((1, 2))
    torch.testing.assert_close(torch.tensor(counts) / n, wanted, atol=0.02, rtol=0)
    assert abs(sum(counts) - keep * n * layers) <= layers
    assert len(set(counts)) > 1
    protected = [policy.kept(n, 4, 100, i, layers) for i in range(layers)]
    assert min(protected) >= 104
    assert abs(sum(protected) - keep * n * layers) <= layers


@pytest.mark.parametrize("keep", [0.1, 0.3, 0.7])
def test_a_layer_keeps_its_part_exactly(tmp_path: Path, keep: float) -> None:
    policy = KVzap(keep=keep, calibration=str(write(tmp_path / "zap", "kvzap", 2, D, layers=4)))
    for layer in range(4):
        c = prompt(150, 2, layer=layer)
        kept, count = policy.select(c), policy.kept(150, c.sinks, c.recent, layer, 4)
        assert kept.sum((1, 2)).tolist() == [2 * count] * 2
        scores = policy.scores(c)
        open_ = torch.ones_like(kept)
        open_[..., : c.sinks] = open_[..., -c.recent :] = False
        for row in range(2):
            inside = scores[row][open_[row]]
            best = inside.topk(2 * count - 2 * (c.sinks + c.recent)).values.min()
            assert torch.equal(inside >= best, kept[row][open_[row]])


def test_a_plan_needs_no_file_and_counts_with_one(tmp_path: Path) -> None:
    assert {KVzap(keep=0.25).kept(1000, 4, 32, i, 4) for i in range(4)} == {250}
    assert {KVzap(keep=0.25, calibration="none yet").kept(1000, 4, 32, i, 4) for i in range(4)} == {250}
    path = str(write(tmp_path / "zap", "kvzap", 2, D, layers=4))
    assert KVzap(keep=0.25, calibration=path).kept(1000, 4, 32, 9, 10) == 250  # a layer that was not calibrated
    for given in ({"budget": 100}, {"threshold": -6.0}):
        policy = KVzap(calibration=path, **given)
        assert policy.layers == "uniform"
        assert Stack.parse(str(Stack.parse(policy))) == Stack.parse(policy)
        assert "layers" not in str(policy)
        assert "heads" not in str(policy)
    with pytest.raises(SpecError, match="layers"):
        KVzap(budget=100, layers=3)
    assert {KVzap(budget=100, calibration=path).kept(1000, 4, 32, i, 4) for i in range(4)} == {100}


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("kvzap(threshold=0.5)", "threshold"),
        ("kvzap(sinks=-1)", "sinks"),
        ("kvzap(critical=true)", "critical"),
        ("kvzap(keep=0.2, threshold=-6)", "threshold"),
    ],
)
def test_arguments_out_of_range(spec: str, told: str) -> None:
    with pytest.raises(SpecError, match=told):
        Stack.parse(spec)


def test_it_needs_a_file_of_its_layers_and_heads(tmp_path: Path) -> None:
    c = prompt(40, 2)
    with pytest.raises(CalibrationError, match=r"kvzap needs calibration='FILE'.*--method kvzap"):
        KVzap().select(c)
    path = str(write(tmp_path / "zap", "kvzap", 2, D, layers=2))
    KVzap(calibration=path).select(c)
    for wrong, told in (
        (replace(c, layer=3), "layer 3, only layers 0, 1"),
        (prompt(40, 3), "2 KV heads of 8 channels in layer 1, and the cache 3 of 8"),
        (prompt(40, 2, v_dim=12), "2 KV heads of 8 channels in layer 1, and the cache 2 of 12"),
    ):
        with pytest.raises(CalibrationError, match=told):
            KVzap(calibration=path).select(wrong)


def test_it_needs_neither_queries_nor_the_model() -> None:
    (policy,) = Stack.parse(spec_of("kvzap", "keep=0.3", D)).policies
    assert not policy.needs_queries
    assert not policy.needs_model
    assert torch.equal(policy.select(replace(prompt(50, 2), queries=None)), policy.select(prompt(50, 2)))
