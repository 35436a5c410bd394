"""Caches from files that are damaged or do not fit: one error in words, or the text that would have come."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import tiny_models as models
import torch
from generation import greedy, left_padded, tokens
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from kvcomp import CompressedCache, KvcompError

IDS, MASK = left_padded([41, 120])
STACK = "kivi(bits=2, group=16) + window(recent=16)"
NAMES = ("llama", "gemma3", "qwen3next", "deepseek32")
pytestmark = pytest.mark.filterwarnings("ignore:.*dense tensors")
Content = tuple[dict[str, Tensor], dict[str, str]]


def filled(name: str, stack: str, path: Path) -> tuple[PreTrainedModel, list[list[int]]]:
    """The model of a saved cache, and the prompt with what was generated before."""
    model = models.make(name)
    cache = CompressedCache(stack, model)
    first = greedy(model, IDS, cache, new=5, attention_mask=MASK)
    cache.save(path)
    return model, first.sequences


def text(path: Path, model: PreTrainedModel, ids: Tensor) -> list[list[int]]:
    cache = CompressedCache.load(path, model)
    mask = torch.cat([MASK, torch.ones(2, 5, dtype=MASK.dtype)], 1)
    found: list[list[int]] = greedy(model, ids, cache, new=30, attention_mask=mask).sequences.tolist()
    return found


def unsigned(path: Path) -> Content:
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        return tensors, {name: word for name, word in file.metadata().items() if name != "crc32"}


@pytest.mark.parametrize("name", NAMES)
def test_a_file_of_the_first_kvcomp(name: str, tmp_path: Path) -> None:
    model, ids = filled(name, STACK if name != "deepseek32" else "int(bits=8)", tmp_path / "new")
    tensors, metadata = unsigned(tmp_path / "new")
    words = json.loads(metadata["model"])
    del words["parameters"]
    save_file(tensors, tmp_path / "old", metadata | {"model": json.dumps(words)})
    assert text(tmp_path / "old", model, ids) == text(tmp_path / "new", model, ids)


@pytest.mark.parametrize("name", NAMES)
def test_flips(name: str, tmp_path: Path) -> None:
    model, _ = filled(name, STACK if name != "deepseek32" else "int(bits=8)", tmp_path / "good")
    content, chance = (tmp_path / "good").read_bytes(), random.Random(1)
    header = 8 + int.from_bytes(content[:8], "little")
    for place in [chance.randrange(header) for _ in range(30)] + [chance.randrange(len(content)) for _ in range(10)]:
        damaged = bytearray(content)
        damaged[place] ^= 1 << chance.randrange(8)
        (tmp_path / "bad").write_bytes(damaged)
        with pytest.raises(KvcompError):
            CompressedCache.load(tmp_path / "bad", model)


# -- the library's own layers -----------------------------------------------------------------------------------------


def attribute(layers: list[Any], layer: int, name: str) -> list[Any]:
    """[name, value] of an attribute in the JSON of a file's layers, added where layers of this transformers lack it."""
    own = dict(layers[layer]["$dict"])["own"]["$dict"]
    if name not in dict(own):
        own.append([name, None])
    return next(pair for pair in own if pair[0] == name)


@pytest.mark.parametrize("written", [True, False])
def test_sliding_layers_load_with_and_without_the_dtype_that_transformers_gave_them_before_5_24(
    written: bool, tmp_path: Path
) -> None:
    model, ids = filled("gemma3", STACK, tmp_path / "good")
    tensors, metadata = unsigned(tmp_path / "good")
    layers = json.loads(metadata["layers"])
    attribute(layers, 0, "dtype")[1] = {"$dtype": "float32"}
    if not written:
        dict(layers[0]["$dict"])["own"]["$dict"].remove(attribute(layers, 0, "dtype"))
    save_file(tensors, tmp_path / "other", metadata | {"layers": json.dumps(layers)})
    good, other = (CompressedCache.load(tmp_path / name, model) for name in ("good", "other"))
    assert vars(other.layers[0]).keys() == vars(good.layers[0]).keys()
    assert text(tmp_path / "other", model, ids) == text(tmp_path / "good", model, ids)


@pytest.mark.parametrize(
    ("name", "attr", "value"),
    [
        ("gemma3", "keys", None),
        ("gemma3", "values", {"$tensor": "layers.1.own.store.counts"}),
        ("gemma3", "is_initialized", False),
        ("gemma3", "is_initialized", 3),
        ("gemma3", "cumulative_length", -1),
        ("gemma3", "cumulative_length", 4),
        ("gemma3", "cumulative_length", True),
        ("gemma3", "sliding_window", 17),
        ("gemma3", "dtype", {"$dtype": "float16"}),
        ("gemma3", "dtype", 7),
        ("gemma3", "device", "cpu"),
        ("gemma3", "_sliding_window_tensor", None),
        ("qwen3next", "has_previous_state", {"$dict": []}),
        ("qwen3next", "conv_states", {"$dict": [[0, None]]}),
        ("qwen3next", "recurrent_states", None),
        ("qwen3next", "number_of_states", 2),
    ],
)
def test_attributes_that_a_layer_cannot_have(name: str, attr: str, value: Any, tmp_path: Path) -> None:
    model, _ = filled(name, STACK, tmp_path / "good")
    tensors, metadata = unsigned(tmp_path / "good")
    layers = json.loads(metadata["layers"])
    attribute(layers, 0, attr)[1] = value
    save_file(tensors, tmp_path / "bad", metadata | {"layers": json.dumps(layers)})
    with pytest.raises(KvcompError, match="the file is damaged: "):
        CompressedCache.load(tmp_path / "bad", model)


@pytest.mark.parametrize("attr", ["update", "__class__", "get_seq_length", "anything"])
def test_only_attributes_of_a_layer_are_set(attr: str, tmp_path: Path) -> None:
    model, _ = filled("gemma3", STACK, tmp_path / "good")
    tensors, metadata = unsigned(tmp_path / "good")
    layers = json.loads(metadata["layers"])
    attribute(layers, 0, "is_initialized")[0] = attr
    save_file(tensors, tmp_path / "bad", metadata | {"layers": json.dumps(layers)})
    with pytest.raises(KvcompError, match=f"the file is damaged: layer 0.own: '{attr}' is unknown"):
        CompressedCache.load(tmp_path / "bad", model)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int32, torch.uint8, torch.complex64])
@pytest.mark.parametrize("name", ["gemma3", "qwen3next"])
def test_dtypes_that_no_model_computes_in(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Such tensors would be taken, and answer otherwise."""
    model, _ = filled(name, STACK, tmp_path / "good")
    tensors, metadata = unsigned(tmp_path / "good")
    floats = [key for key, x in tensors.items() if x.is_floating_point()]
    for key in floats:
        save_file(tensors | {key: tensors[key].to(dtype)}, tmp_path / "bad", metadata)
        with pytest.raises(KvcompError, match="the file is damaged"):
            CompressedCache.load(tmp_path / "bad", model)


@pytest.mark.parametrize("word", ["y" * 10**5, "\x1b[2Jx", "a\nb", "float99"])
def test_a_dtype_that_is_none_is_told_briefly(word: str, tmp_path: Path) -> None:
    model, _ = filled("llama", STACK, tmp_path / "good")
    tensors, metadata = unsigned(tmp_path / "good")
    save_file(tensors, tmp_path / "bad", metadata | {"dtype": word})
    for given in (model, model.config):
        with pytest.raises(KvcompError) as error:
            CompressedCache.load(tmp_path / "bad", given)
        assert str(error.value).isprintable()
        assert len(str(error.value)) < 700


@pytest.mark.parametrize("name", NAMES)
def test_tensors_that_are_none_of_a_cache(name: str, tmp_path: Path) -> None:
    """Or they change nothing; the numbers of the library's own layers may be any."""
    model, ids = filled(name, STACK if name != "deepseek32" else "int(bits=8)", tmp_path / "good")
    (tensors, metadata), expected = unsigned(tmp_path / "good"), text(tmp_path / "good", model, ids)
    changes: list[Callable[[Tensor], Tensor]] = [
        lambda x: x[:1].contiguous() if x.dim() else x,
        lambda x: x[:0].contiguous() if x.dim() else x,
        lambda x: x.to(torch.float64) if x.dtype != torch.float64 else x.float(),
        lambda x: x[None],
        lambda x: torch.full_like(x, 10**6) if x.dtype in (torch.int32, torch.int64) else x,
    ]
    chance = random.Random(2)
    for key in chance.sample(sorted(tensors), min(len(tensors), 24)):
        damaged = tensors | {key: chance.choice(changes)(tensors[key])}
        save_file(damaged, tmp_path / "bad", metadata)
        with suppress(KvcompError):
            assert text(tmp_path / "bad", model, ids) == expected, key


# -- what was asked for -----------------------------------------------------------------------------------------------


@pytest.fixture
def llama(tmp_path: Path) -> tuple[PreTrainedModel, Path]:
    """A tiny Llama, and a cache of 125 columns and at most 125 tokens of it."""
    return filled("llama", STACK, tmp_path / "cache.kv")[0], tmp_path / "cache.kv"


def test_more_tokens_than_there_is_room_for(llama: tuple[PreTrainedModel, Path]) -> None:
    model, path = llama
    held = CompressedCache.load(path, model).get_seq_length()
    CompressedCache.load(path, model, max_tokens=held)
    CompressedCache.load(path, model, preallocate=held)
    with pytest.raises(KvcompError, match=rf"max_tokens={held - 1}: the cache holds {held} tokens.*larger max_tokens="):
        CompressedCache.load(path, model, max_tokens=held - 1)
    with pytest.raises(KvcompError, match=rf"preallocate={held - 1}: the cache holds {held} tokens.*more room"):
        CompressedCache.load(path, model, preallocate=held - 1)


@pytest.mark.parametrize("device", ["foo", "cuda:99", "cuda:-3", "", "cpu:x", 10**9, "privateuseone"])
def test_devices_that_there_are_not(llama: tuple[PreTrainedModel, Path], device: Any) -> None:
    model, path = llama
    with pytest.raises(
        KvcompError, match=r"load\(.*device=.*: no such device here \(.*\): name one that torch can use"
    ):
        CompressedCache.load(path, model, device=device)


def test_paths_that_no_file_has(llama: tuple[PreTrainedModel, Path], tmp_path: Path) -> None:
    model, path = llama
    cache = CompressedCache.load(path, model)
    for odd in ("a\0b", "a\ud800b", "/dev/null", tmp_path):
        with pytest.raises(KvcompError, match=r"load\("):
            CompressedCache.load(odd, model)
        with pytest.raises(KvcompError, match=r"save\(.*it cannot be written"):
            cache.save(odd)


def test_a_saved_file_has_the_permissions_that_it_would_have(llama: tuple[PreTrainedModel, Path]) -> None:
    model, path = llama
    cache = CompressedCache.load(path, model)
    (path.parent / "link.kv").symlink_to(path)
    for mode in (0o640, 0o604):
        path.chmod(mode)
        cache.save(path.parent / "link.kv")
        assert (path.parent / "link.kv").is_symlink()
        assert path.stat().st_mode & 0o777 == mode
    CompressedCache.load(path, model)


def test_heads_of_another_model(llama: tuple[PreTrainedModel, Path], tmp_path: Path) -> None:
    """Shapes that agree with each other, but not with the model, are refused before any kernel reads them."""
    model, _ = llama
    wide = models.make("llama", num_key_value_heads=4, head_dim=32)
    cache = CompressedCache(STACK, wide)
    greedy(wide, IDS, cache, new=2, attention_mask=MASK)
    cache.save(tmp_path / "wide")
    (tensors, metadata), words = unsigned(tmp_path / "wide"), unsigned(tmp_path / "cache.kv")[1]["model"]
    save_file(tensors, tmp_path / "false", metadata | {"model": words})
    for preallocate in (None, 200):
        again = CompressedCache.load(tmp_path / "false", model, preallocate=preallocate)
        with torch.no_grad(), pytest.raises(KvcompError, match=r"4 KV heads of 32 and 32 .* model has 2 of 16 and 16"):
            model(tokens(2, 1), past_key_values=again)
