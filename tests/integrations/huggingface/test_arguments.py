"""Arguments that no method can use: one error in words, and a cache that is as it was."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from generation import tokens
from tiny_models import make
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from kvcomp import CompressedCache, KvcompError, UnsupportedError, prefill

IDS = tokens(2, 90)
STACK = "kivi(bits=4, group=16) + window(recent=16)"
NUMBERS: tuple[Any, ...] = (0, -1, 1.5, "x", True, float("nan"), [3], None.__class__)


@pytest.fixture
def model() -> PreTrainedModel:
    return make("llama", num_hidden_layers=2)


def filled(model: PreTrainedModel, stack: str = STACK) -> CompressedCache:
    cache = CompressedCache(stack, model)
    with torch.no_grad():
        model(IDS, past_key_values=cache)
    return cache


def told(error: pytest.ExceptionInfo[KvcompError]) -> None:
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 700


@pytest.mark.parametrize("name", ["max_tokens", "preallocate"])
@pytest.mark.parametrize("value", NUMBERS, ids=map(str, NUMBERS))
def test_numbers_of_tokens(name: str, value: Any, model: PreTrainedModel, tmp_path: Path) -> None:
    with pytest.raises(KvcompError, match=f"{name}=.*expected a positive number of tokens") as error:
        CompressedCache(STACK, model, **{name: value})
    told(error)
    filled(model).save(tmp_path / "cache.kv")
    with pytest.raises(KvcompError, match=f"{name}=.*expected a positive number of tokens"):
        CompressedCache.load(tmp_path / "cache.kv", model, **{name: value})


def test_what_is_no_model(model: PreTrainedModel) -> None:
    for given in (
        None,
        5,
        "smollm",
        torch.nn.Linear(2, 2),
        {},
        model.config.to_dict(),
        type(model),
        model.model.layers[0],
    ):
        with pytest.raises(KvcompError, match="expected a transformers model or its config") as error:
            CompressedCache(STACK, given)
        told(error)


PREFILLS: dict[str, dict[str, Any]] = {
    "no list": {"caches": "cache"},
    "none in the list": {"caches": [None]},
    "another cache": {"caches": [DynamicCache()]},
    "a list of ids": {"input_ids": IDS.tolist()},
    "one row": {"input_ids": IDS[0]},
    "no rows": {"input_ids": IDS[:0]},
    "one token": {"input_ids": IDS[:, :1]},
    "numbers": {"input_ids": IDS.float()},
    "bytes": {"input_ids": IDS.to(torch.uint8)},
    "a short mask": {"attention_mask": torch.ones(2, 89)},
    "a mask of other rows": {"attention_mask": torch.ones(3, 90)},
    "a mask of one row": {"attention_mask": torch.ones(90)},
    "a mask in four dimensions": {"attention_mask": torch.ones(2, 1, 90, 90)},
    "no mask": {"attention_mask": "x"},
    **{f"chunk {value}": {"chunk": value} for value in NUMBERS},
}


@pytest.mark.parametrize("case", PREFILLS)
def test_prefill(case: str, model: PreTrainedModel) -> None:
    cache = CompressedCache(STACK, model)
    with pytest.raises(KvcompError, match=r"^prefill\((caches|input_ids|attention_mask|chunk)=.*: expected ") as error:
        prefill(model, **{"input_ids": IDS, "caches": [cache], **PREFILLS[case]})
    told(error)
    assert cache.get_seq_length() == 0


def test_prefill_of_the_same_cache_twice_and_without_a_tokenizer(model: PreTrainedModel) -> None:
    cache = CompressedCache(STACK, model)
    with pytest.raises(KvcompError, match="the same cache came twice"):
        prefill(model, IDS, [cache, cache])
    for tokenizer in (None, "gpt2"):
        with pytest.raises(KvcompError, match=r"tokenizer=.*: kvzip asks the model .*: pass the tokenizer"):
            prefill(model, IDS, [CompressedCache("kvzip(keep=0.5)", model)], tokenizer=tokenizer)


SURGERY: dict[str, Any] = {
    "crop('x')": lambda c: c.crop("x"),
    "crop(None)": lambda c: c.crop(None),
    "crop(1.5)": lambda c: c.crop(1.5),
    "crop(3)": lambda c: c.crop(3),
    "reorder a row too high": lambda c: c.reorder_cache(torch.tensor([0, 2])),
    "reorder a row too low": lambda c: c.reorder_cache(torch.tensor([0, -1])),
    "reorder numbers": lambda c: c.reorder_cache(torch.tensor([0.0, 1.0])),
    "reorder a matrix": lambda c: c.reorder_cache(torch.tensor([[0, 1]])),
    "reorder text": lambda c: c.reorder_cache("01"),
    "select too high": lambda c: c.batch_select_indices(torch.tensor([2])),
    "select too low": lambda c: c.batch_select_indices(torch.tensor([-3])),
    "select by a mask of other rows": lambda c: c.batch_select_indices(torch.tensor([True, False, True])),
    "select a number": lambda c: c.batch_select_indices(0),
    "select none": lambda c: c.batch_select_indices(None),
    "repeat -1": lambda c: c.batch_repeat_interleave(-1),
    "repeat 2.5": lambda c: c.batch_repeat_interleave(2.5),
    "repeat 'x'": lambda c: c.batch_repeat_interleave("x"),
    "reuse None": lambda c: c.reuse(None),
    "reuse a list": lambda c: c.reuse(IDS.tolist()),
    "reuse numbers": lambda c: c.reuse(IDS.float()),
    "reuse held": lambda c: c.reuse(IDS, 5),
    "compact a number": lambda c: c.compact(5, IDS, print),
    "compact one number": lambda c: c.compact((5,), IDS, print),
    "compact text": lambda c: c.compact(("a", "b"), IDS, print),
    "compact a list": lambda c: c.compact((0, 64), IDS.tolist(), print),
    "compact keep": lambda c: c.compact((0, 64), IDS, print, keep="x"),
}


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("what", SURGERY)
def test_surgery(what: str, name: str) -> None:
    model = make(name)
    cache, same = filled(model), filled(model)
    with pytest.raises(KvcompError) as error:
        SURGERY[what](cache)
    told(error)
    with torch.no_grad():
        found, expected = (model(IDS[:, :1], past_key_values=c).logits for c in (cache, same))
    assert torch.equal(found, expected)


def test_rows_by_lists_and_masks(model: PreTrainedModel) -> None:
    """As DynamicCache takes them."""
    step = IDS[:1, :1]
    found = []
    for rows in ([1], (1,), torch.tensor([1]), torch.tensor([-1]), torch.tensor([False, True])):
        cache = filled(model)
        cache.batch_select_indices(rows)
        with torch.no_grad():
            found.append(model(step, past_key_values=cache).logits)
    assert all(torch.equal(x, found[0]) for x in found)


@pytest.mark.parametrize("path", [None, 5, 3.5, ["x"], object()])
def test_what_is_no_path(path: Any, model: PreTrainedModel) -> None:
    with pytest.raises(KvcompError, match=r"save\(.*a path is text"):
        filled(model).save(path)
    with pytest.raises(KvcompError, match=r"load\(.*a path is text"):
        CompressedCache.load(path, model)


def test_a_path_in_bytes(model: PreTrainedModel, tmp_path: Path) -> None:
    filled(model).save(os.fsencode(tmp_path / "é.kv"))  # type: ignore[arg-type]
    assert CompressedCache.load(os.fsencode(tmp_path / "é.kv"), model).get_seq_length() == 90  # type: ignore[arg-type]


# -- keys, values and masks that do not fit ---------------------------------------------------------------------------

PAIRS = {
    "other channels": ((2, 2, 1, 8), (2, 2, 1, 8)),
    "other channels of V": ((2, 2, 1, 16), (2, 2, 1, 8)),
    "other heads": ((2, 3, 1, 16), (2, 3, 1, 16)),
    "other heads of V": ((2, 2, 1, 16), (2, 4, 1, 16)),
    "other tokens of V": ((2, 2, 1, 16), (2, 2, 2, 16)),
    "other rows": ((3, 2, 1, 16), (3, 2, 1, 16)),
    "three dimensions": ((2, 1, 16), (2, 1, 16)),
    "five dimensions": ((2, 2, 1, 1, 16), (2, 2, 1, 1, 16)),
}


@pytest.mark.parametrize("what", PAIRS)
@pytest.mark.parametrize("preallocate", [None, 200])
def test_keys_and_values_of_other_shapes(what: str, preallocate: int | None, model: PreTrainedModel) -> None:
    cache = CompressedCache(STACK, model, preallocate=preallocate)
    with torch.no_grad():
        model(IDS, past_key_values=cache)
    with pytest.raises(KvcompError) as error:
        cache.update(*(torch.zeros(shape) for shape in PAIRS[what]), 0)
    told(error)
    assert int(cache.get_seq_length()) == 90


@pytest.mark.parametrize("changes", [{"num_key_value_heads": 4}, {"num_key_value_heads": 1}, {"head_dim": 32}])
@pytest.mark.parametrize("hooked", [True, False])
def test_a_cache_that_another_model_filled(changes: dict[str, Any], hooked: bool, model: PreTrainedModel) -> None:
    cache, other = filled(model), make("llama", num_hidden_layers=2, **changes)
    if hooked:
        CompressedCache("none", other)
    with (
        torch.no_grad(),
        pytest.raises(KvcompError, match=r"2 KV heads of 16 and 16 channels, but the model has .*make a cache"),
    ):
        other(IDS[:, :1], past_key_values=cache)


@pytest.mark.parametrize("preallocate", [None, 200])
def test_a_model_without_weights(preallocate: int | None) -> None:
    model = make("llama", num_hidden_layers=2).to("meta")
    cache = CompressedCache(STACK, model, preallocate=preallocate)
    with torch.no_grad(), pytest.raises(UnsupportedError, match=r"meta device.*kvcomp plan"):
        model(IDS.to("meta"), past_key_values=cache)


def four_dimensional(dtype: torch.dtype, n: int, length: int) -> Tensor:
    return torch.ones(n, length).tril(length - n).to(dtype)[None, None].expand(2, 1, n, length)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.float8_e4m3fn, torch.complex64])
def test_masks_of_a_dtype_that_says_nothing(dtype: torch.dtype, implementation: str) -> None:
    """Ones and zeros would be added to the logits, or not be taken at all."""
    model = make("llama", implementation, num_hidden_layers=2)
    cache = CompressedCache(STACK, model)
    with torch.no_grad(), pytest.raises(UnsupportedError, match=r"attention_mask: .*: expected bool") as error:
        model(IDS, attention_mask=four_dimensional(dtype, 90, 90), past_key_values=cache)
    told(error)
    cache = filled(model)
    with torch.no_grad(), pytest.raises(UnsupportedError, match=r"attention_mask: .*: expected bool"):
        model(IDS[:, :1], attention_mask=four_dimensional(dtype, 1, 91), past_key_values=cache)
    assert cache.get_seq_length() == 90
