"""The bill of materials: what a model's cache holds and a decode step reads, for any stack, context and batch.

Predicted by the code that the stack itself uses (`kvcomp.plan`), for a prompt of `context` tokens and the decode step
after it. Layers of full attention are the stack's, and those with a sliding window its quantizer's; recurrent states
stay the library's own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from kvcomp.architecture import LayerKind, ModelShape, obstacle
from kvcomp.errors import KvcompError, UnsupportedError
from kvcomp.stages.plan import LayerPlan, exact_width, held_parts, read_parts, shared_bytes
from kvcomp.stages.stack import Stack, StackLike
from kvcomp.text import quote, size_text

from .hardware import Gpu
from .roofline import Work, step

READS = "reads"


@dataclass(frozen=True)
class Assumption:
    """A factor that nothing here implements or measures, such as a latent an eighth of the size: `latent/8`.

    It divides what is held and what is read; one called `reads` divides only what is read.
    """

    name: str
    factor: float

    @classmethod
    def parse(cls, text: str) -> Assumption:
        """The assumption that `NAME/FACTOR` describes.

        Raises:
            KvcompError: any other text.
        """
        name, _, number = text.partition("/")
        try:
            factor = float(number)
        except ValueError:
            factor = 0.0
        if not name.strip().isidentifier() or not 1e-9 <= factor <= 1e9:
            raise KvcompError(
                f"assume: {quote(text)} is not NAME/FACTOR with a positive factor, as in latent/8 or reads/10"
            )
        return cls(name.strip(), factor)

    def __str__(self) -> str:
        return f"{self.name}/{self.factor:g}"


@dataclass(frozen=True)
class Bill:
    """What one cache costs: bytes held and read by part, for the whole batch, and the step's work.

    stack: None for the library's own uncompressed cache. dense: what that holds and reads. elements: cached elements of
    K and V in the layers that the stack compresses. weights: bytes of all weights. assumed: what was divided by, beyond
    the stack.
    """

    stack: Stack | None
    context: int
    batch: int
    held_parts: dict[str, float]
    read_parts: dict[str, float]
    dense: tuple[int, int]
    elements: int
    work: Work
    weights: float
    assumed: tuple[Assumption, ...] = ()

    def __repr__(self) -> str:
        held = f"held {size_text(self.held)} ({self.held_ratio:.2f}x less than dense)"
        read = f"read {size_text(self.read)} a step ({self.read_ratio:.2f}x less)"
        return f"<Bill of {self.label}: {self.batch} x {self.context} tokens, {held}, {read}>"

    @property
    def label(self) -> str:
        return "dense" if self.stack is None else str(self.stack)

    @property
    def held(self) -> float:
        return sum(self.held_parts.values())

    @property
    def read(self) -> float:
        return sum(self.read_parts.values())

    @property
    def held_ratio(self) -> float:
        """How many times less than dense."""
        return self.dense[0] / self.held

    @property
    def read_ratio(self) -> float:
        """How many times less than dense."""
        return self.dense[1] / self.read

    @property
    def effective_bits(self) -> float:
        """Bits held per element of K and V in the layers that a stack compresses, as `Stack.effective_bits`."""
        compressed = self.held - self.held_parts.get("library", 0)
        return 8 * compressed / self.elements if self.elements else 0.0

    @property
    def total(self) -> float:
        """Bytes of weights and cache in memory. Activations and the runtime come on top."""
        return self.weights + self.held

    def fits(self, gpu: Gpu) -> bool | None:
        """Whether weights and cache fit; None where the device's memory is not known."""
        return None if gpu.memory is None else self.total <= gpu.memory * 1e9

    def tokens_per_second(self, gpu: Gpu) -> float:
        """The most tokens that a second can give, over all sequences."""
        return self.batch / self.work.seconds(gpu)

    def under(self, assumption: Assumption) -> Bill:
        """This bill, with what it holds and reads divided."""
        reads_only = assumption.name == READS
        held = self.held_parts if reads_only else _divided(self.held_parts, assumption.factor)
        read = _divided(self.read_parts, assumption.factor)
        work = replace(self.work, cache=self.work.cache / assumption.factor)
        return replace(self, held_parts=held, read_parts=read, work=work, assumed=(*self.assumed, assumption))


def bill(shape: ModelShape, stack: StackLike | None, context: int, batch: int = 1) -> Bill:
    """What `batch` sequences hold after a prompt of `context` tokens each, and what the next decode step reads.

    Raises:
        SpecError: a stack that cannot serve the model's head dimensions.
        UnsupportedError: a stack that cannot serve its layers.
    """
    stack = None if stack is None else Stack.parse(stack)
    if stack is not None and (why := obstacle(shape.kinds, stack)) is not None:
        raise UnsupportedError(f"{shape.name} {why}")
    held: Counter[str] = Counter()
    read: Counter[str] = Counter()
    flops = shared = 0
    packed: dict[int, int] = {}  # elements of layers with a sliding window, by number
    dtype = getattr(torch, shape.dtype)
    full = [i for i, layer in enumerate(shape.layers) if layer.full and layer.kind.traits.scored]
    for i, layer in enumerate(shape.layers):
        source = i if layer.source is None else layer.source
        holder, own = shape.layers[source], source == i  # who holds what this layer reads
        seen, token = holder.seen(context + 1), holder.elements * shape.itemsize
        plan = None if stack is None else _plan(stack, shape, source, full)
        if plan is not None:
            heads, k_dim, v_dim = plan.streams(holder.kv_heads, holder.k_dim, holder.v_dim)
            sizes = plan, k_dim, v_dim
            read.update({name: size * heads for name, size in read_parts(*sizes, context, dtype).items()})
            if own:
                held.update({name: size * heads for name, size in held_parts(*sizes, context, dtype).items()})
                shared += shared_bytes(*sizes, heads, dtype)
                if plan.sliding is not None:
                    packed[i] = layer.elements * layer.seen(context)
            seen = plan.attended(context)
        elif holder.full:
            held["dense"] += token * context * own
            read["dense"] += token * (context + 1)
        elif not own:
            read["library"] += token * seen
        flops += 2 * layer.heads * layer.decode_width * seen
    for total, tokens in ((held, context), (read, context + 1)):
        total["library"] += shape.fixed_bytes(tokens, packed)
    if stack is not None and stack.window.bits == 8:
        index = [layer.index for layer in shape.layers if layer.index]
        saved = sum(shape.itemsize * dim - exact_width(8, dim) for dim in index)
        held["library"] -= saved * context
        read["library"] -= saved * (context + 1)
        read["dense copy"] += shape.itemsize * sum(index) * (context + 1)  # the model's indexer reads a tensor
    together = _times(held, batch)
    if shared:
        together["constants"] = together.get("constants", 0.0) + shared
    return Bill(
        stack,
        context,
        batch,
        together,
        _times(read, batch),
        (batch * shape.cache_bytes(context), batch * shape.read_bytes(context + 1)),
        batch * (context * shape.token_bytes // shape.itemsize + sum(packed.values())),
        step(shape, batch, sum(read.values()), flops),
        shape.weights.nbytes,
    )


def _plan(stack: Stack, shape: ModelShape, i: int, full: list[int]) -> LayerPlan | None:
    """What the stack does with layer i, of which those in `full` attend to all tokens; None: it leaves it alone."""
    layer, layers = shape.layers[i], len(shape.layers)
    if layer.full:
        latent = layer.latent or layer.kind is LayerKind.LATENT
        plan = stack.plan(i, layers, full if i in full else None)
        if layer.kind.traits.scored:
            return replace(plan, latent=latent or plan.latent)
        return replace(plan.quantizer_alone(), latent=latent, chosen_tokens=layer.chosen)
    if layer.kind is LayerKind.SLIDING and layer.window is not None:
        return stack.sliding_plan(i, layers, layer.window)
    return None


def bills(
    shape: ModelShape, stacks: Iterable[StackLike], context: int, batch: int, assumptions: Iterable[Assumption] = ()
) -> list[Bill]:
    """The uncompressed cache and each stack, every one followed by itself under the assumptions, one more at a time."""
    rows = []
    for stack in (None, *stacks):
        rows.append(bill(shape, stack, context, batch))
        for assumption in assumptions:
            rows.append(rows[-1].under(assumption))
    return rows


def _times(parts: Counter[str], batch: int) -> dict[str, float]:
    return {name: float(size * batch) for name, size in parts.items() if size}


def _divided(parts: dict[str, float], factor: float) -> dict[str, float]:
    return {name: size / factor for name, size in parts.items()}
