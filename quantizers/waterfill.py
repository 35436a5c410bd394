"""Reverse water-filling: how many bits each unit of channels has."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

UNIT = 8  # channels that share a width: a bit each fills a byte
WIDEST = 8
# Lloyd-Max distortion of a unit Gaussian at 0 to 8 bits (Max 1960, continued at a quarter of the last step per bit)
DISTORTION = (1.0, 0.36338, 0.11748, 0.03455, 0.0095, 0.0025, 0.00064, 0.000163, 0.0000413)
FALL = 0.55**8  # of weighted variances of centred keys, from the first unit to after the last, by a constant factor
DECAY = 1.6  # of those of values: unit i has ~ (i + 1)^-DECAY


def allocate(variance: Tensor, total: int) -> tuple[int, ...]:
    """Bits of each unit of channels, descending, for variances [n] of coordinates in descending order.

    `total` bits times units go one by one to the unit whose summed distortion falls most: reverse water-filling.
    """
    power = variance.double().unflatten(0, (-1, UNIT)).sum(-1).tolist()
    bits = [0] * len(power)
    for _ in range(total):
        gains = [
            p * (DISTORTION[b] - DISTORTION[b + 1]) if b < WIDEST else -1.0 for p, b in zip(power, bits, strict=True)
        ]
        bits[gains.index(max(gains))] += 1
    return tuple(sorted(bits, reverse=True))


@cache
def usual_widths(units: int, total: int, centred: bool) -> tuple[int, ...]:
    """Bits of each unit for streams that are not known beforehand, so that no stream depends on the others of its
    layer.

    Those of a spectrum that models' values have on average. Centred keys fall faster at first, ~ (i + 1)^-2.8, and bits
    for that spectrum have the least squared error; but single tokens do lie in the last directions, and what those lose
    costs a third more divergence at 2 bits than bits for a spectrum that falls evenly.
    """
    at = torch.arange(units, dtype=torch.float32, device="cpu")
    power = FALL ** (at / units) if centred else (at + 1) ** -DECAY
    return allocate(power.repeat_interleave(UNIT), total)


def runs(widths: tuple[int, ...]) -> list[tuple[int, int]]:
    """(bits, channels) of neighbouring units of the same width; those of width 0 are not stored."""
    return [(w, UNIT * widths.count(w)) for w in dict.fromkeys(widths) if w]
