"""Quantized weights and a compressed cache together: int8 weights by torchao, 4-bit keys and values by kvcomp.

    pip install torchao
    python examples/quantized_weights.py

The two do not know of each other: torchao replaces the linear layers, kvcomp the cache.
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers import DynamicCache

from kvcomp import CompressedCache
from kvcomp.integrations.huggingface.models import load_model

TEXT = """The history of bridges is the history of roads. People crossed rivers on fallen trees, then on stones, then on
arches that Roman builders made of concrete; iron came in 1779, steel a century later, and then cables spun of wire. """


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of all parameters, scales included; tied ones count once."""
    tensors = {id(p): p for p in model.parameters()}.values()
    parts = [getattr(p, name) for p in tensors for name in getattr(p, "tensor_data_names", ())]
    plain = [p for p in tensors if not getattr(p, "tensor_data_names", ())]
    return sum(part.nbytes for part in [*plain, *parts])


@torch.no_grad()
def perplexity(model: torch.nn.Module, cache: CompressedCache | DynamicCache, ids: torch.Tensor, scored: int) -> float:
    """Of the last tokens, predicted one by one from the cache that holds those before."""
    model(ids[:, :-scored], past_key_values=cache, logits_to_keep=1)
    nll = 0.0
    for i in range(ids.shape[1] - scored, ids.shape[1] - 1):
        logits = model(ids[:, i : i + 1], past_key_values=cache).logits[0, -1]
        nll += F.cross_entropy(logits.float(), ids[0, i + 1]).item()
    return math.exp(nll / (scored - 1))


def main(stack: str = "kivi(bits=4)", tokens: int = 512, scored: int = 32, model_name: str = "smollm2-135m") -> list:
    model, tokenizer = load_model(model_name)
    ids = tokenizer(TEXT * 20, return_tensors="pt").input_ids[:, :tokens].to(model.device)
    figures = []
    print("                                 weights, MiB   cache, MiB   perplexity")
    for weights in (str(model.dtype).removeprefix("torch."), "int8"):
        if weights == "int8":
            quantize_(model, Int8WeightOnlyConfig())
        for cache in (DynamicCache(config=model.config), CompressedCache(stack, model)):
            found = perplexity(model, cache, ids, scored)
            compressed = isinstance(cache, CompressedCache)
            held = cache.memory().held if compressed else sum(x.keys.nbytes + x.values.nbytes for x in cache.layers)
            name = f"{weights} weights, {stack if compressed else 'DynamicCache'}"
            figures.append({"weights": weight_bytes(model), "held": held, "perplexity": found})
            print(f"{name:33}{weight_bytes(model) / 2**20:12.1f}{held / 2**20:13.2f}{found:13.3f}")
    return figures


if __name__ == "__main__":
    main()
