"""What vLLM cannot do with a stack is refused before an engine takes memory, with the stage and what to do; vLLM itself
need not be installed."""

from __future__ import annotations

import re
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from kvcomp.architecture import LayerKind
from kvcomp.cache.blocks.setup import Setup
from kvcomp.errors import KvcompError, KvcompWarning, UnsupportedError
from kvcomp.integrations.vllm import plugin
from kvcomp.integrations.vllm.checks import accepted, check_layer, check_stages
from kvcomp.integrations.vllm.config import VARIABLE, stack_of
from kvcomp.stages import Held, Policy
from kvcomp.stages.stack import Stack


def config(stack: Any = None, caching: bool = False, **changes: Any) -> Any:
    """As much of a VllmConfig as a setup reads."""
    model = {
        "use_mla": False,
        "dtype": torch.bfloat16,
        "get_total_num_hidden_layers": lambda: 4,
        "get_head_size": lambda: 64,
        "get_sliding_window": lambda: None,
        "hf_text_config": None,
        "model": "no-such-folder/no-such-model.gguf",
        "revision": None,
        "trust_remote_code": False,
        "max_model_len": 2048,
        "hf_config": None,
    }
    cache = {
        "cache_dtype": "auto",
        "enable_prefix_caching": caching,
        "user_specified_block_size": False,
        "block_size": 128,
    }
    parallel = {
        "decode_context_parallel_size": 1,
        "prefill_context_parallel_size": 1,
        "tensor_parallel_size": 1,
    }
    parts = [{name: changes.get(name, value) for name, value in part.items()} for part in (model, cache, parallel)]
    model_config, cache_config, parallel_config = (SimpleNamespace(**part) for part in parts)
    return SimpleNamespace(
        additional_config={} if stack is None else {"kvcomp": {"stack": stack}},
        model_config=model_config,
        cache_config=cache_config,
        parallel_config=parallel_config,
        speculative_config=SimpleNamespace(num_speculative_tokens=changes["drafts"]) if "drafts" in changes else None,
        kv_transfer_config=changes.get("kv_transfer_config"),
    )


@pytest.mark.parametrize(
    ("stack", "changes", "said"),
    [
        ("pyramidkv(keep=0.25) + int8", {}, "pyramidkv keeps other numbers of tokens .* use snapkv"),
        ("adakv(budget=256) + int8", {}, "adakv keeps other numbers of tokens .* use snapkv"),
        ("knorm(threshold=-9.0) + int8", {}, "knorm keeps other numbers of tokens .* use snapkv"),
        ("expected_attention + int8", {}, "expected_attention needs the model .* use snapkv"),
        ("criticalkv + int8", {}, "criticalkv needs the model"),
        ("kvzip + int8", {}, "kvzip needs the model"),
        ("kvzap(calibration='file') + int8", {}, "kvzap keeps other numbers of tokens .* use snapkv"),
        (
            "kvzap(budget=256, heads=own, calibration='file') + int8",
            {"tensor_parallel_size": 2},
            "kvzap: a calibration knows all heads, .* one rank",
        ),
        ("h2o(budget=256) + int8", {"drafts": 3}, "h2o lets pages go while generating, .* set hold=false"),
        ("h2o(budget=256, heads=adaptive) + int8", {}, "h2o keeps other numbers of tokens .* use snapkv"),
        ("snapkv + streaming + int8", {}, "snapkv has to be the only policy"),
        ("tova(keep=0.3) + int8", {"tensor_parallel_size": 2}, "tova keeps the same tokens in all heads, .* one rank"),
        ("streaming(chunk=64) + int8", {}, "streaming.chunk=64.*leave chunk out"),
        ("klt(bits=4)", {}, "klt needs a calibration of no-such-folder.*, which could not be made: .* and name it"),
        ("int8 + window(recent=8, bits=8)", {}, "windows in vLLM's blocks hold floating-point numbers: set bits=16"),
        ("int8", {"use_mla": True}, "caches latents .MLA., .* without a stack"),
        ("int8", {"cache_dtype": "fp8"}, "--kv-cache-dtype fp8 .* leave it out"),
        ("int8", {"user_specified_block_size": True, "block_size": 16}, "use --block-size 64"),
        ("int8", {"decode_context_parallel_size": 2}, "context parallelism"),
        ("kivi(bits=2)", {"kv_transfer_config": object()}, "leave out --kv-transfer-config, or use a stack .* int"),
    ],
)
def test_refused(stack: str, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UnsupportedError, match=said):
        accepted(config(stack, **changes))


@dataclass(frozen=True)
class Halves(Policy):
    """A policy of another package: it keeps every other token of a prompt."""

    name = "halves"

    @property
    def uniform(self) -> bool:
        return True

    def kept(self, tokens: int, sinks: int, recent: int, layer: int, layers: int) -> int:
        return tokens // 2


class Expiring(Halves):
    name = "expiring"

    def expired(self, held: Held) -> Tensor | None:
        return None


class Ragged(Halves):
    name = "ragged"
    uniform = False


class Newest(Ragged):
    name = "newest"
    keeps_newest = 100


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        (Halves(), None),
        (Newest(), None),
        (Expiring(), "expiring lets pages go .* no limit"),
        (Ragged(), "ragged keeps"),
    ],
)
def test_policies_of_other_packages(policy: Policy, said: str | None) -> None:
    """What they say in integers decides, whatever class they are of."""
    setup = Setup(Stack((policy,)), 4, 64, torch.float32)
    if said is None:
        check_stages(setup)
        tokens = setup.geometry.extent(300, 200)
        assert tokens.held == (200 if policy.keeps_newest is None else 300)
        return
    with pytest.raises(UnsupportedError, match=said):
        check_stages(setup)


def test_where_the_stack_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert stack_of(config()) is None
    monkeypatch.setenv(VARIABLE, "int8")
    assert str(stack_of(config())) == "int8"
    assert str(stack_of(config("kivi(bits=2)"))) == "kivi(bits=2)"
    wrong = config()
    wrong.additional_config = {"kvcomp": "int8"}
    with pytest.raises(KvcompError, match="expected"):
        stack_of(wrong)


def test_other_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    """One message: an error where a stack is asked for, a warning where none is."""
    monkeypatch.setattr(plugin, "installed", lambda: "0.99.1")
    monkeypatch.delenv(VARIABLE, raising=False)
    with pytest.warns(KvcompWarning, match=r"knows vLLM 0\.32 and 0\.33, and this is 0\.99\.1"):
        plugin.register()
    monkeypatch.setenv(VARIABLE, "int8")
    with pytest.raises(UnsupportedError, match=r"this is 0\.99\.1: install one of those, or unset KVCOMP_STACK"):
        plugin.register()


@pytest.mark.parametrize("kind", LayerKind)
@pytest.mark.parametrize(("k_dim", "v_dim"), [(64, 64), (64, 32), (32, 64), (576, 512)])
def test_layers_are_refused_for_what_architecture_says_of_them(kind: LayerKind, k_dim: int, v_dim: int) -> None:
    setup = accepted(config("int8"))
    if kind.traits.engine and k_dim == v_dim == setup.dim:
        check_layer(setup, kind, k_dim, v_dim)
        return
    said = kind.traits.does if not kind.traits.engine else f"keys of {k_dim} and values of {v_dim} channels"
    with pytest.raises(UnsupportedError, match=re.escape(said) + ".* without a stack"):
        check_layer(setup, kind, k_dim, v_dim)
