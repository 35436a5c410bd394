"""Intervals cover what they claim to, and claim nothing that the samples cannot know."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcomp.benchmarks.intervals import accuracy_interval, paired_interval, unpaired_interval

FRACTIONS = st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=1, max_size=12)


def test_zero_and_one_get_wilsons_interval() -> None:
    assert accuracy_interval([1.0] * 10) == pytest.approx((0.7225, 1.0), abs=1e-4)  # 10 of 10: published
    low, high = accuracy_interval([1.0, 0.0])
    assert low == pytest.approx(1 - high)


def test_equal_fractions_are_as_wide_as_zeros_and_ones_of_that_mean() -> None:
    assert accuracy_interval([0.5] * 10) == pytest.approx(accuracy_interval([1.0, 0.0] * 5))
    low, high = accuracy_interval([0.25] * 5)  # 1.25 of 5: from 1 of 5 to 2 of 5
    assert (low, high) == (accuracy_interval([1.0, 0, 0, 0, 0]).low, accuracy_interval([1.0, 1, 0, 0, 0]).high)


@pytest.mark.parametrize("n", [1, 2, 5, 100])
@pytest.mark.parametrize("difference", [-1.0, 0.0, 0.5])
def test_equal_differences_keep_a_width_that_shrinks(n: int, difference: float) -> None:
    low, high = paired_interval([difference] * n)
    assert -1 <= low < high <= 1
    assert low <= difference <= high
    wider = paired_interval([difference] * n + [difference])
    assert wider.high - wider.low < high - low
    assert paired_interval([0.1 + 0.2, 0.3]).high > 0.31  # equal but for rounding


@settings(max_examples=40, deadline=None)
@given(scores=FRACTIONS, others=FRACTIONS)
def test_ends_hold_the_mean_and_stay_in_range(scores: list[float], others: list[float]) -> None:
    low, high = accuracy_interval(scores)
    assert 0 <= low <= np.mean(scores) + 1e-12
    assert np.mean(scores) - 1e-12 <= high <= 1
    pairs = [a - b for a, b in zip(scores, others, strict=False)]
    low, high = paired_interval(pairs)
    assert -1 <= low <= np.mean(pairs) + 1e-12
    assert np.mean(pairs) - 1e-12 <= high <= 1
    low, high = unpaired_interval(scores, others)
    other_low, other_high = unpaired_interval(others, scores)
    assert (low, high) == pytest.approx((-other_high, -other_low))
    assert low - 1e-12 <= np.mean(scores) - np.mean(others) <= high + 1e-12


def test_a_bootstrap_repeats_itself_and_agrees_with_the_normal_one_where_there_are_many() -> None:
    pairs = np.random.default_rng(1).choice([-1.0, 0.0, 0.0, 0.0, 1.0], 800).tolist()
    low, high = paired_interval(pairs)
    assert (low, high) == paired_interval(pairs)
    half = 1.96 * np.std(pairs) / len(pairs) ** 0.5
    assert (low, high) == pytest.approx((np.mean(pairs) - half, np.mean(pairs) + half), abs=0.006)


def test_pairing_narrows() -> None:
    scores = [1.0, 0.0] * 20
    others = [*scores[:-2], 0.0, 0.0]
    paired = paired_interval([a - b for a, b in zip(scores, others, strict=True)])
    unpaired = unpaired_interval(scores, others)
    assert paired.high - paired.low < 0.5 * (unpaired.high - unpaired.low)


def test_unpaired_is_newcombes() -> None:
    # Newcombe (1998), example (a): 56 of 70 against 48 of 80, method 10.
    low, high = unpaired_interval([1.0] * 56 + [0.0] * 14, [1.0] * 48 + [0.0] * 32)
    assert (low, high) == pytest.approx((0.0524, 0.3339), abs=1e-4)
