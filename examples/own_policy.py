"""An eviction policy of your own: a score in one method, and budgets, stacks, the bench and vLLM take it from there.

    python examples/own_policy.py

A package offers it to everybody by an entry point of the group "kvcomp.stages": `mine = "package.module:ValueNorm"`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from transformers import DynamicCache

from kvcomp import CompressedCache
from kvcomp.integrations.huggingface.models import load_model
from kvcomp.stages import Chunk, ScoredPolicy, arg, register

TEXT = "The bridge of Arlen was opened in 1712. The bridge of Corvan was opened in 1846. "
STACKS = ("valuenorm(keep=0.5)", "valuenorm(keep=0.25, power=2) + kivi(bits=4)", "snapkv(keep=0.25) + kivi(bits=4)")


@register("valuenorm")
@dataclass(frozen=True)
class ValueNorm(ScoredPolicy):
    """Keeps the tokens whose values are largest: sum_d |v_d|^p, over the mean of their neighbours."""

    scores_within: ClassVar[tuple[float, float]] = (0.0, 1e30)

    power: float = arg(1.0, "exponent of the norm")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(self.power > 0, "power", "positive")

    def scores(self, chunk: Chunk) -> Tensor:  # keys, values [B, Hkv, N, D] -> [B, Hkv, N]
        norms = chunk.values.float().abs().pow(self.power).sum(-1)
        around = torch.nn.functional.avg_pool1d(norms, 9, stride=1, padding=4, count_include_pad=False)
        return norms / around.clamp_min(1e-6)


def main(tokens: int = 768, model_name: str = "smollm2-135m") -> dict[str, dict[str, float]]:
    model, tokenizer = load_model(model_name)
    ids = tokenizer(TEXT * 40, return_tensors="pt").input_ids[:, :tokens].to(model.device)
    figures: dict[str, dict[str, float]] = {}
    for stack in STACKS:
        cache = CompressedCache(stack, model)
        model.generate(ids, past_key_values=cache, max_new_tokens=8, min_new_tokens=8, do_sample=False)
        memory, traffic = cache.memory(), cache.traffic()
        figures[stack] = {"held": memory.held, "dense": memory.dense, "read": traffic.read}
        print(f"{stack:48}held {memory.held / 2**20:6.2f} MiB, {memory.ratio:5.2f} times less")
    dense = DynamicCache(config=model.config)
    model.generate(ids, past_key_values=dense, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    size = sum(layer.keys.nbytes + layer.values.nbytes for layer in dense.layers)
    figures["DynamicCache"] = {"held": size}
    print(f"{'DynamicCache':48}held {size / 2**20:6.2f} MiB")
    return figures


if __name__ == "__main__":
    main()
