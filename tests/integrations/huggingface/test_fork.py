"""One prefill, many continuations: a fork generates what a fresh cache would, to the last bit, and shares its pages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_models as models
import torch
from generation import greedy, left_padded, tokens
from reachable import reachable_bytes
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from kvcomp import CompressedCache, Memory, prefill
from kvcomp.integrations.huggingface import memory_of

WINDOW = " + window(sinks=2, recent=16)"
STACKS = (
    "none" + WINDOW,
    "kivi(bits=4)" + WINDOW,
    "klt(bits=2)" + WINDOW,
    "snapkv(keep=0.5) + kivi(bits=4)" + WINDOW,
    "adakv(keep=0.5) + int(bits=4)" + WINDOW,
    "streaming(recent=48) + kivi(bits=4)",
    "h2o(budget=100) + kivi(bits=4)" + WINDOW,
    "quest(pages=3, dense_layers=0) + turboquant(bits=2.5)" + WINDOW,
)
DOCUMENT = tokens(1, 250)
pytestmark = pytest.mark.filterwarnings("ignore:.*same redundancy", "ignore:.*dense tensors")


def filled(model: PreTrainedModel, stack: str, document: Tensor = DOCUMENT) -> CompressedCache:
    cache = CompressedCache(stack, model)
    prefill(model, document, [cache])
    return cache


def asked(seed: int, document: Tensor = DOCUMENT) -> Tensor:
    return torch.cat([document, tokens(1, 9, seed=seed)], 1)


def assert_equal(ours: Any, theirs: Any) -> None:
    assert ours.sequences.tolist() == theirs.sequences.tolist()
    for a, b in zip(ours.logits, theirs.logits, strict=True):
        assert torch.equal(a, b)


def forward(model: PreTrainedModel, cache: CompressedCache, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids, past_key_values=cache).logits


def capacities(cache: CompressedCache) -> list[int]:
    return [layer.store.pool.capacity for layer in cache._compressed()]


# -- generation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stack", STACKS)
def test_forks_and_their_original_generate_as_fresh_caches_do(stack: str) -> None:
    model = models.make("qwen3", num_hidden_layers=2)
    cache, new = filled(model, stack), 60
    forks = [cache.fork() for _ in range(2)]
    outputs = [greedy(model, asked(seed), fork, new) for seed, fork in zip((5, 6), forks, strict=True)]
    outputs.append(greedy(model, asked(7), cache, new))  # the original, after what its forks did
    for seed, output in zip((5, 6, 7), outputs, strict=True):
        assert_equal(output, greedy(model, asked(seed), filled(model, stack), new))
    for x, output in zip((*forks, cache), outputs, strict=True):  # and each goes on
        again = torch.cat([output.sequences, tokens(1, 5, seed=8)], 1)
        x.fork()
        assert greedy(model, again, x, 20).sequences.shape[1] == again.shape[1] + 20


@pytest.mark.parametrize("name", ["gemma3", "gptoss", "qwen3next"])
@pytest.mark.parametrize("stack", [STACKS[1], STACKS[3]])
def test_layers_of_the_librarys_own_are_copied(name: str, stack: str) -> None:
    model = models.make(name, "eager" if name in models.EAGER_ONLY else "sdpa")
    cache = filled(model, stack)
    fork = cache.fork()
    assert_equal(greedy(model, asked(5), fork), greedy(model, asked(5), filled(model, stack)))
    assert_equal(greedy(model, asked(6), cache), greedy(model, asked(6), filled(model, stack)))


@pytest.mark.parametrize("stack", STACKS)
def test_forks_take_turns(stack: str) -> None:
    model = models.make("qwen3", num_hidden_layers=2)
    caches, fresh = [filled(model, stack)], [filled(model, stack) for _ in range(3)]
    caches.append(caches[0].fork())
    caches.append(caches[1].fork())  # a fork of a fork
    for i in range(60):
        for j, (ours, theirs) in enumerate(zip(caches, fresh, strict=True)):
            step = tokens(1, 1, seed=3 * i + j)
            assert torch.equal(forward(model, ours, step), forward(model, theirs, step))


@pytest.mark.parametrize("prompt", [2, 12, 20])
def test_klt_fits_each_fork_to_its_own_tokens(prompt: int) -> None:
    """The prompt is too short for a page: nothing is fitted yet when the cache forks."""
    model, stack = models.make("qwen3", num_hidden_layers=2), "klt(bits=2)" + WINDOW
    document = tokens(1, prompt)
    cache = filled(model, stack, document)
    assert all(layer.store.table.longest == 0 for layer in cache._compressed())
    caches = [cache, cache.fork(), cache.fork()]
    for seed, x in enumerate(caches):
        ids = torch.cat([document, tokens(1, 150, seed=seed)], 1)
        assert_equal(greedy(model, ids, x), greedy(model, ids, filled(model, stack, document)))
    bases = [x._compressed()[0].store.codec.k_grid.dual for x in caches]
    assert not torch.equal(bases[0], bases[1])
    assert not torch.equal(bases[1], bases[2])


def test_rows_of_one_fork_are_not_those_of_another() -> None:
    model, stack = models.make("qwen3", num_hidden_layers=2), STACKS[4]
    ids, mask = left_padded([165, 180, 141])

    def one() -> tuple[CompressedCache, Tensor]:
        cache = CompressedCache(stack, model)
        return cache, greedy(model, ids, cache, 20, attention_mask=mask).sequences

    (cache, so_far), (fresh, _) = one(), one()
    fork, second = cache.fork(), cache.fork()
    fork.batch_select_indices(torch.tensor([2]))
    second.reorder_cache(torch.tensor([1, 1, 0]))
    cache.fork().batch_repeat_interleave(3)
    longer = F.pad(mask, (0, 20), value=1)
    alone = greedy(model, so_far[2:], fork, 40, attention_mask=longer[2:])
    ours, theirs = (greedy(model, so_far, x, 40, attention_mask=longer) for x in (cache, fresh))
    assert_equal(ours, theirs)
    assert alone.sequences.tolist() == ours.sequences[2:].tolist()
    assert (fork.batch_size, second.batch_size, cache.batch_size) == (1, 3, 3)


def test_crop_and_reset_of_a_fork() -> None:
    model, stack = models.make("qwen3", num_hidden_layers=2), STACKS[0]
    cache, fresh = filled(model, stack), filled(model, stack)
    fork, other = cache.fork(), cache.fork()
    fork.crop(-100)  # deep into pages that all share
    fresh.crop(-100)
    other_question = asked(5, DOCUMENT[:, :150])
    assert_equal(greedy(model, other_question, fork), greedy(model, other_question, fresh))
    other.reset()
    assert other.get_seq_length() == 0
    assert_equal(greedy(model, asked(6), other), greedy(model, asked(6), CompressedCache(stack, model)))
    pools = {id(x._compressed()[0].store.pool) for x in (cache, fork, other)}
    assert len(pools) == 2
    assert_equal(greedy(model, asked(7), cache), greedy(model, asked(7), filled(model, stack)))


def test_a_chunk_that_is_not_committed_yet_is_carried_over() -> None:
    model, stack = models.make("qwen3", num_hidden_layers=2), STACKS[1]
    cache, fresh = CompressedCache(stack, model), CompressedCache(stack, model)
    for x in (cache, fresh):
        x.activate_past_recording()
        forward(model, x, DOCUMENT)
        forward(model, x, tokens(1, 40, seed=3))
    fork = cache.fork()
    fork.crop(-35)
    forward(model, fork, tokens(1, 40, seed=4))
    for x in (cache, fresh):
        x.crop(-20)  # more than the window holds
    step = tokens(1, 40, seed=5)
    assert torch.equal(forward(model, cache, step), forward(model, fresh, step))
    assert (fork.get_seq_length(), cache.get_seq_length()) == (295, 310)


def test_an_empty_cache() -> None:
    model = models.make("gemma3")
    cache = CompressedCache(STACKS[1], model, max_tokens=300)
    fork = cache.fork()
    assert fork.stack == cache.stack
    assert_equal(greedy(model, DOCUMENT, fork), greedy(model, DOCUMENT, CompressedCache(STACKS[1], model)))
    assert cache.get_seq_length() == 0
    assert [layer.max_tokens for layer in fork._compressed()] == [300, 300]


def test_a_saved_fork(tmp_path: Path) -> None:
    model, stack = models.make("qwen3", num_hidden_layers=2), STACKS[3]
    cache = filled(model, stack)
    forks = [cache.fork() for _ in range(3)]
    outputs = [greedy(model, asked(seed), fork, 60) for seed, fork in zip((5, 6, 7), forks, strict=True)]
    cache.save(tmp_path / "document.kv")
    forks[1].save(tmp_path / "fork.kv")
    filled(model, stack).save(tmp_path / "fresh.kv")
    assert (tmp_path / "document.kv").stat().st_size == (tmp_path / "fresh.kv").stat().st_size
    ids = torch.cat([outputs[1].sequences, tokens(1, 9, seed=8)], 1)
    loaded = greedy(model, ids, CompressedCache.load(tmp_path / "fork.kv", model), 60)
    assert_equal(loaded, greedy(model, ids, forks[1], 60))


# -- memory -----------------------------------------------------------------------------------------------------------


def test_ten_forks_hold_little_more_than_one_cache() -> None:
    model = models.make("qwen3", num_hidden_layers=2)
    document = tokens(1, 8000)
    cache = filled(model, "kivi(bits=4, group=16) + window(recent=16)", document)
    alone = cache.memory()
    forks = [cache.fork() for _ in range(10)]
    together = memory_of([cache, *forks])
    assert together.held == sum(together.parts.values()) == reachable_bytes([cache, forks])
    assert together.held < 1.5 * alone.held
    assert together.dense == 11 * alone.dense
    assert together.parts["pages"] == alone.parts["pages"]
    for seed, fork in enumerate(forks):
        greedy(model, asked(seed, document), fork, 20)
    together = memory_of([cache, *forks])
    assert together.held == reachable_bytes([cache, forks]) < 1.5 * alone.held
    assert together.effective_bits < alone.effective_bits / 5


@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_memory_of_caches_that_share_nothing_is_their_sum(name: str) -> None:
    model = models.make(name)
    caches = [filled(model, stack) for stack in STACKS[:3]]
    both, each = memory_of(caches), [cache.memory() for cache in caches]
    matrices = sum(m.held for m in each) - both.held  # constants that all caches of a model share
    assert 0 <= matrices <= sum(m.parts.get("constants", 0) for m in each)
    assert both.dense == sum(m.dense for m in each)
    assert memory_of(caches[:1]) == each[0]
    assert memory_of([]) == Memory(0, 0, 0.0, {})


@pytest.mark.parametrize("stack", STACKS)
def test_pages_of_dropped_forks_are_used_again(stack: str) -> None:
    model = models.make("qwen3", num_hidden_layers=1)
    cache, held = filled(model, stack), []
    for seed in range(20):
        fork = cache.fork()
        greedy(model, asked(seed), fork, 50)
        held.append(capacities(cache))
    assert max(held) == max(held[:3])
    assert_equal(greedy(model, asked(21), cache, 50), greedy(model, asked(21), filled(model, stack), 50))
