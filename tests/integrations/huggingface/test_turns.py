"""The next turn goes on from what the cache holds, or is refused: positions, masks, rows that ended early."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import tiny_models as models
import torch
from generation import assert_same, greedy, left_padded, tokens
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedModel

from kvcomp import CompressedCache, KvcompError, UnsupportedError, prefill

NAMES = ["llama", "qwen3", "gemma3", "gptoss", "qwen3next", "deepseek"]
STACKS = [
    "none",
    "int(bits=8)",
    "kivi(bits=4, group=16) + window(recent=16)",
    "klt(bits=4)",
    "snapkv(budget=48, window=8) + int8",
    "knorm(keep=0.5)",
    "quest(pages=3, dense_layers=0)",
]
pytestmark = pytest.mark.filterwarnings("ignore:.*dense tensors", "ignore:.*same redundancy")


def model_of(name: str) -> PreTrainedModel:
    return models.make(name, "eager" if name in models.EAGER_ONLY else "sdpa")


def filled(model: PreTrainedModel, ids: Tensor, by_config: bool = False, stack: str = "none") -> CompressedCache:
    cache = CompressedCache(stack, model.config if by_config else model)
    prefill(model, ids, [cache])
    return cache


IDS = tokens(1, 100)


# -- positions that do not follow the cache ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "by_config"),  # a model that expands its latents shows its positions to itself alone
    [*((name, False) for name in NAMES), *((name, True) for name in NAMES if name != "deepseek")],
)
@pytest.mark.parametrize("case", ["old mask", "older mask", "three with an old mask", "shorter turn", "same ids"])
def test_positions_that_come_again_are_refused(name: str, case: str, by_config: bool) -> None:
    model = model_of(name)
    cache = filled(model, IDS[:, :97], by_config)
    ones = torch.ones(1, 100, dtype=torch.int64)
    ids, mask = {
        "old mask": (IDS[:, 97:98], ones[:, :97]),
        "older mask": (IDS[:, 97:98], ones[:, :40]),
        "three with an old mask": (IDS[:, 97:], ones[:, :97]),
        "shorter turn": (IDS[:, :80], ones[:, :80]),
        "same ids": (IDS[:, :97], ones[:, :97]),
    }[case]
    with pytest.raises(KvcompError, match=r"reuse\(ids\)|0 new tokens"):
        model.generate(ids, past_key_values=cache, attention_mask=mask, max_new_tokens=5)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_refusal_leaves_the_cache_as_it_was(name: str) -> None:
    model = model_of(name)
    cache, other = filled(model, IDS[:, :97]), filled(model, IDS[:, :97])
    for _ in range(2):
        with pytest.raises(UnsupportedError, match="position 96, but the tokens that the cache holds end before 97"):
            model.generate(IDS[:, 97:98], past_key_values=cache, attention_mask=torch.ones(1, 97), max_new_tokens=5)
    assert cache.get_seq_length() == 97
    assert_same(greedy(model, IDS, cache), greedy(model, IDS, other), 0)


@pytest.mark.parametrize(
    ("name", "stack"), [(name, stack) for name in NAMES for stack in (STACKS[:4] if name == "deepseek" else STACKS)]
)
def test_turns_in_all_their_right_forms(name: str, stack: str) -> None:
    """No false refusal: full ids, new ids with the whole mask, step by step, with and without positions."""
    model = model_of(name)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*positions jump")
        cache = CompressedCache(stack, model)
        out = greedy(model, IDS[:, :60], cache, new=5).sequences
        ids = torch.cat([out, tokens(1, 7, seed=5)], 1)
        out = greedy(model, ids, cache, new=5).sequences
        new = tokens(1, 3, seed=6)
        mask = torch.ones(1, out.shape[1] + 3, dtype=torch.int64)
        out = torch.cat([out, new], 1)
        more = greedy(model, torch.cat([out[:, -4:-3], new], 1), cache, new=5, attention_mask=mask).sequences
        with torch.no_grad():
            n = cache.get_seq_length()
            for i in range(3):
                model(more[:, -1:], past_key_values=cache)
                at = torch.tensor([[n + 2 * i + 1]])
                model(more[:, -1:], past_key_values=cache, position_ids=at)


POSITIONS = {
    "shifted": torch.arange(120) + 7,
    "jumping": torch.arange(120) * 3,
    "gap": torch.arange(120) + 50 * (torch.arange(120) > 30),
    "restarting": torch.arange(120) % 20,
    "decreasing": torch.arange(120).flip(0) + 5,
    "repeated": torch.arange(120) // 2,
}


@pytest.mark.parametrize("by_config", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma3", "deepseek"])
@pytest.mark.parametrize("kind", list(POSITIONS))
def test_positions_of_the_callers_own_equal_dynamic_cache(name: str, kind: str, by_config: bool) -> None:
    model, positions = model_of(name), POSITIONS[kind][None]
    ids = tokens(1, 120)
    ours, theirs = CompressedCache("none", model.config if by_config else model), DynamicCache(config=model.config)
    with torch.no_grad():
        for a, b in ((0, 70), (70, 71), (71, 90), (90, 91), (91, 92)):
            x, y = (
                model(ids[:, a:b], position_ids=positions[:, a:b], past_key_values=c).logits for c in (ours, theirs)
            )
            torch.testing.assert_close(x, y, atol=1e-4, rtol=0)


def test_a_jump_ahead_is_warned_of_once_and_equals_dynamic_cache() -> None:
    model = models.make("llama")
    ours, theirs = CompressedCache("none", model), DynamicCache(config=model.config)
    at = torch.cat([torch.arange(60), torch.arange(100, 140)])[None]
    with torch.no_grad(), warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for a, b in ((0, 60), (60, 70), (70, 71), (71, 80)):
            x, y = (model(IDS[:, a:b], position_ids=at[:, a:b], past_key_values=c).logits for c in (ours, theirs))
            torch.testing.assert_close(x, y, atol=1e-4, rtol=0)
    assert sum("positions jump" in str(w.message) for w in found) == 1


# -- reuse ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stack", [*STACKS, "h2o(budget=64)", "streaming(recent=48)"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3next"])
@pytest.mark.parametrize("case", ["shorter", "same", "other", "branch", "longer"])
def test_reuse_makes_the_next_turn_right(name: str, stack: str, case: str) -> None:
    model = model_of(name)
    first = tokens(1, 60)
    cache = CompressedCache(stack, model)
    so_far = greedy(model, first, cache, new=6).sequences
    ids = {
        "shorter": first[:, :40],
        "same": first,
        "other": tokens(1, 60, seed=9),
        "branch": torch.cat([so_far[:, :50], tokens(1, 20, seed=8)], 1),
        "longer": torch.cat([so_far, tokens(1, 20, seed=8)], 1),
    }[case]
    held = None if cache._turns().record else so_far
    kept = cache.reuse(ids, held)
    assert kept == cache.get_seq_length() < ids.shape[1]
    if case == "longer":
        assert kept == 65
    if stack == "none" and name == "llama":
        assert kept == {"shorter": 39, "same": 59, "other": 0, "branch": 50, "longer": 65}[case]
    ours = greedy(model, ids, cache, new=8)
    fresh = CompressedCache(stack, model)
    if kept == 65:
        greedy(model, first, fresh, new=6)
    theirs = greedy(model, ids, fresh, new=8)
    if stack in ("none", "int(bits=8)") or not kept or kept == 65:
        assert_same(ours, theirs)


def test_reuse_after_a_refusal() -> None:
    for name in ("llama", "gemma3"):
        model = model_of(name)
        for by_config in (False, True):
            cache = filled(model, IDS[:, :97], by_config)
            with pytest.raises(UnsupportedError, match="reuse"):
                model.generate(IDS[:, :80], past_key_values=cache, max_new_tokens=5)
            cache.reuse(IDS[:, :80], IDS[:, :97])
            ours = greedy(model, IDS[:, :80], cache)
            assert_same(ours, greedy(model, IDS[:, :80], DynamicCache(config=model.config)))


def test_a_second_turn_of_assisted_decoding_is_right() -> None:
    """transformers feeds all of it again, after what a DynamicCache holds."""
    model, ids = models.make("llama"), tokens(1, 40).repeat(1, 2)
    cache = CompressedCache("none", model)
    so_far = greedy(model, ids, cache, new=15, prompt_lookup_num_tokens=4).sequences
    ours = greedy(model, so_far, cache, new=8, prompt_lookup_num_tokens=4)
    theirs = greedy(model, so_far, DynamicCache(config=model.config), new=8)
    assert ours.sequences.tolist() == theirs.sequences.tolist()


def test_reuse_of_a_batch_and_of_beams() -> None:
    model = models.make("llama")
    ids, mask = left_padded([40, 50])
    cache = CompressedCache("none", model)
    so_far = greedy(model, ids, cache, attention_mask=mask).sequences
    changed = so_far.clone()
    changed[1, 45:] = tokens(1, changed.shape[1] - 45, seed=5)
    assert cache.reuse(changed) == 45
    longer = F.pad(mask, (0, 10), value=1)
    theirs = greedy(model, changed, DynamicCache(config=model.config), attention_mask=longer)
    assert_same(greedy(model, changed, cache, attention_mask=longer), theirs)
    cache = CompressedCache("none", model)
    out = model.generate(ids[:1, 10:], past_key_values=cache, num_beams=3, num_return_sequences=3, max_new_tokens=8)
    assert cache.reuse(F.pad(out, (0, 1), value=7)) <= 47
    with pytest.raises(KvcompError, match="3 rows"):
        cache.reuse(out[:1])


def test_reuse_says_what_it_needs(tmp_path: Any) -> None:
    model = models.make("llama")
    cache = CompressedCache("none", model.config)
    with torch.no_grad():
        model(IDS, past_key_values=cache)
    with pytest.raises(KvcompError, match="held="):
        cache.reuse(IDS)
    with pytest.raises(KvcompError, match="at least 100"):
        cache.reuse(IDS, IDS[:, :40])
    assert cache.reuse(IDS[:, :50], IDS) == 49
    filled(model, IDS).save(tmp_path / "x.kv")
    loaded = CompressedCache.load(tmp_path / "x.kv", model)
    with pytest.raises(KvcompError, match="held="):
        loaded.reuse(IDS)
    assert loaded.reuse(IDS[:, :50], IDS) == 49
    fork = filled(model, IDS).fork()
    assert fork.reuse(IDS[:, :50]) == 49
    assert CompressedCache("none", model).reuse(IDS) == 0


MASKS = ("generate", "no mask", "ones", "a step", "swapped")

# -- rows that ended early, and masks that change ---------------------------------------------------------------------


def ended(model: PreTrainedModel, cache: Any, ends: list[int], **kwargs: Any) -> tuple[Tensor, Tensor]:
    """A turn of 30 tokens in rows that end after so many: ids and the mask that hides what is after their ends."""
    ids, mask = left_padded([65, 80, 41])
    out = greedy(model, ids, cache, new=30, attention_mask=mask, **kwargs).sequences
    longer = F.pad(mask, (0, 30), value=1)
    for row, end in enumerate(ends):
        out[row, 80 + end :] = 0
        longer[row, 80 + end :] = 0
    return out, longer


@pytest.mark.parametrize("name", ["llama", "qwen3", "gptoss", "deepseek"])
@pytest.mark.parametrize("ends", [[30, 5, 29], [0, 30, 30], [1, 2, 3], [12, 30, 0]])
def test_a_row_that_ended_goes_on_as_with_dynamic_cache(name: str, ends: list[int]) -> None:
    model = model_of(name)
    found = []
    for cache in (CompressedCache("none", model), DynamicCache(config=model.config)):
        ids, mask = ended(model, cache, ends)
        for turn in range(3):
            ids, mask = F.pad(ids, (0, 9)), F.pad(mask, (0, 9), value=1)
            ids[:, -9:] = tokens(3, 9, seed=20 + turn)
            out = greedy(model, ids, cache, new=12, attention_mask=mask)
            found.append(out)
            ids, mask = out.sequences.clone(), F.pad(mask, (0, 12), value=1)
            ids[turn, -7:] = 0
            mask[turn, -7:] = 0
    for ours, theirs in zip(found[:3], found[3:], strict=True):
        assert_same(ours, theirs)


@pytest.mark.parametrize("stack", [*STACKS, "h2o(budget=200)", "rkv(budget=200)"])
def test_a_row_that_ended_is_as_if_it_had_gone_on_alone(stack: str) -> None:
    model, ends = models.make("llama"), [30, 5, 29]
    cache = CompressedCache(stack, model)
    ids, mask = ended(model, cache, ends)
    ids, mask = F.pad(ids, (0, 9)), F.pad(mask, (0, 9), value=1)
    ids[:, -9:] = tokens(3, 9, seed=20)
    ours = greedy(model, ids, cache, new=12, attention_mask=mask)
    length = [65, 80, 41]
    for row in range(3):
        alone = CompressedCache(stack, model)
        own = ids[row, mask[row].bool()][None]
        if ends[row]:
            greedy(model, own[:, : length[row]], alone, new=ends[row])  # the same choices: its own tokens so far
        theirs = greedy(model, own, alone, new=12)
        x, y = ours.logits[0][row], theirs.logits[0][0]
        assert torch.corrcoef(torch.stack([x, y]))[0, 1] > 0.98
        store = cache._compressed()[0].store
        counts = store.kept.view(3, -1)[row]
        assert (counts == alone._compressed()[0].store.kept).all()
    memory = cache.memory()
    assert memory.dense == int(mask.sum() + 3 * 11) * 4 * 2 * 2 * 16 * 4


def test_a_row_that_ended_with_one_new_token() -> None:
    model = models.make("llama")
    found = []
    for cache in (CompressedCache("none", model), DynamicCache(config=model.config)):
        ids, mask = ended(model, cache, [30, 5, 29])
        cut = torch.tensor([29, 5, 29]) + 80
        keep = cut.max() + 1
        with torch.no_grad():
            cache.crop(-(cache.get_seq_length() - int(keep) + 1))
            out = model(
                ids[:, keep - 1 : keep].clone().fill_(9),
                attention_mask=F.pad(mask[:, : keep - 1], (0, 1), value=1),
                past_key_values=cache,
            )
        found.append(out.logits)
    torch.testing.assert_close(*found, atol=1e-4, rtol=0)


def test_what_was_evicted_cannot_be_dropped() -> None:
    model = models.make("llama")
    cache = CompressedCache("streaming(sinks=2, recent=16)", model)
    ids, mask = left_padded([65, 80, 41])
    greedy(model, ids, cache, new=120, attention_mask=mask)
    mask = F.pad(mask, (0, 125), value=1)
    mask[0, 81:199] = 0
    with pytest.raises(UnsupportedError, match=r"held without gaps.*reset\(\)"), torch.no_grad():
        model(tokens(3, 6), attention_mask=mask, past_key_values=cache)


@pytest.mark.parametrize("by_config", [False, True])
@pytest.mark.parametrize(
    ("name", "how"),
    [
        *(
            (name, how)
            for name in ("llama", "gptoss", "gemma3")
            for how in ("generate", "no mask", "ones", "a step", "swapped")
        ),
        ("llama", "ones in 4D"),
    ],
)
def test_a_mask_that_shows_what_it_hid(name: str, by_config: bool, how: str) -> None:
    model = model_of(name)
    ids, mask = left_padded([65, 80, 41])
    cache = CompressedCache("none", model.config if by_config else model)
    prefill(model, ids, [cache], attention_mask=mask)
    new = tokens(3, 1 if how == "a step" else 5)
    n = 80 + new.shape[1]
    ones = torch.ones(3, n, dtype=torch.int64)
    swapped = F.pad(mask, (0, 5), value=1)
    swapped[0, :1], swapped[0, 20:21] = 1, 0
    refused = pytest.raises(UnsupportedError, match=r"mask hides or shows|no attention mask came|reuse")
    with refused, torch.no_grad():
        if how == "generate":
            model.generate(torch.cat([ids, new], 1), past_key_values=cache, attention_mask=ones, max_new_tokens=3)
        elif how == "ones in 4D":
            both = torch.ones(3, 1, 5, n, dtype=torch.bool).tril(80)
            model(new, past_key_values=cache, attention_mask=both)
        else:
            given = {"no mask": None, "ones": ones, "a step": ones, "swapped": swapped}[how]
            model(new, past_key_values=cache, attention_mask=given)


def test_a_preallocated_cache_follows_as_well() -> None:
    model = models.make("llama")
    found = []
    for cache in (CompressedCache("none", model, preallocate=200), DynamicCache(config=model.config)):
        ids, mask = ended(model, cache, [30, 5, 29], disable_compile=True)
        ids, mask = F.pad(ids, (0, 9), value=5), F.pad(mask, (0, 9), value=1)
        found.append(greedy(model, ids, cache, new=12, attention_mask=mask, disable_compile=True))
    assert_same(*found)
    cache = CompressedCache("none", model, preallocate=200)
    out = greedy(model, IDS, cache, new=3, disable_compile=True).sequences
    for ids, mask in ((out[:, -1:], torch.ones(1, 101)), (out[:, :50], torch.ones(1, 50))):
        with pytest.raises(UnsupportedError, match="reuse"):
            model.generate(ids, past_key_values=cache, attention_mask=mask, max_new_tokens=4, disable_compile=True)
    assert cache.reuse(out[:, :50], out) == 49
    assert_same(
        greedy(model, out[:, :50], cache, disable_compile=True),
        greedy(model, out[:, :50], DynamicCache(config=model.config)),
    )
