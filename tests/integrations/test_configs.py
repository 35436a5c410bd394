"""Configs of any kind are read or refused in words: of layers that differ, of unusual layer types, of no decoder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_models as models
import torch
from generation import assert_same, greedy, left_padded
from transformers import (
    DeepseekV3Config,
    DynamicCache,
    EncodecConfig,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    LlamaConfig,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES
from transformers.models.mllama.configuration_mllama import MllamaTextConfig

from kvcomp import CompressedCache, KvcompError, UnsupportedError
from kvcomp.architecture import LayerKind
from kvcomp.integrations.configs import cache_layers, field, layer_kinds, max_positions
from kvcomp.integrations.huggingface.fingerprint import fingerprint
from kvcomp.integrations.huggingface.saving import essentials
from kvcomp.integrations.huggingface.shapes import shape_of

SMALL = {k: v for k, v in models.COMMON.items() if k != "num_hidden_layers"}


def _llama(per_layer: dict[int, dict[str, Any]] | None = None, **changes: Any) -> LlamaConfig:
    return LlamaConfig(**{**models.COMMON, **changes}, per_layer_config=per_layer)


@pytest.mark.filterwarnings("ignore")
def test_every_config_of_transformers_is_taken_or_refused_in_one_sentence() -> None:
    tried, refusals = 0, dict[str, str]()
    for name in CONFIG_MAPPING_NAMES:
        try:
            config = CONFIG_MAPPING[name]()
        except Exception:  # transformers makes no default config of it
            continue
        tried += 1
        try:
            CompressedCache("none", config)
        except KvcompError as error:
            refusals[name] = str(error)
    assert tried > 400
    assert not {name: said for name, said in refusals.items() if "\n" in said or len(said) > 400}


def test_a_cache_layer_that_its_modeling_file_registers() -> None:
    code = (
        "from transformers import DeepseekV4Config; from kvcomp import CompressedCache; "
        "print(len(CompressedCache('none', DeepseekV4Config(num_hidden_layers=4)).layers))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["4"], done.stderr[-400:]


@pytest.mark.parametrize("config", [EncodecConfig(), CONFIG_MAPPING["lxmert"](), CONFIG_MAPPING["resnet"]()])
def test_a_config_of_no_decoder(config: Any) -> None:
    with pytest.raises(KvcompError, match="describes no text decoder"):
        CompressedCache("none", config)
    with pytest.raises(KvcompError, match="describes no text decoder"):
        fingerprint(config)


def test_a_layer_type_without_a_cache_layer() -> None:
    config = _llama(layer_types=["full_attention"] * 4)
    config.layer_types = ["full_attention", "hopping_attention"] * 2
    with pytest.raises(UnsupportedError, match="layer 1 of llama is 'hopping_attention'"):
        CompressedCache("none", config)


OVERRIDES = {
    "kv heads": {1: {"num_key_value_heads": 4}, 2: {"num_key_value_heads": 1}},
    "head dim": {0: {"head_dim": 32}},
    "windows": {i: {"sliding_window": 16} for i in (0, 2)},
    "positions": {3: {"max_position_embeddings": 4096}},
}


@pytest.mark.parametrize("overrides", OVERRIDES.values(), ids=OVERRIDES)
def test_fields_that_differ_between_layers_are_read_per_layer(overrides: dict[int, dict[str, Any]]) -> None:
    same = _llama(head_dim=16, sliding_window=None)
    config = _llama(overrides, head_dim=16, sliding_window=None)
    name = next(iter(overrides[min(overrides)]))
    assert field(config, name) == [getattr(own, name) for own in config.per_layer_config]
    assert field(same, name) == getattr(same, name)
    assert max_positions(config) == (4096 if name == "max_position_embeddings" else 8192)
    CompressedCache("none", config)
    if name in essentials(config):
        assert essentials(config) != essentials(same)
        assert fingerprint(config) != fingerprint(same)
    known = essentials(config)
    config.allow_global_per_layer_attribute_access = True
    assert essentials(config) == known


@pytest.mark.filterwarnings("ignore")
def test_latents_of_some_layers() -> None:
    config = DeepseekV3Config(**{**models.COMMON, **models.LATENT})
    assert LayerKind.LATENT in layer_kinds(config)
    mixed = DeepseekV3Config(**{**models.COMMON, **models.LATENT}, per_layer_config={0: {"kv_lora_rank": 16}})
    assert LayerKind.LATENT in layer_kinds(mixed)
    with pytest.raises(UnsupportedError, match="caches latents"):
        CompressedCache("criticalkv(keep=0.5)", mixed)
    with pytest.raises(UnsupportedError, match="latent attention"):
        CompressedCache("none", mixed, preallocate=100)
    assert set(layer_kinds(_llama())) == {LayerKind.FULL}


def test_gemma_4(tmp_path: Path) -> None:
    """Its sliding and its full layers differ in head dimension and heads."""
    config = Gemma4TextConfig(
        **{**models.COMMON, "vocab_size_per_layer_input": 256, "hidden_size_per_layer_input": 16},
        head_dim=16,
        global_head_dim=32,
        sliding_window=16,
        layer_types=list(models.MIXED),
        num_kv_shared_layers=0,
    )
    assert field(config, "head_dim") == [16, 32, 16, 32]
    torch.manual_seed(0)
    model = Gemma4ForCausalLM(config).eval()
    ids, mask = left_padded([150, 90])
    dense = greedy(model, ids, DynamicCache(config=config), attention_mask=mask)
    cache = CompressedCache("none", model)
    assert_same(greedy(model, ids, cache, attention_mask=mask), dense)
    cache.save(tmp_path / "cache")
    again = CompressedCache.load(tmp_path / "cache", model)
    assert again.get_seq_length() == cache.get_seq_length()
    config.layer_types[0], config.layer_types[1] = config.layer_types[1], config.layer_types[0]
    with pytest.raises(KvcompError, match=r"another model: .*layer_types"):
        CompressedCache.load(tmp_path / "cache", config)


def test_the_shape_of_a_model_whose_layers_differ() -> None:
    config = Gemma4TextConfig(layer_types=None, num_hidden_layers=6, vocab_size=64, vocab_size_per_layer_input=64)
    shape = shape_of(config, "gemma-4")
    kinds, _ = cache_layers(config)
    assert len(shape.layers) == 6
    assert {layer.k_dim for layer in shape.layers if layer.kv_heads} == set(field(config, "head_dim"))
    assert len(set(kinds)) == 2


@pytest.mark.parametrize("crossing", [[1], [0, 3], []])
def test_layers_that_attend_to_an_image_stay_the_library_s_own(crossing: list[int]) -> None:
    config = MllamaTextConfig(**models.COMMON, cross_attention_layers=crossing)
    kinds, _ = cache_layers(config)
    assert [i for i, kind in enumerate(kinds) if kind == "cross_attention"] == crossing
    cache = CompressedCache("int(bits=8)", config)
    ours = [i for i, layer in enumerate(cache.layers) if type(layer).__name__ == "CompressedLayer"]
    assert ours == [i for i in range(4) if i not in crossing]
