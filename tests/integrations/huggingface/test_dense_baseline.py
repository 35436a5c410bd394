"""`none` is the dense cache: the same greedy tokens as DynamicCache, on every architecture and in every way to
generate."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import tiny_models as models
import torch
from generation import assert_same, greedy, left_padded, tokens
from transformers import DynamicCache, PreTrainedModel

from kvcomp import CompressedCache

IDS = tokens(1, 80)
PADDED, MASK = left_padded([65, 80, 9])
STACKS = ("none", "window(sinks=2, recent=20)", "window(sinks=0, recent=0)")
NewCache = Callable[[PreTrainedModel], Any]


def plain(model: PreTrainedModel, cache: NewCache) -> Any:
    return greedy(model, IDS, cache(model))


def padded(model: PreTrainedModel, cache: NewCache) -> Any:
    return greedy(model, PADDED, cache(model), attention_mask=MASK)


def chunked(model: PreTrainedModel, cache: NewCache) -> Any:
    return greedy(model, PADDED, cache(model), attention_mask=MASK, prefill_chunk_size=16)


def two_turns(model: PreTrainedModel, cache: NewCache) -> Any:
    state = cache(model)
    first = greedy(model, IDS, state, new=6)
    return greedy(model, torch.cat([first.sequences, IDS[:, :9]], 1), state, new=6)


def beams(model: PreTrainedModel, cache: NewCache) -> Any:
    return greedy(model, PADDED, cache(model), attention_mask=MASK, num_beams=3)


def prompt_lookup(model: PreTrainedModel, cache: NewCache) -> Any:
    return greedy(model, IDS.repeat(1, 2), cache(model), new=24, prompt_lookup_num_tokens=4)


def deep_copy(model: PreTrainedModel, cache: NewCache) -> Any:
    """The copy goes on by itself, after the original went elsewhere."""
    state = cache(model)
    first = greedy(model, IDS, state, new=4)
    twin = copy.deepcopy(state)
    greedy(model, torch.cat([first.sequences, IDS[:, 40:60]], 1), state, new=20)
    return greedy(model, torch.cat([first.sequences, IDS[:, :5]], 1), twin, new=6)


SCENARIOS = (plain, padded, chunked, two_turns, beams, prompt_lookup, deep_copy)
CASES = [
    pytest.param(name, implementation, scenario, id=f"{name}-{implementation}-{scenario.__name__}")
    for name in models.NAMES
    for implementation in ("sdpa", "eager")
    for scenario in SCENARIOS
    if not (implementation == "sdpa" and name in models.EAGER_ONLY)
    # transformers itself refuses assisted generation with recurrent state
    if not (name == "qwen3next" and scenario is prompt_lookup)
]


@pytest.mark.parametrize(("name", "implementation", "scenario"), CASES)
@pytest.mark.filterwarnings("ignore:.*nothing is compressed", "ignore:.*as dense tensors")
def test_same_as_dynamic_cache(name: str, implementation: str, scenario: Callable[..., Any]) -> None:
    expected = scenario(models.make(name, implementation), lambda m: DynamicCache(config=m.config))
    for stack in STACKS:
        ours = scenario(models.make(name, implementation), lambda m, s=stack: CompressedCache(s, m))
        assert_same(ours, expected)


@pytest.mark.parametrize("name", models.NAMES)
@pytest.mark.filterwarnings("ignore:.*nothing is compressed")
def test_hooked_model_works_with_other_caches(name: str) -> None:
    implementation = "eager" if name in models.EAGER_ONLY else "sdpa"
    model, untouched = models.make(name, implementation), models.make(name, implementation)
    CompressedCache("none", model)
    for scenario in (padded, chunked, two_turns):
        dynamic = [scenario(m, lambda m: DynamicCache(config=m.config)) for m in (model, untouched)]
        assert_same(*dynamic)
    with torch.no_grad():
        a, b = (m(PADDED, attention_mask=MASK, use_cache=False).logits[MASK.bool()] for m in (model, untouched))
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_detach_restores_the_model(name: str) -> None:
    model = models.make(name)
    before = model.config._attn_implementation
    cache = CompressedCache("none", model)
    assert model.config._attn_implementation != before
    cache.detach()
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_inside_a_compiled_forward(name: str) -> None:
    expected = padded(models.make(name), lambda m: DynamicCache(config=m.config))
    model = models.make(name)
    model.forward = torch.compile(model.forward, backend="eager", dynamic=True)
    assert_same(padded(model, lambda m: CompressedCache("none", m)), expected)
    torch._dynamo.reset()


def test_logical_lengths_feed_exactly_the_new_tokens() -> None:
    model = models.make("qwen3")
    cache = CompressedCache("window(sinks=2, recent=8) + snapkv(budget=24, window=8) + kivi(bits=4, group=16)", model)
    first = greedy(model, IDS, cache, new=6)
    fed: list[tuple[int, int]] = []
    hook = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: fed.append((kwargs["input_ids"].shape[1], int(kwargs["position_ids"][0, 0]))),
        with_kwargs=True,
    )
    greedy(model, torch.cat([first.sequences, IDS[:, :9]], 1), cache, new=2)
    hook.remove()
    # 80 + 6 tokens, of which the last was never fed; 9 new ones and that one are due
    assert fed == [(10, 85), (1, 95)]
