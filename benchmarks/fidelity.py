"""How near the next-token distributions of a compressed cache are to those of the uncompressed one.

A window of a text as for `perplexity`: the cache is filled from its beginning, and the tokens that follow are fed to it
and to an uncompressed one, whose predictions p are compared with those of the stack, q, token by token:

    KL = sum p log(p / q)     1 - TVD = 1 - 1/2 sum |p - q| = sum min(p, q)     top-1: argmax p = argmax q

Every token is a measurement of what the cache changed, where an answer is right or wrong: hundreds of tokens separate
stacks that tens of answers do not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvcomp.benchmarks.perplexity import SOURCES, Perplexity
from kvcomp.integrations.huggingface.forward import with_cache


@dataclass(frozen=True)
class Fidelity(Perplexity):
    """Windows of one text; the score is the mean 1 - TVD of the predictions of its last tokens, the higher the better.

    continuation: how many predictions are compared.
    """

    continuation: int = 64


TASKS: dict[str, Fidelity] = {source.tasks[1]: Fidelity(source.tasks[1], source) for source in SOURCES}


def dense_logits(model: Any, cache: Any, tokens: list[int]) -> Tensor:
    """Logits [n - 1, V] after each of the n tokens but the last, fed to an uncompressed cache at once."""
    ids = torch.tensor([tokens[:-1]], dtype=torch.int64, device=model.device)
    logits: Tensor = model(input_ids=ids, **with_cache(model, cache), use_cache=True).logits
    return logits[0]
