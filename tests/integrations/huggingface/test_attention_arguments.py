"""What a model passes to its attention is served, or refused in words, with our cache and with any other."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import tiny_models as models
import torch
import transformers
from generation import assert_same, greedy, left_padded, tokens
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DiffLlamaConfig,
    DiffLlamaForCausalLM,
    DynamicCache,
    GPTNeoConfig,
    LlamaForCausalLM,
    MiniMaxM3VLTextConfig,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    XLMConfig,
)
from transformers.models.llama import modeling_llama

from kvcomp import CompressedCache, UnsupportedError
from kvcomp.integrations.huggingface.keywords import CHOICES, HARMLESS, SERVED

IDS = tokens(1, 80)
PADDED, MASK = left_padded([65, 80, 9])
pytestmark = pytest.mark.filterwarnings("ignore:.*as dense tensors")


def _spread(model: PreTrainedModel) -> PreTrainedModel:
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() >= 2:
                p.normal_(0, 0.12)
    model.generation_config.pad_token_id = 0
    return model.eval()


# -- keywords -----------------------------------------------------------------------------------------------------

UNSERVED: dict[str, Any] = {
    "position_bias": torch.ones(1, 4, 1, 1),
    "block_indices": torch.zeros(1, 2, 1, 2, dtype=torch.int64),
    "indices": torch.zeros(1, 1, 4, dtype=torch.int64),
    "head_mask": torch.zeros(4),
    "temperature_of_each_head": torch.ones(4),
    "flag": True,
}


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "flex_attention"])
@pytest.mark.parametrize("keyword", UNSERVED)
def test_a_keyword_that_attention_cannot_follow(keyword: str, implementation: str) -> None:
    model = models.make("llama")
    model.config._attn_implementation = implementation
    cache = CompressedCache("none", model)
    with torch.no_grad():
        with pytest.raises(UnsupportedError, match=f"LlamaAttention .*{keyword}=.* own cache"):
            model(IDS, past_key_values=cache, **{keyword: UNSERVED[keyword]})
        with torch.compiler.set_stance("force_eager"):
            model(IDS, past_key_values=CompressedCache("none", model), **{keyword: None}, output_router_logits=False)


@pytest.mark.parametrize("keyword", ["head_mask", "temperature_of_each_head"])
def test_a_keyword_that_a_plain_cache_cannot_follow(keyword: str) -> None:
    """A model may pass it only because it does not know our attention by its name."""
    model = models.make("llama")
    CompressedCache("none", model)
    for cache in (DynamicCache(config=model.config), None):
        with torch.no_grad(), pytest.raises(UnsupportedError, match=f"passes {keyword}= to its attention"):
            model(IDS, past_key_values=cache, **{keyword: UNSERVED[keyword]})


def test_a_keyword_that_the_base_serves() -> None:
    """sdpa adds a position bias: with a plain cache it still does."""
    model, untouched = models.make("llama"), models.make("llama")
    CompressedCache("none", model)
    bias = torch.randn(1, 4, 80, 80)
    with torch.no_grad():
        a, b, without = (m(IDS, position_bias=x).logits for m, x in ((model, bias), (untouched, bias), (model, None)))
    torch.testing.assert_close(a, b)
    assert float((a - without).abs().max()) > 0.01


def _modeling_files() -> list[Path]:
    return sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py"))


def test_every_keyword_of_every_model_is_known() -> None:
    """All that modeling files pass to attention by name: a new one of a newer transformers must be looked at."""
    found: set[str] = set()
    for path in _modeling_files():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "attention_interface":
                found |= {keyword.arg for keyword in node.keywords if keyword.arg is not None}
    positional = {"query", "key", "value", "attention_mask", "scaling"}
    refused_or_named_by_their_base = {"position_bias", "sinks"}
    assert len(found) > 15
    assert found <= HARMLESS | SERVED | CHOICES | positional | refused_or_named_by_their_base


def test_no_other_model_asks_for_its_attention_by_name() -> None:
    """A model that does acts differently when hooked. These were looked at; the choices that they make are CHOICES."""
    asks = re.compile(r"_attn_implementation (?:==|!=|in|not in) ")
    found = {path.parent.name for path in _modeling_files() if asks.search(path.read_text(encoding="utf-8"))}
    choose = {"axk2", "deepseek_v32", "dots3_note", "glm_moe_dsa", "hy_v4", "hy_v4_vl", "minimax_m3_vl"}
    choose |= {"mistral_large4"}
    harmless = {"decision_transformer", "diffusion_gemma", "gemma4", "gemma4_unified", "glm5_next", "gpt2"}
    others = {"falcon", "qwen2_5_omni", "timm_backbone", "timm_wrapper"}  # not hooked
    assert found <= choose | harmless | others


def _sparse(implementation: str) -> PreTrainedModel:
    config = MiniMaxM3VLTextConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        index_n_heads=2,
        head_dim=16,
        rotary_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        layer_types=["full_attention", "minimax_m3_sparse"],
        index_block_size=16,
        index_topk_blocks=2,
        pad_token_id=0,
        eos_token_id=None,
        attn_implementation=implementation,
    )
    return _spread(AutoModelForCausalLM.from_config(config, attn_implementation=implementation))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_blocks_that_an_indexer_chooses(implementation: str) -> None:
    untouched, hooked = _sparse(implementation), _sparse(implementation)
    ours = CompressedCache("none", hooked)
    assert_same(greedy(hooked, IDS, ours), greedy(untouched, IDS, DynamicCache(config=untouched.config)))
    for options in ({}, {"attention_mask": MASK}, {"attention_mask": MASK, "prefill_chunk_size": 32}):
        ids = PADDED if options else IDS
        results = [greedy(m, ids, DynamicCache(config=m.config), **options) for m in (hooked, untouched)]
        assert_same(*results)
    everything = _sparse(implementation)
    everything.model.layers[1].self_attn.indexer.topk_blocks = 99
    with torch.no_grad():
        a, b, dense = (m(IDS, use_cache=False).logits for m in (hooked, untouched, everything))
    torch.testing.assert_close(a, b)
    assert float((dense - b).abs().max()) > 1e-3


# -- values -------------------------------------------------------------------------------------------------------


def _differential() -> PreTrainedModel:
    config = DiffLlamaConfig(
        **{k: v for k, v in models.COMMON.items() if k != "num_hidden_layers"}, num_hidden_layers=2
    )
    torch.manual_seed(0)  # its lambdas are random and of one dimension
    return _spread(DiffLlamaForCausalLM(config))


@pytest.mark.parametrize("options", [{}, {"prompt_lookup_num_tokens": 4}, {"num_beams": 3}, {"prefill_chunk_size": 16}])
def test_values_that_the_model_changes(options: dict[str, Any]) -> None:
    """DiffLlama splits the values and attends twice."""
    ids = IDS.repeat(1, 2)
    dense, model = _differential(), _differential()
    expected = greedy(dense, ids, DynamicCache(config=dense.config), new=16, **options)
    for stack in ("none", "int(bits=8) + window(recent=300)"):
        assert_same(greedy(model, ids, CompressedCache(stack, model), new=16, **options), expected)
    with pytest.raises(UnsupportedError, match="use a stack of a quantizer alone"):
        greedy(model, ids, CompressedCache("streaming(recent=32)", model), **options)


CHANGES = {
    "values": lambda k, v, i: (k, v * 2),
    "keys": lambda k, v, i: (k + 1, v),
    "both": lambda k, v, i: (k[:, :], -v),
    "swapped": lambda k, v, i: (v, k),
    "keys_twice": lambda k, v, i: (k, k),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("lookup", [False, True])
def test_what_the_model_passes_is_what_is_used(change: str, lookup: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(kind: type, cache: Any, model: PreTrainedModel) -> Any:
        own = kind.update

        def update(self: Any, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
            return CHANGES[change](*own(self, keys, values, layer_idx, *args, **kwargs), layer_idx)

        with monkeypatch.context() as patch:
            patch.setattr(kind, "update", update)
            options = {"prompt_lookup_num_tokens": 4} if lookup else {}
            return greedy(model, IDS.repeat(1, 2), cache, new=12, **options)

    dense, model = models.make("llama"), models.make("llama")
    expected = run(DynamicCache, DynamicCache(config=dense.config), dense)
    assert_same(run(CompressedCache, CompressedCache("none", model), model), expected)


def test_handles_of_different_layers() -> None:
    """The keys of one layer with the values of another: both are decoded."""
    model = models.make("llama")
    cache = CompressedCache("none", model)
    with torch.no_grad():
        model(IDS, past_key_values=cache)
    new = [torch.randn(1, 2, 1, 16, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    (k, _), (_, v) = cache.update(*new[:2], 0), cache.update(*new[2:], 1)
    query = torch.randn(1, 4, 1, 16)
    attend = modeling_llama.ALL_ATTENTION_FUNCTIONS.get_interface(model.config._attn_implementation, None)
    module = model.model.layers[0].self_attn
    out, _ = attend(module, query, k, v, None, scaling=0.25, dropout=0.0)
    keys, values = (x.dense().repeat_interleave(2, 1) for x in (k, v))
    torch.testing.assert_close(out, ((query @ keys.mT * 0.25).softmax(-1) @ values).transpose(1, 2))


# -- models without the interface ---------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["model", "config"])
@pytest.mark.parametrize(
    ("config", "name"),
    [
        (
            GPTNeoConfig(vocab_size=64, hidden_size=32, num_layers=1, num_heads=2, attention_types=[[["global"], 1]]),
            "GPTNeo",
        ),
        (XLMConfig(vocab_size=64, emb_dim=32, n_layers=1, n_heads=2, causal=True, is_decoder=True), "MultiHead"),
    ],
)
def test_models_that_attend_by_themselves(config: Any, name: str, given: str) -> None:
    """They are known by what they do: these call their layer `layer_id`."""
    model = AutoModelForCausalLM.from_config(config)
    before = model.config._attn_implementation
    with pytest.raises(UnsupportedError, match=f"{name}\\w*Attention\\w* does not go through .*own cache"):
        CompressedCache("none", model if given == "model" else config)
    assert model.config._attn_implementation == before


def test_a_class_of_the_users_that_attends_by_itself() -> None:
    class Odd(modeling_llama.LlamaAttention):
        def forward(self, hidden_states: Tensor, past_key_values: Any = None, **kwargs: Any) -> Any:
            k = self.k_proj(hidden_states)[:, None]
            k, v = past_key_values.update(k, k, self.layer_idx)
            return torch.nn.functional.scaled_dot_product_attention(k, k, v)[:, 0], None

    model = models.make("llama")
    model.model.layers[2].self_attn.__class__ = Odd
    with pytest.raises(UnsupportedError, match="Odd does not go through"):
        CompressedCache("none", model)


def test_a_subclass_in_a_file_without_eager_attention() -> None:
    class Mine(modeling_llama.LlamaAttention):
        pass

    dense, model = models.make("llama", "eager"), models.make("llama", "eager")
    for layer in model.model.layers:
        layer.self_attn.__class__ = Mine
    expected = greedy(dense, PADDED, DynamicCache(config=dense.config), attention_mask=MASK)
    assert_same(greedy(model, PADDED, CompressedCache("none", model), attention_mask=MASK), expected)


# -- weights ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma3", "gptoss"])
@pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 16}, {"prompt_lookup_num_tokens": 4}])
def test_attention_weights_of_decode_steps(name: str, options: dict[str, Any]) -> None:
    ids, mask = (IDS.repeat(1, 2), None) if "prompt_lookup_num_tokens" in options else (PADDED, MASK)
    dense, model = models.make(name, "eager"), models.make(name, "eager")
    options = {**options, "output_attentions": True, "attention_mask": mask, "new": 4}
    expected = greedy(dense, ids, DynamicCache(config=dense.config), **options)
    ours = greedy(model, ids, CompressedCache("none", model), **options)
    assert_same(ours, expected)
    assert len(ours.attentions) == len(expected.attentions)
    for step, same in zip(ours.attentions, expected.attentions, strict=True):
        for a, b in zip(step, same, strict=True):
            shown = torch.ones(len(ids), 1, b.shape[2], 1, dtype=torch.bool)
            if mask is not None and b.shape[2] > 1:
                shown = mask[:, None, -b.shape[2] :, None].bool()  # a padded query has no certain weights
            torch.testing.assert_close(a * shown, b * shown, atol=1e-4, rtol=0)


def test_attention_weights_by_the_config() -> None:
    dense, model = models.make("llama", "eager"), models.make("llama", "eager")
    results = []
    for m in (dense, model):
        m.config.output_attentions = True
    for m, cache in ((dense, DynamicCache(config=dense.config)), (model, CompressedCache("none", model))):
        with torch.no_grad():
            m(IDS, past_key_values=cache)
            results.append(m(IDS[:, :1], past_key_values=cache).attentions)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


@pytest.mark.parametrize("stack", ["streaming(recent=32)", "quest(pages=1, dense_layers=0)"])
def test_attention_weights_of_tokens_left_out_are_refused(stack: str) -> None:
    model = models.make("llama", "eager")
    with pytest.raises(UnsupportedError, match=r"output_attentions=True: .* leaves tokens out"):
        greedy(model, IDS, CompressedCache(stack, model), output_attentions=True)
    with pytest.raises(UnsupportedError, match=r"output_attentions=True: .*preallocate=100"):
        greedy(model, IDS, CompressedCache("none", model, preallocate=100), output_attentions=True)


def test_a_report_tells_that_longrope_drops_the_cache() -> None:
    config = Phi3Config(
        **{k: v for k, v in models.COMMON.items() if k != "max_position_embeddings"},
        max_position_embeddings=400,
        original_max_position_embeddings=90,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0] * 8,
            "long_factor": [2.0] * 8,
            "original_max_position_embeddings": 90,
        },
    )
    model = _spread(Phi3ForCausalLM(config))
    cache = CompressedCache("none", model)
    text = greedy(model, IDS, cache, new=20).sequences
    assert text.shape[1] == 100
    assert cache.get_seq_length() <= 90
    assert "past 90 tokens, transformers drops this cache" in cache.report()
    cache = CompressedCache("none", model)
    greedy(model, text, cache, new=4)
    assert "transformers drops" not in cache.report()


# -- handles ------------------------------------------------------------------------------------------------------

OPERATORS = {
    "k + 1": lambda k, v: k + 1,
    "1 - k": lambda k, v: 1 - k,
    "k * v": lambda k, v: k * v,
    "2 / k": lambda k, v: 2 / k,
    "k // 0.1": lambda k, v: k // 0.1,
    "k % 0.3": lambda k, v: k % 0.3,
    "k ** 2": lambda k, v: k**2,
    "2 ** k": lambda k, v: 2**k,
    "-k": lambda k, v: -k,
    "+k": lambda k, v: +k,
    "abs(k)": lambda k, v: abs(k),
    "k > 0": lambda k, v: k > 0,
    "k <= 0.5": lambda k, v: k <= 0.5,
    "k == v": lambda k, v: k == v,
    "k != v": lambda k, v: k != v,
    "(k > 0) & (v > 0)": lambda k, v: (k > 0) & (v > 0),
    "q @ k.mT": lambda k, v: torch.ones(1, 2, 3, 16) @ k.mT,
    "k.mT @ v": lambda k, v: k.mT @ v,
    "v @ tensor": lambda k, v: v @ torch.ones(16, 3),
    "list(k)": lambda k, v: torch.stack(list(k)),
    "k[...]": lambda k, v: k[..., :5],
    "len(k)": lambda k, v: torch.tensor(len(k)),
    "0.0 in k": lambda k, v: torch.tensor(0.0 in k),
    "k.to(float64)": lambda k, v: k.to(torch.float64),
    "numpy": lambda k, v: torch.as_tensor(k.numpy()),
    "chunk": lambda k, v: torch.cat([*v.chunk(2, -1), k], -1),
    "tensor += k": lambda k, v: torch.zeros(1, 2, 81, 16).add_(k.dense() if hasattr(k, "layer") else k),
}


@pytest.mark.parametrize("operator", OPERATORS)
def test_operators_of_handles(operator: str) -> None:
    model = models.make("llama")
    cache = CompressedCache("none", model)
    with torch.no_grad():
        model(IDS, past_key_values=cache)
    k, v = cache.update(torch.ones(1, 2, 1, 16), torch.zeros(1, 2, 1, 16), 0)
    expected = OPERATORS[operator](k.dense(), v.dense())
    assert torch.equal(OPERATORS[operator](k, v), expected)
    assert {k: 1}[k] == 1
    assert k.to(torch.float32) is k
    assert k.to("cpu") is k


def test_the_hook_goes_by_the_signature_that_models_use() -> None:
    """The name that transformers knows our attention by serves every model class that is built from such a config."""
    model = models.make("llama")
    CompressedCache("none", model)
    again = LlamaForCausalLM(model.config)
    assert again.config._attn_implementation == model.config._attn_implementation
    assert "kwargs" in inspect.signature(again.forward).parameters
