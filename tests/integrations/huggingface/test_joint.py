"""Latents of plain models: steps over them are those over the K and V that they give back, and exact at full rank."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_models as models
import torch
from generation import assert_same, greedy, left_padded, tokens
from torch import Tensor
from transformers import DynamicCache, Gemma2Config, Gemma2ForCausalLM, PreTrainedModel

from kvcomp import CompressedCache, KvcompError, Stack, UnsupportedError, prefill
from kvcomp.calibration.file import CalibrationError, load
from kvcomp.cost.bill import bill
from kvcomp.integrations.huggingface.calibrate import calibrate
from kvcomp.integrations.huggingface.joint import JointLayer
from kvcomp.integrations.huggingface.latent import MANY
from kvcomp.integrations.huggingface.shapes import shape_of
from kvcomp.state import CHECKSUM

FAMILIES = {  # GQA of 2; norms of K; K and V of their own, or of one head; layers with sliding windows between
    "llama": {},
    "qwen3": {},
    "llama of one KV head": {"num_key_value_heads": 1},
    "llama without groups": {"num_key_value_heads": 4},
    "gemma3": {},
}
pytestmark = pytest.mark.filterwarnings("ignore:.*same redundancy")


class Letters:
    """A tokenizer of one token per character."""

    def __call__(self, text: str, add_special_tokens: bool = True, **_: Any) -> Any:
        ids = [3 + ord(letter) % 200 for letter in text]
        return type("Encoded", (), {"input_ids": torch.tensor([ids]) if _ else ids})


def made(name: str, implementation: str = "sdpa", **changes: Any) -> PreTrainedModel:
    return models.make(name.partition(" ")[0], implementation, **FAMILIES.get(name, {}), **changes)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("latent")
    text = folder / "letters.txt"
    text.write_text("".join(map(chr, tokens(1, 3000, seed=9).clamp(32, 120)[0].tolist())))
    found = {}
    for name in FAMILIES:
        path = folder / f"{name}.safetensors"
        calibrate(made(name), Letters(), "latent", [text], tokens=2048, context=256, name="tiny").save(path)
        found[name] = str(path)
    return found


def spec(files: dict[str, str], rest: str = "none", rank: float | int = 1.0, name: str = "llama") -> str:
    return f"latent(rank={rank}, calibration={files[name]!r}) + {rest} + window(sinks=2, recent=8)"


def dense(model: PreTrainedModel) -> DynamicCache:
    return DynamicCache(config=model.config)


def steps(model: PreTrainedModel, cache: Any, padded: bool = True) -> Tensor:
    """Logits of a prompt, steps and chunks, each after what came before."""
    ids, at, found = tokens(2, 200 + MANY), 0, []
    _, mask = left_padded([100, 120])
    with torch.no_grad():
        for n in (120, 1, 1, 9, 1, MANY, 1, 40, 1):
            whole = torch.cat([mask, mask.new_ones(2, at + n - 120)], 1) if padded else None
            found.append(model(ids[:, at : at + n], past_key_values=cache, attention_mask=whole).logits[:, -1])
            at += n
    return torch.stack(found)


# -- exact at full rank -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_full_rank_is_dense_attention(name: str, padded: bool, files: dict[str, str]) -> None:
    model = made(name)
    cache = CompressedCache(spec(files, name=name), model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = steps(model, cache, padded)
    torch.testing.assert_close(ours, steps(model, dense(model), padded), atol=1e-4, rtol=0)
    full = [layer for layer in cache.layers if isinstance(layer, JointLayer)]
    assert full
    assert "dense copy" not in full[0].read()[0]
    assert full[0].store.heads == 1


@pytest.mark.parametrize("rest", ["quest(keep=1.0, dense_layers=0)", "h2o(keep=1.0)", "snapkv(keep=1.0, window=16)"])
def test_stages_that_leave_nothing_out_lose_nothing(rest: str, files: dict[str, str]) -> None:
    model = made("llama")
    ours = steps(model, CompressedCache(spec(files, rest), model))
    torch.testing.assert_close(ours, steps(model, dense(model)), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}, {"prefill_chunk_size": 37}, {"implementation": "eager"}],
)
def test_generation_equals_dynamic_cache(options: dict[str, Any], files: dict[str, str]) -> None:
    options = dict(options)
    model, rows = made("llama", options.pop("implementation", "sdpa")), 2 - ("prompt_lookup_num_tokens" in options)
    ids = tokens(rows, 120)
    ids[:, 60:] = ids[:, :60]
    cache = CompressedCache(spec(files), model)
    ours, theirs = greedy(model, ids, cache, **options), greedy(model, ids, dense(model), **options)
    assert_same(ours, theirs)
    if "num_beams" in options:
        return
    turn = torch.cat([ours.sequences, tokens(rows, 20, seed=4)], 1)  # a second turn, of a fork and of a file, too
    twin = cache.fork()
    again = greedy(model, turn, dense(model))
    for held in (cache, twin):
        assert_same(greedy(model, turn, held), again)


@pytest.mark.parametrize("rest", ["none", "int(bits=8)", "klt(bits=4)"])
def test_files_go_on_alike(rest: str, files: dict[str, str], tmp_path: Path) -> None:
    model, ids = made("llama"), tokens(2, 150)
    cache = CompressedCache(spec(files, rest, 0.5), model)
    first = greedy(model, ids, cache)
    cache.save(tmp_path / "cache.safetensors")
    loaded = CompressedCache.load(tmp_path / "cache.safetensors", model)
    held = cache.layers[0].keys[:]
    torch.testing.assert_close(loaded.layers[0].keys[:], held, atol=0, rtol=0)
    turn = torch.cat([first.sequences, tokens(2, 20, seed=4)], 1)
    assert_same(greedy(model, turn, loaded), greedy(model, turn, cache))
    loaded.crop(-3)
    assert loaded.get_seq_length() == cache.get_seq_length() - 3
    loaded.reset()
    assert_same(greedy(model, ids, loaded), first)


def test_bfloat16_loses_its_rounding_alone(files: dict[str, str]) -> None:
    model = made("llama").to(torch.bfloat16)
    exact = steps(made("llama"), dense(made("llama")))
    ours, theirs = (steps(model, c).float() - exact for c in (CompressedCache(spec(files), model), dense(model)))
    assert float(ours.norm()) < 1.3 * float(theirs.norm())


def test_gradients_and_weights_are_those_of_all_tokens(files: dict[str, str]) -> None:
    model = made("llama", "eager")
    cache, twin = CompressedCache(spec(files), model), dense(model)
    found = []
    for held in (cache, twin):
        with torch.no_grad():
            model(tokens(1, 120), past_key_values=held)
        out = model(tokens(1, 1, seed=3), past_key_values=held, output_attentions=True)
        out.logits.square().sum().backward()
        weight = model.model.layers[1].self_attn.q_proj.weight
        assert weight.grad is not None
        found.append((weight.grad.clone(), out.attentions[2]))
        model.zero_grad()
    torch.testing.assert_close(*(grad for grad, _ in found), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(*(weights for _, weights in found), atol=1e-4, rtol=0)


# -- fewer coordinates ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rest", ["none", "int(bits=4)", "int(bits=4, basis=hadamard)", "turboquant(bits=4)", "fp8"])
def test_steps_are_dense_attention_over_what_the_pages_give_back(rest: str, files: dict[str, str]) -> None:
    model, twin = made("llama"), made("llama")
    cache, plain = CompressedCache(spec(files, rest, 40), model), dense(twin)
    ids = tokens(2, 200)
    with torch.no_grad():
        both = [m(ids, past_key_values=c).logits[:, -1] for m, c in ((model, cache), (twin, plain))]
        torch.testing.assert_close(*both, atol=1e-4, rtol=0)
        lossless = [layer.keys.clone() for layer in plain.layers]
        for i in range(80):  # the window overflows into pages on the way
            for mine, theirs in zip(cache.layers, plain.layers, strict=True):
                theirs.keys, theirs.values = mine.keys[:], mine.values[:]
            if i == 0:
                assert all((a - b.keys).norm() > 0.05 * a.norm() for a, b in zip(lossless, plain.layers, strict=True))
            step = tokens(2, 1, seed=100 + i)
            ours, reference = (m(step, past_key_values=c).logits for m, c in ((model, cache), (twin, plain)))
            torch.testing.assert_close(ours, reference, atol=1e-4, rtol=0)


def test_what_pages_give_back_is_the_roundtrip(files: dict[str, str]) -> None:
    model = made("llama")
    stack = Stack.parse(spec(files, "int(bits=4)", 40))
    cache, plain = CompressedCache(stack, model), dense(model)
    with torch.no_grad():
        model(tokens(2, 200), past_key_values=plain)
        model(tokens(2, 200), past_key_values=cache)
    held, k, v = cache.layers[0], plain.layers[0].keys, plain.layers[0].values
    ours = stack.roundtrip(k, v)
    torch.testing.assert_close(ours[0], held.keys[:], atol=1e-5, rtol=0)
    torch.testing.assert_close(ours[1], held.values[:], atol=1e-5, rtol=0)
    window = ours[0][:, :, -8:]
    torch.testing.assert_close(window, k[:, :, -8:], atol=1e-5, rtol=0)


def test_policies_choose_for_all_heads_together(files: dict[str, str]) -> None:
    model, ids = made("llama"), tokens(2, 200)
    for policy in ("snapkv(keep=0.5, window=8)", "keydiff(keep=0.5)", "tova(keep=0.5)"):
        cache = CompressedCache(f"{policy} + {spec(files, 'int(bits=8)')}", model)
        greedy(model, ids, cache)
        kept = cache.layers[0].store.kept
        assert kept.shape == (2,)
        assert bool((kept < 150).all())


def test_kvzip_repeats_prompts(files: dict[str, str]) -> None:
    """By one budget for all layers, of tokens of one stream instead of two."""
    model = made("llama")
    stacks = (f"kvzip(keep=0.5) + {spec(files)}", "kvzip(keep=0.5) + none + window(sinks=2, recent=8)")
    caches = [CompressedCache(stack, model) for stack in stacks]
    prefill(model, tokens(1, 150), caches, tokenizer=Letters())
    joint, heads = (torch.stack([layer.store.kept for layer in cache.layers]).float() for cache in caches)
    assert (joint.shape, heads.shape) == ((4, 1), (4, 2))
    assert float(joint.mean()) == pytest.approx(float(heads.mean()), rel=0.1)
    with torch.no_grad():
        model(tokens(1, 1), past_key_values=caches[0])
    assert "dense copy" not in caches[0].traffic().parts


def test_stacks_with_and_without_share_a_prefill(files: dict[str, str]) -> None:
    model = made("llama")
    together = [CompressedCache(stack, model) for stack in (spec(files, "none", 0.5), "int(bits=8)")]
    alone = [CompressedCache(cache.stack, model) for cache in together]
    prefill(model, tokens(2, 150), together)
    for cache in alone:
        prefill(model, tokens(2, 150), [cache])
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one.layers[1].keys[:], other.layers[1].keys[:], atol=0, rtol=0)


@pytest.mark.parametrize("rest", ["none", "int(bits=4)", "int(bits=4) + sketch(keep=0.2, rank=8)"])
def test_a_plan_knows_what_is_held_and_read(rest: str, files: dict[str, str]) -> None:
    model, ids = made("llama"), tokens(1, 901)
    cache = CompressedCache(spec(files, rest, 0.5), model)
    with torch.inference_mode():
        model(ids[:, :900], past_key_values=cache)
        memory = cache.memory()
        model(ids[:, 900:], past_key_values=cache)
    shape = replace(shape_of(model.config, "tiny"), dtype="float32", itemsize=4)
    foretold = bill(shape, spec({"llama": "no such file"}, rest, 0.5), 900)
    assert memory.held == pytest.approx(foretold.held, rel=0.01)
    assert cache.traffic().read == pytest.approx(foretold.read, rel=0.01)
    assert memory.parts["constants"] >= 4 * 2 * 64 * 64 * 4
    assert memory.dense == foretold.dense[0]


# -- refused ----------------------------------------------------------------------------------------------------------


def test_what_latents_cannot_serve_is_said(files: dict[str, str]) -> None:
    stack = Stack.parse(spec(files))
    with pytest.raises(UnsupportedError, match=r"latents \(MLA\) itself: leave latent out"):
        CompressedCache(Stack.parse("latent + none"), models.make("deepseek"))
    with pytest.raises(UnsupportedError, match="expected_attention does not know"):
        CompressedCache(f"expected_attention(keep=0.5) + {stack}", made("llama"))
    with pytest.raises(UnsupportedError, match=r"preallocate=200.*latent makes.*leave preallocate= out"):
        CompressedCache(stack, made("llama"), preallocate=200)
    with pytest.raises(KvcompError, match="calibration='FILE'"):
        greedy(made("llama"), tokens(1, 50), CompressedCache("latent", made("llama")))
    with pytest.raises(KvcompError, match="another model"):
        CompressedCache(stack, made("qwen3"))


@pytest.mark.parametrize(("name", "what"), [("gemma2", "capped logits"), ("gptoss", "learned sinks")])
def test_logits_that_a_constant_would_change(name: str, what: str, tmp_path: Path) -> None:
    if name == "gemma2":
        given = {**models.COMMON, "head_dim": 32, "layer_types": models.MIXED, "attn_logit_softcapping": 2.0}
        model: PreTrainedModel = Gemma2ForCausalLM(Gemma2Config(**given, attn_implementation="eager")).eval()
    else:
        model = models.make(name, "eager")
    text = tmp_path / "letters.txt"
    text.write_text("abcdefghij" * 100)
    calibrate(model, Letters(), "latent", [text], tokens=512, context=128).save(tmp_path / "c.safetensors")
    cache = CompressedCache(f"latent(calibration={str(tmp_path / 'c.safetensors')!r})", model)
    with pytest.raises(UnsupportedError, match=f"{what}.*leave latent out"), torch.no_grad():
        model(tokens(1, 30), past_key_values=cache)


def test_another_shape_than_before_is_refused(files: dict[str, str]) -> None:
    cache = CompressedCache(spec(files), made("llama"))
    layer = cache.layers[0]
    layer.update(torch.zeros(1, 2, 3, 16), torch.zeros(1, 2, 3, 16))
    with pytest.raises(KvcompError, match="latents of 2 KV heads of 16 and 16 channels, but the model has 4 of 16"):
        layer.update(torch.zeros(1, 4, 1, 16), torch.zeros(1, 4, 1, 16))
    with pytest.raises(KvcompError, match="the cache holds 1 rows, but the batch has 2"):
        layer.update(torch.zeros(2, 2, 1, 16), torch.zeros(2, 2, 1, 16))
    with pytest.raises(CalibrationError, match="calibrate the model that the cache is for"):
        CompressedCache(spec(files), made("llama")).layers[0].update(torch.zeros(1, 3, 1, 16), torch.zeros(1, 3, 1, 16))


def test_damaged_files_are_refused(files: dict[str, str], tmp_path: Path) -> None:
    found = load(files["llama"], "latent")
    assert CHECKSUM not in found.settings
    for change in (
        {"0.write": found.tensors["0.write"] * torch.tensor([0.0] + [1.0] * 63)},
        {"0.write": found.tensors["0.write"][:, :5]},
        {"0.mean": found.tensors["0.mean"][:, :5]},
    ):
        path = tmp_path / "c.safetensors"
        replace(found, tensors={**found.tensors, **change}).save(path)
        with pytest.raises(CalibrationError, match="is damaged: "):
            CompressedCache(f"latent(calibration={str(path)!r})", made("llama"))
        path.unlink()
