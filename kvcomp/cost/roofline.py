"""The roofline of a model: what prefill and decode compute and move, from its shape alone.

Conventions, which reproduce the published figures of Qwen3-8B on an H100
(`tests/kvcomp/cost/test_roofline.py` asserts them):

- A multiply-add is 2 FLOPs. A token costs 2 FLOPs per matrix parameter that it meets: attention, MLP, router, its own
  experts and the output head. An input embedding is a lookup: no FLOPs, no traffic; a table that is also the output
  head (tied) is a matrix like any other. Norms, biases, rotations and softmax are not counted.
- Attention costs 2 (Dqk + Dv) FLOPs per query head and (query, key) pair, so 4 Hq D in plain attention. Prefill of T
  tokens has T (T + 1) / 2 pairs (causal), w per query at most where a window of w slides. A decode step sees every
  token cached before it and its own: context + 1. With a stack, it sees what is kept and selected.
- Prefill moves the weights once and writes K and V once. A decode step moves the weights once and reads K and V of
  what its queries see. Activations are not counted: they stay on chip, or are small beside the weights.
- The output head runs on every position of a prefill.
- Routed experts: a batch of n tokens that choose k of E experts uniformly touches E (1 - (1 - k/E)^n) of them.
- A latent cache (MLA) is attended as it is: decode multiplies each query head with the latent and the rotary key, and
  the probabilities with the latent; prefill expands it to heads.
- Scores for eviction and selection, dequantization, and the recurrences of linear layers cost no FLOPs here.

KB, GB and TB are powers of ten. Bounds are peaks: nothing runs faster, most things run at 60-90 % of it.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvcomp.architecture import ModelShape

from .hardware import Gpu


@dataclass(frozen=True)
class Work:
    """What a forward computes and moves: FLOPs, bytes of weights, bytes of K and V."""

    flops: float
    weights: float
    cache: float

    @property
    def nbytes(self) -> float:
        return self.weights + self.cache

    @property
    def intensity(self) -> float:
        """FLOP per byte."""
        return self.flops / self.nbytes

    def seconds(self, gpu: Gpu) -> float:
        """The least time it can take: the longer of moving and computing."""
        return max(self.nbytes / (gpu.bandwidth * 1e12), self.flops / (gpu.tflops * 1e12))


def prefill(shape: ModelShape, tokens: int, batch: int = 1) -> Work:
    """Prefilling `batch` prompts of `tokens` tokens into an empty cache, with plain causal attention."""
    pairs = sum(2 * layer.heads * layer.prefill_width * layer.pairs(tokens) for layer in shape.layers)
    flops = batch * (2 * shape.active_parameters * tokens + pairs)
    return Work(flops, shape.weight_bytes(batch * tokens), batch * shape.cache_bytes(tokens))


def decode(shape: ModelShape, context: int, batch: int = 1) -> Work:
    """One decode step of `batch` sequences with `context` tokens each in an uncompressed cache."""
    return step(shape, batch, shape.read_bytes(context + 1), shape.attention_flops(context + 1))


def step(shape: ModelShape, batch: int, read: float, attention_flops: float) -> Work:
    """One decode step of `batch` sequences, each of which reads `read` bytes of cache and spends `attention_flops`."""
    return Work(batch * (2 * shape.active_parameters + attention_flops), shape.weight_bytes(batch), batch * read)


def attention_intensity(shape: ModelShape, context: int) -> float:
    """FLOP per byte of decode attention alone, over an uncompressed cache. No batch changes it."""
    return shape.attention_flops(context + 1) / shape.read_bytes(context + 1)


def decode_limit(shape: ModelShape, context: int) -> float:
    """FLOP per byte of a decode step as the batch grows without end: per sequence only the cache is read."""
    flops = 2 * shape.active_parameters + shape.attention_flops(context + 1)
    return flops / shape.read_bytes(context + 1)
