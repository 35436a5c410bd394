"""Texts that a vLLM engine is made to write, token by token, for perplexities of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

FORCED = "kvcomp_forced"  # the name under which a request carries the tokens that it shall begin with


def forcing() -> type:
    """A class of logits processors that leave a request no choice while it has forced tokens."""
    from vllm import SamplingParams
    from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

    class Forcing(AdapterLogitsProcessor):
        def is_argmax_invariant(self) -> bool:
            return False

        def new_req_logits_processor(self, params: SamplingParams) -> Callable[[list[int], Tensor], Tensor] | None:
            forced = (params.extra_args or {}).get(FORCED)
            return partial(force, forced) if forced else None

    return Forcing


def force(forced: list[int], written: list[int], logits: Tensor) -> Tensor:
    if len(written) >= len(forced):
        return logits
    only = torch.full_like(logits, -torch.inf)
    only[forced[len(written)]] = 0.0
    return only
