"""What a layer is, and what a stack may do with each kind: the one place that says so.

An engine says of which kind the layers of a model are; everything else asks here.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass
from enum import Enum

from kvcomp.stages.stack import Stack


@dataclass(frozen=True)
class Traits:
    """What a stack may do with a kind of layer.

    does: what the layer does, of a model that has one. packed: its keys and values, or what it caches for them, go
    through the stack. scored: policies and selectors can distinguish its tokens. fixed: its decode steps have fixed
    shapes in a preallocated cache. calibrated: what calibrated stages need can be gathered from it. engine: an engine
    that owns the memory, such as vLLM, can hold its pages. bounded: it sees a window alone, whatever the context, so
    that policies and selectors leave it to the quantizer.
    """

    does: str
    packed: bool = False
    scored: bool = False
    fixed: bool = False
    calibrated: bool = False
    engine: bool = False
    bounded: bool = False


class LayerKind(Enum):
    """The kinds of decoder layers, by what they cache."""

    FULL = Traits("attends to all tokens", packed=True, scored=True, fixed=True, calibrated=True, engine=True)
    LATENT = Traits("caches latents (MLA)", packed=True, scored=True)
    INDEXED = Traits("chooses tokens by an indexer of its own", packed=True)
    SLIDING = Traits("attends to a sliding window", packed=True, calibrated=True, engine=True, bounded=True)
    CHUNKED = Traits("attends to a chunk of the text, or to latents in a window")
    SHARED = Traits("reads the cache of another layer, or none")
    CROSS = Traits("attends to an image or another text")
    RECURRENT = Traits("keeps a state of its own")

    @property
    def traits(self) -> Traits:
        return self.value


def without(kinds: Iterable[LayerKind], trait: str) -> LayerKind | None:
    """The first of a model's kinds that a stack packs whole and that lacks a trait; None where all have it."""
    return next((k for k in kinds if k.traits.packed and not (k.traits.bounded or getattr(k.traits, trait))), None)


def obstacle(kinds: Iterable[LayerKind], stack: Stack) -> str | None:
    """Why a model with layers of these kinds cannot be served by the stack, and what can; None: it can."""
    names = " and ".join(s.name for s in (*stack.policies, stack.selector) if s is not None)
    kinds = list(kinds)
    if stack.latent is not None:
        if LayerKind.LATENT in kinds:
            return f"{LayerKind.LATENT.traits.does} itself: leave {stack.latent.name} out"
        kinds = [LayerKind.LATENT if kind is LayerKind.FULL else kind for kind in kinds]
    scored = any(kind.traits.scored for kind in kinds if kind.traits.packed)  # by a quantizer alone, the others
    kind = None if scored else without(kinds, "scored")
    asking = next((policy.name for policy in stack.policies if policy.needs_model), None)
    if LayerKind.LATENT in kinds and asking is not None:
        return (
            f"{LayerKind.LATENT.traits.does}, of which {asking} does not know the weights that it asks for: use a "
            "policy that asks for none, such as snapkv"
        )
    if not names or kind is None:
        return None
    return f"{kind.traits.does}, which {names} cannot score yet: use a stack of a quantizer alone"


@dataclass(frozen=True)
class LayerShape:
    """One decoder layer as its cache sees it.

    kv_heads, k_dim, v_dim: what is cached of a token (a latent: 1 head, its rank, its rotary channels). heads: query
    heads. prefill_width, decode_width: channels that a head multiplies per (query, key) pair, Dqk + Dv. window: tokens
    that a sliding layer sees at most. source: the layer, by number, whose cache this one reads. state: bytes per
    sequence that a recurrent layer holds, whatever the context. latent: whether it caches latents. index: channels of a
    token's index key, all of which a model's own indexer reads; chosen: tokens that it chooses.
    """

    kv_heads: int = 0
    k_dim: int = 0
    v_dim: int = 0
    heads: int = 0
    prefill_width: int = 0
    decode_width: int = 0
    window: int | None = None
    state: int = 0
    kind: LayerKind = LayerKind.FULL
    source: int | None = None
    latent: bool = False
    index: int = 0
    chosen: int | None = None

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


def engine_obstacle(layers: Iterable[LayerShape], dim: int) -> str | None:
    """Why an engine's blocks, for heads of `dim` channels, cannot hold these layers; None: they can."""
    for layer in layers:
        if not layer.kind.traits.engine:
            return layer.kind.traits.does
        if (layer.k_dim, layer.v_dim) != (dim, dim):
            return f"has keys of {layer.k_dim} and values of {layer.v_dim} channels, not {dim} of each"
    return None


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
    and V. positions: the longest context it is made for.
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

    @property
    def kinds(self) -> list[LayerKind]:
        """The kinds of its layers."""
        return [layer.kind for layer in self.layers]

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

    def fixed_bytes(self, tokens: int, packed: Container[int] = ()) -> int:
        """Bytes of a sequence that a stack leaves alone: index keys, and layers that do not grow with the context
        (sliding windows, recurrent states) but for those, by number, that it has `packed`."""
        rest = [layer for i, layer in enumerate(self.layers) if not layer.full and i not in packed]
        index = sum(self.itemsize * layer.index for layer in self.layers) * tokens
        return index + sum(self.itemsize * layer.elements * layer.seen(tokens) + layer.state for layer in rest)

    def cache_bytes(self, tokens: int) -> int:
        """Bytes of an uncompressed cache of one sequence of `tokens` tokens."""
        return self.token_bytes * tokens + self.fixed_bytes(tokens)

    def read_bytes(self, tokens: int) -> int:
        """Bytes of an uncompressed cache that a query of `tokens` tokens reads: what layers share, once for each."""
        sources = [self.layers[layer.source] for layer in self.layers if layer.source is not None]
        return self.cache_bytes(tokens) + self.itemsize * sum(x.elements * x.seen(tokens) for x in sources)

    def weight_bytes(self, tokens: int) -> float:
        """Bytes of weights that a forward over `tokens` tokens, of all sequences together, has to move."""
        return self.dense.nbytes + self.experts.nbytes * self._share(tokens)

    def _share(self, tokens: int) -> float:
        """Part of the experts that `tokens` tokens touch, choosing uniformly."""
        return 1 - (1 - self.active_experts / self.total_experts) ** tokens if self.total_experts else 0.0

    def attention_flops(self, tokens: int) -> int:
        """FLOPs of attention of one query over `tokens` tokens, in all layers."""
        return sum(2 * layer.heads * layer.decode_width * layer.seen(tokens) for layer in self.layers)
