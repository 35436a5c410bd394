"""What the Hugging Face tests share: batches, greedy generation, comparison."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel


def tokens(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(3, 256, shape, generator=torch.Generator().manual_seed(seed), device="cpu")


def left_padded(lengths: list[int], seed: int = 2) -> tuple[Tensor, Tensor]:
    """input_ids and attention_mask [len(lengths), max(lengths)] with padding on the left."""
    longest = max(lengths)
    ids, mask = tokens(len(lengths), longest, seed=seed), torch.ones(len(lengths), longest, dtype=torch.int64)
    for row, length in enumerate(lengths):
        ids[row, : longest - length] = 0
        mask[row, : longest - length] = 0
    return ids, mask


def greedy(model: PreTrainedModel, ids: Tensor, cache: Any, new: int = 10, **kwargs: Any) -> Any:
    """Greedy continuation with its logits."""
    return model.generate(
        ids,
        past_key_values=cache,
        do_sample=False,
        max_new_tokens=new,
        return_dict_in_generate=True,
        output_logits=True,
        **kwargs,
    )


def assert_same(ours: Any, theirs: Any, tolerance: float = 1e-4) -> None:
    """The same tokens, from logits that agree to `tolerance`."""
    assert ours.sequences.tolist() == theirs.sequences.tolist()
    for a, b in zip(ours.logits, theirs.logits, strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=0)
