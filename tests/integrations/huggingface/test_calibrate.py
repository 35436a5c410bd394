"""Calibration of models: the moments are those of the attention, a file serves its model only, and generation with a
calibrated stack is dense attention over what its pages decode to."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_models as models
import torch
from generation import greedy, tokens
from torch import Tensor
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

import kvcomp
from kvcomp import CompressedCache, KvcompError, Stack, UnsupportedError
from kvcomp.calibration.file import CalibrationError, load
from kvcomp.cost.bill import bill
from kvcomp.integrations.huggingface.calibrate import calibrate, gather, read_contexts
from kvcomp.integrations.huggingface.fingerprint import fingerprint
from kvcomp.integrations.huggingface.shapes import shape_of
from kvcomp.ledger import storage_bytes

METHODS = ("oscar", "svd", "think", "klt")
CONTEXTS = [tokens(1, n, seed=n)[0].tolist() for n in (40, 64, 7)]


class Letters:
    """A tokenizer of one token per character, with or without a token before every prompt."""

    def __init__(self, start: int | None = None) -> None:
        self.start = [] if start is None else [start]

    def __call__(self, text: str, add_special_tokens: bool = True) -> Any:
        class Encoded:
            input_ids = (self.start if add_special_tokens else []) + [ord(letter) % 256 for letter in text]

        return Encoded


def make(name: str, **changes: object) -> PreTrainedModel:
    return models.make(name, "eager" if name in models.EAGER_ONLY else "sdpa", **changes)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "letters.txt"
    path.write_text("".join(map(chr, tokens(1, 3000, seed=9).clamp(32, 120)[0].tolist())))
    return path


@pytest.fixture(scope="module")
def files(text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A file of each method for the tiny Llama."""
    folder, model = tmp_path_factory.mktemp("files"), make("llama")
    out = {}
    for method in METHODS:
        out[method] = folder / f"{method}.safetensors"
        calibrate(model, Letters(), method, [text], tokens=2048, context=256, name="tiny").save(out[method])
    return out


# -- statistics ---------------------------------------------------------------------------------------------------

SEEN: list[tuple[int, Tensor, Tensor, Tensor]] = []  # (layer, query, key, value) of every attention


def _watched(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
    SEEN.append((module.layer_idx, query, key, value))
    return AttentionInterface._global_mapping["sdpa"](module, query, key, value, *args, **kwargs)


AttentionInterface.register("test_watched", _watched)
AttentionMaskInterface.register("test_watched", sdpa_mask)


@pytest.fixture
def watched() -> Iterator[list[tuple[int, Tensor, Tensor, Tensor]]]:
    SEEN.clear()
    yield SEEN
    SEEN.clear()


@pytest.mark.parametrize("windows", [False, True])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "qwen3next", "mistral"])
def test_moments_are_those_of_the_models_own_attention(name: str, windows: bool, watched: list) -> None:
    options = {"sliding_window": 24} if name in ("gemma3", "mistral") else {}
    model, plain = make(name, **options), make(name, **options)
    before = model.config._attn_implementation
    if name == "mistral" and not windows:
        with pytest.raises(UnsupportedError, match="nothing to calibrate"):
            gather(model, CONTEXTS)
        return
    found = gather(model, CONTEXTS, windows=windows)
    assert model.config._attn_implementation == before
    plain.set_attn_implementation("test_watched")
    with torch.no_grad():
        for ids in CONTEXTS:
            plain(torch.tensor([ids]))
    kinds = getattr(model.config, "layer_types", None) or ["full_attention"] * 4
    gathered = ("full_attention", "sliding_attention") if windows else ("full_attention",)
    assert list(found) == [i for i, kind in enumerate(kinds) if kind in gathered]
    for i, stats in found.items():
        q, k, v = (torch.cat([seen[at] for seen in watched if seen[0] == i], 2)[0].double() for at in (1, 2, 3))
        assert stats.tokens == k.shape[1] == sum(map(len, CONTEXTS))
        for h in range(2):
            own = q[2 * h : 2 * h + 2].flatten(0, 1)
            torch.testing.assert_close(stats.queries[h], own.T @ own / len(own))
            torch.testing.assert_close(stats.key_covariance[h], torch.cov(k[h].T, correction=0))
            torch.testing.assert_close(stats.value_mean[h], v[h].mean(0))


@pytest.mark.parametrize("name", ["llama", "qwen3", "gptoss"])
def test_the_output_cost_is_what_a_value_error_does_to_the_residual_stream(name: str) -> None:
    model = make(name)
    attention = model.model.layers[1].self_attn
    stats = gather(model, CONTEXTS[:1])[1]
    assert stats.output is not None
    dim = stats.output.shape[-1]
    error = torch.randn(dim, generator=torch.Generator().manual_seed(0))
    for h in range(2):
        total = 0.0
        for g in (2 * h, 2 * h + 1):  # the query heads of KV head h, each with this error in its output
            heads = torch.zeros(4, dim)
            heads[g] = error
            with torch.no_grad():
                moved = attention.o_proj(heads.flatten()) - attention.o_proj(torch.zeros(4 * dim))
            total += float(moved.square().sum())
        assert float(error.double() @ stats.output[h] @ error.double()) == pytest.approx(total, rel=1e-4)


# -- texts --------------------------------------------------------------------------------------------------------


def test_texts_share_the_tokens_and_contexts_begin_as_prompts_do(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / name).write_text(name * 1000)
    paths = [tmp_path / name for name in "abc"]
    contexts = read_contexts(Letters(start=7), paths, tokens=900, context=101)
    assert {len(c) for c in contexts} == {101}
    assert [c[0] for c in contexts] == [7] * 9
    assert [c[1] for c in contexts] == [ord(name) for name in "aaabbbccc"]
    assert sum(map(len, read_contexts(Letters(), paths[:1], tokens=250, context=100))) == 250
    assert sum(map(len, read_contexts(Letters(), paths[:1], tokens=5000, context=100))) == 1000  # all there is
    assert [len(c) for c in read_contexts(Letters(), paths[:1], tokens=201, context=100)] == [100, 100]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"method": "kivi"}, "method: 'kivi' is not calibrated: choose one of .*oscar.*svd.*think"),
        ({"texts": []}, "at least one file"),
        ({"texts": ["nothing.txt"]}, "nothing.txt.*No such file"),
        ({"context": 8}, "at least 16"),
        ({"tokens": 100, "context": 200}, "tokens: 100"),
        ({"context": 4000, "tokens": 5000}, "has 3000 tokens, less than a context of 4000"),
        ({"rotation": "mine"}, "oscar has no setting 'rotation': it has none"),
        ({"method": "svd", "ridge": 1.0}, "svd has no setting 'ridge': it has damping"),
    ],
)
def test_what_cannot_be_calibrated_from(arguments: dict[str, Any], told: str, text: Path) -> None:
    with pytest.raises(KvcompError, match=told):
        calibrate(make("llama"), Letters(), **{"method": "oscar", "texts": [text], **arguments})


def test_contexts_beyond_the_models_positions(text: Path) -> None:
    with pytest.raises(KvcompError, match="context: 2048 is more than the 1000 positions"):
        calibrate(make("llama", max_position_embeddings=1000), Letters(), "oscar", [text])


def test_a_model_that_caches_latents() -> None:
    with pytest.raises(UnsupportedError, match="MLA"):
        gather(make("deepseek"), CONTEXTS)


# -- files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_file_says_what_it_was_made_of(method: str, files: dict[str, Path], text: Path) -> None:
    found = load(files[method], method)
    assert (found.method, found.tokens, found.context) == (method, 2048, 256)
    assert found.texts == (("letters.txt", hashlib.sha256(text.read_bytes()).hexdigest()),)
    assert found.version == kvcomp.__version__
    assert found.model == fingerprint(make("llama"), "tiny")
    assert found.layers == [0, 1, 2, 3]
    dims = {len(t.shape) for t in found.tensors.values()}
    assert all(t.shape[:2] == (2, 16) for t in found.tensors.values())
    assert dims == {"oscar": {3}, "svd": {2, 3}, "think": {2}, "klt": {2, 3}}[method]


@pytest.mark.parametrize("method", METHODS)
def test_a_file_serves_its_model_and_no_other(method: str, files: dict[str, Path]) -> None:
    stack = Stack.parse(f"{method}(calibration={str(files[method])!r})")
    model = make("llama")
    CompressedCache(stack, model)
    CompressedCache(stack, make("llama").to(torch.bfloat16))
    CompressedCache(stack, model.config)  # weights are not available: the config alone is compared
    tuned = make("llama")
    with torch.no_grad():
        tuned.model.layers[2].mlp.down_proj.weight.mul_(1.1)
    with pytest.raises(CalibrationError, match=r"calibrated for tiny \(llama.*for .*with other weights.*calibrate"):
        CompressedCache(stack, tuned)
    for other in (make("qwen3"), make("llama", num_hidden_layers=3), make("llama", vocab_size=300).config):
        with pytest.raises(CalibrationError, match=r"calibrated for tiny \(llama.*which is another model"):
            CompressedCache(stack, other)


def test_a_fingerprint_is_the_models_whatever_surrounds_it(tmp_path: Path) -> None:
    model = make("llama")
    before = fingerprint(model)
    assert fingerprint(model.model).same(before)
    assert fingerprint(model.model).weights == before.weights
    assert fingerprint(model.config).weights is None
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    half = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert (again.dtype, half.dtype) == (torch.float32, torch.bfloat16)
    for other in (again, half):
        assert (fingerprint(other).config, fingerprint(other).weights) == (before.config, before.weights)
    CompressedCache("none", model)  # a hooked model is the same model
    assert fingerprint(model) == before
    with torch.device("meta"):
        empty = type(model)(model.config)
    assert fingerprint(empty).weights is None
    assert (
        fingerprint(make("llama", rope_parameters={"rope_type": "default", "rope_theta": 5e5})).config != before.config
    )


# -- generation ---------------------------------------------------------------------------------------------------

STACKS = (
    "oscar(bits=2, {}) + window(sinks=2, recent=8)",
    "svd(rank=8, {}) + window(sinks=2, recent=8)",
    "svd(rank=8, bits=4, {}) + window(sinks=2, recent=8)",
    "think(keep=8, {}) + window(recent=8)",
    "think(keep=8, bits=4, group=16, {}) + window(recent=8)",
    "klt(bits=2, {}) + window(sinks=2, recent=8)",
)


@pytest.mark.parametrize("stack", STACKS)
def test_generation_is_dense_attention_over_what_the_pages_decode_to(stack: str, files: dict[str, Path]) -> None:
    """Two rows; before each step the dense cache is overwritten with what the compressed one decodes to."""
    path = files[stack.partition("(")[0]]
    model, twin = make("llama"), make("llama")
    cache = CompressedCache(stack.format(f"calibration={str(path)!r}"), model)
    dense = DynamicCache(config=twin.config)
    ids = tokens(2, 200)
    with torch.no_grad():
        logits = [m(ids, past_key_values=c).logits[:, -1] for m, c in ((model, cache), (twin, dense))]
        torch.testing.assert_close(*logits, atol=1e-4, rtol=0)
        lossless = [layer.keys.clone() for layer in dense.layers]
        for i in range(80):  # the window overflows into pages on the way
            for mine, theirs in zip(cache.layers, dense.layers, strict=True):
                theirs.keys, theirs.values = mine.store.dense()
            if i == 0:
                assert all((a - b.keys).norm() > 0.05 * a.norm() for a, b in zip(lossless, dense.layers, strict=True))
            step = tokens(2, 1, seed=100 + i)
            ours, reference = (m(step, past_key_values=c).logits for m, c in ((model, cache), (twin, dense)))
            torch.testing.assert_close(ours, reference, atol=1e-4, rtol=0)
    assert cache.layers[0].store.table.total > 2 * 2 * 2
    assert cache.memory().parts["constants"] > 0


def test_full_rank_generates_what_the_dense_cache_does(files: dict[str, Path]) -> None:
    model = make("llama")
    ids = tokens(2, 150)
    plain = greedy(model, ids, DynamicCache(config=model.config), new=30)
    stack = f"svd(rank=1.0, calibration={str(files['svd'])!r})"
    assert greedy(model, ids, CompressedCache(stack, model), new=30).sequences.tolist() == plain.sequences.tolist()


def test_effective_bits_are_foretold_without_the_file(files: dict[str, Path]) -> None:
    model = make("llama")
    for method in set(METHODS) - {"klt"}:  # which holds more without a file: a basis for each row
        stack = Stack.parse(f"{method}(calibration={str(files[method])!r}) + window(sinks=0, recent=0)")
        cache = CompressedCache(stack, model)
        with torch.no_grad():
            model(tokens(1, 700), past_key_values=cache)
        adapted = storage_bytes(t for layer in cache.layers for t in layer.store.codec.adapted())
        constants = 8 * (cache.memory().parts["constants"] - adapted) / (4 * 2 * 2 * 16 * 700)
        told = Stack.parse(f"{method} + window(sinks=0, recent=0)").effective_bits(16, 700, torch.float32, layers=4)
        assert cache.memory().effective_bits - constants == pytest.approx(told, rel=2e-3)


@pytest.mark.parametrize("method", METHODS)
def test_a_plan_knows_what_a_calibrated_cache_holds_and_reads(files: dict[str, Path], method: str) -> None:
    """Low rank, few bits and sparse reads together: the bytes are those foretold without the file."""
    bits = {"svd": "rank=0.5, bits=4", "think": "keep=0.5, bits=4", "oscar": "bits=4", "klt": "bits=2"}[method]
    rest = "+ sketch(keep=0.2, rank=8) + window(sinks=2, recent=16)"
    model = make("llama")
    cache = CompressedCache(f"{method}({bits}, calibration={str(files[method])!r}) {rest}", model)
    ids = tokens(1, 901)
    with torch.inference_mode():
        model(ids[:, :900], past_key_values=cache)
        held = cache.memory().held
        model(ids[:, 900:], past_key_values=cache)
    shape = replace(shape_of(model.config, "tiny"), dtype="float32", itemsize=4)
    foretold = bill(shape, Stack.parse(f"{method}({bits}, calibration='no such file') {rest}"), 900)
    assert held == pytest.approx(foretold.held, rel=0.01)
    assert cache.traffic().read == pytest.approx(foretold.read, rel=0.01)
