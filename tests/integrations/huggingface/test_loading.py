"""How a model is loaded: each option reaches transformers, or is refused in one sentence."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import tiny_folder
import torch
import transformers

from kvcomp.errors import KvcompError, UnsupportedError
from kvcomp.integrations.huggingface import models, placing
from kvcomp.integrations.huggingface.models import ModelError, load_config, load_model, load_tokenizer
from kvcomp.integrations.huggingface.shapes import model_shape
from kvcomp.integrations.loading import QUANTIZATIONS, Loading

LOADERS = ("AutoConfig", "AutoTokenizer", "AutoModelForCausalLM")
OWN_CONFIG = """
from pathlib import Path
from transformers import LlamaConfig
Path({mark!r}).touch()
class OwnConfig(LlamaConfig):
    model_type = "own_llama"
"""
OWN_MODEL = """
from transformers import LlamaForCausalLM
from .configuration_own import OwnConfig
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_folder.save(tmp_path / "model")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
    """What each `from_pretrained` is called with; the model's is the last, and ends the loading."""
    found: dict[str, dict[str, Any]] = {}

    def recorded(name: str) -> Any:
        real = getattr(transformers, name).from_pretrained

        def from_pretrained(source: str, **given: Any) -> Any:
            found[name] = {"source": source, **given}
            if name == "AutoModelForCausalLM":
                raise OSError("enough")
            return real(source, **given) if os.path.exists(source) else None

        return from_pretrained

    for name in LOADERS:
        monkeypatch.setattr(getattr(transformers, name), "from_pretrained", recorded(name))
    return found


def edited(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def written(folder: Path, places: Any) -> str:
    file = folder / "map.json"
    file.write_text(places if isinstance(places, str) else json.dumps(places))
    return str(file)


def test_options_reach_the_model(folder: Path, tmp_path: Path) -> None:
    model, _ = load_model(str(folder), Loading("bfloat16", "cpu", attn_implementation="eager"))
    assert (model.dtype, model.device.type) == (torch.bfloat16, "cpu")
    assert model.config._attn_implementation == "eager"
    model, _ = load_model(str(folder), device_map=written(tmp_path, {"": "cpu"}), dtype=torch.float16)
    assert (model.dtype, model.device.type) == (torch.float16, "cpu")
    model, _ = load_model(str(folder))
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("places", ["auto", "sequential", {"": "cpu"}, {"model": "cpu", "lm_head": "cpu"}])
def test_maps_reach_the_model(
    folder: Path, tmp_path: Path, asked: dict[str, dict[str, Any]], places: str | dict[str, str]
) -> None:
    given = places if isinstance(places, str) else written(tmp_path, places)
    with pytest.raises(ModelError, match="enough"):
        load_model(str(folder), device_map=given)
    assert asked["AutoModelForCausalLM"]["device_map"] == places


@pytest.mark.parametrize("trusted", [False, True])
def test_revision_and_trust_reach_everything_of_a_hub_model(asked: dict[str, dict[str, Any]], trusted: bool) -> None:
    loading = Loading(revision="v2", trust_remote_code=trusted)
    with pytest.raises(ModelError, match="enough"):
        load_model("someone/some-model", loading)
    load_config("someone/some-model", loading)
    assert set(asked) == set(LOADERS)
    for given in asked.values():
        assert (given["source"], given["revision"]) == ("someone/some-model", "v2")
        assert given["trust_remote_code"] is trusted
    asked.clear()
    with pytest.raises(AttributeError):  # a config of None has no shape
        model_shape("someone/some-model", loading=loading)
    load_tokenizer("someone/some-model", loading)
    assert {name: given["revision"] for name, given in asked.items()} == {"AutoConfig": "v2", "AutoTokenizer": "v2"}


@pytest.mark.parametrize(
    ("quantization", "expected"),
    [("bnb-8bit", {"load_in_8bit": True}), ("bnb-4bit", {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"})],
)
def test_bitsandbytes_configs(
    folder: Path, asked: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, quantization: str, expected: Any
) -> None:
    real = transformers.utils.quantization_config.importlib.metadata.version  # type: ignore[attr-defined]
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.48" if name == "bitsandbytes" else real(name))
    monkeypatch.setattr(placing, "_require", lambda *_: None)
    with pytest.raises(ModelError, match="enough"):
        load_model(str(folder), quantization=quantization, device="cpu", dtype="bfloat16")
    given = asked["AutoModelForCausalLM"]
    assert given["device_map"] == {"": torch.device("cpu")}
    assert {name: getattr(given["quantization_config"], name) for name in expected} == expected
    assert given["quantization_config"].bnb_4bit_compute_dtype == (
        torch.bfloat16 if quantization == "bnb-4bit" else torch.float32
    )


def test_torchao_quantizes_the_weights(folder: Path) -> None:
    # In a process of its own: where torchao is installed, every import of transformers loads it.
    torchao = Path(sys.prefix) / "torchao"
    assert torchao.is_dir(), f"`make test` installs it: pip install --no-deps --target {torchao} torchao"
    code = f"""
from kvcomp.integrations.huggingface import CompressedCache
from kvcomp.integrations.huggingface.models import load_model
model, tokenizer = load_model({str(folder)!r}, quantization="torchao-int8", device="cpu")
print(type(model.model.layers[0].mlp.up_proj.weight).__name__)
ids = tokenizer("a number of words", return_tensors="pt").input_ids
cache = CompressedCache("int(bits=4)", model)
print(model.generate(ids, past_key_values=cache, max_new_tokens=4).shape[1] - ids.shape[1])
try:
    load_model({str(folder)!r}, quantization="torchao-int4", device="cpu")
except ValueError as error:
    print(error)
"""
    paths = os.pathsep.join([str(torchao), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    weight, new, refusal = done.stdout.strip().splitlines()[-3:]
    assert (weight, new) == ("Int8Tensor", "4")
    assert refusal.startswith("quantization: torchao-int4 has kernels for NVIDIA GPUs alone")


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_an_absent_library_says_how_to_install_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, quantization: str
) -> None:
    monkeypatch.setattr(placing.importlib.util, "find_spec", lambda name: None)
    package = "torchao" if quantization.startswith("torchao") else "bitsandbytes"
    with pytest.raises(KvcompError, match=f"quantization: '{quantization}' needs {package}.*: pip install {package}"):
        load_model(str(folder), quantization=quantization)
    with pytest.raises(KvcompError, match="device-map: 'auto' needs accelerate: pip install accelerate"):
        load_model(str(folder), device_map="auto")


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_quantized_checkpoints_are_not_quantized_again(folder: Path, method: str) -> None:
    edited(folder, quantization_config={"quant_method": method, "bits": 4, "group_size": 32})
    with pytest.raises(ModelError, match=rf"quantization: .* is quantized already \({method}\): leave out"):
        load_model(str(folder), quantization="bnb-4bit")
    with pytest.raises(ModelError, match=f"could not be loaded: .*(?i:{method})"):
        load_model(str(folder), device="cpu")


def test_gguf_files_are_not_quantized_again(tmp_path: Path) -> None:
    (tmp_path / "any.gguf").touch()
    with pytest.raises(ModelError, match=r"quantization: .* is a \.gguf file: leave out --quantization bnb-4bit"):
        load_model(str(tmp_path / "any.gguf"), quantization="bnb-4bit")


def test_code_beside_a_model_runs_only_where_it_is_trusted(folder: Path, tmp_path: Path) -> None:
    mark = tmp_path / "it ran"
    (folder / "configuration_own.py").write_text(OWN_CONFIG.format(mark=str(mark)))
    (folder / "modeling_own.py").write_text(OWN_MODEL)
    auto_map = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    edited(folder, model_type="own_llama", auto_map=auto_map)
    for load in (load_model, load_config, model_shape):
        with pytest.raises(ModelError, match=r"comes with code of its own.*--trust-remote-code"):
            load(str(folder))
    assert not mark.exists()
    model, _ = load_model(str(folder), device="cpu", trust_remote_code=True)
    assert type(model).__name__ == "OwnForCausalLM"
    assert mark.exists()


@pytest.mark.parametrize("name", ["smollm2-135m", "folder", "file.gguf"])
def test_what_is_not_of_the_hub_has_no_revisions(
    name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "converted", lambda alias: folder)
    (tmp_path / "file.gguf").touch()
    given = {"folder": str(folder), "file.gguf": str(tmp_path / "file.gguf")}.get(name, name)
    for load in (load_model, load_config, load_tokenizer):
        with pytest.raises(
            ModelError, match=r"revision: .* is no model of the hub, and has no revision 'main': leave out"
        ):
            load(given, Loading(revision="main"))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"dtype": "int8"}, "dtype: 'int8' is none of float32, bfloat16, float16"),
        ({"dtype": torch.int8}, "dtype: 'int8' is none of"),
        ({"quantization": "int4"}, "quantization: 'int4' is none of torchao-int8, torchao-int4, bnb-8bit, bnb-4bit"),
        ({"device": "cpu", "device_map": "auto"}, "device, device-map: .*give one of the two"),
        ({"attn_implementation": ""}, "attn-implementation: '' names nothing"),
        ({"revision": "a\x1bb"}, "revision: .* names nothing"),
        ({"device": "nowhere"}, "device='nowhere': no such device here"),
        ({"device": "cuda:77"}, "device='cuda:77': no such device here"),
        ({"device": "meta"}, "device='meta': it holds no numbers"),
        ({"device_map": "anywhere"}, "device-map: 'anywhere' cannot be read .*: expected auto"),
        ({"device_map": "~nosuchuser/map.json"}, "device-map: .* cannot be read"),
        ({"device_map": "."}, "device-map: '.' cannot be read"),
        ({"attn_implementation": "unheard_of"}, "could not be loaded: .*unheard_of"),
    ],
)
def test_what_no_model_is_loaded_with(folder: Path, given: dict[str, Any], told: str) -> None:
    with pytest.raises(KvcompError, match=told) as caught:
        load_model(str(folder), **given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("places", "told"),
    [
        ("{", "is no JSON"),
        ("[" * 5000, "is no JSON"),
        ([], "has no devices by module"),
        ({}, "has no devices by module"),
        ({"": None}, "has no devices by module"),
        ({"": -1}, "has no devices by module"),
        ({"": True}, "has no devices by module"),
        ({"": "nowhere"}, "no such device here"),
        ({"": 77}, "no such device here"),
    ],
)
def test_maps_that_place_nothing(folder: Path, tmp_path: Path, places: Any, told: str) -> None:
    with pytest.raises(KvcompError, match=f"device-map: .*map.json.*{told}"):
        load_model(str(folder), device_map=written(tmp_path, places))


def test_offloaded_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    places |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    with pytest.raises(UnsupportedError, match=r"device-map: .*outside of the devices that compute.*layers\.1\."):
        load_model(str(folder), device_map=written(tmp_path, places))


def test_changed_is_what_differs() -> None:
    assert Loading().changed() == {}
    every = Loading("float16", None, "auto", "eager", "bnb-4bit", "v1", True)
    assert set(every.changed()) == {field.name for field in fields(Loading)} - {"device"}
    assert Loading(device=torch.device("cpu"), dtype=torch.float16) == Loading("float16", "cpu")
