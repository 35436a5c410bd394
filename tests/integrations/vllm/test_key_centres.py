"""Centres of pages that follow from a model's weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from kvcomp.cache.blocks.centres import Turned, middle, turned, turns
from kvcomp.cache.blocks.pages import Pages
from kvcomp.cache.blocks.setup import Setup
from kvcomp.integrations.vllm.key_centres import turned_biases
from kvcomp.stages.stack import Stack

HEADS, DIM, POSITIONS = 3, 64, 2048
SIZES = {"vocab_size": 64, "hidden_size": 96, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 6}


def qwen(theta: float) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    config = Qwen2Config(
        **SIZES,
        num_key_value_heads=HEADS,
        head_dim=DIM,
        max_position_embeddings=4096,
        rope_parameters={"rope_theta": theta, "rope_type": "default"},
    )
    model = Qwen2ForCausalLM(config).eval()
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.k_proj.bias, std=20)
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Qwen2ForCausalLM]:
    model, folder = qwen(1e6), tmp_path_factory.mktemp("qwen")
    model.save_pretrained(folder, max_shard_size="100KB")
    return folder, model


def keys_of(model: Qwen2ForCausalLM) -> Tensor:
    """[HEADS, POSITIONS, DIM] of layer 1."""
    cache = DynamicCache(config=model.config)
    ids = torch.randint(0, 64, (1, POSITIONS), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        model.model(ids, past_key_values=cache)
    return cache.layers[1].keys[0]


def test_they_are_the_biases_as_keys_have_them(saved: tuple[Path, Qwen2ForCausalLM]) -> None:
    """In the middle of each page: tokens differ from it by what they say, without a mean, and by half a page's turn."""
    folder, model = saved
    keys, found = keys_of(model), turned_biases(str(folder), model.config, 1, DIM)
    assert found is not None
    assert found.weights.shape == (2 * len(found.frequencies) + 1, HEADS, DIM)
    centres = torch.einsum("tf,fhd->htd", turns(found.frequencies, torch.arange(POSITIONS)), found.weights)
    assert float((keys - centres).norm() / keys.norm()) < 0.1
    page = centres.unflatten(1, (-1, 64))
    thresholds = torch.einsum(
        "tf,fhd->htd", turns(found.frequencies, middle(torch.arange(POSITIONS // 64), 64)), found.weights
    )
    slow = found.frequencies < 0.01
    slow = torch.cat([slow, slow])
    assert float((page - thresholds[:, :, None])[..., slow].norm() / page[..., slow].norm()) < 0.2


def test_models_without_biases_have_none(tmp_path: Path) -> None:
    config = LlamaConfig(**SIZES, num_key_value_heads=HEADS, head_dim=DIM)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    assert turned_biases(str(tmp_path), config, 0, DIM) is None
    assert turned_biases(str(tmp_path / "nowhere"), config, 0, DIM) is None
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    assert turned_biases(str(tmp_path / "."), config, 0, DIM) is None


def test_layers_without_biases_have_zeros(saved: tuple[Path, Qwen2ForCausalLM]) -> None:
    """All layers of a model that has some take the same turns."""
    folder, model = saved
    some, none = (turned_biases(str(folder), model.config, layer, DIM) for layer in (1, 7))
    assert some is not None
    assert none is not None
    assert torch.equal(some.frequencies, none.frequencies)
    assert not none.weights.any()


@pytest.mark.parametrize(("ranks", "heads"), [(1, 4), (2, 2), (4, 1), (8, 1)])
def test_each_rank_has_those_of_its_heads(ranks: int, heads: int) -> None:
    every = Turned(torch.ones(1), torch.arange(4.0)[None, :, None].expand(3, 4, DIM))
    for rank in range(ranks):
        expected = [rank * heads + h for h in range(heads)] if ranks <= 4 else [rank // 2]
        assert every.of_rank(heads, rank, ranks).weights[0, :, 0].tolist() == expected


@pytest.mark.parametrize("factor", [1.0, 1.25])
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_channels_turn_as_rotary_embeddings_turn_them(share: float, factor: float) -> None:
    heads, rotated = torch.randn(HEADS, DIM), int(DIM * share)
    frequencies = 1e4 ** -(torch.arange(0, rotated, 2) / rotated)
    found = turned(heads, frequencies, factor)
    positions = torch.tensor([0.0, 31.5, 1000.0])
    centres = torch.einsum("tf,fhd->thd", turns(found.frequencies, positions), found.weights)
    angles = (positions[:, None] * frequencies)[:, None]
    x, y, rest = heads.split([rotated // 2, rotated // 2, DIM - rotated], -1)
    expected = [factor * (x * angles.cos() - y * angles.sin()), factor * (y * angles.cos() + x * angles.sin())]
    torch.testing.assert_close(centres, torch.cat([*expected, rest.expand(3, -1, -1)], -1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "stack", ["int(bits=4)", "turboquant(bits=4)", "turboquant(bits=3, variant=prod)", "int(bits=8, basis=hadamard)"]
)
@pytest.mark.parametrize("page", [0, 3, 40])
def test_pages_of_keys_with_a_large_bias(stack: str, page: int) -> None:
    """The error is that of keys without it, wherever it does not turn much within a page."""
    setup = Setup(Stack.parse(stack), 4, DIM, torch.float32, 0)
    frequencies = torch.full((DIM // 2,), 1e-5)
    biases, size = turned(100 * torch.randn(HEADS, DIM), frequencies, 1.0), setup.page_size
    cell = setup.record_bytes(HEADS) // size
    plain, pages = (
        Pages(setup, 1, HEADS, biases=b).at(torch.zeros(7, HEADS, size, cell, dtype=torch.uint8))
        for b in (None, biases)
    )
    assert not pages.codec.state()
    assert not pages.codec.adapted()
    position = torch.arange(size) + page * size
    shift = torch.einsum("tf,fhd->thd", turns(frequencies, position), biases.weights)
    noise = torch.randn(size, HEADS, DIM, generator=torch.Generator().manual_seed(2))
    slots, records = torch.arange(size), torch.arange(HEADS)[:, None]
    begun = torch.tensor([[0], [page]])
    errors = []
    for where, x in ((plain, noise), (pages, noise + shift)):
        where.write_tokens(x, x, where.cells(slots, begun))
        errors.append(float((where.tokens(records)[0] - x.transpose(0, 1)).norm()))
    assert errors[1] < 1.1 * errors[0]
