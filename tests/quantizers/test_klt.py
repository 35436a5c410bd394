"""klt: the basis is the best one for q . k, bits go where the variance is, and what is read is what was written."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvcomp import SpecError, Stack
from kvcomp.cache.layer import LayerStore
from kvcomp.quantizers import directions
from kvcomp.quantizers.directions import scaled_directions
from kvcomp.quantizers.klt import KLTCodec
from kvcomp.quantizers.transform import KLTGrid
from kvcomp.quantizers.waterfill import DISTORTION, UNIT, allocate, runs, usual_widths
from kvcomp.stages import PageShape
from kvcomp.stages.plan import held_parts, read_by_stream

CPU = torch.device("cpu")


def shape(dim: int, v_dim: int | None = None, heads: int = 2) -> PageShape:
    return PageShape(64, dim, v_dim or dim, heads, torch.float32, CPU, 0)


def low_rank(streams: int, tokens: int, dim: int, seed: int = 0) -> Tensor:
    """Tokens [streams, tokens, dim] whose spectrum falls by 0.9 per direction, in a random basis, with a mean."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(streams, dim, dim, generator=generator)).Q
    scales = 0.9 ** torch.arange(dim)
    tokens_ = torch.randn(streams, tokens, dim, generator=generator) * scales @ basis
    return tokens_ + 3 * torch.randn(streams, 1, dim, generator=generator)


def written(spec: str, k: Tensor, v: Tensor, q: Tensor) -> LayerStore:
    """A layer that holds k, v [B, H, n, D], seen by queries q [B, Hq, n, D]."""
    store = LayerStore(Stack.parse(spec).plan(0, 1))
    store.start(k, v)
    store.write(k, v, None, q)
    return store


@pytest.mark.parametrize("total", [8, 12, 16, 24, 32])
def test_bits_go_where_they_help_most(total: int) -> None:
    """The greedy widths leave no more distortion than any shift of one bit between two units."""
    variance = 0.8 ** torch.arange(64.0)
    widths = allocate(variance, total)
    assert sum(widths) == total
    assert list(widths) == sorted(widths, reverse=True)
    power = variance.view(-1, UNIT).sum(-1).tolist()

    def distortion(bits: list[int]) -> float:
        return sum(p * DISTORTION[b] for p, b in zip(power, bits, strict=True))

    best = distortion(list(widths))
    for i in range(len(widths)):
        for j in range(len(widths)):
            moved = list(widths)
            moved[i], moved[j] = moved[i] + 1, moved[j] - 1
            if i != j and min(moved) >= 0 and max(moved) <= 8:
                assert distortion(moved) >= best - 1e-9


def test_runs_leave_out_what_has_no_bits() -> None:
    assert runs((4, 4, 2, 1, 1, 1, 0, 0)) == [(4, 16), (2, 8), (1, 24)]


def test_the_directions_are_the_best_for_inner_products() -> None:
    """Keeping r of them leaves less E[(q . (x - x^))^2] than the weight's or the covariance's own eigenvectors."""
    generator = torch.Generator().manual_seed(1)
    x = low_rank(1, 4000, 16)[0]
    x = x - x.mean(0)
    q = torch.randn(4000, 16, generator=generator) * torch.linspace(3, 0.1, 16)
    covariance, weight = (x.T @ x / len(x)).double()[None], (q.T @ q / len(q)).double()[None]
    basis, variance = scaled_directions(covariance, weight)
    write = torch.linalg.inv(basis).mT
    z = x @ write[0]
    torch.testing.assert_close(z.T @ z / len(z), torch.eye(16), atol=0.05, rtol=0)
    assert bool((variance.diff() <= 1e-6).all())
    for r in (2, 5, 10):

        def loss(estimate: Tensor) -> Tensor:
            return ((q @ (x - estimate).T) ** 2).mean()

        ours = loss(z[:, :r] @ basis[0, :, :r].T)
        for other in (covariance, weight):
            vectors = torch.linalg.eigh(other[0]).eigenvectors.flip(-1)[:, :r].float()
            assert ours <= loss(x @ vectors @ vectors.T) * 1.01


@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("bits", [1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5, 5.5, 6])
def test_a_page_holds_the_bits_it_says(dim: int, bits: float) -> None:
    layout = Stack.parse(f"klt(bits={bits})").plan(0, 1).layout(shape(dim))
    assert 8 * layout.bytes_per_page == 2 * 64 * (bits * dim + 16)


def test_the_plan_knows_what_is_held_and_read(layer_inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    k, v, q = layer_inputs
    plan = Stack.parse("klt(bits=2)").plan(0, 1)
    store = written("klt(bits=2)", k, v, q)
    store.append(k[:, :, :1], v[:, :, :1])
    store.attend(q[:, :, :1], 0.125)
    assert 4 * read_by_stream(plan, 64, 64, 500, torch.float32) == sum(store.read.values())
    held = store.held(set())
    assert 4 * held_parts(plan, 64, 64, 500, torch.float32)["constants"] == held["constants"] - len(
        store.codec.queries.fitted
    )


@pytest.mark.parametrize(("k_bits", "v_bits"), [(2, 2), (3, 1.5), (6, 4)])
@pytest.mark.parametrize("calibrated", [False, True])
def test_attention_over_codes_is_attention_over_what_they_decode_to(
    k_bits: float, v_bits: float, calibrated: bool
) -> None:
    k, v = low_rank(4, 192, 64), low_rank(4, 192, 80, seed=1)
    sides = KLTGrid("k", 64, 64, k_bits, CPU, True), KLTGrid("v", 64, 80, v_bits, CPU, False)
    codec = KLTCodec(*sides, fitted_heads=calibrated)
    streams = torch.arange(4)
    if calibrated:
        for side, x in zip(sides, (k, v), strict=True):
            side.fit(streams[:2], x[:2], torch.eye(x.shape[-1]).expand(2, -1, -1))
    else:
        codec.observe(streams, torch.randn(4, 50, 64))
        codec.fit(streams, k, v)
    owner = streams.repeat_interleave(3)
    page = codec.encode(*(x.unflatten(1, (3, 64)).flatten(0, 1) for x in (k, v)), owner)
    coded_k, coded_v = codec.decode(page)
    plain_k, plain_v = codec.inverse(coded_k, coded_v, owner)
    plain_k, plain_v, coded_k, coded_v = (
        x.unflatten(0, (4, 3)).flatten(1, 2) for x in (plain_k, plain_v, coded_k, coded_v)
    )
    q, weights = torch.randn(4, 5, 64), torch.rand(4, 5, 192).softmax(-1)
    read, bias = codec.read_query(q)
    assert bias is not None
    torch.testing.assert_close(read @ coded_k.mT + bias[..., None], q @ plain_k.mT, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(codec.read_output(weights @ coded_v), weights @ plain_v, rtol=1e-4, atol=1e-4)


@pytest.fixture
def layer_inputs() -> tuple[Tensor, Tensor, Tensor]:
    """k, v [2, 2, 500, 64] and q [2, 6, 500, 64] whose rows differ."""
    k, v = (low_rank(4, 500, 64, seed=s).unflatten(0, (2, 2)) for s in (2, 3))
    return k, v, torch.randn(2, 6, 500, 64, generator=torch.Generator().manual_seed(4))


def relative(back: Tensor, x: Tensor) -> float:
    """The error over the spread of x: harder than over its norm."""
    return float((back - x).norm() / (x - x.mean(2, keepdim=True)).norm())


def test_what_is_stored_is_not_shorter_than_what_came_in(layer_inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    """k . k^ = |k|^2 about the mean, weighted as the basis is, and |v^| = |v|, of what has bits."""
    k, v, _ = layer_inputs
    v = v - v.mean(2, keepdim=True)
    store = LayerStore(Stack.parse("klt(bits=1) + window(sinks=0, recent=0)").plan(0, 1))
    store.start(k, v)
    store.write(k, v, None, None)
    pages = store.table.longest * 64
    for back, x, side in zip(store.dense(), (k, v), (store.codec.k_grid, store.codec.v_grid), strict=True):
        basis = side.basis()
        mean = 0 if basis.mean is None else basis.mean[:, None]
        back, x = (y[:, :, :pages].flatten(0, 1) - mean for y in (back, x))
        live = torch.linalg.pinv(side.dual.float())[:, : side.live].mT
        back, x = back @ live, x @ live
        weight = torch.cat([torch.full((n,), 4.0**bits) for bits, n in runs(side.widths)])
        along = (weight * x * x).sum(-1)
        found = (weight * back * (x if side.name == "k" else back)).sum(-1)
        torch.testing.assert_close(found, along, rtol=5e-3, atol=1e-3)


def test_fewer_bits_than_turboquant_for_the_same_error(layer_inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    k, v, q = layer_inputs
    none = "window(sinks=0, recent=0)"
    ours = written(f"klt(bits=2) + {none}", k, v, q).dense()
    theirs = Stack.parse(f"turboquant(bits=3) + {none}").roundtrip(k, v)
    assert relative(ours[1], v) < relative(theirs[1], v)


def test_more_bits_are_better(layer_inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    k, v, q = layer_inputs
    stacks = (f"klt(bits={bits}) + window(recent=0)" for bits in (1, 2, 3, 4, 6))
    backs = [written(stack, k, v, q).dense() for stack in stacks]
    for side, x in enumerate((k, v)):
        errors = [float((back[side] - x).norm() / x.norm()) for back in backs]
        assert errors == sorted(errors, reverse=True)
        assert errors[-1] < 0.02


def test_each_row_has_its_own_basis_which_follows_it(layer_inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    k, v, q = layer_inputs
    together = written("klt(bits=3)", k, v, q)
    for row in range(2):
        alone = written("klt(bits=3)", *(x[row : row + 1] for x in (k, v, q)))
        for found, expected in zip(together.dense(), alone.dense(), strict=True):
            torch.testing.assert_close(found[row : row + 1], expected)
    before = together.dense()
    together.select_rows(torch.tensor([1, 1, 0]))
    for now, then in zip(together.dense(), before, strict=True):
        torch.testing.assert_close(now, then[[1, 1, 0]])


def test_a_short_prompt_is_fitted_when_its_first_page_is_written() -> None:
    """Forty tokens of prompt, then decode steps: pages appear, and what they hold is near what came in."""
    k, v = low_rank(2, 400, 64, seed=5)[None], low_rank(2, 400, 64, seed=6)[None]
    q = torch.randn(1, 2, 40, 64)
    store = written("klt(bits=4) + window(sinks=4, recent=64)", k[:, :, :40], v[:, :, :40], q)
    assert store.table.total == 0
    moments = len(store.codec.queries.sums)
    for at in range(40, 400):
        store.append(k[:, :, at : at + 1], v[:, :, at : at + 1])
        store.settle()
    assert store.table.longest == 5
    assert (moments, len(store.codec.queries.sums)) == (2, 0)
    for back, x in zip(store.dense(), (k, v), strict=True):
        assert relative(back, x) < 0.2


@pytest.mark.parametrize("tokens", [64, 128, 256, 512])
def test_a_basis_of_few_tokens_serves_later_ones_that_vary_elsewhere(
    tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens that move on to directions which the first ones hardly used: doubt about the moment pays."""
    x = low_rank(2, tokens + 1024, 64, seed=8)
    x[:, tokens:] += low_rank(2, 1024, 64, seed=9) / 3
    errors = []
    for doubt in (directions.DOUBT, 0.0):
        monkeypatch.setattr(directions, "DOUBT", doubt)
        side = KLTGrid("k", 64, 64, 3, CPU, centred=True)
        side.fit(torch.arange(2), x[:, :tokens], torch.eye(64).expand(2, -1, -1))
        pages = x[:, tokens:].unflatten(1, (16, 64)).flatten(0, 1)
        owner = torch.arange(2).repeat_interleave(16)
        back = side.basis().inverse(side.decode(side.encode(pages, owner)), owner)
        errors.append(float((back - pages).square().mean()))
    assert errors[0] < 0.9 * errors[1]


def test_a_moment_of_many_tokens_is_taken_as_it_is() -> None:
    covariance = torch.eye(64, dtype=torch.float64).expand(1, -1, -1)
    assert not directions.shrinkage(covariance, directions.SETTLED * 64).any()
    assert float(directions.shrinkage(covariance, 128)[0, 3, 3]) == pytest.approx(
        directions.DOUBT * (64 / 128 - 1 / directions.SETTLED)
    )


def test_tokens_that_fill_no_page_come_back_as_they_are() -> None:
    x = torch.randn(1, 2, 20, 64)
    for back in Stack.parse("klt(bits=2) + window(sinks=4, recent=128)").roundtrip(x, x, x):
        assert torch.equal(back, x)
    for back in Stack.parse("klt(bits=2)").roundtrip(x, x, x):
        assert torch.equal(back, x.half().float())


def test_held_counts_the_bases_and_what_is_gathered_for_them(layer_inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    k, v, q = layer_inputs
    store = written("klt(bits=2)", k, v, q)
    assert store.held(set())["constants"] == 4 * (2 * 64 * 64 * 2 + 64 * 4) + 4
    short = written("klt(bits=2)", *(x[:, :, :50] for x in (k, v, q)))
    assert short.held(set())["constants"] == 4 * 64 * 64 * 4 + 4


def test_without_queries_all_directions_count_the_same(layer_inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    k, v, _ = layer_inputs
    store = LayerStore(Stack.parse("klt(bits=4)").plan(0, 1))
    store.start(k, v)
    store.write(k, v, None, None)
    assert relative(store.dense()[0], k) < 0.15


@pytest.mark.parametrize("x", [torch.zeros(1, 1, 300, 64), torch.ones(1, 1, 300, 64), torch.full((1, 1, 300, 64), 6e4)])
def test_constant_tokens_stay_finite(x: Tensor) -> None:
    back = written("klt(bits=2) + window(recent=0)", x, x, x).dense()
    torch.testing.assert_close(back[0], x, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(back[1], x, rtol=0.3, atol=1e-2)  # 4 bits for all that there is


def test_an_outlier_channel_keeps_its_precision() -> None:
    k = torch.randn(1, 1, 512, 64, generator=torch.Generator().manual_seed(7))
    k[..., 5] *= 100
    back = written("klt(bits=3) + window(recent=0)", k, k, k[..., :, :]).dense()[0]
    others = torch.arange(64) != 5
    assert (back - k)[..., others].square().mean() < 0.1
    assert (back - k)[..., 5].square().mean() < 0.01 * 100**2


@pytest.mark.parametrize("spec", ["klt(bits=2.25)", "klt(bits=7)", "klt(k=0)"])
def test_other_widths_are_refused(spec: str) -> None:
    with pytest.raises(SpecError, match=r"1, 1\.5, 2"):
        Stack.parse(spec)


def test_a_head_dimension_that_fills_no_unit_is_refused() -> None:
    with pytest.raises(SpecError, match=r"klt\(k=2\).*100 channels"):
        Stack.parse("klt(bits=2)").plan(0, 1).build(shape(100))


EXTREMES = [1e15, 1e19, 1e30, 3e38]


@pytest.mark.parametrize("size", EXTREMES)
@pytest.mark.parametrize("where", ["everywhere", "a token", "a number"])
def test_extreme_numbers_are_coded(size: float, where: str) -> None:
    k = torch.randn(1, 1, 256, 64, generator=torch.Generator().manual_seed(0))
    x = k.clone()
    if where == "everywhere":
        x = (k * size).clamp(-3e38, 3e38)
    elif where == "a token":
        x[..., 5, :] = size
    else:
        x[..., 5, 7] = size
    for back in written("klt(bits=2) + window(recent=0)", x, x, x).dense():
        assert back.isfinite().all()
    if where != "everywhere":
        usual, found = (written("klt(bits=4) + window(recent=0)", y, k, k).dense()[0] for y in (k, x))
        others = torch.arange(256) != 5
        assert relative(found[:, :, others], k[:, :, others]) < 1.1 * relative(usual[:, :, others], k[:, :, others])


@pytest.mark.parametrize("tokens", [256, 1024])
@pytest.mark.parametrize("size", [1e3, 1e4, 1e5, 1e6])
def test_a_loud_token_does_not_spoil_the_others(tokens: int, size: float) -> None:
    k = low_rank(1, tokens, 64, seed=2)[None]
    x = k.clone()
    x[..., 9, 3] = size
    usual, found = (written("klt(bits=4) + window(recent=0)", y, k, k).dense()[0] for y in (k, x))
    others = torch.arange(tokens) != 9
    assert relative(found[:, :, others], k[:, :, others]) < 1.1 * relative(usual[:, :, others], k[:, :, others])


@pytest.mark.parametrize("tokens", [17, 40, 64, 100])
def test_a_basis_of_few_tokens_does_not_hang_on_rounding(tokens: int) -> None:
    """Directions that no token has are not chosen by the last bit of those that they have."""
    generator = torch.Generator().manual_seed(3)
    k, v, q = (torch.randn(1, 2, tokens, 64, generator=generator) for _ in range(3))
    later = torch.randn(1, 2, 256, 64, generator=generator)

    def seen(noise: float) -> tuple[Tensor, Tensor]:
        codec, _ = Stack.parse("klt(bits=2)").plan(0, 1).build(shape(64))
        streams, on = torch.arange(2), torch.arange(2).repeat_interleave(4)
        x = [
            y[0] * (1 + noise * torch.randn(y[0].shape, generator=torch.Generator().manual_seed(4))) for y in (k, v, q)
        ]
        codec.observe(streams, x[2])
        codec.fit(streams, x[0], x[1])
        pages = later[0].unflatten(1, (4, 64)).flatten(0, 1)
        return codec.inverse(*codec.decode(codec.encode(pages, pages, on)), on)

    for found, expected in zip(seen(1e-7), seen(0), strict=True):
        assert relative(found, expected) < 0.1 * relative(expected, later[0].unflatten(1, (4, 64)).flatten(0, 1))


@pytest.mark.parametrize(
    ("total", "widths"),
    [
        (12, (3, 3, 2, 2, 1, 1, 0, 0)),
        (16, (4, 3, 3, 2, 2, 1, 1, 0)),
        (24, (5, 4, 4, 3, 3, 2, 2, 1)),
        (28, (5, 5, 4, 4, 3, 3, 2, 2)),
    ],
)
def test_widths_of_keys_fall_evenly(total: int, widths: tuple[int, ...]) -> None:
    """The divergence of SmolLM2 chose these: see `usual_widths`."""
    assert usual_widths(8, total, True) == widths


def test_pages_of_other_widths_are_read_as_they_were_written(layer_inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    """Caches saved by versions that gave keys other widths."""
    k, v, q = layer_inputs
    store = LayerStore(Stack.parse("klt(bits=2)").plan(0, 1))
    store.start(k, v)
    store.codec.k_grid.widths = (5, 4, 3, 2, 1, 1, 0, 0)
    store.write(k, v, None, q)
    twin = LayerStore(store.plan)
    twin.restore(store.state(), CPU)
    for found, expected in zip(twin.dense(), store.dense(), strict=True):
        assert torch.equal(found, expected)
    assert torch.equal(twin.attend(q[:, :, :1], 0.125).out, store.attend(q[:, :, :1], 0.125).out)


def test_the_window_is_half_as_large_in_models_of_float32(layer_inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    k, v, q = layer_inputs
    small, exact = (written(f"klt(bits=2){w}", k, v, q) for w in ("", " + window(sinks=4, recent=128)"))
    assert 2 * small.held(set())["window"] == exact.held(set())["window"]
    for store in (small, exact):
        store.append(k[:, :, :1], v[:, :, :1])
    found, expected = (store.attend(q[:, :, :1], 0.125).out for store in (small, exact))
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize("size", [1e3, 1e4, 1e15, 1e30, 3e38])
@pytest.mark.parametrize("side", ["k", "v", "q", "all"])
@pytest.mark.parametrize("tokens", [70, 300])
def test_what_one_token_is_costs_the_others_nothing(tokens: int, side: str, size: float) -> None:
    """A spike in one channel of a token: q . k and v of the others have at most a tenth more error than without it."""
    x = {name: low_rank(2, tokens, 64, seed=s)[None] for name, s in (("k", 2), ("v", 3))}
    x["q"] = torch.randn(1, 6, tokens, 64, generator=torch.Generator().manual_seed(4)) * torch.linspace(3, 0.1, 64)
    spiked = {name: y.clone() for name, y in x.items()}
    for name in spiked if side == "all" else (side,):
        spiked[name][:, :, 9, 3] = size
    others = torch.arange(tokens) != 9

    def errors(given: dict[str, Tensor]) -> list[float]:
        k, v = written("klt(bits=4) + window(sinks=0, recent=0)", given["k"], given["v"], given["q"]).dense()
        off = (k - x["k"])[:, :, others] @ x["q"][:, ::3].mT
        return [float(y.norm()) for y in (off, (v - x["v"])[:, :, others])]

    for found, usual in zip(errors(spiked), errors(x), strict=True):
        assert found < 1.1 * usual
