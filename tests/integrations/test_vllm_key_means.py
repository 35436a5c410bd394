"""Mean keys that follow from a model's weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from kvcomp.cache.blocks.pages import Pages
from kvcomp.cache.blocks.setup import Setup
from kvcomp.integrations.vllm.key_means import POSITIONS, mean_keys, of_rank
from kvcomp.stages.stack import Stack

HEADS, DIM = 3, 64
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


def test_they_are_the_means_of_the_keys(saved: tuple[Path, Qwen2ForCausalLM]) -> None:
    folder, model = saved
    keys, found = keys_of(model), mean_keys(str(folder), model.config, 1, DIM)
    assert found is not None
    assert found.shape == (HEADS, DIM)
    assert (found - keys.mean(1)).norm() < 0.01 * keys.mean(1).norm()


def test_models_without_biases_have_none(tmp_path: Path) -> None:
    config = LlamaConfig(**SIZES, num_key_value_heads=HEADS, head_dim=DIM)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    assert mean_keys(str(tmp_path), config, 0, DIM) is None
    assert mean_keys(str(tmp_path / "nowhere"), config, 0, DIM) is None
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    assert mean_keys(str(tmp_path / "."), config, 0, DIM) is None


@pytest.mark.parametrize(("ranks", "heads"), [(1, 4), (2, 2), (4, 1), (8, 1)])
def test_each_rank_has_those_of_its_heads(ranks: int, heads: int) -> None:
    means = torch.arange(4.0)[:, None].expand(4, DIM)
    for rank in range(ranks):
        expected = [rank * heads + h for h in range(heads)] if ranks <= 4 else [rank // 2]
        assert of_rank(means, heads, rank, ranks)[:, 0].tolist() == expected


@pytest.mark.parametrize("stack", ["int(bits=4)", "turboquant(bits=4)", "nvfp4", "int(bits=8, basis=hadamard)"])
def test_pages_of_keys_with_a_large_mean(stack: str, saved: tuple[Path, Qwen2ForCausalLM]) -> None:
    """Every request has the same; the error is that of keys without a mean."""
    folder, model = saved
    setup, means = Setup(Stack.parse(stack), 4, DIM, torch.float32, 0), mean_keys(str(folder), model.config, 1, DIM)
    assert means is not None
    cell = setup.record_bytes(HEADS) // setup.page_size
    plain, pages = (
        Pages(setup, 1, HEADS, means=m).at(torch.zeros(7, HEADS, setup.page_size, cell, dtype=torch.uint8))
        for m in (None, means)
    )
    assert not pages.codec.state()
    assert not pages.codec.adapted()
    noise = torch.randn(HEADS, 64, DIM, generator=torch.Generator().manual_seed(2))
    keys, records = noise + means[:, None], torch.arange(HEADS)[:, None]
    errors = []
    for where, x in ((plain, noise), (pages, keys)):
        if setup.by_token:
            slots = torch.arange(64)
            where.write_tokens(x.transpose(0, 1), x.transpose(0, 1), where.cells(slots))
        else:
            where.write_pages(x, x, records)
        errors.append(float((where.tokens(records)[0] - x).norm()))
    assert errors[1] == pytest.approx(errors[0], rel=1e-3)
    queries = torch.randn(2 * HEADS, 2, DIM)  # two rows share the means of their heads
    _, bias = pages.codec.read_query(queries)
    torch.testing.assert_close(bias, (queries * means.repeat(2, 1)[:, None]).sum(-1), rtol=1e-4, atol=1e-3)
