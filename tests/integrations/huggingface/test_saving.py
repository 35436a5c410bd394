"""A cache in a file: whoever loads it generates what the one who saved it would have generated, to the last bit."""

from __future__ import annotations

import copy
import gc
import json
from pathlib import Path
from typing import Any

import pytest
import tiny_models as models
import torch
from generation import greedy, left_padded, tokens
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from kvcomp import CompressedCache, KvcompError, UnsupportedError, prefill
from kvcomp.ledger import storage_bytes

EVICTING = "snapkv(budget=32, window=8) + kivi(bits=4, group=16) + window(sinks=2, recent=8)"
STACKS = (
    "none",
    "kivi(bits=2, group=16) + window(recent=16)",
    EVICTING,
    "int(bits=4, basis=hadamard) + quest(pages=2, dense_layers=0)",
    f"{EVICTING} + quest(pages=2, dense_layers=0)",
    "streaming(sinks=2, recent=24) + turboquant(bits=4)",
)
HYBRIDS = ("gemma3", "gptoss", "qwen3next")
CASES = [("llama", stack) for stack in STACKS] + [(name, stack) for name in HYBRIDS for stack in (STACKS[1], STACKS[4])]
IDS, MASK = left_padded([65, 80, 41])
pytestmark = pytest.mark.filterwarnings("ignore:.*same redundancy", "ignore:.*dense tensors")


def make(name: str, **changes: Any) -> PreTrainedModel:
    return models.make(name, "eager" if name in models.EAGER_ONLY else "sdpa", **changes)


def reload(cache: CompressedCache, model: PreTrainedModel, path: Path) -> CompressedCache:
    cache.save(path)
    return CompressedCache.load(path, model)


def data_bytes(path: Path) -> int:
    """Bytes after the header, whose length the first eight bytes say."""
    with path.open("rb") as file:
        return path.stat().st_size - 8 - int.from_bytes(file.read(8), "little")


def forward(model: PreTrainedModel, cache: CompressedCache, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    positions = None if mask is None else (mask.cumsum(-1) - 1).clamp_min(0)[:, -ids.shape[1] :]
    with torch.no_grad():
        return model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits


def assert_equal(ours: Any, theirs: Any) -> None:
    assert ours.sequences.tolist() == theirs.sequences.tolist()
    for a, b in zip(ours.logits, theirs.logits, strict=True):
        assert torch.equal(a, b)


# -- generation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "stack"), CASES)
def test_a_padded_batch_goes_on_identically(name: str, stack: str, tmp_path: Path) -> None:
    model = make(name)
    cache = CompressedCache(stack, model)
    first = greedy(model, IDS, cache, new=20, attention_mask=MASK)
    again = reload(cache, model, tmp_path / "cache.kv")
    assert again.stack == cache.stack
    assert again.get_seq_length() == cache.get_seq_length() == 99
    mask = F.pad(MASK, (0, 20), value=1)
    saved, loaded = (greedy(model, first.sequences, x, new=40, attention_mask=mask) for x in (cache, again))
    assert_equal(loaded, saved)
    assert again.traffic() == cache.traffic()


@pytest.mark.parametrize("stack", ["none", "int(bits=8)"])
def test_a_model_that_reads_tensors(stack: str, tmp_path: Path) -> None:
    model = make("deepseek")
    for name, module in model.named_modules():
        if name.endswith("kv_b_proj"):  # whatever a hook does to keys and values, it reads them
            module.register_forward_hook(lambda module, args, out: out * 1)
    cache = CompressedCache(stack, model)
    first = greedy(model, IDS, cache, new=5, attention_mask=MASK)
    again = reload(cache, model, tmp_path / "cache.kv")
    assert again.memory().parts["pending"] > 0  # such a model commits a token when the next one comes
    assert all(layer.warned for layer in again._compressed())
    mask = F.pad(MASK, (0, 5), value=1)
    saved, loaded = (greedy(model, first.sequences, x, attention_mask=mask) for x in (cache, again))
    assert_equal(loaded, saved)


def test_half_precision(tmp_path: Path) -> None:
    model = make("llama").to(torch.bfloat16)
    cache = CompressedCache(EVICTING, model)
    first = greedy(model, IDS, cache, attention_mask=MASK)
    again = reload(cache, model, tmp_path / "cache.kv")
    mask = F.pad(MASK, (0, 10), value=1)
    saved, loaded = (greedy(model, first.sequences, x, new=30, attention_mask=mask) for x in (cache, again))
    assert_equal(loaded, saved)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_beams(name: str, tmp_path: Path) -> None:
    model = make(name)
    cache = CompressedCache("kivi(bits=4, group=16) + window(recent=16)", model)
    greedy(model, tokens(1, 300), cache, new=8, num_beams=4)
    again = reload(cache, model, tmp_path / "cache.kv")
    assert again.memory().parts["pages"] == cache.memory().parts["pages"]  # shared in both
    for i in range(20):
        step = tokens(4, 1, seed=i)
        assert torch.equal(forward(model, again, step), forward(model, cache, step))


def test_rows_that_were_repeated_and_chosen(tmp_path: Path) -> None:
    model = make("gemma3")
    cache = CompressedCache(EVICTING, model)
    forward(model, cache, IDS, MASK)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([5, 0, 2, 3]))
    again = reload(cache, model, tmp_path / "cache.kv")
    mask, ids = F.pad(MASK[[2, 0, 1, 1]], (0, 7), value=1), tokens(4, 7)
    assert torch.equal(forward(model, again, ids, mask), forward(model, cache, ids, mask))


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("stack", STACKS[:3])
def test_prompt_lookup(name: str, stack: str, tmp_path: Path) -> None:
    model = make(name)
    cache = CompressedCache(stack, model)
    first = greedy(model, IDS[1:2].repeat(1, 2), cache, new=15, prompt_lookup_num_tokens=4)
    again = reload(cache, model, tmp_path / "cache.kv")
    saved, loaded = (greedy(model, first.sequences, x, new=15, prompt_lookup_num_tokens=4) for x in (cache, again))
    assert_equal(loaded, saved)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_chunk_that_awaits_a_crop(name: str, tmp_path: Path) -> None:
    model = make(name)
    cache = CompressedCache("kivi(bits=2, group=16) + window(recent=16)", model)
    cache.activate_past_recording()
    forward(model, cache, tokens(1, 90))
    forward(model, cache, tokens(1, 40, seed=3))
    again = reload(cache, model, tmp_path / "cache.kv")
    for seed in (4, 5):
        for x in (cache, again):
            x.crop(-35)  # more than the window holds: only what is not committed yet can go
        step = tokens(1, 40, seed=seed)
        assert torch.equal(forward(model, again, step), forward(model, cache, step))
    assert again.get_seq_length() == cache.get_seq_length() == 140


def test_one_prefill_answers_many_questions(tmp_path: Path) -> None:
    model, stack = make("llama"), EVICTING
    document, questions = tokens(1, 150), [tokens(1, 9, seed=i) for i in (5, 6)]
    cache = CompressedCache(stack, model)
    prefill(model, document, [cache])
    cache.save(tmp_path / "document.kv")
    for question in questions:
        fresh = CompressedCache(stack, model)
        prefill(model, document, [fresh])
        ids = torch.cat([document, question], 1)
        expected = greedy(model, ids, fresh)
        assert_equal(greedy(model, ids, copy.deepcopy(cache)), expected)
        assert_equal(greedy(model, ids, CompressedCache.load(tmp_path / "document.kv", model)), expected)


def test_saving_changes_nothing(tmp_path: Path) -> None:
    model = make("gemma3")
    saved, other = (CompressedCache(EVICTING, model) for _ in range(2))
    for cache in (saved, other):
        forward(model, cache, IDS, MASK)
    held = saved.memory()
    assert other.memory() == held  # to look at a prompt that may go on ends it
    saved.save(tmp_path / "cache.kv")
    assert saved.memory() == held
    mask, ids = F.pad(MASK, (0, 9), value=1), tokens(3, 9)
    assert torch.equal(forward(model, saved, ids, mask), forward(model, other, ids, mask))


def test_an_empty_cache(tmp_path: Path) -> None:
    model = make("gemma3")
    again = reload(CompressedCache("kivi", model), model, tmp_path / "cache.kv")
    assert again.get_seq_length() == 0
    loaded, new = (greedy(model, IDS, x, attention_mask=MASK) for x in (again, CompressedCache("kivi", model)))
    assert_equal(loaded, new)


def test_a_loaded_cache_can_be_reset(tmp_path: Path) -> None:
    model = make("llama")
    cache = CompressedCache(EVICTING, model)
    first = greedy(model, IDS, cache, attention_mask=MASK)
    again = reload(cache, model, tmp_path / "cache.kv")
    again.reset()
    assert again.memory().held == 0
    assert_equal(greedy(model, IDS, again, attention_mask=MASK), first)


def test_what_was_read_before_is_not_remembered(tmp_path: Path) -> None:
    model = make("llama")
    cache = CompressedCache("kivi", model)
    greedy(model, IDS, cache, attention_mask=MASK)
    with pytest.raises(KvcompError, match="no decode step"):
        reload(cache, model, tmp_path / "cache.kv").traffic()


def test_max_tokens_is_that_of_the_load(tmp_path: Path) -> None:
    model = make("llama", max_position_embeddings=128)
    cache = CompressedCache("none", model, max_tokens=4096)
    forward(model, cache, tokens(1, 140))
    cache.save(tmp_path / "cache.kv")
    with pytest.raises(KvcompError, match="141 tokens exceed"):
        forward(model, CompressedCache.load(tmp_path / "cache.kv", model), tokens(1, 1))
    forward(model, CompressedCache.load(tmp_path / "cache.kv", model, max_tokens=4096), tokens(1, 1))


# -- bytes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "stack"), [*CASES, ("deepseek", "none"), ("deepseek", "int(bits=4)")])
def test_the_file_takes_the_bytes_that_are_held(name: str, stack: str, tmp_path: Path) -> None:
    model, path = make(name), tmp_path / "cache.kv"
    cache = CompressedCache(stack, model)
    greedy(model, IDS, cache, new=30, attention_mask=MASK)
    again = reload(cache, model, path)
    held, was, size = again.memory(), cache.memory(), data_bytes(path)
    learned = storage_bytes(x for layer in again._compressed() for x in layer.store.codec.state().values())
    assert size == held.held - held.parts.get("constants", 0) + learned
    assert "slack" not in held.parts
    tables = [layer.store.table for layer in cache._compressed()]
    spare = sum((t.rows.shape[1] - t.longest) * len(t.rows) * t.rows.itemsize for t in tables)
    views = storage_bytes(cache._library()) - sum(t.nbytes for t in cache._library())  # the library cuts by views
    idle = was.parts.get("constants", 0) - learned + was.parts.get("slack", 0) + spare + views
    assert size == was.held - idle


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_file_of_what_was_loaded_is_the_same_file(name: str, tmp_path: Path) -> None:
    model = make(name)
    cache = CompressedCache(STACKS[4], model)
    greedy(model, IDS, cache, new=30, attention_mask=MASK)
    reload(cache, model, tmp_path / "one").save(tmp_path / "two")
    one, two = (load_file(tmp_path / file) for file in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


# -- other models -----------------------------------------------------------------------------------------------------


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """The cache of a tiny Llama."""
    model = make("llama")
    cache = CompressedCache("kivi(bits=2, group=16)", model)
    forward(model, cache, tokens(1, 200))
    cache.save(tmp_path / "llama.kv")
    return tmp_path / "llama.kv"


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("llama", {"num_hidden_layers": 3}, "num_hidden_layers 4 (here 3)"),
        ("llama", {"num_key_value_heads": 4}, "num_key_value_heads 2 (here 4)"),
        ("llama", {"head_dim": 32}, "head_dim 16 (here 32)"),
        ("llama", {"vocab_size": 300}, "vocab_size 256 (here 300)"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
            "rope_parameters {'rope_theta': 10000.0, 'rope_type': 'default'} (here {'rope_t",
        ),
        ("qwen3", {}, "layer_types None (here ['full_attention', "),
        ("gemma3", {}, "model_type 'llama' (here 'gemma3_text')"),
    ],
)
def test_another_model(llama: Path, name: str, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(KvcompError) as caught:
        CompressedCache.load(llama, make(name, **changes))
    assert str(caught.value).startswith(f"load('{llama}'): the cache is of another model: ")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_weights(llama: Path) -> None:
    model = make("llama")
    with torch.no_grad():
        model.model.layers[3].self_attn.k_proj.weight.mul_(1.5)
    with pytest.raises(KvcompError, match=r"another model: the same architecture with other weights$"):
        CompressedCache.load(llama, model)
    CompressedCache.load(llama, model.config)  # which has none to compare


def test_a_model_that_is_gone_when_its_cache_is_saved(tmp_path: Path) -> None:
    model = make("llama")
    cache = CompressedCache("kivi", model)
    forward(model, cache, IDS, MASK)
    del model
    gc.collect()
    cache.save(tmp_path / "cache.kv")
    assert CompressedCache.load(tmp_path / "cache.kv", make("llama")).get_seq_length() == 80


def test_another_dtype(llama: Path) -> None:
    model = make("llama").to(torch.bfloat16)
    with pytest.raises(KvcompError, match=r"another model: dtype float32 \(here bfloat16\)$"):
        CompressedCache.load(llama, model)
    config = make("llama").config
    config.dtype = torch.float16
    with pytest.raises(KvcompError, match=r"another model: dtype float32 \(here float16\)$"):
        CompressedCache.load(llama, config)


def test_a_config_is_enough(llama: Path) -> None:
    model = make("llama")
    again, whole = CompressedCache.load(llama, model.config), CompressedCache.load(str(llama), model)
    step = tokens(1, 1)
    assert torch.equal(forward(model, again, step), forward(model, whole, step))


def test_the_device_is_the_models_or_as_asked(llama: Path, tmp_path: Path) -> None:
    model = make("gemma3")
    hybrid = CompressedCache("kivi(bits=2, group=16)", model)
    forward(model, hybrid, tokens(1, 200))
    hybrid.save(tmp_path / "gemma3.kv")
    for path, twin, asked in (
        (llama, make("llama").to("meta"), None),
        (llama, make("llama"), "meta"),
        (tmp_path / "gemma3.kv", make("gemma3").to("meta"), None),
    ):
        cache = CompressedCache.load(path, twin, device=asked)
        for layer in cache.layers:
            ours = hasattr(layer, "store")
            large = [layer.store.pool.data, *layer.store.exact.tensors] if ours else [layer.keys, layer.values]
            assert {t.device.type for t in (*large, layer)} == {"meta"}
            assert not ours or layer.store.table.rows.device.type == "cpu"  # where pages are allocated
    assert CompressedCache.load(llama, make("llama")).layers[0].store.pool.data.device.type == "cpu"


def test_another_kind_of_layer(llama: Path) -> None:
    with safe_open(llama, framework="pt") as opened:
        metadata = opened.metadata()
    layers = json.loads(metadata["layers"])
    ((_, pairs),) = layers[2].items()
    assert pairs[0] == ["kind", "CompressedLayer"]
    pairs[0][1] = "LayerOfTheFuture"
    content = {name: tensor.clone() for name, tensor in load_file(llama).items()}
    save_file(content, llama, metadata | {"layers": json.dumps(layers)})
    with pytest.raises(KvcompError, match=r"a LayerOfTheFuture was saved where .* has a CompressedLayer"):
        CompressedCache.load(llama, make("llama"))


def test_a_layer_that_holds_more_than_tensors(tmp_path: Path) -> None:
    model = make("gemma3")
    cache = CompressedCache("kivi", model)
    cache.layers[0].compressor = torch.nn.Linear(2, 2)
    with pytest.raises(UnsupportedError, match=r"layers\.0\.own\.compressor is a Linear.*cannot be saved"):
        cache.save(tmp_path / "cache.kv")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_no_cache(tmp_path: Path) -> None:
    model = make("llama")
    model.save_pretrained(tmp_path)
    with pytest.raises(KvcompError, match=r"model\.safetensors'\): it holds tensors, but no cache"):
        CompressedCache.load(tmp_path / "model.safetensors", model)
    with pytest.raises(KvcompError, match="no such file"):
        CompressedCache.load(tmp_path / "none", model)
    assert greedy(model, tokens(1, 8), CompressedCache("none", model)).sequences.shape[1] == 18
