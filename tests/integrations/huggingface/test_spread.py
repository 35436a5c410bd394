"""Models over several devices: the cache of a layer lies where the layer does, and what layers share is moved."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_folder
import torch
from torch import nn
from two_places import TwoPlaces

from kvcomp.integrations.huggingface import CompressedCache, prefill
from kvcomp.integrations.huggingface.models import load_model
from kvcomp.integrations.huggingface.placing import layer_devices

STACKS = (
    "none",
    "int(bits=4)",
    "kivi(bits=2) + quest(keep=0.5)",
    "klt(bits=2)",
    "turboquant(bits=3)",
    "snapkv(keep=0.5) + int(bits=4)",
    "pyramidkv(keep=0.5)",
    "adakv(keep=0.5) + moba(keep=0.5)",
    "h2o(budget=100) + int(bits=4)",
    "criticalkv(keep=0.5)",
    "expected_attention(keep=0.5)",
    "kvzip(keep=0.5) + int(bits=4)",
    "kvzip(keep=0.5, layers=uniform)",
    "streaming(recent=64, chunk=100)",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder.save(tmp_path_factory.mktemp("model"))


def logits(folder: Path, stack: str, mode: TwoPlaces | None) -> torch.Tensor:
    """Of the prompt's last token, and of three that follow."""
    model, tokenizer = load_model(str(folder), device="cpu")
    ids = torch.randint(400, (1, 300), generator=torch.Generator().manual_seed(1))
    if mode is not None:
        mode.spread(model)
    cache = CompressedCache(stack, model)
    found: list[torch.Tensor] = []
    with torch.no_grad():
        if mode is None:
            _run(model, tokenizer, cache, ids, found)
        else:
            with mode:
                _run(model, tokenizer, cache, ids, found)
    return torch.stack([x.flatten() for x in found])


def _run(model: Any, tokenizer: Any, cache: CompressedCache, ids: torch.Tensor, found: list[torch.Tensor]) -> None:
    (filled,) = prefill(model, ids, [cache], tokenizer=tokenizer)
    found.append(filled.logits)
    for i in range(3):
        found.append(model(ids[:, i : i + 1], past_key_values=cache).logits[:, -1])


@pytest.mark.parametrize("stack", STACKS)
def test_layers_share_nothing_across_devices(stack: str, folder: Path) -> None:
    assert torch.equal(logits(folder, stack, TwoPlaces()), logits(folder, stack, None))


def test_the_test_sees_what_mixes_devices(folder: Path) -> None:
    mode = TwoPlaces()
    first, second = torch.ones(2), torch.ones(2)
    mode.mark(first, "first")
    mode.mark(second, "second")
    with mode:
        assert torch.equal(first + torch.ones(2), torch.full((2,), 2.0))
        with pytest.raises(RuntimeError, match=r"first.*second"):
            first * 2 + second.view(1, 2)
        assert torch.equal(first.to(second.device) + second, torch.full((2,), 2.0))
        assert torch.equal(mode.moved(first * 2, "second") + second, torch.full((2,), 3.0))


def test_a_loaded_cache_lies_where_the_layers_do() -> None:
    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(2, 2, device="cpu")
            self.layers = nn.ModuleList([nn.Linear(2, 2, device=name) for name in ("cpu", "meta", "meta")])

    decoder = Decoder()
    model = SimpleNamespace(get_decoder=lambda: decoder, hf_device_map={"embed": "cpu", "layers": "meta"})
    names = [device.type for device in layer_devices(model, 4, torch.device("cpu"))]
    assert names == ["cpu", "meta", "meta", "cpu"]
    model.hf_device_map = {"": "cpu"}
    assert {device.type for device in layer_devices(model, 4, torch.device("cpu"))} == {"cpu"}
