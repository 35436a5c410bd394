"""A program of a user of kvcomp, for `mypy --strict` and pyright on the installed package: see `make lint`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel
from typing_extensions import assert_type

import kvcomp
from kvcomp import (
    KIVI,
    KLT,
    Compaction,
    CompressedCache,
    KvcompError,
    Memory,
    Prefilled,
    Quest,
    SnapKV,
    Stack,
    StackLike,
    Stage,
    StreamingLLM,
    Traffic,
    Window,
    memory_of,
    prefill,
)
from kvcomp.stages import Chunk, Policy, Quantizer, ScoredPolicy, Selector, arg, register


@register("typed_example")
@dataclass(frozen=True)
class Longest(ScoredPolicy):
    """Keeps the longest values."""

    power: float = arg(1.0, "factor of the norm")

    def scores(self, chunk: Chunk) -> Tensor:
        return chunk.values.float().square().sum(-1).sqrt() * self.power


def stacks() -> dict[str, Stack]:
    one: Stage = SnapKV(keep=0.25, window=32, pooling="max")
    two = one + KIVI(bits=4, group=64) + Window(sinks=4, recent=128)
    three = StreamingLLM(sinks=4, recent=1024) + two
    return {
        "sum": two,
        "longer": three,
        "parsed": Stack.parse("klt(bits=2)"),
        "mine": Longest(keep=0.5) + KLT(bits=2.5),
    }


def measure(model: PreTrainedModel, ids: Tensor, given: Sequence[StackLike]) -> list[Memory]:
    caches = [CompressedCache(stack, model, max_tokens=4096) for stack in given]
    filled: list[Prefilled] = prefill(model, ids, caches, chunk=512)
    print([f"{one.dense_s + one.own_s:.2f} s, logits {tuple(one.logits.shape)}" for one in filled])
    traffic: Traffic = caches[0].traffic()
    print(traffic.ratio, memory_of(caches).held, caches[0].report(), kvcomp.__version__)
    return [cache.memory() for cache in caches]


def keep(
    cache: CompressedCache, model: PreTrainedModel, ids: Tensor, tokenizer: object, path: Path
) -> Compaction | None:
    try:
        done = cache.fork().compact((0, 512), ids, tokenizer, keep=0.1)
        cache.save(path)
        assert_type(CompressedCache.load(path, model, device="cpu"), CompressedCache)
    except KvcompError as error:
        print(error)
        return None
    return done


stack = Quest(pages=16) + KIVI(bits=2)
assert_type(stack, Stack)
assert_type(KIVI() + stack, Stack)
assert_type(stack + Window(), Stack)
assert_type(stack.quantizer, Quantizer)
assert_type(stack.policies, tuple[Policy, ...])
assert_type(stack.selector, Selector | None)
assert_type(stack.effective_bits(128, 4096), float)
assert_type(KIVI(bits=4).group, int)
