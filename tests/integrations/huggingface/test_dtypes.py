"""bf16, fp16, fp64 and autocast: no further from float32 than DynamicCache is, plus what the stack itself costs."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import tiny_models as models
import torch
from generation import greedy, left_padded, tokens
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from kvcomp import CompressedCache
from kvcomp.calibration.stage import Calibrated
from kvcomp.integrations.huggingface.calibrate import calibrate
from kvcomp.stages import Quantizer
from kvcomp.stages.registry import find, stages

IDS = tokens(2, 150)
WINDOW = "window(sinks=2, recent=8)"
SPECS = {"kivi": "kivi(bits=4)", "int": "int(bits=4)", "klt": "klt(bits=4)", "turboquant": "turboquant(bits=4)"}
QUANTIZERS = [name for name, stage in stages().items() if issubclass(stage, Quantizer)]
EVERY = [
    *(SPECS.get(name, name) for name in QUANTIZERS),
    "int(bits=4, basis=hadamard)",
    "turboquant(bits=2.5)",
    "turboquant(bits=4, variant=prod)",
    "klt(bits=2.5)",
]
KINDS = ("bfloat16", "float16", "float64", "autocast bfloat16", "autocast float16", "autocast bfloat16 of bfloat16")


class Letters:
    """A tokenizer of one token per character."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> Any:
        return type("Encoded", (), {"input_ids": [ord(letter) % 256 for letter in text]})


def make(kind: str) -> tuple[PreTrainedModel, Any]:
    """The tiny Llama in the dtype of that kind, and the autocast around its forwards."""
    model = models.make("llama", num_hidden_layers=2, head_dim=32)
    cast = nullcontext()
    words = kind.split()
    if words[0] == "autocast":
        cast = torch.autocast("cpu", getattr(torch, words[1]))
    if words[-1] != "float32" and (words[0] != "autocast" or len(words) > 2):
        model.to(getattr(torch, words[-1]))
    return model, cast


def logits(model: PreTrainedModel, cache: Any, cast: Any) -> Tensor:
    """[2, 9, vocabulary] float32: of a prompt's last token, six single tokens and a chunk of two."""
    found = []
    with torch.no_grad(), cast:
        found.append(model(IDS[:, :140], past_key_values=cache).logits[:, -1:])
        for i in range(140, 146):
            found.append(model(IDS[:, i : i + 1], past_key_values=cache).logits)
        found.append(model(IDS[:, 146:148], past_key_values=cache).logits)
    return torch.cat([x.float() for x in found], 1)


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "letters.txt"
    path.write_text("".join(map(chr, tokens(1, 1200, seed=9).clamp(32, 120)[0].tolist())))
    return path


def spec(quantizer: str, model: PreTrainedModel, text: Path, folder: Path) -> str:
    """The quantizer, calibrated for the model where it has to be."""
    if quantizer not in QUANTIZERS or not issubclass(find(quantizer), Calibrated):
        return quantizer
    path = folder / f"{quantizer}.safetensors"
    calibrate(model, Letters(), quantizer, [text], tokens=512, context=256, name="tiny").save(path)
    return f'{quantizer}(calibration="{path}")'


FORMS = ("{}", "streaming(sinks=2, recent=130) + {}", "{} + quest(pages=3, dense_layers=0)")


@pytest.mark.parametrize("quantizer", EVERY)
def test_error_in_every_dtype(quantizer: str, text: Path, tmp_path: Path) -> None:
    """Alone, with a policy and with a selector, whose choices do not depend on the last bit of a key."""

    def costs(kind: str) -> list[float]:
        """Errors of DynamicCache and of each form."""
        model, cast = make(kind)
        found = logits(model, DynamicCache(config=model.config), cast)
        name, out = spec(quantizer, model, text, tmp_path), [error(found, dense)]
        for form in FORMS:
            out.append(error(logits(model, CompressedCache(f"{WINDOW} + {form.format(name)}", model), cast), dense))
        return out

    model, _ = make("float32")
    dense = logits(model, DynamicCache(config=model.config), nullcontext())
    _, *stack = costs("float32")
    for kind in KINDS:
        own, *found = costs(kind)
        for form, a, b in zip(FORMS, found, stack, strict=True):
            assert a <= 1.1 * (own + b), (kind, form, a, own, b)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 16}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 3}])
def test_generation_under_autocast(implementation: str, options: dict[str, Any]) -> None:
    ids, mask = left_padded([65, 80]) if "prompt_lookup_num_tokens" not in options else (tokens(1, 80), None)
    found = []
    for kind in (DynamicCache, CompressedCache):
        model = models.make("llama", implementation)
        cache = kind(config=model.config) if kind is DynamicCache else CompressedCache("none", model)
        with torch.autocast("cpu", torch.bfloat16):
            found.append(greedy(model, ids, cache, attention_mask=mask, new=8, **options))
    ours, theirs = (torch.stack(result.logits).float() for result in found)
    assert ours.isfinite().all()
    assert error(ours[:2, :1], theirs[:2, :1]) < 0.05  # later tokens may differ: bfloat16 has ties


def test_autocast_that_comes_and_goes() -> None:
    """A prompt under autocast, steps without, and the reverse; forks, crops and files do not mind."""
    for stack in ("none", "kivi(bits=4, group=16) + window(recent=16)"):
        for first, then in ((True, False), (False, True)):
            model = models.make("llama")
            dense, ours = DynamicCache(config=model.config), CompressedCache(stack, model)
            rows = []
            for cache in (dense, ours):
                with torch.no_grad():
                    with torch.autocast("cpu", torch.bfloat16, enabled=first):
                        model(IDS[:, :120], past_key_values=cache)
                        cache.crop(-3)
                    with torch.autocast("cpu", torch.bfloat16, enabled=then):
                        rows.append(model(IDS[:, 120:121], past_key_values=cache).logits.float())
            assert error(rows[1], rows[0]) < (0.03 if stack == "none" else 0.1)
            assert {x.dtype for layer in ours.layers for x in (layer.store.exact.k, layer.store.exact.v)} == {
                torch.float32
            }


def test_steps_of_fixed_shape_under_autocast() -> None:
    model, cast = make("autocast bfloat16")
    found = logits(model, CompressedCache("int(bits=8, basis=hadamard)", model, preallocate=160), cast)
    assert error(found, logits(model, DynamicCache(config=model.config), cast)) < 0.03
