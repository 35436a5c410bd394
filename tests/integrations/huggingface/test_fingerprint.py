"""A fingerprint is of what a model computes: adapters, scaling, norms and packed weights count while they are used."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny_models as models
import torch
from generation import tokens
from peft import IA3Config, LoraConfig, VeraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._pytree import tree_map

from kvcomp import CompressedCache, KvcompError, KvcompWarning, UnsupportedError
from kvcomp.integrations.huggingface.attention_module import output_projection
from kvcomp.integrations.huggingface.fingerprint import fingerprint

IDS = tokens(1, 90)
OTHER = "another model: the same architecture with other weights$"


def filled(model: Any, path: Path) -> Path:
    """The file of a cache of the model."""
    cache = CompressedCache("none", model)
    with torch.no_grad():
        model(IDS, past_key_values=cache)
    cache.save(path)
    return path


def unsigned(path: Path) -> Path:
    """The same file as the first kvcomp wrote it: without a checksum and without digests of all parameters."""
    with safe_open(path, framework="pt") as file:
        found = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        metadata = {name: word for name, word in file.metadata().items() if name != "crc32"}
    model = json.loads(metadata["model"])
    del model["parameters"]
    save_file(found, path, metadata | {"model": json.dumps(model)})
    return path


@contextmanager
def refused() -> Iterator[None]:
    with pytest.raises(KvcompError, match=OTHER):
        yield


def lora(**changes: Any) -> LoraConfig:
    return LoraConfig(
        **{"r": 4, "target_modules": ["q_proj", "k_proj", "v_proj"], "init_lora_weights": False, **changes}
    )


@pytest.fixture
def adapted() -> Any:
    """A tiny Llama with two adapters, of which the first is active."""
    model = models.make("llama")
    torch.manual_seed(1)
    model.add_adapter(lora(), "a")
    model.add_adapter(lora(), "b")
    model.set_adapter("a")
    return model


@pytest.mark.parametrize("old", [False, True])
def test_a_base_models_file_is_that_of_the_base_with_adapters_disabled(adapted: Any, old: bool, tmp_path: Path) -> None:
    path = filled(models.make("llama"), tmp_path / "base")
    path = unsigned(path) if old else path
    with refused():
        CompressedCache.load(path, adapted)
    adapted.disable_adapters()
    assert fingerprint(adapted) == fingerprint(models.make("llama"))
    CompressedCache.load(path, adapted)
    CompressedCache.load(path, adapted.config)


def test_another_adapter_is_another_model(adapted: Any, tmp_path: Path) -> None:
    path = filled(adapted, tmp_path / "a")
    CompressedCache.load(path, adapted)
    for other in ("b", ["a", "b"], ["b", "a"]):
        adapted.set_adapter(other)
        with refused():
            CompressedCache.load(path, adapted)
    adapted.set_adapter("a")
    CompressedCache.load(path, adapted)
    adapted.disable_adapters()
    with refused():
        CompressedCache.load(path, adapted)


def test_another_scaling_is_another_model(adapted: Any, tmp_path: Path) -> None:
    path = filled(adapted, tmp_path / "a")
    scaled = [module for module in adapted.modules() if isinstance(getattr(module, "scaling", None), dict)]
    for module in scaled:
        module.scaling["b"] *= 2
    CompressedCache.load(path, adapted)  # b is not active
    scaled[0].scaling["a"] *= 2
    with refused():
        CompressedCache.load(path, adapted)


@pytest.mark.parametrize(
    "config",
    [
        lora(),
        lora(use_dora=True),
        lora(modules_to_save=["norm"]),
        IA3Config(target_modules=["k_proj", "v_proj"], feedforward_modules=[], init_ia3_weights=False),
        VeraConfig(r=4, target_modules=["q_proj"]),
    ],
    ids=["lora", "dora", "norm", "ia3", "vera"],
)
def test_a_peft_model_is_the_base_while_its_adapter_is_disabled(config: Any, tmp_path: Path) -> None:
    base = filled(models.make("llama"), tmp_path / "base")
    model = get_peft_model(models.make("llama"), config)
    own = filled(model, tmp_path / "own")
    CompressedCache.load(own, model)
    with refused():
        CompressedCache.load(base, model)
    with model.disable_adapter():
        CompressedCache.load(base, model)
        with refused():
            CompressedCache.load(own, model)
    CompressedCache.load(own, model)


def test_a_merged_adapter_is_in_the_weights(tmp_path: Path) -> None:
    base = filled(models.make("llama"), tmp_path / "base")
    model = get_peft_model(models.make("llama"), lora())
    model.merge_adapter()
    with refused():
        CompressedCache.load(base, model)
    CompressedCache.load(filled(model, tmp_path / "own"), model)


@pytest.mark.parametrize(
    ("name", "part", "change"),
    [
        ("llama", "model.layers.0.input_layernorm.weight", lambda x: x.mul_(3)),
        ("llama", "model.norm.weight", lambda x: x[13].add_(0.5)),
        ("qwen3", "model.layers.3.self_attn.k_norm.weight", lambda x: x.mul_(2)),
        ("gptoss", "model.layers.1.self_attn.k_proj.bias", lambda x: x[5].add_(30)),
        ("gptoss", "model.layers.1.self_attn.sinks", lambda x: x.neg_()),
    ],
)
def test_norms_and_biases_are_the_models(
    name: str, part: str, change: Callable[[Tensor], Tensor], tmp_path: Path
) -> None:
    make = lambda: models.make(name, "eager" if name in models.EAGER_ONLY else "sdpa")  # noqa: E731
    path, model = filled(make(), tmp_path / "file"), make()
    CompressedCache.load(path, model)
    with torch.no_grad():
        change(model.get_parameter(part))
    with refused():
        CompressedCache.load(path, model)
    CompressedCache.load(unsigned(path), model)  # which knows matrices only


def test_a_chunk_through_other_adapters_warns_once(adapted: Any) -> None:
    cache = CompressedCache("none", adapted)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            adapted(IDS, past_key_values=cache)
        adapted.set_adapter("b")
        with pytest.warns(KvcompWarning, match=r"other adapters are active.*reset\(\) it"):
            adapted(IDS, past_key_values=cache)
        adapted(IDS, past_key_values=cache)
        cache.reset()
        adapted.disable_adapters()
        adapted(IDS, past_key_values=cache)


# -- quantized weights --------------------------------------------------------------------------------------------


class Sealed(Tensor):
    """A weight of integers and scales that calls itself floating-point and has no views."""

    @staticmethod
    def __new__(cls, codes: Tensor, scales: Tensor) -> Sealed:
        return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scales.dtype, device=codes.device)

    def __init__(self, codes: Tensor, scales: Tensor) -> None:
        self.codes, self.scales = codes, scales

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].codes, args[0].scales)
        if func in (torch.ops.aten.t.default, torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            return func(*tree_map(lambda x: x.codes * x.scales if isinstance(x, Sealed) else x, args))
        raise NotImplementedError(f"{func} of a packed weight")


class Packed(Sealed):
    """One that tells its parts, like those of torchao."""

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "scales"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Tensor], *_: Any) -> Packed:
        return cls(inner["codes"], inner["scales"])


def packed(name: str = "llama", scale: float = 1.0) -> Any:
    """A tiny model with all projections packed to int8."""
    model = models.make(name)
    for module in model.model.modules():
        if isinstance(module, torch.nn.Linear):
            scales = module.weight.detach().abs().amax(-1, keepdim=True) / 127
            codes = (module.weight.detach() / scales).round().to(torch.int8)
            module.weight = torch.nn.Parameter(Packed(codes, scales * scale), requires_grad=False)
    return model


def test_packed_weights_have_a_fingerprint(tmp_path: Path) -> None:
    path = filled(packed(), tmp_path / "packed")
    CompressedCache.load(path, packed())
    for other in (packed(scale=1.5), models.make("llama")):
        with refused():
            CompressedCache.load(path, other)


def test_weights_that_cannot_be_read_are_named() -> None:
    model = packed()
    weight = model.model.layers[0].mlp.up_proj.weight
    model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(Sealed(weight.codes, weight.scales), False)
    with pytest.raises(
        UnsupportedError, match=r"the elements of layers.0.mlp.up_proj.weight, a Sealed, cannot be read"
    ):
        fingerprint(model)


def test_the_output_projection_is_what_the_module_does() -> None:
    model, plain = packed(), models.make("llama")
    found, true = (output_projection(m.model.layers[1].self_attn, 4, 16) for m in (model, plain))
    assert found is not None
    assert true is not None
    assert float((found - true).norm() / true.norm()) < 0.01
    assert output_projection(model.model.layers[1].self_attn, 4, 32) is None
    with torch.no_grad():
        model(IDS, past_key_values=CompressedCache("criticalkv(keep=0.5)", model))
    tuned = models.make("llama")
    tuned.add_adapter(lora(target_modules=["o_proj"]), "a")
    attention = tuned.model.layers[1].self_attn
    effective = attention.o_proj.weight + attention.o_proj.get_delta_weight("a")
    found = output_projection(attention, 4, 16)
    assert found is not None
    torch.testing.assert_close(found.flatten(0, 1).mT, effective, atol=1e-5, rtol=1e-4)
