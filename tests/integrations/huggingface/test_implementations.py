"""Every attention implementation: the prompt runs through the model's own, everything later through ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import tiny_models as models
import torch
from generation import assert_same, greedy, left_padded, tokens
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

from kvcomp import CompressedCache, UnsupportedError
from kvcomp.integrations.huggingface.masks import dense_mask, read_mask
from kvcomp.integrations.huggingface.sliding import SlidingLayer

FLASH, KERNEL, BARE = "flash_attention_of_tests", "tests/a-kernel@main", "test_without_masks"
CALLS: list[str] = []  # names of the implementations that ran, as they see them


def _causal(n: int) -> Tensor:
    return torch.ones(n, n, dtype=torch.bool).tril()


def _contract(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The contract of flash attention: a mask [B, N] of the tokens that are no padding, or none."""
    assert attention_mask is None or (type(attention_mask) is Tensor and attention_mask.dim() == 2)
    assert module.is_causal
    CALLS.append(module.config._attn_implementation)
    n, length = query.shape[2], key.shape[2]
    seen = _causal(length)[-n:][None]
    if sliding_window is not None:
        seen = seen & ~seen[0].tril(length - n - sliding_window)
    if attention_mask is not None:
        seen = seen & attention_mask.bool()[:, None]
    k, v = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    weights = (query @ k.mT * scaling).masked_fill(~seen[:, None], -torch.inf).softmax(-1).nan_to_num(0)
    return (weights @ v).transpose(1, 2).contiguous(), None


for _name in (FLASH, KERNEL, BARE):
    AttentionInterface.register(_name, _contract)
    if _name != BARE:
        AttentionMaskInterface.register(_name, flash_attention_mask)


@contextmanager
def uncompiled() -> Iterator[None]:
    """Transformers compiles flex attention, which takes minutes on a CPU and does the same."""
    torch.compiler.set_stance("force_eager")
    try:
        yield
    finally:
        torch.compiler.set_stance("default")


@pytest.fixture(autouse=True)
def _without_compilation() -> Iterator[None]:
    with uncompiled():
        yield


def make(name: str, implementation: str, **changes: Any) -> PreTrainedModel:
    model = models.make(name, **changes)
    model.config._attn_implementation = implementation  # what is not installed could not be asked for
    return model


IDS = tokens(1, 80)
PADDED, MASK = left_padded([65, 80, 9])
STACKS = ("none", "kivi(bits=4, group=16)", "window(sinks=2, recent=8) + snapkv(budget=32, window=8) + int8")
Run = Callable[[PreTrainedModel, Any], Any]


def plain(model: PreTrainedModel, cache: Any) -> Any:
    return greedy(model, IDS, cache)


def padded(model: PreTrainedModel, cache: Any) -> Any:
    return greedy(model, PADDED, cache, attention_mask=MASK)


def chunked(model: PreTrainedModel, cache: Any) -> Any:
    return greedy(model, PADDED, cache, attention_mask=MASK, prefill_chunk_size=16)


def two_turns(model: PreTrainedModel, cache: Any) -> Any:
    first = greedy(model, IDS, cache, new=6)
    return greedy(model, torch.cat([first.sequences, IDS[:, :9]], 1), cache, new=6)


def beams(model: PreTrainedModel, cache: Any) -> Any:
    return greedy(model, PADDED, cache, attention_mask=MASK, num_beams=3)


def lookup(model: PreTrainedModel, cache: Any) -> Any:
    return greedy(model, IDS.repeat(1, 2), cache, new=24, prompt_lookup_num_tokens=4)


SCENARIOS = (plain, padded, chunked, two_turns, beams, lookup)


CASES = [
    *((name, run) for name in ("flex_attention", FLASH) for run in SCENARIOS),
    *((name, chunked) for name in (KERNEL, f"paged|{FLASH}", "paged|eager")),
]


@pytest.mark.parametrize(("implementation", "run"), CASES, ids=lambda x: getattr(x, "__name__", x))
def test_the_same_tokens_as_with_sdpa(implementation: str, run: Run) -> None:
    for stack in STACKS:
        model = models.make("llama")
        expected = run(model, CompressedCache(stack, model))
        model = make("llama", implementation)
        cache = CompressedCache(stack, model)
        CALLS.clear()
        assert_same(run(model, cache), expected)
        if FLASH in implementation or implementation == KERNEL:
            assert set(CALLS) == {implementation.removeprefix("paged|")}  # the prompt, under its own name
        cache.detach()
        assert model.config._attn_implementation == implementation


@pytest.mark.parametrize(("implementation", "run"), CASES, ids=lambda x: getattr(x, "__name__", x))
def test_layers_with_a_sliding_window(implementation: str, run: Run) -> None:
    dense = models.make("gemma3", sliding_window=72)
    model = make("gemma3", implementation, sliding_window=72)
    cache = CompressedCache("none + window(recent=8)", model)
    assert sum(isinstance(layer, SlidingLayer) for layer in cache.layers) == 2
    assert_same(run(model, cache), run(dense, DynamicCache(config=dense.config)))


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("implementation", ["flex_attention", FLASH, KERNEL])
def test_other_caches_on_a_hooked_model(implementation: str, name: str) -> None:
    hooked, untouched = make(name, implementation), make(name, implementation)
    CompressedCache("none", hooked)
    for run in (padded, chunked, two_turns):
        assert_same(*(run(m, DynamicCache(config=m.config)) for m in (hooked, untouched)))
    with torch.no_grad():
        a, b = (m(PADDED, attention_mask=MASK, use_cache=False).logits[MASK.bool()] for m in (hooked, untouched))
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("implementation", ["flex_attention", FLASH])
def test_layers_with_windows_keep_them(implementation: str) -> None:
    for run in (padded, chunked):
        dense, model = make("gemma3", implementation), make("gemma3", implementation)
        assert_same(run(model, CompressedCache("none", model)), run(dense, DynamicCache(config=dense.config)))


def test_an_implementation_without_a_mask_function() -> None:
    """It gets no mask at all, from transformers, and so do we."""
    dense, model = make("llama", BARE), make("llama", BARE)
    for run in (plain, two_turns):
        assert_same(run(model, CompressedCache("none", model)), run(dense, DynamicCache(config=dense.config)))


def test_room_ahead() -> None:
    with pytest.raises(UnsupportedError, match="attn_implementation='sdpa', or leave preallocate= out"):
        CompressedCache("none", make("llama", "flex_attention"), preallocate=128)
    dense, model = models.make("llama"), make("llama", FLASH)
    for run in (plain, padded):
        cache = CompressedCache("none", model, preallocate=128)
        assert_same(run(model, cache), run(dense, DynamicCache(config=dense.config)))


@pytest.mark.parametrize("implementation", ["flex_attention", FLASH])
def test_a_model_that_repeats_its_prompt(implementation: str) -> None:
    from kvcomp import prefill

    class Tokenizer:
        def __call__(self, text: str, **kwargs: Any) -> Any:
            return type("Encoded", (), {"input_ids": torch.tensor([[ord(c) for c in text]])})

    kept = []
    for model in (models.make("llama"), make("llama", implementation)):
        cache = CompressedCache("kvzip(keep=0.5)", model)
        logits = prefill(model, IDS, [cache], tokenizer=Tokenizer())[0].logits
        with torch.no_grad():
            kept.append((logits, model(IDS[:, :1], past_key_values=cache).logits))
    for a, b in zip(*kept, strict=True):
        torch.testing.assert_close(a, b)


# -- block masks --------------------------------------------------------------------------------------------------


def test_a_block_mask_of_the_user() -> None:
    """A prompt whose first tokens see each other, then a causal chunk."""

    def prefix(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) | (k < 40)

    def behind(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return q + 80 >= k

    block, later = (
        create_block_mask(m, 1, None, n, length, device="cpu") for m, n, length in ((prefix, 80, 80), (behind, 9, 89))
    )
    dense = make("llama", "flex_attention")
    model = make("llama", "flex_attention")
    expected, cache = DynamicCache(config=dense.config), CompressedCache("none", model)
    with torch.no_grad():
        for ids, mask in ((IDS, block), (IDS[:, :9], later), (IDS[:, :1], None)):
            a, b = (
                m(ids, attention_mask=mask, past_key_values=c).logits for m, c in ((dense, expected), (model, cache))
            )
            torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


def test_block_masks_are_read_as_flex_attention_does() -> None:
    padding = torch.arange(300)[None] >= torch.tensor([[0], [140]])

    def shown(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q + 150 >= k) & padding[b, k]

    block = create_block_mask(shown, 2, None, 150, 300, device="cpu")
    expected = _causal(300)[150:] & padding[:, None]
    assert torch.equal(dense_mask(block)[:, 0], expected)
    seen, same = read_mask(block, 150, 150), read_mask(expected[:, None], 150, 150)
    assert seen.facts is not None
    assert same.facts is not None
    for a, b in zip([*seen[:-1], seen.facts.counts], [*same[:-1], same.facts.counts], strict=True):
        assert torch.equal(a, b)
    assert seen.facts[1:] == same.facts[1:] == (True, True, False)
    two = create_block_mask(shown, 2, 4, 150, 300, device="cpu")
    with pytest.raises(UnsupportedError, match="differs between heads"):
        read_mask(two, 150, 150)
    with pytest.raises(UnsupportedError, match="its mask_mod does not say which tokens it shows"):
        read_mask(block[:, :, :1], 150, 150)


def test_blocks_without_a_mask_mod() -> None:
    """Whole blocks, as lists of them: the second block of queries sees the first and the last block of keys."""
    counts, order = (
        torch.tensor([[[1, 2]]], dtype=torch.int32),
        torch.tensor([[[[0, 0, 0], [0, 2, 0]]]], dtype=torch.int32),
    )
    whole = BlockMask.from_kv_blocks(counts * 0, order, counts, order, BLOCK_SIZE=128)
    expected = torch.zeros(2, 3, dtype=torch.bool)
    expected[0, 0] = expected[1, 0] = expected[1, 2] = True
    for block in (whole, BlockMask.from_kv_blocks(counts, order, BLOCK_SIZE=128)):
        assert torch.equal(dense_mask(block)[0, 0, ::128, ::128], expected)


def test_continuous_batching_names_the_way_out() -> None:
    model = models.make("llama")
    cache = CompressedCache("none", model)
    with pytest.raises(ValueError, match=r"cache\.detach\(\)"):
        model.generate_batch([[5, 6, 7]], progress_bar=False)
    cache.detach()
    assert model.config._attn_implementation == "sdpa"
