"""Compaction by attention matching: few tokens that attention can hardly tell from the span they stand for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvcomp import attention
from kvcomp.attention import attend, merge
from kvcomp.cache import compaction
from kvcomp.cache.compaction import LEAST, Compacted, deviation, match
from kvcomp.errors import KvcompError

SCALE = 0.3


def spans(s: int, r: int, n: int, dk: int = 12, dv: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(s, r, dk), torch.randn(s, n, dk), torch.randn(s, n, dv)


def clusters(s: int, r: int, count: int, each: int, spread: float) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens in `count` groups of `each`, in any order: keys differ by `spread` within a group, values always do."""
    q, centres, means = spans(s, r, count)
    of = torch.randperm(count * each) % count
    k, v = centres[:, of], means[:, of]
    return q, k + spread * torch.randn_like(k), v + 0.5 * torch.randn_like(v)


def evicted(q: Tensor, k: Tensor, v: Tensor, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens that receive the most attention, with their own values and no bias."""
    index = (torch.bmm(q, k.mT) * SCALE).softmax(-1).mean(1).topk(tokens).indices[..., None]
    return k.take_along_dim(index, 1), k.new_zeros(len(k), tokens), v.take_along_dim(index, 1)


def assert_sound(c: Compacted, k: Tensor, v: Tensor, tokens: int) -> None:
    """Shapes, dtypes, everything finite, keys of the span in its order, biases between the bounds."""
    s, n = k.shape[:2]
    assert c.keys.shape == (s, tokens, k.shape[2])
    assert c.values.shape == (s, tokens, v.shape[2])
    assert c.bias.shape == (s, tokens)
    assert c.error.shape == c.lse_error.shape == (s,)
    assert (c.keys.dtype, c.values.dtype, c.bias.dtype) == (k.dtype, v.dtype, torch.float32)
    assert all(bool(x.isfinite().all()) for x in c)
    assert float(c.bias.exp().min()) > LEAST * 0.999
    assert float(c.bias.exp().max()) < n * 1.001
    for stream in range(s):
        rows = iter(k[stream])
        assert all(any(torch.equal(key, row) for row in rows) for key in c.keys[stream])


@pytest.mark.parametrize("tokens", [9, 10, 64])
def test_a_span_that_is_small_enough_comes_back_as_it_is(tokens: int) -> None:
    q, k, v = spans(2, 5, 9)
    c = match(q, k, v, SCALE, tokens)
    assert c.keys is k
    assert c.values is v
    assert not bool(torch.cat([c.bias.flatten(), c.error, c.lse_error]).any())
    assert deviation(*c[:3], q, k, v, SCALE)[0].tolist() == [0, 0]


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("count", [3, 8])
def test_clusters_of_keys_need_one_token_each(count: int, softcap: float | None) -> None:
    torch.manual_seed(count)
    q, k, v = clusters(2, 200, count, 30, 0.0)
    c = match(q, k, v, SCALE, count, softcap)
    assert_sound(c, k, v, count)
    later = torch.randn_like(q)
    error, lse_error = deviation(*c[:3], later, k, v, SCALE, softcap)
    # A bias of log 30 and the mean of 30 values, but for the ridge.
    assert float(error.max()) < 0.08, error
    assert float(lse_error.max()) < 0.03, lse_error
    assert float((c.bias - torch.tensor(30.0).log()).abs().max()) < 0.1
    naive_error, naive_lse = deviation(*evicted(q, k, v, count), later, k, v, SCALE, softcap)
    assert float((error / naive_error).max()) < 0.1
    assert float((lse_error / naive_lse).max()) < 0.01


@pytest.mark.parametrize(("tokens", "n", "r"), [(5, 63, 300), (20, 100, 257), (50, 100, 400), (100, 130, 90)])
def test_random_spans_are_matched_better_than_evicted(tokens: int, n: int, r: int) -> None:
    torch.manual_seed(tokens)
    q, k, v = spans(3, r, n)
    c = match(q, k, v, SCALE, tokens)
    assert_sound(c, k, v, tokens)
    later = torch.randn(3, 200, 12)
    error, lse_error = deviation(*c[:3], later, k, v, SCALE)
    naive_error, naive_lse = deviation(*evicted(q, k, v, tokens), later, k, v, SCALE)
    assert bool((error < 0.85 * naive_error).all()), (error, naive_error)
    assert bool((lse_error < 0.5 * naive_lse).all()), (lse_error, naive_lse)
    # What is reported is what later queries of the same kind see, or a little more.
    assert bool((c.error < 2.2 * error).all())
    assert bool((c.error > 0.7 * error).all()), (c.error, error)
    assert bool((c.lse_error > 0.5 * lse_error).all()), (c.lse_error, lse_error)


def test_a_compacted_span_merges_with_other_tokens() -> None:
    torch.manual_seed(0)
    q, k, v = clusters(2, 300, 10, 20, 0.1)
    c = match(q, k, v, SCALE, 10)
    later, near_k, near_v = spans(2, 60, 40)
    near = attend(later, near_k, near_v, SCALE)
    whole = merge([attend(later, k, v, SCALE), near])
    ours = merge([attend(later, c.keys, c.values, SCALE, key_bias=c.bias), near])
    naive_k, _, naive_v = evicted(q, k, v, 10)
    naive = merge([attend(later, naive_k, naive_v, SCALE), near])
    distance = (ours.out - whole.out).norm() / whole.out.norm()
    assert float(distance) < 0.1
    assert float(distance) < 0.25 * float((naive.out - whole.out).norm() / whole.out.norm())
    assert float((ours.lse - whole.lse).abs().mean()) < 0.05


def test_streams_do_not_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    q, k, v = spans(3, 50, 40)
    together = match(q, k, v, SCALE, 8)
    for stream in range(3):
        on = slice(stream, stream + 1)
        for ours, alone in zip(together, match(q[on], k[on], v[on], SCALE, 8), strict=True):
            torch.testing.assert_close(ours[on], alone, rtol=1e-4, atol=1e-4)
    for module in (attention, compaction):
        monkeypatch.setattr(module, "MAX_LOGITS", 500)  # a stream and a few queries at a time
    for ours, blocks in zip(together, match(q, k, v, SCALE, 8), strict=True):
        torch.testing.assert_close(ours, blocks, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_spans_keep_their_dtype(dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    q, k, v = (x.to(dtype) for x in spans(2, 100, 60))
    c = match(q, k, v, SCALE, 15)
    assert_sound(c, k, v, 15)
    exact = match(q.float(), k.float(), v.float(), SCALE, 15)
    torch.testing.assert_close(c.bias, exact.bias, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(c.error, exact.error, rtol=0.02, atol=1e-3)


def test_a_long_span_is_searched_among_the_tokens_with_the_most_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(8)
    q, k, v = spans(2, 300, 200)
    all_of_them = match(q, k, v, SCALE, 10)
    monkeypatch.setattr(compaction, "CANDIDATES", 1)  # 4 times 10 of 200
    some = match(q, k, v, SCALE, 10)
    assert_sound(some, k, v, 10)
    assert bool((some.error < 1.15 * all_of_them.error).all())
    assert bool((some.lse_error < 1.4 * all_of_them.lse_error).all())


def test_constant_keys_share_one_weight() -> None:
    torch.manual_seed(3)
    q, k, v = spans(2, 30, 24)
    k = k[:, :1].expand_as(k)
    c = match(q, k, v, SCALE, 4)
    assert_sound(c, k, v, 4)
    torch.testing.assert_close(c.bias.exp().sum(1), torch.full((2,), 24.0), rtol=0.01, atol=0)
    error, lse_error = deviation(*c[:3], torch.randn_like(q), k, v, SCALE)
    assert float(error.max()) < 0.05
    assert float(lse_error.max()) < 0.01


def test_zero_values_stay_zero() -> None:
    q, k, v = spans(2, 30, 24)
    c = match(q, k, torch.zeros_like(v), SCALE, 4)
    assert_sound(c, k, v, 4)
    assert not bool(c.values.any())
    assert c.error.tolist() == [0, 0]


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("same", [False, True])
def test_few_queries_are_served(rows: int, same: bool) -> None:
    torch.manual_seed(rows)
    q, k, v = spans(2, rows, 24)
    q = q[:, :1].expand_as(q) if same else q
    c = match(q, k, v, SCALE, 6)
    assert_sound(c, k, v, 6)
    error, lse_error = deviation(*c[:3], q, k, v, SCALE)
    naive_error, naive_lse = deviation(*evicted(q, k, v, 6), q, k, v, SCALE)
    assert bool((error < 0.5 * naive_error).all())
    assert bool((lse_error < 0.1 * naive_lse).all())


def test_large_logits_do_not_overflow() -> None:
    """Each query sees one key only, and most queries one that is not chosen."""
    torch.manual_seed(4)
    q, k, v = spans(2, 40, 30)
    c = match(300 * q, 10 * k, v, 1.0, 3)
    assert_sound(c, 10 * k, v, 3)


def test_one_token_for_a_whole_span() -> None:
    torch.manual_seed(5)
    q, k, v = spans(2, 40, 30)
    assert_sound(match(0.1 * q, k, v, SCALE, 1), k, v, 1)


def test_more_tokens_are_nearer() -> None:
    torch.manual_seed(6)
    q, k, v = spans(1, 400, 120)
    errors = [match(q, k, v, SCALE, t) for t in (5, 20, 60)]
    assert [float(e.error) for e in errors] == sorted((float(e.error) for e in errors), reverse=True)
    assert [float(e.lse_error) for e in errors] == sorted((float(e.lse_error) for e in errors), reverse=True)


def test_the_bias_solves_the_bounded_least_squares_problem() -> None:
    """The conditions of Karush, Kuhn and Tucker: no slope inside the bounds, and only outward slopes at them."""
    torch.manual_seed(7)
    a = (2 * torch.randn(4, 200, 60)).softmax(-1).double()[..., :20]
    gram, mass = a.mT @ a, a.sum(1)
    w = compaction._bounded(gram, mass, torch.ones_like(mass), 0.05, 4.0, steps=300)
    slope = (gram @ w[..., None])[..., 0] - mass
    small = 1e-6 * mass.amax()
    assert bool(((w == 0.05) | (slope < small)).all())
    assert bool(((w == 4.0) | (slope > -small)).all())
    assert 0 < int((w == 4.0).sum()) < w.numel()


@pytest.mark.parametrize(("rows", "tokens", "names"), [(0, 2, "queries"), (3, 0, "tokens=0"), (3, -1, "tokens=-1")])
def test_what_cannot_be_matched_is_refused(rows: int, tokens: int, names: str) -> None:
    with pytest.raises(KvcompError, match=names):
        match(*spans(1, rows, 5), SCALE, tokens)
