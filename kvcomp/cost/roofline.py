"""The roofline of a model: what prefill and decode compute and move, from its shape alone.

Conventions, which reproduce the published figures of Qwen3-8B on an H100 (`tests/core/test_roofline.py` asserts them):

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

from .hardware import Gpu


@dataclass(frozen=True)
class LayerShape:
    """One decoder layer as its cache sees it.

    kv_heads, k_dim, v_dim: what is cached of a token (a latent: 1 head, its rank, its rotary channels). heads: query
    heads. prefill_width, decode_width: channels that a head multiplies per (query, key) pair, Dqk + Dv. window: tokens
    that a sliding layer sees at most. state: bytes per sequence that a recurrent layer holds, whatever the context.
    """

    kv_heads: int = 0
    k_dim: int = 0
    v_dim: int = 0
    heads: int = 0
    prefill_width: int = 0
    decode_width: int = 0
    window: int | None = None
    state: int = 0

    @property
    def full(self) -> bool:
        """Whether it attends to everything: such layers grow with the context, and are the ones a stack compresses."""
        return self.kv_heads > 0 and self.window is None

    @property
    def elements(self) -> int:
        """Cached elements per token."""
        return self.kv_heads * (self.k_dim + self.v_dim)

    def seen(self, tokens: int) -> int:
        """Of `tokens` tokens, how many a query sees."""
        return tokens if self.window is None else min(tokens, self.window)

    def pairs(self, tokens: int) -> int:
        """(query, key) pairs of a causal prefill of `tokens` tokens."""
        inside = self.seen(tokens)
        return inside * (inside + 1) // 2 + (tokens - inside) * inside


@dataclass(frozen=True)
class Matrices:
    """A group of weight matrices: how many parameters, in how many bytes."""

    parameters: int = 0
    nbytes: float = 0.0

    def __add__(self, other: Matrices) -> Matrices:
        return Matrices(self.parameters + other.parameters, self.nbytes + other.nbytes)


@dataclass(frozen=True)
class ModelShape:
    """What a roofline needs of a model.

    dense: matrices that every token meets, the output head included. experts: all routed experts, of which each
    token meets `active_experts` of `total_experts`. lookup: tables that are only looked up. dtype, itemsize: of K
    and V. positions: the longest context it is made for. latent: whether its cache is a latent (MLA).
    """

    name: str
    layers: tuple[LayerShape, ...]
    dense: Matrices
    experts: Matrices = Matrices()
    lookup: Matrices = Matrices()
    total_experts: int = 0
    active_experts: int = 0
    dtype: str = "bfloat16"
    itemsize: int = 2
    positions: int | None = None
    latent: bool = False

    @property
    def weights(self) -> Matrices:
        """Everything that has to be in memory."""
        return self.dense + self.experts + self.lookup

    @property
    def active_parameters(self) -> float:
        """Matrix parameters that one token meets."""
        return self.dense.parameters + self.experts.parameters * self._share(1)

    @property
    def token_bytes(self) -> int:
        """Bytes of K and V that one more token adds, in the layers that keep all tokens."""
        return self.itemsize * sum(layer.elements for layer in self.layers if layer.full)

    def fixed_bytes(self, tokens: int) -> int:
        """Bytes that the layers a stack leaves alone (sliding windows, recurrent states) hold of a sequence."""
        rest = [layer for layer in self.layers if not layer.full]
        return sum(self.itemsize * layer.elements * layer.seen(tokens) + layer.state for layer in rest)

    def cache_bytes(self, tokens: int) -> int:
        """Bytes of an uncompressed cache of one sequence of `tokens` tokens."""
        return self.token_bytes * tokens + self.fixed_bytes(tokens)

    def weight_bytes(self, tokens: int) -> float:
        """Bytes of weights that a forward over `tokens` tokens, of all sequences together, has to move."""
        return self.dense.nbytes + self.experts.nbytes * self._share(tokens)

    def _share(self, tokens: int) -> float:
        """Part of the experts that `tokens` tokens touch, choosing uniformly."""
        return 1 - (1 - self.active_experts / self.total_experts) ** tokens if self.total_experts else 0.0

    def attention_flops(self, tokens: int) -> int:
        """FLOPs of attention of one query over `tokens` tokens, in all layers."""
        return sum(2 * layer.heads * layer.decode_width * layer.seen(tokens) for layer in self.layers)


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
    return step(shape, batch, shape.cache_bytes(context + 1), shape.attention_flops(context + 1))


def step(shape: ModelShape, batch: int, read: float, attention_flops: float) -> Work:
    """One decode step of `batch` sequences, each of which reads `read` bytes of cache and spends `attention_flops`."""
    return Work(batch * (2 * shape.active_parameters + attention_flops), shape.weight_bytes(batch), batch * read)


def attention_intensity(shape: ModelShape, context: int) -> float:
    """FLOP per byte of decode attention alone, over an uncompressed cache. No batch changes it."""
    return shape.attention_flops(context + 1) / shape.cache_bytes(context + 1)


def decode_limit(shape: ModelShape, context: int) -> float:
    """FLOP per byte of a decode step as the batch grows without end: per sequence only the cache is read."""
    flops = 2 * shape.active_parameters + shape.attention_flops(context + 1)
    return flops / shape.cache_bytes(context + 1)
