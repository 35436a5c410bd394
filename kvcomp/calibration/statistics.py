"""What calibrated methods are computed from: moments of queries, keys and values, gathered chunk by chunk."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor


@dataclass(frozen=True)
class Statistics:
    """One layer of H KV heads as calibration saw it: means over `tokens` tokens, float64 on the CPU, all post-RoPE.

    queries [H, Dk, Dk]: S_q, the mean of q q' over the tokens and the G query heads of a KV head.
    key_mean [H, Dk], key_covariance [H, Dk, Dk]; value_mean [H, Dv], value_covariance [H, Dv, Dv].
    value_directions [H, Dv, Dv]: the mean of v v' / |v|^2.
    value_scored [H, Dv, Dv]: the mean of w v v', where w = k' S_q k over its mean tells how much the queries look for a
        token; S_q is the chunk's own here.
    output [H, Dv, Dv]: sum of W_o' W_o over the G query heads, so that e' output e is what an error e of a value costs
        after the output projection; None where the model has no such matrix.
    """

    tokens: int
    queries: Tensor
    key_mean: Tensor
    key_covariance: Tensor
    value_mean: Tensor
    value_covariance: Tensor
    value_directions: Tensor
    value_scored: Tensor
    output: Tensor | None = None


class Moments:
    """Sums that `Statistics` are made of, in float64: memory does not grow with the tokens added."""

    def __init__(self) -> None:
        self.tokens = 0
        self.sums: dict[str, Tensor] = {}

    def add(self, queries: Tensor, keys: Tensor, values: Tensor) -> None:
        """Add a chunk: queries [B, Hq, n, Dk], keys [B, H, n, Dk], values [B, H, n, Dv], without padding."""
        heads = keys.shape[1]
        q = rearrange(queries.double(), "b (h g) n d -> h (b g n) d", h=heads)
        k, v = (rearrange(x.double(), "b h n d -> h (b n) d") for x in (keys, values))
        tokens = k.shape[1]
        s_q = q.mT @ q / q.shape[1]
        score = ((k @ s_q) * k).sum(-1)  # [H, tokens]
        weight = score / score.mean(-1, keepdim=True).clamp_min(torch.finfo(score.dtype).tiny)
        direction = v / v.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(v.dtype).tiny)
        chunk = {
            "queries": s_q * tokens,
            "key": k.sum(1),
            "keys": k.mT @ k,
            "value": v.sum(1),
            "values": v.mT @ v,
            "directions": direction.mT @ direction,
            "scored": (v * weight[..., None]).mT @ v,
        }
        self.sums = {name: total + self.sums[name] if self.tokens else total for name, total in chunk.items()}
        self.tokens += tokens

    def result(self, output: Tensor | None = None) -> Statistics:
        """What was added so far; at least one token."""
        mean = {name: (total / self.tokens).cpu() for name, total in self.sums.items()}
        key, value = mean["key"], mean["value"]
        return Statistics(
            tokens=self.tokens,
            queries=mean["queries"],
            key_mean=key,
            key_covariance=mean["keys"] - key[:, :, None] * key[:, None],
            value_mean=value,
            value_covariance=mean["values"] - value[:, :, None] * value[:, None],
            value_directions=mean["directions"],
            value_scored=mean["scored"],
            output=output,
        )


def weighted_directions(covariance: Tensor, weight: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """W and D, both [H, D, D] float64, whose first r columns are the best r directions, for every r.

    With A = (weight + damping * mean eigenvalue * I)^(1/2) and U the eigenvectors of A covariance A by falling
    eigenvalue, W = A U and D = A^-1 U. Of all linear maps of x - mean of rank r, x^ = mean + D_r W_r' (x - mean) has
    the least E[(x - x^)' A^2 (x - x^)]: the expected squared error of q . k, where weight is the mean of q q'. A is
    scaled to determinant 1, so that coordinates are of the size of x.

    covariance, weight: [H, D, D], symmetric and positive semidefinite.
    """
    eigenvalues, vectors = torch.linalg.eigh(weight)
    eigenvalues = eigenvalues.clamp_min(torch.finfo(eigenvalues.dtype).tiny)
    eigenvalues = eigenvalues + damping * eigenvalues.mean(-1, keepdim=True)
    eigenvalues = eigenvalues / eigenvalues.log().mean(-1, keepdim=True).exp()
    root = vectors * eigenvalues.sqrt()[:, None] @ vectors.mT
    inverse = vectors / eigenvalues.sqrt()[:, None] @ vectors.mT
    directions = torch.linalg.eigh(root @ covariance @ root).eigenvectors.flip(-1)
    return root @ directions, inverse @ directions
