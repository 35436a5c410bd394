"""`prefill`: every cache ends up as if it had been filled alone, densely or in the chunks that its stack asks for."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import pytest
import tiny_models as models
import torch
from generation import assert_same, greedy, left_padded, tokens
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from kvcomp import CompressedCache, KvcompWarning, attention, prefill
from kvcomp.integrations.huggingface import masks
from kvcomp.integrations.huggingface.timing import Stopwatch
from kvcomp.stages import Chunk, Policy
from kvcomp.stages import registry as reg

IDS = tokens(1, 80)
PADDED, MASK = left_padded([65, 80, 9])
STACKS = (
    "none",
    "kivi(bits=2, group=16) + window(recent=16)",
    "streaming(sinks=2, recent=16, chunk=24) + int(bits=8)",
    "snapkv(budget=24, window=8) + int(bits=8)",
    "streaming(sinks=2, recent=16, chunk=1)",
)


def by_hand(model: PreTrainedModel, cache: Any, ids: Tensor, mask: Tensor | None, chunk: int | None) -> Tensor:
    """Feed ids [B, n] in chunks; logits [B, V] of the last token."""
    positions = None if mask is None else (mask.cumsum(-1) - 1).clamp_min(0)
    step = chunk or ids.shape[1]
    with torch.no_grad():
        for start in range(0, ids.shape[1], step):
            part = slice(start, start + step)
            out = model(
                ids[:, part],
                attention_mask=None if mask is None else mask[:, : start + step],
                position_ids=None if positions is None else positions[:, part],
                past_key_values=cache,
            )
    return out.logits[:, -1]


@pytest.mark.parametrize("name", ["llama", "gemma3", "gptoss", "qwen3next"])
@pytest.mark.parametrize("rows", ["one", "padded"])
def test_each_is_as_if_alone(name: str, rows: str) -> None:
    ids, mask = (IDS, None) if rows == "one" else (PADDED, MASK)
    model = models.make(name, "eager" if name in models.EAGER_ONLY else "sdpa")
    together = [CompressedCache(stack, model) for stack in STACKS]
    filled = prefill(model, ids, together, attention_mask=mask)
    more = tokens(len(ids), 1, seed=9)
    longer = None if mask is None else torch.nn.functional.pad(mask, (0, 1), value=1)
    for stack, shared, (logits, dense_s, own_s) in zip(STACKS, together, filled, strict=True):
        alone = CompressedCache(stack, model)
        theirs = by_hand(model, alone, ids, mask, alone.stack.prefill_chunk)
        torch.testing.assert_close(logits, theirs)
        assert shared.memory() == alone.memory()
        assert own_s > 0
        assert (dense_s > 0) is (alone.stack.prefill_chunk is None)
        inputs = torch.cat([ids, more], 1)
        assert_same(*(greedy(model, inputs, cache, new=6, attention_mask=longer) for cache in (shared, alone)))
        assert shared.traffic() == alone.traffic()


def test_a_prompt_of_one_chunk_is_shared() -> None:
    model = models.make("llama")
    caches = [CompressedCache(f"streaming(sinks=2, recent=16, chunk={chunk})", model) for chunk in (79, 80)]
    split, whole = prefill(model, IDS, caches)
    assert split.dense_s == 0 < whole.dense_s


def test_a_dense_prefill_builds_no_mask_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(n: int, device: torch.device) -> Tensor:
        raise AssertionError(f"a mask of {n} x {n}")

    for module in (attention, masks):
        monkeypatch.setattr(module, "causal", refuse)
    model = models.make("llama")
    prefill(model, IDS, [CompressedCache(stack, model) for stack in ("none", "kivi(bits=2)")])


def test_padded_rows_go_on_as_generate_would() -> None:
    """Positions count what is no padding, before and after the prefill."""
    model = models.make("llama")
    expected = greedy(model, PADDED, DynamicCache(config=model.config), attention_mask=MASK)
    cache = CompressedCache("none", model)
    prefill(model, PADDED[:, :-1], [cache], attention_mask=MASK[:, :-1])
    assert_same(greedy(model, PADDED, cache, attention_mask=MASK), expected)


def test_later_chunks_do_not_see_what_was_dropped() -> None:
    """In one layer a token is seen only through its own key and value: one that was dropped changes nothing later."""
    model = models.make("llama", num_hidden_layers=1)
    ids = tokens(1, 320)
    other = ids.clone()
    other[0, 50] = (ids[0, 50] + 1) % 256
    seen = {}
    for chunk in ("", ", chunk=64"):
        logits = [
            prefill(model, x, [CompressedCache(f"streaming(sinks=2, recent=16{chunk})", model)])[0].logits
            for x in (ids, other)
        ]
        seen[chunk] = not torch.equal(*logits)
    assert seen == {"": True, ", chunk=64": False}


def test_a_prompt_that_comes_at_once_is_warned_of() -> None:
    model = models.make("llama")
    spec = "streaming(sinks=2, recent=16, chunk=32)"
    with pytest.warns(KvcompWarning, match=r"80 tokens .* chunks of 32.*prefill_chunk_size=32"):
        greedy(model, IDS, CompressedCache(spec, model), new=2)
    chunked, filled = (CompressedCache(spec, model) for _ in range(2))
    prefill(model, IDS[:, :-1], [filled])
    generated = greedy(model, IDS[:, :-1], chunked, new=1, prefill_chunk_size=32)
    assert chunked.memory() == filled.memory()
    assert generated.sequences.shape[1] == 80


def test_what_a_cache_adds_is_its_own_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reg, "_stages", dict(reg.stages()))

    @reg.register("slow")
    @dataclass(frozen=True)
    class Slow(Policy):
        """Keeps all, after a while."""

        def select(self, chunk: Chunk) -> Tensor:
            time.sleep(0.05)
            return chunk.alive

        def kept(self, tokens: int, sinks: int, recent: int, layer: int, layers: int) -> int:
            return tokens

    model = models.make("llama")
    caches = [CompressedCache(stack, model) for stack in ("none", "slow", "int(bits=8)")]
    prefill(model, IDS, [CompressedCache("none", model)])  # what is done once only
    none, slow, quantized = prefill(model, IDS, caches)
    assert slow.own_s >= 4 * 0.05  # four layers
    assert max(none.own_s, quantized.own_s, none.dense_s) < 4 * 0.05
    assert none.dense_s == slow.dense_s == quantized.dense_s


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_spans_on_cuda_hold_the_work_that_was_queued_in_them() -> None:
    device = torch.device("cuda")
    x = torch.randn(4096, 4096, device=device)
    x @ x
    torch.cuda.synchronize()
    watch = Stopwatch()
    start = time.perf_counter()
    with watch.span(device):
        for _ in range(50):
            x @ x
    queued = time.perf_counter() - start
    seconds = watch.seconds()
    assert queued < seconds <= time.perf_counter() - start
    for _ in range(50):
        x @ x
    assert watch.seconds() == seconds
