"""Correlated queries, keys and values, and calibration files made of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvcomp.calibration.file import Calibration
from kvcomp.calibration.statistics import Moments, Statistics
from kvcomp.fingerprint import Fingerprint
from kvcomp.integrations.huggingface.calibrate import method_of, settings_of
from kvcomp.policies.kvzap import Repetitions

MODEL = Fingerprint("a synthetic model", "config", "weights")


def chunk(
    heads: int, k_dim: int, v_dim: int | None = None, tokens: int = 512, group: int = 2, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """queries [1, heads * group, n, Dk], keys [1, heads, n, Dk], values [1, heads, n, Dv], each KV head of its own
    covariance and mean, with a few large channels."""
    generator = torch.Generator().manual_seed(seed)

    def draw(streams: int, dim: int, n: int) -> Tensor:
        mix = torch.randn(streams, dim, dim, generator=generator) / dim**0.5
        size = torch.linspace(2, -2, dim).exp()[torch.randperm(dim, generator=generator)]
        mean = torch.randn(streams, 1, dim, generator=generator)
        return (torch.randn(streams, n, dim, generator=generator) @ mix) * size + mean

    queries = draw(heads, k_dim, group * tokens).reshape(1, heads * group, tokens, k_dim)
    return queries, draw(heads, k_dim, tokens)[None], draw(heads, v_dim or k_dim, tokens)[None]


def statistics(heads: int, k_dim: int, v_dim: int | None = None, seed: int = 0) -> Statistics:
    moments = Moments()
    moments.add(*chunk(heads, k_dim, v_dim, seed=seed))
    return moments.result()


class Still:
    """A model without positions."""

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        return x

    def output(self) -> Tensor:
        raise NotImplementedError


def seen_by(method: str, heads: int, k_dim: int, v_dim: int | None = None, seed: int = 0) -> Any:
    """What `calibrate` of a method gets, from one chunk."""
    stage = method_of(method)
    seen = stage.seen()
    seen.add(*chunk(heads, k_dim, v_dim, seed=seed))
    if isinstance(seen, Repetitions):
        scores = torch.rand(1, heads, 512, generator=torch.Generator().manual_seed(seed))
        seen.repeated(scores, Still())
    return seen.result(None)


def write(
    path: Path,
    method: str,
    heads: int,
    k_dim: int,
    v_dim: int | None = None,
    layers: int = 1,
    model: Fingerprint = MODEL,
) -> Path:
    """A calibration file of `method`; layer i is calibrated on the chunk of seed i."""
    return save(path, method, [seen_by(method, heads, k_dim, v_dim, seed=layer) for layer in range(layers)], model)


def save(path: Path, method: str, layers: Sequence[Any], model: Fingerprint = MODEL) -> Path:
    """A calibration file of `method`, from what each layer saw."""
    quantizer = method_of(method)
    tensors = {
        f"{layer}.{name}": tensor
        for layer, seen in enumerate(layers)
        for name, tensor in quantizer.calibrate(seen).items()
    }
    settings = settings_of(quantizer, {})
    Calibration(method, settings, model, (("a.txt", "0" * 64),), 512, 512, tensors).save(path)
    return path
