"""Shapes from configs alone: parameters as published, caches as CompressedCache reports them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_models as models
import torch
from generation import tokens
from transformers import AutoConfig, DynamicCache, PreTrainedModel

from kvcomp import CompressedCache, Stack, UnsupportedError
from kvcomp.architecture import LayerKind, ModelShape
from kvcomp.cost.bill import bill
from kvcomp.cost.roofline import decode
from kvcomp.integrations.huggingface.models import ModelError
from kvcomp.integrations.huggingface.shapes import builtin, model_shape, shape_of

# total parameters as the checkpoints have them, norms and biases included
PUBLISHED = {
    "smollm2-135m": 134_515_008,
    "qwen2.5-coder-1.5b": 1_543_714_304,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-32b": 32_762_123_264,
    "qwen3-30b-a3b": 30_532_122_624,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "mistral-7b": 7_248_023_552,
    "gemma-3-27b": 27_009_346_304,  # the decoder; the vision tower has 0.4 B more
    "gpt-oss-20b": 20_914_757_184,
    "gpt-oss-120b": 116_829_156_672,
    "deepseek-v3": 671_026_419_200,
}
KV_BYTES = {
    "smollm2-135m": 30 * 3 * 64 * 4,
    "qwen2.5-coder-1.5b": 28 * 2 * 128 * 4,
    "qwen2.5-7b": 28 * 4 * 128 * 4,
    "qwen3-0.6b": 28 * 8 * 128 * 4,
    "qwen3-4b": 147_456,
    "qwen3-8b": 147_456,
    "qwen3-32b": 64 * 8 * 128 * 4,
    "qwen3-30b-a3b": 48 * 4 * 128 * 4,
    "llama-3.1-8b": 32 * 8 * 128 * 4,
    "llama-3.1-70b": 80 * 8 * 128 * 4,
    "mistral-7b": 32 * 8 * 128 * 4,
    "gemma-3-27b": 10 * 16 * 128 * 4,  # 1 layer of 6 is global
    "gpt-oss-20b": 12 * 8 * 64 * 4,  # every other layer
    "gpt-oss-120b": 18 * 8 * 64 * 4,
    "deepseek-v3": 61 * (512 + 64) * 2,
}


@pytest.mark.parametrize("name", builtin())
def test_builtin_models_are_as_published(name: str) -> None:
    shape = model_shape(name)
    assert shape.weights.parameters == pytest.approx(PUBLISHED[name], rel=5e-4)
    assert shape.weights.parameters <= PUBLISHED[name]  # norms and biases are not counted
    assert shape.token_bytes == KV_BYTES[name]
    assert shape.dtype == "bfloat16"
    assert model_shape(builtin()[name]["hub"].upper()) == shape


@pytest.mark.parametrize(
    ("name", "active"), [("qwen3-30b-a3b", 3.3), ("gpt-oss-20b", 3.6), ("gpt-oss-120b", 5.1), ("deepseek-v3", 37)]
)
def test_active_parameters_are_as_published(name: str, active: float) -> None:
    shape = model_shape(name)
    # some publishers count the input embedding and some do not
    low, high = shape.active_parameters, shape.active_parameters + shape.lookup.parameters
    assert low * 0.99 <= active * 1e9 <= high * 1.01


def test_weights_of_quantized_checkpoints() -> None:
    # the model card's checkpoint sizes in GiB, which have biases and norms too
    assert model_shape("gpt-oss-120b").weights.nbytes / 2**30 == pytest.approx(60.8, rel=3e-3)
    assert model_shape("gpt-oss-20b").weights.nbytes / 2**30 == pytest.approx(12.8, rel=3e-3)
    deepseek = model_shape("deepseek-v3")
    assert 671e9 < deepseek.weights.nbytes < 1.01 * 671e9
    assert model_shape("deepseek-v3", weight_bits=16).weights.nbytes == 2 * deepseek.weights.parameters
    assert model_shape("qwen3-8b", weight_bits=4.5).weights.nbytes == pytest.approx(8_190_427_136 * 4.5 / 8)


def test_published_figures_from_the_config() -> None:
    shape = model_shape("qwen3-8b")
    assert f"{shape.dense.nbytes / 1e9:.1f}" == "15.1"
    assert f"{decode(shape, 4096, 32).intensity:.2f}" == "16.30"
    assert f"{model_shape('deepseek-v3').token_bytes / 1e3:.0f}" == "70"


def tiny(name: str) -> tuple[PreTrainedModel, ModelShape]:
    """A tiny model in float32, and its shape."""
    model = models.make(name, "eager" if name in models.EAGER_ONLY else "sdpa")
    model.config.dtype = model.dtype
    return model, shape_of(model.config, name)


@pytest.mark.parametrize("name", models.NAMES)
def test_parameters_are_those_of_the_real_model(name: str) -> None:
    model, shape = tiny(name)
    biases = [p.numel() for n, p in model.named_parameters() if p.dim() < 2 or n.endswith("bias")]
    assert shape.weights.parameters == sum(p.numel() for p in model.parameters()) - sum(biases)
    assert len(shape.layers) == model.config.num_hidden_layers


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "gptoss", "qwen3next"])
@pytest.mark.parametrize("spec", ["none", "kivi(bits=2, group=16)", "int(bits=4) + quest(pages=4, dense_layers=1)"])
def test_a_plan_foretells_what_the_cache_reports(name: str, spec: str) -> None:
    """Held and read of a whole model, sliding and recurrent layers included."""
    model, shape = tiny(name)
    cache = CompressedCache(spec, model)
    row = bill(shape, Stack.parse(spec), 300, batch=2)
    with torch.no_grad():
        model(tokens(2, 300), past_key_values=cache)
        parts = cache.memory().parts
        model(tokens(2, 1), past_key_values=cache)
    for part in ("pages", "summaries", "window", "sinks"):
        assert parts.get(part, 0) == row.held_parts.get(part, 0)
    traffic = cache.traffic()
    counters = 64 * len(shape.layers)  # bytes of the library's own bookkeeping
    assert traffic.read == pytest.approx(row.read, abs=counters)
    assert traffic.dense == pytest.approx(row.dense[1], abs=counters)
    assert traffic.parts.get("library", 0) == pytest.approx(row.read_parts.get("library", 0), abs=counters)
    assert {n: s for n, s in traffic.parts.items() if n != "library"} == {
        n: s for n, s in row.read_parts.items() if n != "library"
    }


def test_latents_are_cached_as_foretold() -> None:
    model, shape = tiny("deepseek")
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(tokens(1, 50), past_key_values=cache)
    assert set(shape.kinds) == {LayerKind.LATENT}
    assert sum(x.keys.nbytes + x.values.nbytes for x in cache.layers) == shape.cache_bytes(50)
    layer = shape.layers[0]
    assert (layer.k_dim, layer.v_dim) == (cache.layers[0].keys.shape[-1], cache.layers[0].values.shape[-1])
    held = CompressedCache("int(bits=8)", model)
    with torch.no_grad():
        model(tokens(1, 200), past_key_values=held)
        model(tokens(1, 1), past_key_values=held)  # commits the prompt
    foretold = bill(shape, Stack.parse("int(bits=8)"), 200).held_parts
    assert foretold["pages"] == held.memory().parts["pages"]
    assert foretold["window"] == held.memory().parts["window"]


def test_a_local_folder_needs_no_weights(tmp_path: Path) -> None:
    models.make("llama").config.save_pretrained(tmp_path / "mine")
    shape = model_shape(str(tmp_path / "mine"))
    assert shape.name == "mine"
    assert shape.positions == 8192
    assert shape.token_bytes == 4 * 2 * 2 * 16 * shape.itemsize


def test_a_folder_goes_before_a_builtin_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models.make("llama").config.save_pretrained(tmp_path / "qwen3-8b")
    monkeypatch.chdir(tmp_path)
    assert len(model_shape("qwen3-8b").layers) == 4


def test_a_mistyped_name_is_not_asked_of_the_hub() -> None:
    with pytest.raises(ModelError, match=r"did you mean 'qwen3-8b'\?"):
        model_shape("qwen3-9b")


def test_a_model_that_is_nowhere_lists_what_is_built_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"hub.*gpt-oss-120b"):
        model_shape("nobody/no-such-model")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no-such-architecture"}))
    with pytest.raises(ModelError, match="no-such-architecture"):
        model_shape(str(tmp_path))


@pytest.mark.parametrize(
    ("kind", "fields", "part"),
    [
        ("t5", {}, "encoder-decoder"),
        ("mamba", {"num_hidden_layers": 1}, "linear_attention"),
        ("vit", {}, "cannot be built"),
        (
            "llama",
            {"num_hidden_layers": 1, "quantization_config": {"quant_method": "gptq", "bits": 4}},
            "--weight-bits",
        ),
        ("mixtral", {"num_hidden_layers": 1, "num_experts_per_tok": 0}, "experts"),
    ],
)
def test_what_a_config_does_not_tell_is_refused(kind: str, fields: dict, part: str) -> None:
    with pytest.raises(UnsupportedError, match=part):
        shape_of(AutoConfig.for_model(kind, **fields), kind)


def test_quantized_weights_of_a_given_size() -> None:
    config = AutoConfig.for_model("llama", num_hidden_layers=1, quantization_config={"quant_method": "gptq", "bits": 4})
    shape = shape_of(config, "llama", weight_bits=4.25)
    assert shape.weights.nbytes == pytest.approx(shape.weights.parameters * 4.25 / 8)


@pytest.mark.parametrize("spec", [None, "none", "int(bits=8)", "kivi(bits=4, group=16)"])
def test_layers_with_an_indexer_are_foretold(spec: str | None) -> None:
    """All index keys are held and read, beside the tokens that the model chooses, wherever those lie."""
    model, shape = tiny("deepseek32")
    assert set(shape.kinds) == {LayerKind.INDEXED}
    assert {(x.k_dim, x.v_dim, x.index, x.chosen) for x in shape.layers} == {(32, 16, 32, 24)}
    foretold, cache = bill(shape, spec, 600), CompressedCache(spec or "none", model)
    with torch.no_grad():
        model(tokens(1, 600), past_key_values=cache)
        for layer in cache.layers:
            layer.commit()
        held = cache.memory()
        model(tokens(1, 1), past_key_values=cache)
    read = cache.traffic().parts
    index = foretold.read_parts["library"]
    assert index == read["index keys"] == 4 * 601 * 32 * 4
    if spec is None:
        assert foretold.read == cache.traffic().dense == 4 * 601 * (48 + 32) * 4
        return
    assert foretold.held_parts["pages"] == held.parts["pages"]
    assert foretold.read < cache.traffic().dense / 2
    assert sum(read.values()) == pytest.approx(foretold.read, rel=0.1)


def test_published_cache_of_an_indexed_model() -> None:
    """DeepSeek-V3.2: 70 KB a token of latents and 16 KB of index keys, of which a step reads 2,048 tokens and all."""
    shape = shape_of(AutoConfig.for_model("deepseek_v32"), "deepseek-v3.2", weight_bits=8)
    assert shape.token_bytes == 61 * 576 * 2
    row = bill(shape, "none + window(sinks=0, recent=0)", 131_072)
    assert row.read_parts["library"] == 61 * 131_073 * 128 * 2
    assert row.read_parts["pages"] + row.read_parts.get("window", 0) == 61 * 2048 * 576 * 2
