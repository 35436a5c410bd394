"""Held bytes are the allocator's, read bytes are what attention was given."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import tiny_models as models
import torch
from generation import greedy, left_padded, tokens
from reachable import reachable_bytes
from torch import Tensor

import kvcomp.cache.reader
from kvcomp import CompressedCache, KvcompError, Stack
from kvcomp.integrations.huggingface.masks import _read_masks
from kvcomp.layout import SUMMARY, round_up
from kvcomp.ledger import storage_bytes
from kvcomp.stages import Summaries

STACKS = (
    "none",
    "kivi(bits=2)",
    "int(bits=4, basis=hadamard)",
    "window(sinks=4, recent=32) + snapkv(keep=0.5) + kivi(bits=4) + quest(pages=4)",
    "streaming(recent=256) + int(bits=8)",
)
pytestmark = pytest.mark.filterwarnings("ignore:.*same redundancy")


def adapted(cache: CompressedCache) -> list[Tensor]:
    """What codecs hold of each stream."""
    return [tensor for layer in cache._compressed() for tensor in layer.store.codec.adapted()]


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3next"])
@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("length", [1, 100, 5000])
def test_held_is_what_the_allocator_holds(name: str, stack: str, length: int) -> None:
    model = models.make(name, num_hidden_layers=2, layer_types=None if name == "llama" else _mixed(name))
    cache = CompressedCache(stack, model)
    ids = tokens(1, length)
    with torch.no_grad():
        model(ids, past_key_values=cache, logits_to_keep=1)
        assert cache.memory().held == reachable_bytes(cache)
        for i in range(70):
            model(tokens(1, 1, seed=i), past_key_values=cache)
    memory = cache.memory()
    assert memory.held == reachable_bytes(cache)
    assert memory.held == sum(memory.parts.values())
    assert "pending" not in memory.parts


def _mixed(name: str) -> list[str]:
    return ["linear_attention" if name == "qwen3next" else "sliding_attention", "full_attention"]


def test_held_counts_padded_batches_and_copies() -> None:
    model = models.make("llama")
    cache = CompressedCache("kivi(bits=4, group=16) + window(recent=16)", model)
    ids, mask = left_padded([65, 80, 41])
    greedy(model, ids, cache, new=5, attention_mask=mask)
    assert cache.memory().held == reachable_bytes(cache)
    cache.reorder_cache(torch.tensor([1, 1, 0]))
    assert cache.memory().held == reachable_bytes(cache)


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("length", [40, 700])
def test_effective_bits_foretell_the_held_bytes(stack: str, length: int) -> None:
    model = models.make("llama")
    cache = CompressedCache(stack, model)
    with torch.no_grad():
        model(tokens(1, length), past_key_values=cache)
    told = Stack.parse(stack).effective_bits(head_dim=16, tokens=length, dtype=torch.float32, layers=4)
    shared = cache.memory().parts.get("constants", 0) - storage_bytes(adapted(cache))
    constants = 8 * shared / (4 * 2 * 2 * 16 * length)
    assert cache.memory().effective_bits - constants == pytest.approx(told, rel=2e-3)


@pytest.mark.parametrize("stack", STACKS)
def test_read_is_what_attention_was_handed(stack: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.make("llama")
    cache = CompressedCache(stack, model)
    with torch.no_grad():
        model(tokens(1, 700), past_key_values=cache)
    handed = {"pages": 0, "exact": 0, "summaries": 0}
    reader = kvcomp.cache.reader
    real_pages, real_chosen, real_tokens = reader.attend_pages, reader.attend_chosen, reader.attend_tokens

    def count(counts: Tensor, layout: Any, exact_tokens: Any) -> None:
        handed["exact"] += 0 if exact_tokens is None else exact_tokens.nbytes
        body = sum(round_up(f.nbytes, 16) for f in layout.fields if not f.name.startswith(SUMMARY))
        handed["pages"] += int(counts.sum()) * body

    def pages(q: Tensor, pool: Tensor, ids: Tensor, counts: Tensor, layout: Any, *rest: Any, **options: Any) -> Any:
        count(counts, layout, rest[4])
        return real_pages(q, pool, ids, counts, layout, *rest, **options)

    def chosen(q: Tensor, pool: Tensor, ids: Tensor, places: Tensor, valid: Tensor, *rest: Any, **options: Any) -> Any:
        assert not options["by_tokens"]
        count(valid, rest[0], rest[5])
        return real_chosen(q, pool, ids, places, valid, *rest, **options)

    def exact(q: Tensor, tokens: Any, *rest: Any, **options: Any) -> Any:
        handed["exact"] += tokens.nbytes
        return real_tokens(q, tokens, *rest, **options)

    monkeypatch.setattr(kvcomp.cache.reader, "attend_pages", pages)
    monkeypatch.setattr(kvcomp.cache.reader, "attend_chosen", chosen)
    monkeypatch.setattr(kvcomp.cache.reader, "attend_tokens", exact)
    for layer in cache._compressed():
        selector = layer.plan.selector
        if selector is not None:
            monkeypatch.setattr(
                type(selector),
                "select",
                _counting(type(selector).select, handed),
            )
    with torch.no_grad():
        model(tokens(1, 1), past_key_values=cache)
    parts = cache.traffic().parts
    assert parts.get("pages", 0) == handed["pages"]
    assert parts.get("sinks", 0) + parts.get("window", 0) == handed["exact"]
    assert parts.get("summaries", 0) == handed["summaries"]
    tables = sum(layer.store.table.ids().nbytes for layer in cache._compressed())
    assert parts.get("table", 0) == tables
    constants = storage_bytes(adapted(cache)) if handed["pages"] else 0  # bases that fit their stream
    assert parts.get("constants", 0) == constants
    assert (constants > 0) == ("klt" in stack)
    assert cache.traffic().read == sum(handed.values()) + tables + constants
    assert cache.traffic().dense == 701 * 4 * 2 * 2 * 16 * 4


def _counting(select: Any, handed: dict[str, int]) -> Any:
    if hasattr(select, "counted"):
        return select

    def wrapped(self: Any, q: Tensor, scale: float, held: Summaries) -> Any:
        handed["summaries"] += sum(field.nbytes for field in held.fields.values())
        return select(self, q, scale, held)

    wrapped.counted = True
    return wrapped


def test_quest_reads_less_than_it_holds() -> None:
    model = models.make("llama")
    some, all_ = (CompressedCache(f"int(bits=8) + quest(pages={n}, dense_layers=1)", model) for n in (4, 1000))
    ids = tokens(1, 1000)
    for cache in (some, all_):
        greedy(model, ids, cache, new=2)
    assert some.memory() == all_.memory()
    assert some.traffic().read < 0.5 * all_.traffic().read


def test_report_tells_the_figures() -> None:
    model = models.make("llama")
    cache = CompressedCache("kivi(bits=2)", model)
    with pytest.raises(KvcompError, match="no decode step"):
        cache.traffic()
    greedy(model, tokens(1, 600), cache, new=2)
    report = cache.report()
    assert "kivi(bits=2)" in report
    assert f"{cache.memory().ratio:.2f}x" in report
    assert f"{cache.traffic().ratio:.2f}x" in report


def test_little_context_is_told_honestly() -> None:
    """A window larger than the context saves nothing, and the figures say so."""
    model = models.make("llama")
    cache = CompressedCache("kivi(bits=2)", model)
    with torch.no_grad():
        model(tokens(1, 20), past_key_values=cache)
    assert cache.memory().ratio < 1
    assert cache.memory().effective_bits > 32


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_masks_are_not_kept_alive(implementation: str) -> None:
    """What a forward learns of its mask is shared by the layers, and gone with the mask."""
    model = models.make("llama", implementation)
    ids, mask = left_padded([40, 60])
    for options in ({}, {"prefill_chunk_size": 16}):
        greedy(model, ids, CompressedCache("none", model), new=5, attention_mask=mask, **options)
        gc.collect()
        assert len(_read_masks) == 0
