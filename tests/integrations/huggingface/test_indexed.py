"""Models with an indexer of their own: its choice is kept, its keys are held, and the latents are compressed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_models as models
import torch
from generation import assert_same, greedy, left_padded, tokens
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, DynamicCache, MiniMaxM3VLTextConfig, PreTrainedModel, Qwen4ExpTextConfig

from kvcomp import CompressedCache, KvcompError, Stack, UnsupportedError
from kvcomp.cache.rows import Rows
from kvcomp.cost.bill import bill
from kvcomp.integrations.huggingface import build
from kvcomp.integrations.huggingface.hook import hook
from kvcomp.integrations.huggingface.indexed import SPARE, IndexedLayer
from kvcomp.integrations.huggingface.layer import CompressedLayer
from kvcomp.integrations.huggingface.shapes import shape_of

pytestmark = pytest.mark.filterwarnings("ignore:.*as dense tensors")


def test_what_the_indexer_leaves_out_stays_out() -> None:
    """Hooked, the model masks nothing by itself any more: attention does."""
    ids = tokens(2, 80)
    plain, hooked = models.make("deepseek32"), models.make("deepseek32")
    everything = models.make("deepseek32", index_topk=80)
    hook(hooked.config)
    with torch.no_grad():
        expected, got, dense = (m(ids).logits for m in (plain, hooked, everything))
    torch.testing.assert_close(got, expected)
    assert float((dense - expected).abs().max()) > 0.01


def test_latents_are_compressed_and_index_keys_are_not(tmp_path: Path) -> None:
    model = models.make("deepseek32")
    cache = CompressedCache("int(bits=4) + window(recent=16)", model)
    first = greedy(model, tokens(1, 200), cache, new=4)
    memory = cache.memory()
    keys = sum(layer.index_keys.nbytes for layer in cache.layers)
    assert keys == len(cache.layers) * 203 * 32 * 4
    assert keys <= memory.parts["library"] <= keys + len(cache.layers) * SPARE * 32 * 4
    assert memory.held < 0.75 * memory.dense
    cache.save(tmp_path / "cache.safetensors")
    loaded, twin = CompressedCache.load(tmp_path / "cache.safetensors", model), cache.fork()
    assert loaded.memory().held <= memory.held
    on = [greedy(model, first.sequences, each, new=6).sequences for each in (cache, twin, loaded)]
    assert torch.equal(on[0], on[1])
    assert torch.equal(on[0], on[2])
    cache.crop(-3)
    assert all(layer.index_keys.shape[1] == cache.get_seq_length() for layer in cache.layers)


def _minimax() -> PreTrainedModel:
    """Layers of all tokens, and such whose indexer chooses blocks of them for each KV head."""
    torch.manual_seed(0)
    config = MiniMaxM3VLTextConfig(
        **{**models.COMMON, "eos_token_id": 1},
        head_dim=32,
        num_local_experts=4,
        num_experts_per_tok=2,
        dense_intermediate_size=64,
        shared_intermediate_size=64,
        layer_types=["full_attention", "minimax_m3_sparse"] * 2,
        mlp_layer_types=["dense"] * 4,
        index_n_heads=2,
        index_head_dim=16,
        index_block_size=16,
        index_topk_blocks=3,
        index_local_blocks=1,
    )
    return _spread(AutoModelForCausalLM.from_config(config).eval())


def _spread(model: PreTrainedModel) -> PreTrainedModel:
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() >= 2:
                p.normal_(0, 0.12)
    return model


INDEXED = {"deepseek32": lambda: models.make("deepseek32"), "minimax": _minimax}


def _steps(model: PreTrainedModel, cache: Any, padded: bool) -> torch.Tensor:
    """Logits of a prompt, steps and a chunk, each after what came before."""
    ids, at, found = tokens(2, 200), 0, []
    _, mask = left_padded([100, 120])
    with torch.no_grad():
        for n in (120, 1, 1, 9, 1, 40, 1):
            whole = torch.cat([mask, mask.new_ones(2, at + n - 120)], 1) if padded else None
            found.append(model(ids[:, at : at + n], past_key_values=cache, attention_mask=whole).logits[:, -1])
            at += n
    return torch.stack(found)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", INDEXED)
def test_steps_see_what_the_indexer_chose(name: str, implementation: str, padded: bool) -> None:
    model = INDEXED[name]()
    model.set_attn_implementation(implementation)
    expected = _steps(model, DynamicCache(config=model.config), padded)
    ours = CompressedCache("none + window(sinks=2, recent=8)", model)
    torch.testing.assert_close(_steps(model, ours, padded), expected, atol=1e-4, rtol=0)
    assert "dense copy" not in ours.traffic().parts


@pytest.mark.parametrize(
    "spec", ["int(bits=8)", "int(bits=4)", "kivi(bits=4, group=16)", "turboquant(bits=4)", "klt(bits=4)", "fp8"]
)
@pytest.mark.parametrize("name", INDEXED)
def test_compressed_tokens_are_those_of_all_under_the_same_mask(
    name: str, spec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = INDEXED[name]()
    with monkeypatch.context() as then:
        then.setattr(IndexedLayer, "_follows", lambda self, call: False)
        in_full = CompressedCache(f"{spec} + window(sinks=2, recent=8)", model)
        expected = _steps(model, in_full, True)
    ours = CompressedCache(f"{spec} + window(sinks=2, recent=8)", model)
    torch.testing.assert_close(_steps(model, ours, True), expected, atol=2e-3, rtol=0)
    assert "dense copy" in in_full.traffic().parts
    assert "dense copy" not in ours.traffic().parts


@pytest.mark.parametrize("spec", ["none", "int(bits=4)"])
def test_a_step_reads_index_keys_and_chosen_tokens_and_nothing_else(spec: str) -> None:
    """24 of 301 tokens: of those in pages as they are stored, of the others as they came."""
    model = models.make("deepseek32")
    cache = CompressedCache(f"{spec} + window(sinks=0, recent=0)", model)
    with torch.no_grad():
        model(tokens(1, 300), past_key_values=cache)
        model(tokens(1, 1), past_key_values=cache)
    read, layers = cache.traffic().parts, cache.layers
    assert set(read) == {"index keys", "pages", "window", "table"}
    assert read["index keys"] == len(layers) * 301 * 32 * 4
    exact, size = read["window"] // (48 * 4), layers[0].store.layout.token_bytes
    assert read["pages"] == (24 * len(layers) - exact) * size
    assert read["table"] == 4 * (24 * len(layers) - exact)
    assert cache.traffic().dense > 5 * (read["pages"] + read["window"])


BITS = "none + window(sinks=2, recent=8, bits=8)"


@pytest.mark.parametrize("name", [*INDEXED, "qwen4"])
def test_index_keys_of_8_bits_are_those_that_the_indexer_reads(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of tokens before a chunk, rounded; its own as they are."""
    model = _qwen4() if name == "qwen4" else INDEXED[name]()
    ours = CompressedCache(BITS, model)
    found, update = _steps(model, ours, False), IndexedLayer.update_indexer

    def rounded(self: IndexedLayer, new: torch.Tensor) -> torch.Tensor:
        keys, rows, past = update(self, new).clone(), Rows(8, new.dtype), -new.shape[1]
        keys[:, :past] = rows.decode(rows.encode(keys[:, :past]), keys.shape[2])
        return keys

    with monkeypatch.context() as then:
        then.setattr(IndexedLayer, "_rows", lambda self, dtype: Rows(None, dtype))
        then.setattr(IndexedLayer, "update_indexer", rounded)
        cache = CompressedCache(BITS, model)
        torch.testing.assert_close(found, _steps(model, cache, False), atol=1e-5, rtol=0)
        dense = [layer.index_keys for layer in cache.layers if isinstance(layer, IndexedLayer)]
    held = [layer.library()[0] for layer in ours.layers if isinstance(layer, IndexedLayer)]
    assert held
    for keys, rows in zip(dense, held, strict=True):
        assert rows.dtype == torch.int8
        assert rows.shape == (*keys.shape[:2], keys.shape[2] + 2 * -(-keys.shape[2] // 32))


def test_index_keys_of_8_bits_follow_rows_files_and_plans(tmp_path: Path) -> None:
    model = models.make("deepseek32", dtype="float32")
    cache, ids = CompressedCache("int(bits=4) + window(recent=16, bits=8)", model), tokens(2, 300)
    foretold = bill(shape_of(model.config, "tiny"), cache.stack, 300, batch=2)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        slots = SPARE * 2 * len(cache.layers) * (32 + 2)
        assert cache.memory().parts["library"] - slots == foretold.held_parts["library"]
        assert cache.memory().dense - slots == foretold.dense[0]
        model(ids[:, :1], past_key_values=cache)
    traffic = cache.traffic()
    assert traffic.parts["index keys"] == foretold.read_parts["library"] == 2 * 301 * len(cache.layers) * (32 + 2)
    assert traffic.parts["dense copy"] == foretold.read_parts["dense copy"] == 2 * 301 * len(cache.layers) * 32 * 4
    assert traffic.dense == foretold.dense[1]
    cache.save(tmp_path / "cache")
    copies = cache.fork(), CompressedCache.load(tmp_path / "cache", model)
    cache.crop(-3)
    for other in (cache, *copies):
        other.batch_select_indices(torch.tensor([1, 0, 1]))
    for other in copies:
        other.crop(-3)
    with torch.no_grad():
        for i in range(5):
            one, *others = (model(tokens(3, 1, seed=i), past_key_values=c).logits for c in (cache, *copies))
            assert all(torch.equal(one, other) for other in others)


def test_8_bits_change_few_of_the_tokens_that_an_indexer_chooses() -> None:
    """Of those with the least scores: DeepSeek's indexer, 16 heads of 128 channels, an eighth of 4,096 tokens."""
    torch.manual_seed(0)
    spectrum = torch.arange(1, 129) ** -0.7  # of keys and queries alike, after which keys are normalized
    keys = F.layer_norm(torch.randn(4096, 128) * spectrum + 0.3 * torch.randn(128), (128,))
    queries, weights = torch.randn(8, 16, 128) * spectrum, torch.randn(8, 1, 16)
    rows = Rows(8, torch.float32)
    exact, coded = ((weights @ (queries @ x.T).relu())[:, 0] for x in (keys, rows.decode(rows.encode(keys), 128)))
    wanted, found = exact.topk(512).indices, coded.topk(512).indices
    there = torch.zeros_like(exact, dtype=torch.bool).scatter(1, found, True).gather(1, wanted)
    assert 0.98 < there.float().mean() < 1
    assert there[:, :64].all()


def test_gradients_and_weights_are_those_of_all_tokens() -> None:
    model = models.make("deepseek32", "eager")
    cache = CompressedCache("none", model)
    with torch.no_grad():
        model(tokens(1, 80), past_key_values=cache)
        found = model(tokens(1, 1), past_key_values=cache, output_attentions=True).attentions
    assert [x.shape for x in found] == [(1, 4, 1, 81)] * 4
    assert all(int((x[0, 0, 0] > 0).sum()) <= 24 for x in found)
    assert "dense copy" in cache.traffic().parts


@pytest.mark.parametrize("spec", ["none", "int8", "int(bits=4)"])
def test_files_of_before_go_on(spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saved when all latents were expanded in each step."""
    model = models.make("deepseek32")
    ids, mask = left_padded([100, 150])
    wide, after = torch.cat([ids, tokens(2, 1)], 1), torch.cat([mask, mask.new_ones(2, 1)], 1)
    with monkeypatch.context() as then, torch.no_grad():
        then.setattr(build, "IndexedLatentLayer", IndexedLayer)
        old = CompressedCache(spec, model)
        model(ids, attention_mask=mask, past_key_values=old)
        old.save(tmp_path / "old")
        expected = greedy(model, wide, old, attention_mask=after)
    ours = CompressedCache.load(tmp_path / "old", model)
    assert_same(greedy(model, wide, ours, attention_mask=after), expected)
    assert "dense copy" not in ours.traffic().parts


def test_files_with_layers_of_transformers_own_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MiniMax-M3's sparse layers were its own."""
    model = _minimax()
    with monkeypatch.context() as then:
        then.setattr(build, "OURS", {"full_attention": CompressedLayer})
        old = CompressedCache("none", model)
        first = greedy(model, tokens(1, 150), old, new=3)
        old.save(tmp_path / "old")
        expected = greedy(model, first.sequences, old, new=3)
    ours = CompressedCache.load(tmp_path / "old", model)
    assert {type(layer) for layer in ours.layers} == {CompressedLayer, IndexedLayer}
    assert_same(greedy(model, first.sequences, ours, new=3), expected)


def test_policies_and_selectors_leave_indexed_layers_alone() -> None:
    model = _minimax()
    with pytest.warns(match="same redundancy"):
        cache = CompressedCache("snapkv(keep=0.5) + int8 + quest(pages=2, dense_layers=0)", model)
    greedy(model, tokens(1, 200), cache, new=3)
    kept = [int(layer.store.kept[0]) for layer in cache.layers]
    assert kept[0] == kept[2] < 202 == kept[1] == kept[3]
    plans = [layer.plan for layer in cache.layers]
    assert [plan.selector is None for plan in plans] == [False, True] * 2


def _qwen4() -> PreTrainedModel:
    """A model that masks what its indexer leaves out, and keeps the positions of tokens in its first indexed layer."""
    torch.manual_seed(0)
    config = Qwen4ExpTextConfig(
        **{**models.COMMON, "eos_token_id": 1},
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
        head_dim=16,
        layer_types=["linear_attention", "indexed_attention"] * 2,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        indexer_n_heads=4,
        indexer_kv_heads=1,
        indexer_head_dim=16,
        indexer_budget=24,
        indexer_compress_ratio=2,
        hc_lowrank=8,
        ngram_vocab_size_base=512,
        split_ngram_parts=2,
        ple_embed_dim=64,
    )
    return _spread(AutoModelForCausalLM.from_config(config).eval())


def test_positions_that_an_indexer_holds_follow_the_cache(tmp_path: Path) -> None:
    model = _qwen4()
    ids, mask = left_padded([90, 61])

    def both(stack: str, **kwargs: Any) -> tuple[Any, Any]:
        caches = DynamicCache(config=model.config), CompressedCache(stack, model)
        dense, ours = (greedy(model, ids, cache, attention_mask=mask, new=4, **kwargs) for cache in caches)
        return dense, ours

    for kwargs in ({}, {"num_beams": 2}, {"prefill_chunk_size": 40}):
        dense, ours = both("none + window(recent=8)", **kwargs)
        assert_same(ours, dense)
    cache = ours.past_key_values
    held = [layer for layer in cache.layers if hasattr(layer, "indexer_position_ids")]
    theirs = [x.indexer_position_ids for x in dense.past_key_values.layers if hasattr(x, "indexer_position_ids")]
    theirs = theirs or [dense.past_key_values.position_ids]  # transformers 5.19 leaves them on the cache itself
    wide = torch.cat([mask, torch.ones(2, 4, dtype=mask.dtype)], 1)
    assert held[0].indexer_position_ids.shape == theirs[0].shape == (3, 2, 93)
    memory = cache.memory()
    assert memory.parts["library"] >= sum(x.nbytes for layer in held for x in layer.library())
    cache.save(tmp_path / "cache")
    loaded, twin = CompressedCache.load(tmp_path / "cache", model), cache.fork()
    steps = [greedy(model, ours.sequences, each, attention_mask=wide, new=3) for each in (twin, loaded, cache)]
    assert_same(steps[0], steps[2])
    assert_same(steps[1], steps[2])
    with pytest.raises(UnsupportedError, match="chooses tokens by an indexer of its own, which snapkv and quest"):
        CompressedCache("snapkv(keep=0.5) + quest(pages=2)", model)


def test_positions_that_a_model_leaves_on_the_cache_lie_in_its_first_indexed_layer(tmp_path: Path) -> None:
    """As Qwen4 of transformers 5.19 does: they follow rows, forks, files and resets."""
    model = _qwen4()
    cache = CompressedCache("none", model)
    assert not hasattr(cache, "position_ids")
    greedy(model, tokens(2, 20), cache, new=3)
    positions = torch.arange(22).expand(3, 2, 22) + torch.tensor([0, 100])[:, None]
    cache.position_ids = positions
    cache.save(tmp_path / "cache")
    twin, loaded = cache.fork(), CompressedCache.load(tmp_path / "cache", model)
    cache.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(cache.position_ids, positions[:, [1, 0]])
    assert all(torch.equal(other.position_ids, positions) for other in (twin, loaded))
    cache.reset()
    assert not hasattr(cache, "position_ids")
    with pytest.raises(UnsupportedError, match="leaves position_ids on its cache"):
        CompressedCache("none", models.make("llama")).position_ids = positions


def test_what_an_indexer_holds_follows_crops_rows_and_resets() -> None:
    positions, keys = torch.arange(24).view(2, 3, 4), torch.randn(3, 4, 5)
    layer = IndexedLayer(Stack.parse("none").plan(0, 1), None)

    def holds(rows: list[int], tokens: int) -> bool:
        expected = positions[:, rows, :tokens], keys[rows, :tokens]
        return torch.equal(layer.indexer_position_ids, expected[0]) and torch.equal(layer.index_keys, expected[1])

    layer.update(torch.randn(3, 1, 4, 8), torch.randn(3, 1, 4, 8))
    layer.update_indexer(keys)
    layer.indexer_position_ids = positions
    layer.crop(0)
    assert holds([0, 1, 2], 4)
    layer.crop(-1)
    assert holds([0, 1, 2], 3)
    twin = layer.fork({})
    layer.reorder_cache(torch.tensor([2, 0, 0]))
    assert holds([2, 0, 0], 3)
    layer.batch_select_indices(torch.tensor([0, 2]))
    assert holds([2, 0], 3)
    layer.batch_repeat_interleave(2)
    assert holds([2, 2, 0, 0], 3)
    state = layer.state()
    layer.reset()
    assert layer.indexer_position_ids is None
    assert layer.index_keys is None
    assert torch.equal(twin.indexer_position_ids, positions[..., :3])
    layer.restore(state, torch.device("cpu"))
    assert holds([2, 2, 0, 0], 3)
    older = {name: value for name, value in state.items() if name != "index_positions"}
    layer.restore(older, torch.device("cpu"))
    assert layer.indexer_position_ids is None


def test_a_layer_that_shares_latents_holds_index_keys_alone() -> None:
    """Mistral-Large-4: such a layer's indexer is its own."""
    layer = IndexedLayer(Stack.parse("none").plan(0, 1), None)
    keys = torch.randn(2, 4, 5)
    layer.update_indexer(keys)
    layer.crop(-1)
    layer.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(layer.index_keys, keys[[1, 0], :3])
    again = IndexedLayer(layer.plan, None)
    again.restore(layer.state(), torch.device("cpu"))
    assert torch.equal(again.index_keys, layer.index_keys)
    layer.reset()
    with pytest.raises(KvcompError, match="holds 0 tokens"):
        layer.crop(-1)


def test_an_indexer_over_keys_and_values_is_refused() -> None:
    model = models.make("llama")
    cache = CompressedCache("none", model)
    with torch.no_grad(), pytest.raises(UnsupportedError, match="chooses by itself which tokens"):
        model(tokens(1, 8), past_key_values=cache, indices=torch.zeros(1, 8, 4, dtype=torch.int64))
