"""Caches decoded as the rows of one batch: each is as if it had been alone."""

from __future__ import annotations

import pytest
import tiny_models as models
import torch
from generation import tokens

from kvcomp import CompressedCache, prefill
from kvcomp.integrations.huggingface.lockstep import can_step_apart, can_step_together, lockstep

STACKS = (
    "none",
    "kivi(bits=2, group=16) + window(recent=16)",
    "streaming(sinks=2, recent=16, chunk=24) + int(bits=8)",
    "snapkv(budget=24, window=8) + int(bits=8)",
    "none + quest(pages=3, dense_layers=0)",
    "none",
)
QUANTIZED = ("none", "int(bits=4)", "int(bits=2, group=8)")


@pytest.mark.parametrize("name", ["llama", "gemma3", "gptoss", "deepseek"])
def test_each_row_is_as_if_alone(name: str) -> None:
    model = models.make(name, "eager" if name in models.EAGER_ONLY else "sdpa")
    stacks = QUANTIZED if name == "deepseek" else STACKS
    ids = tokens(1, 80)
    together, alone = ([CompressedCache(stack, model) for stack in stacks] for _ in range(2))
    for caches in (together, alone):
        prefill(model, ids, caches)
    assert all(can_step_together(cache) for cache in together)
    batch, fed = lockstep(together), tokens(len(stacks), 30, seed=3)
    with torch.no_grad():
        for at in range(30):
            rows = model(fed[:, at : at + 1], past_key_values=batch).logits[:, -1]
            each = [model(fed[i : i + 1, at : at + 1], past_key_values=c).logits[0, -1] for i, c in enumerate(alone)]
            torch.testing.assert_close(rows, torch.stack(each), rtol=1e-4, atol=1e-4)
    for one, other in zip(together, alone, strict=True):
        assert one.memory() == other.memory()
        assert one.traffic() == other.traffic()
    assert torch.unique(rows, dim=0).shape[0] > 1


def test_recurrent_layers_step_alone() -> None:
    assert not can_step_together(CompressedCache("none", models.make("qwen3next")))


@pytest.mark.parametrize(
    ("name", "attention"), [("llama", "sdpa"), ("llama", "eager"), ("deepseek", "sdpa"), ("deepseek", "eager")]
)
def test_rows_of_other_lengths_are_as_if_alone(name: str, attention: str) -> None:
    model = models.make(name, attention)
    stacks = QUANTIZED if name == "deepseek" else STACKS
    lengths = [37 + 29 * i for i in range(len(stacks))]
    together, alone = ([CompressedCache(stack, model) for stack in stacks] for _ in range(2))
    for caches in (together, alone):
        for cache, length in zip(caches, lengths, strict=True):
            prefill(model, tokens(1, length, seed=length), [cache])
    assert all(can_step_apart(model, cache) for cache in together)
    batch, fed = lockstep(together), tokens(len(stacks), 30, seed=3)
    with torch.no_grad():
        for at in range(30):
            places = torch.tensor(lengths)[:, None] + at
            rows = model(fed[:, at : at + 1], position_ids=places, past_key_values=batch).logits[:, -1]
            each = [model(fed[i : i + 1, at : at + 1], past_key_values=c).logits[0, -1] for i, c in enumerate(alone)]
            torch.testing.assert_close(rows, torch.stack(each), rtol=1e-4, atol=1e-4)
    for one, other in zip(together, alone, strict=True):
        assert one.get_seq_length() == other.get_seq_length()
        assert one.memory() == other.memory()
        assert one.traffic() == other.traffic()


@pytest.mark.parametrize("name", ["gemma3", "gptoss", "qwen3next"])
def test_layers_with_masks_of_their_own_need_rows_of_one_length(name: str) -> None:
    model = models.make(name, "eager" if name in models.EAGER_ONLY else "sdpa")
    assert not can_step_apart(model, CompressedCache("int(bits=4)", model))


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_frequencies_that_follow_the_longest_row_need_rows_of_one_length(kind: str) -> None:
    model = models.make("llama")
    cache = CompressedCache("none", model)
    assert can_step_apart(model, cache)
    model.config.rope_parameters = {"rope_type": kind, "rope_theta": 10000.0, "factor": 2.0}
    assert not can_step_apart(model, cache)
