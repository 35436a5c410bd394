"""Moments are those of all tokens, however they came; directions are the best ones of every rank."""

from __future__ import annotations

import pytest
import torch
from synthetic import chunk, statistics
from torch import Tensor

from kvcomp.calibration.statistics import Moments, Statistics, weighted_directions


def test_moments_are_those_of_the_tokens_of_each_head() -> None:
    q, k, v = chunk(3, 8, 6, tokens=64)
    stats = statistics_of([(q, k, v)])
    assert stats.tokens == 64
    for h in range(3):
        queries = q[0, 2 * h : 2 * h + 2].reshape(-1, 8).double()
        torch.testing.assert_close(stats.queries[h], sum(torch.outer(x, x) for x in queries) / 128)
        for x, mean, covariance in (
            (k[0, h].double(), stats.key_mean[h], stats.key_covariance[h]),
            (v[0, h].double(), stats.value_mean[h], stats.value_covariance[h]),
        ):
            torch.testing.assert_close(mean, x.mean(0))
            torch.testing.assert_close(covariance, torch.cov(x.T, correction=0))
        sought = torch.stack([x @ stats.queries[h] @ x for x in k[0, h].double()])
        weighted = sum(w * torch.outer(x, x) for w, x in zip(sought / sought.mean(), v[0, h].double(), strict=True))
        torch.testing.assert_close(stats.value_scored[h], weighted / 64)


def statistics_of(chunks: list[tuple[Tensor, Tensor, Tensor]]) -> Statistics:
    moments = Moments()
    for piece in chunks:
        moments.add(*piece)
    return moments.result()


def test_chunks_of_any_size_add_up() -> None:
    q, k, v = chunk(2, 8, tokens=100)
    whole = statistics_of([(q, k, v)])
    parts = statistics_of([tuple(x[:, :, at] for x in (q, k, v)) for at in (slice(0, 7), slice(7, 60), slice(60, 100))])
    rows = statistics_of([tuple(torch.cat(x.split(50, 2)) for x in (q, k, v))])  # the same tokens as two rows
    for other in (parts, rows):
        assert other.tokens == 100
        for name in ("queries", "key_mean", "key_covariance", "value_mean", "value_covariance"):
            torch.testing.assert_close(getattr(other, name), getattr(whole, name))


def test_large_means_leave_the_covariance_alone() -> None:
    q, k, v = chunk(2, 8, tokens=200)
    plain, shifted = statistics_of([(q, k, v)]), statistics_of([(q, k + 1000, v)])
    # keys are float32: a thousand more costs them ten bits
    torch.testing.assert_close(shifted.key_covariance, plain.key_covariance, rtol=1e-2, atol=1e-2)


def test_no_other_map_of_the_rank_has_a_smaller_expected_error_of_logits() -> None:
    """E over independent q and k of (q . (k - k^))^2 = trace(S_q covariance of the error)."""
    stats = statistics(2, 16)
    write, read = weighted_directions(stats.key_covariance, stats.queries, damping=1e-9)

    def cost(kept: Tensor) -> Tensor:
        """[H] of maps [H, D, D] of k - mean."""
        lost = torch.eye(16).double() - kept
        return (stats.queries @ lost @ stats.key_covariance @ lost.mT).diagonal(dim1=1, dim2=2).sum(-1)

    generator = torch.Generator().manual_seed(0)
    plain = torch.linalg.eigh(stats.key_covariance).eigenvectors.flip(-1)
    for rank in (1, 4, 8, 15):
        ours = read[..., :rank] @ write[..., :rank].mT
        best = cost(ours)
        channels = torch.diag((torch.arange(16) < rank).double())[None].expand(2, -1, -1)
        assert bool((best < cost(channels)).all())
        assert bool((best < cost(plain[..., :rank] @ plain[..., :rank].mT)).all())
        for _ in range(20):
            left, right = (
                x[..., :rank] + 0.05 * torch.randn(2, 16, rank, generator=generator).double() for x in (read, write)
            )
            assert bool((best <= cost(left @ right.mT)).all())
    torch.testing.assert_close(read @ write.mT, torch.eye(16).double().expand(2, -1, -1))


@pytest.mark.parametrize("weight", ["none", "one direction"])
def test_weights_without_full_rank(weight: str) -> None:
    stats = statistics(2, 16)
    q = torch.zeros(2, 16, 16).double()
    if weight == "one direction":
        q[:, 3, 3] = 1e8
    write, read = weighted_directions(stats.key_covariance, q, damping=1e-4)
    assert write.isfinite().all()
    torch.testing.assert_close(read @ write.mT, torch.eye(16).double().expand(2, -1, -1))
    if weight == "one direction":  # the first direction keeps all that the queries see
        kept = read[..., :1] @ write[..., :1].mT
        assert bool(((kept[:, 3, 3] - 1).abs() < 0.05).all())
