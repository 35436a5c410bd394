"""A preallocated cache gives the text of the one that grows, in steps that graphs take whole and use again."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import tiny_models as models
import torch
from generation import assert_same, greedy, left_padded, tokens
from reachable import reachable_bytes
from torch import Tensor
from torch._dynamo import lookup_backend
from torch._dynamo.utils import counters
from transformers import CompileConfig, DynamicCache, PreTrainedModel, StaticCache

from kvcomp import CompressedCache, KvcompError, UnsupportedError, prefill

STACKS = (
    "none",
    "int(bits=4, group=16)",
    "kivi(bits=4, group=16) + window(recent=16)",
    "turboquant(bits=4) + window(sinks=4, recent=16)",
    "snapkv(budget=32, window=8) + kivi(bits=4, group=16) + window(recent=16)",
)
IDS, MASK = left_padded([65, 80, 41])
ALONE = tokens(1, 50)
NEW = 100


@pytest.fixture
def model() -> Iterator[PreTrainedModel]:
    """With no graphs of other tests."""
    torch._dynamo.reset()
    counters.clear()
    yield models.make("llama", num_hidden_layers=2)
    torch._dynamo.reset()


def compiled(backend: str = "aot_eager") -> dict[str, Any]:
    """Options of `generate` that compile steps here as on an accelerator, or fail."""
    config = CompileConfig(fullgraph=True, backend=backend, mode=None)
    config._compile_all_devices = True
    return {"compile_config": config}


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("stack", STACKS)
def test_the_text_is_that_of_a_cache_that_grows(stack: str, implementation: str) -> None:
    model = models.make("llama", implementation, num_hidden_layers=2)
    for ids, given in ((ALONE, {}), (IDS, {"attention_mask": MASK}), (tokens(2, 1), {})):
        expected = greedy(model, ids, CompressedCache(stack, model), new=NEW, **given)
        cache = CompressedCache(stack, model, preallocate=ids.shape[1] + NEW - 1)  # the last token is not fed
        assert_same(greedy(model, ids, cache, new=NEW, **given), expected, tolerance=1e-5)
        assert all(layer.preallocated.pages.any() for layer in cache.layers)


def _without_numbers(module: torch.fx.GraphModule, inputs: Any) -> Any:
    """A backend for graphs in which the host waits for no number."""
    for node in module.graph.nodes:
        assert node.target not in ("item", "tolist", "nonzero", "__bool__", "__int__"), node
    return lookup_backend("aot_eager")(module, inputs)


@pytest.mark.parametrize("stack", [STACKS[2], STACKS[4]])
def test_one_graph_for_all_steps(model: PreTrainedModel, stack: str) -> None:
    ids, steps = tokens(2, 50), 220
    expected = greedy(model, ids, CompressedCache(stack, model), new=steps).sequences[:, 50:]
    cache = CompressedCache(stack, model, preallocate=300)
    step = torch.compile(model.forward, fullgraph=True, backend=_without_numbers)
    with torch.no_grad():
        found = [model(ids, past_key_values=cache).logits[:, -1:].argmax(-1)]
        while len(found) < steps:
            found.append(step(found[-1], past_key_values=cache).logits[:, -1:].argmax(-1))
    assert torch.equal(torch.cat(found, 1), expected)
    assert graphs() == 1
    assert not counters["graph_break"]


def test_learned_sinks(model: PreTrainedModel) -> None:
    model = models.make("gptoss", "eager", num_hidden_layers=2, layer_types=["full_attention"] * 2)
    given = {"new": 20, "attention_mask": MASK}
    expected = greedy(model, IDS, CompressedCache(STACKS[2], model), **given)
    cache = CompressedCache(STACKS[2], model, preallocate=100)
    assert_same(greedy(model, IDS, cache, **given, **compiled("eager")), expected)
    assert graphs() == 1


def _conversation(model: PreTrainedModel, cache: Any, **options: Any) -> Tensor:
    """Two turns of a padded batch, the second one's prompt after the first one's answer."""
    first = greedy(model, IDS, cache, new=40, attention_mask=MASK, **options).sequences
    ids = torch.cat([first, tokens(3, 20, seed=9)], 1)
    mask = torch.cat([MASK, torch.ones(3, 60, dtype=MASK.dtype)], 1)
    return greedy(model, ids, cache, new=40, attention_mask=mask, **options).sequences


@pytest.mark.parametrize("stack", STACKS[2:])
def test_generate_compiles_once(model: PreTrainedModel, stack: str) -> None:
    """Turns and, after `reset`, other conversations use the same graph."""
    expected = _conversation(model, CompressedCache(stack, model))
    cache = CompressedCache(stack, model, preallocate=200)
    for _ in range(2):
        assert torch.equal(_conversation(model, cache, **compiled()), expected)
        cache.reset()
    assert graphs() == 1
    assert not counters["graph_break"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("stack", STACKS)
def test_generate_records_cuda_graphs(model: PreTrainedModel, stack: str) -> None:
    """As it does by itself on accelerators."""
    model.cuda()
    ids, given = IDS.cuda(), {"attention_mask": MASK.cuda(), "new": 60}
    expected = greedy(model, ids, CompressedCache(stack, model), **given).sequences
    cache = CompressedCache(stack, model, preallocate=200)
    for _ in range(2):
        assert torch.equal(greedy(model, ids, cache, **given).sequences, expected)
        cache.reset()
    assert graphs() == 1


@pytest.mark.slow
def test_generate_by_inductor(model: PreTrainedModel) -> None:
    stack = STACKS[2]
    expected = _conversation(model, CompressedCache(stack, model))
    cache = CompressedCache(stack, model, preallocate=200)
    assert torch.equal(_conversation(model, cache, **compiled("inductor")), expected)
    assert graphs() == 1


def _in_chunks(model: PreTrainedModel, cache: CompressedCache, **options: Any) -> list[list[int]]:
    given = {"attention_mask": MASK, "prefill_chunk_size": 32}
    found: list[list[int]] = greedy(model, IDS, cache, new=30, **given, **options).sequences.tolist()
    return found


def test_a_prompt_in_chunks(model: PreTrainedModel) -> None:
    expected = _in_chunks(model, CompressedCache(STACKS[2], model))
    assert _in_chunks(model, CompressedCache(STACKS[2], model, preallocate=120)) == expected


@pytest.mark.slow
def test_chunks_that_generate_compiles(model: PreTrainedModel) -> None:
    """They break graphs."""
    options: dict[str, Any] = compiled()
    options["compile_config"].fullgraph = False
    expected = _in_chunks(model, CompressedCache(STACKS[2], model))
    assert _in_chunks(model, CompressedCache(STACKS[2], model, preallocate=120), **options) == expected


def test_only_then_it_is_compileable(model: PreTrainedModel) -> None:
    assert CompressedCache("none", model, preallocate=10).is_compileable
    assert not CompressedCache("none", model).is_compileable


# -- what else a cache can do ------------------------------------------------------------------------------------------


def _continued(model: PreTrainedModel, start: Tensor, cache: Any) -> list[list[int]]:
    mask = torch.cat([MASK, torch.ones(3, start.shape[1] - MASK.shape[1], dtype=MASK.dtype)], 1)
    found: list[list[int]] = greedy(model, start, cache, new=40, attention_mask=mask).sequences.tolist()
    return found


def test_copies_forks_and_files_go_on_by_themselves(model: PreTrainedModel, tmp_path: Path) -> None:
    stack, path = STACKS[2], tmp_path / "cache.safetensors"
    cache = CompressedCache(stack, model, preallocate=160)
    start = greedy(model, IDS, cache, new=30, attention_mask=MASK).sequences
    fork, copied = cache.fork(), deepcopy(cache)
    cache.save(path)
    loaded = CompressedCache.load(path, model, preallocate=160)
    grows = CompressedCache.load(path, model)
    expected = _continued(model, start, grows)
    for other in (fork, copied, loaded, cache):
        assert other.is_compileable
        assert isinstance(other.get_seq_length(), Tensor)  # the next step may be a graph's
        assert _continued(model, start, other) == expected


def test_beams_and_crops(model: PreTrainedModel) -> None:
    caches = CompressedCache(STACKS[2], model), CompressedCache(STACKS[2], model, preallocate=130)
    options = {"attention_mask": MASK, "num_beams": 3, "do_sample": False, "max_new_tokens": 40}
    grown, found = (model.generate(IDS, past_key_values=cache, **options) for cache in caches)
    assert torch.equal(found, grown)
    for cache in caches:
        cache.crop(-3)
    assert int(caches[1].get_seq_length()) == caches[0].get_seq_length()
    assert caches[1].memory().dense == caches[0].memory().dense


def test_a_shared_prefill(model: PreTrainedModel) -> None:
    ids, options = torch.cat([IDS, tokens(3, 1)], 1), {"new": 30}
    mask = torch.cat([MASK, torch.ones(3, 1, dtype=MASK.dtype)], 1)
    caches = [CompressedCache(STACKS[4], model), CompressedCache(STACKS[4], model, preallocate=120)]
    prefill(model, IDS, caches, MASK)
    grown, found = (greedy(model, ids, cache, attention_mask=mask, **options).sequences for cache in caches)
    assert torch.equal(found, grown)


# -- accounting --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stack", [*STACKS[:3], STACKS[4]])
def test_room_counts_as_held_from_the_start(model: PreTrainedModel, stack: str) -> None:
    cache, grows = CompressedCache(stack, model, preallocate=200), CompressedCache(stack, model)
    assert cache.memory().held == reachable_bytes(cache) == 0
    held = []
    for new in (1, 50, 63):
        for each in (cache, grows):
            each.reset()
            greedy(model, IDS, each, new=new, attention_mask=MASK)
        memory = cache.memory()
        assert memory.held == reachable_bytes(cache) == sum(memory.parts.values())
        assert memory.dense == grows.memory().dense
        held.append(memory.held - memory.parts["history"])
    assert held[0] == held[1] == held[2]
    assert cache.memory().parts["pages"] == grows.memory().parts["pages"]
    assert cache.traffic().dense == grows.traffic().dense
    assert cache.traffic().parts == grows.traffic().parts  # nothing was settled in the last step
    assert f"tokens  {80 + 62} x 3 rows" in cache.report()
    cache.reset()
    assert cache.memory().held == reachable_bytes(cache)


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stack", "words"),
    [
        ("streaming(recent=64)", "streaming lets pages go while decoding"),
        ("snapkv(budget=64, hold=true)", "snapkv lets pages go while decoding"),
        ("quest(pages=4, dense_layers=0) + int(bits=4)", "quest chooses pages on the host"),
    ],
)
def test_stages_that_decide_while_decoding(model: PreTrainedModel, stack: str, words: str) -> None:
    with pytest.raises(UnsupportedError, match=f"preallocate=90: {words}"):
        CompressedCache(stack, model, preallocate=90)


@pytest.mark.parametrize("name", ["gemma3", "qwen3next", "deepseek", "deepseek32"])
def test_models_with_other_layers(name: str) -> None:
    with pytest.raises(UnsupportedError, match="other layers than full attention"):
        CompressedCache("none", models.make(name), preallocate=90)


def test_room_that_cannot_be(model: PreTrainedModel) -> None:
    for tokens_, words in ((0, "positive"), (8193, "at most the model's max_position_embeddings=8192")):
        with pytest.raises(KvcompError, match=words):
            CompressedCache("none", model, preallocate=tokens_)


def test_more_tokens_than_room(model: PreTrainedModel) -> None:
    cache = CompressedCache("none", model, preallocate=60)
    with pytest.raises(KvcompError, match="61 tokens exceed preallocate=60"):
        greedy(model, tokens(1, 61), cache)
    cache.reset()
    greedy(model, ALONE, cache, new=11)
    for options in ({}, compiled()):
        with pytest.raises(KvcompError, match="room for preallocate=60 tokens per row"):
            greedy(model, tokens(1, 61), cache, new=2, **options)
        assert int(cache.get_seq_length()) == 60  # as if it had not been asked


def test_a_mask_that_hides_what_is_cached(model: PreTrainedModel) -> None:
    cache = CompressedCache("none", model, preallocate=100)
    greedy(model, ALONE, cache, new=2)
    mask = torch.ones(1, 52)
    mask[0, 7] = 0
    with pytest.raises(UnsupportedError, match="hides or shows other cached tokens"), torch.no_grad():
        model(tokens(1, 1), past_key_values=cache, attention_mask=mask)


def test_what_takes_tokens_back_or_merges_them(model: PreTrainedModel) -> None:
    cache = CompressedCache("none", model, preallocate=100)
    with pytest.raises(UnsupportedError, match="assisted decoding"):
        model.generate(ALONE, past_key_values=cache, assistant_model=models.make("llama"), max_new_tokens=4)
    cache.reset()
    greedy(model, ALONE, cache, new=2)
    with pytest.raises(UnsupportedError, match="biases"):
        cache.compact((0, 40), ALONE, None)
    with pytest.raises(KvcompError, match="the cache holds 1 rows, but the batch has 2"), torch.no_grad():
        model(tokens(2, 1), past_key_values=cache)


# -- the library's own -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padded", [False, True])
def test_a_hooked_model_serves_static_caches(model: PreTrainedModel, padded: bool) -> None:
    """Their keys end with idle room, which no query may see."""
    CompressedCache("none", model)
    ids, given = (IDS, {"attention_mask": MASK}) if padded else (ALONE, {})
    found, expected = (
        greedy(model, ids, cache, new=20, **given) for cache in (StaticCache(model.config, 200), DynamicCache())
    )
    assert_same(found, expected)
