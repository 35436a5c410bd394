"""Layers that attend to another layer's keys and values: Gemma 3n and Gemma 4."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from generation import assert_same, greedy, left_padded, tokens
from torch.nn import functional as F
from transformers import (
    DynamicCache,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    PreTrainedModel,
)

from kvcomp import CompressedCache, UnsupportedError, prefill

SMALL = {
    "vocab_size": 256,
    "vocab_size_per_layer_input": 256,
    "hidden_size": 64,
    "hidden_size_per_layer_input": 16,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "num_kv_shared_layers": 3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "max_position_embeddings": 8192,
}
STACKS = [
    "none",
    "int8",
    "kivi(bits=4, group=16) + window(recent=16)",
    "int(bits=4, basis=hadamard)",
    "klt(bits=4)",
    "snapkv(budget=64, window=8) + int8",
    "streaming(recent=48)",
    "h2o(budget=80)",
    "tova(keep=0.5)",
    "quest(pages=3, dense_layers=0)",
]


def make(name: str, implementation: str = "sdpa", window: int = 16) -> PreTrainedModel:
    torch.manual_seed(0)
    small = {**SMALL, "sliding_window": window}
    if name == "gemma3n":
        more = {"intermediate_size": [128] * 6, "laurel_rank": 8, "activation_sparsity_pattern": [0.0] * 6}
        config, cls = Gemma3nTextConfig(**small, **more), Gemma3nForCausalLM
    else:
        config = Gemma4TextConfig(**small, intermediate_size=128, global_head_dim=16)
        cls = Gemma4ForCausalLM
    config._attn_implementation = implementation
    model = cls(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() >= 2:
                p.normal_(0, 0.12)
    model.generation_config.pad_token_id = 0
    return model


@pytest.fixture(scope="module", params=[(name, window) for name in ("gemma3n", "gemma4") for window in (16, 100)])
def model(request: Any) -> PreTrainedModel:
    """Layers with the larger window are packed by the quantizers of these tests."""
    return make(request.param[0], window=request.param[1])


@pytest.fixture(scope="module")
def twin(model: PreTrainedModel) -> PreTrainedModel:
    """The same model, never hooked."""
    name = "gemma3n" if isinstance(model, Gemma3nForCausalLM) else "gemma4"
    return make(name, window=model.config.sliding_window)


IDS, MASK = left_padded([150, 110])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"attention_mask": MASK},
        {"prefill_chunk_size": 33},
        {"prefill_chunk_size": 33, "attention_mask": MASK},
        {"num_beams": 3},
        {"num_beams": 2, "attention_mask": MASK},
    ],
    ids=lambda options: " ".join(options) or "plain",
)
def test_tokens_and_logits_equal_dynamic_cache(model: PreTrainedModel, twin: PreTrainedModel, options: Any) -> None:
    ours, theirs = (
        greedy(m, IDS, c, new=45, **options)
        for m, c in ((model, CompressedCache("none", model)), (twin, DynamicCache(config=twin.config)))
    )
    assert_same(ours, theirs)


def test_eager_attention(model: PreTrainedModel) -> None:
    name = "gemma3n" if isinstance(model, Gemma3nForCausalLM) else "gemma4"
    a, b = (make(name, "eager", model.config.sliding_window) for _ in range(2))
    assert_same(
        greedy(a, IDS, CompressedCache("none", a), new=40, attention_mask=MASK),
        greedy(b, IDS, DynamicCache(config=b.config), new=40, attention_mask=MASK),
    )


@pytest.mark.parametrize("keep", [0, 1, 3])
def test_few_logits(model: PreTrainedModel, twin: PreTrainedModel, keep: int) -> None:
    """Gemma 4 leaves queries of the sharing layers out whose logits nobody asks for."""
    ours, theirs = CompressedCache("none", model), DynamicCache(config=twin.config)
    mask = F.pad(MASK, (0, 24), value=1)
    with torch.no_grad():
        for a, b in ((0, 150), (150, 165), (165, 166), (166, 174)):
            ids = torch.cat([IDS, tokens(2, 24)], 1)[:, a:b]
            given = {"attention_mask": mask[:, :b], "logits_to_keep": keep}
            x = model(ids, past_key_values=ours, **given).logits
            y = twin(ids, past_key_values=theirs, **given).logits
            torch.testing.assert_close(x, y, atol=1e-4, rtol=0)


def test_turns_lookup_and_surgery(model: PreTrainedModel, twin: PreTrainedModel) -> None:
    one = IDS[:1]
    ours, theirs = CompressedCache("none", model), DynamicCache(config=twin.config)
    first = [greedy(m, one, c, new=9) for m, c in ((model, ours), (twin, theirs))]
    assert_same(*first)
    longer = torch.cat([first[0].sequences, tokens(1, 11)], 1)
    assert_same(greedy(model, longer, ours, new=9), greedy(twin, longer, theirs, new=9))
    repeated = one[:, :40].repeat(1, 3)
    plain = greedy(twin, repeated, DynamicCache(config=twin.config), new=20)
    lookup = greedy(model, repeated, CompressedCache("none", model), new=20, prompt_lookup_num_tokens=4)
    assert lookup.sequences.tolist() == plain.sequences.tolist()
    fork = ours.fork()
    both = [greedy(model, longer.new_full((1, longer.shape[1] + 12), 9), c, new=5) for c in (ours, fork)]
    assert_same(*both, 0)
    fork.batch_repeat_interleave(2)
    assert fork.batch_size == 2


@pytest.mark.parametrize("stack", STACKS)
def test_every_stack_serves_the_layers_that_share(model: PreTrainedModel, stack: str, tmp_path: Any) -> None:
    """What an earlier layer holds is what later ones read: the same as if each forward was repeated from a file."""
    ids = IDS[:1]
    cache, twin = CompressedCache(stack, model), CompressedCache(stack, model)
    prefill(model, ids, [cache])
    with torch.no_grad():
        dense = model(ids, past_key_values=twin).logits[:, -1]
        for i in range(45):
            step = tokens(1, 1, seed=i)
            a = model(step, past_key_values=cache).logits
            b = model(step, past_key_values=twin).logits
            assert torch.equal(a, b)
            if i == 20:
                twin.save(tmp_path / "x.kv")
                twin = CompressedCache.load(tmp_path / "x.kv", model)
    assert torch.isfinite(dense).all()
    full = [layer for layer in cache._compressed() if not layer.is_sliding]
    windows = [layer for layer in cache._compressed() if layer.is_sliding]
    owner = full[0]
    assert [layer.lends for layer in full] == [True]
    assert [layer.lends for layer in windows] in ([], [False, True])
    assert int(owner.store.history.counts) == cache.get_seq_length() == 195
    traffic = cache.traffic()  # three layers of the six attend to these tokens, one of which holds them
    assert traffic.parts.get("window", 1) > 0
    token = 2 * 2 * 16 * 4
    library = traffic.parts.get("library", 0)
    packed = 100 if windows else 0  # tokens of each of two layers, one of which a third one reads
    assert traffic.dense - library == 3 * (195 + packed) * token
    assert cache.memory().dense - library == (195 + 2 * packed) * token


@pytest.mark.parametrize("stack", ["int8", "kivi(bits=4, group=16) + window(recent=16)", "klt(bits=4)"])
def test_lossy_stacks_stay_near(model: PreTrainedModel, twin: PreTrainedModel, stack: str) -> None:
    ours, theirs = CompressedCache(stack, model), DynamicCache(config=twin.config)
    with torch.no_grad():
        for a, b in ((0, 100), *((i, i + 1) for i in range(100, 130))):
            x = model(IDS[:1, a:b], past_key_values=ours).logits[:, -1]
            y = twin(IDS[:1, a:b], past_key_values=theirs).logits[:, -1]
            least = 0.9 if model.config.sliding_window == 16 else 0.75  # as more layers are coded
            assert torch.corrcoef(torch.cat([x, y]))[0, 1] > least
    assert ours.memory().held


def test_memory_after_a_prompt_is_compressed(model: PreTrainedModel) -> None:
    cache = CompressedCache("int(bits=4)", model)
    prefill(model, tokens(1, 1000), [cache])
    memory = cache.memory()
    assert "pending" not in memory.parts
    assert cache._compressed()[0].pending is None
    assert memory.effective_bits < (8 if model.config.sliding_window == 16 else 11)  # windows keep 64 of 100 exact


def test_a_preallocated_cache_is_refused(model: PreTrainedModel) -> None:
    with pytest.raises(UnsupportedError, match="leave preallocate= out"):
        CompressedCache("none", model, preallocate=300)


def test_gradients_of_a_first_forward_reach_shared_keys(model: PreTrainedModel, twin: PreTrainedModel) -> None:
    found = []
    for m, cache in ((model, CompressedCache("none", model)), (twin, DynamicCache(config=twin.config))):
        m.zero_grad()
        m(IDS[:1, :40], past_key_values=cache).logits.logsumexp(-1).sum().backward()
        found.append(m.model.layers[1].self_attn.k_proj.weight.grad.clone())
        m.zero_grad()
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)
