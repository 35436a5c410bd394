"""95% intervals of mean scores and of their differences, by SciPy. Scores lie in [0, 1].

Bootstraps are BCa with 9999 resamples (Efron, 1987), seeded, so that the same samples give the same interval.
Where a bootstrap sees no spread it has nothing to resample and would claim certainty; a bound by Wilson's
interval (1927) replaces it there: "all n agree" allows as many others as n samples can hide. All of them
take the samples as independent draws. With the few of a short run they are rough, and a bootstrap is too narrow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

LEVEL = 0.95
RESAMPLES = 9999
BATCH = 500  # resamples drawn at once: thousands of samples stay within megabytes
SAME = 1e-9  # values closer than that differ by rounding only


class Interval(NamedTuple):
    """The ends of an interval."""

    low: float
    high: float


def accuracy_interval(scores: Sequence[float]) -> Interval:
    """Return the interval of the mean of `scores`.

    Wilson's where all are 0 or 1; else a bootstrap. Where all are the same fraction: Wilson's for as many right
    answers as their sum, rounded outwards, as no scores in [0, 1] of that mean spread more than 0 and 1 do.
    """
    total = math.fsum(scores)
    if all(score in (0, 1) for score in scores):
        return _wilson(round(total), len(scores))
    if _agree(scores):
        below, above = math.floor(total + SAME), math.ceil(total - SAME)
        return Interval(_wilson(below, len(scores)).low, _wilson(above, len(scores)).high)
    return _bootstrap(scores)


def paired_interval(differences: Sequence[float]) -> Interval:
    """Return the interval of the mean of `differences` in [-1, 1] between two scores of the same sample.

    A bootstrap. Where all n are the same d: the share of pairs with d may be as low as Wilson's bound w for n of
    n, and the others anything, so that the mean lies in w d ± (1 - w).
    """
    if not _agree(differences):
        return _bootstrap(differences)
    share = _wilson(len(differences), len(differences)).low
    centre = share * math.fsum(differences) / len(differences)
    return Interval(max(-1.0, centre - (1 - share)), min(1.0, centre + (1 - share)))


def unpaired_interval(scores: Sequence[float], others: Sequence[float]) -> Interval:
    """Return the interval of mean(scores) - mean(others), of different samples.

    Newcombe (1998), hybrid score: the distances of the means to the ends of their own intervals, in quadrature.
    It keeps a width where all scores agree, which a bootstrap does not.
    """
    first, second = (math.fsum(values) / len(values) for values in (scores, others))
    (low, high), (other_low, other_high) = accuracy_interval(scores), accuracy_interval(others)
    return Interval(
        max(-1.0, first - second - math.hypot(first - low, other_high - second)),
        min(1.0, first - second + math.hypot(high - first, second - other_low)),
    )


def mean_interval(values: Sequence[float]) -> Interval | None:
    """Return the interval of the mean of any numbers, a bootstrap; None where they show no spread."""
    return None if _agree(values) else _bootstrap(values)


def _agree(values: Sequence[float]) -> bool:
    return max(values) - min(values) < SAME


def _wilson(right: int, n: int) -> Interval:
    from scipy.stats import binomtest

    ends = binomtest(right, n).proportion_ci(LEVEL, method="wilson")
    return Interval(float(ends.low), float(ends.high))


def _bootstrap(values: Sequence[float]) -> Interval:
    from scipy.stats import bootstrap

    data = (np.asarray(values, dtype=np.float64),)
    ends = bootstrap(
        data,
        np.mean,
        n_resamples=RESAMPLES,
        batch=BATCH,
        confidence_level=LEVEL,
        method="BCa",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Interval(float(ends.low), float(ends.high))
