"""Stages that need a calibration and name none: made when the first engine of a model starts."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from kvcomp.stages.stack import Stack

ENGINE = Callable[..., dict[str, Any]]
TEXT = Callable[[int, int], list[int]]
TOKENS = 40


@pytest.fixture(scope="module")
def model(folder: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model of random weights with a tokenizer, and its folder as `name_or_path`."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        initializer_range=0.2,
        of_test=uuid4().hex,  # no calibration is kept of it
    )
    path = tmp_path_factory.mktemp("fitted")
    LlamaForCausalLM(config).save_pretrained(path)
    AutoTokenizer.from_pretrained(folder).save_pretrained(path)
    return LlamaForCausalLM.from_pretrained(path).eval()


def test_calibrated_by_the_first_engine(engine: ENGINE, model: Any, text: TEXT, share: Any) -> None:
    """Text as in Hugging Face with the same files; the second engine finds them."""
    import torch

    from kvcomp import CompressedCache

    path, stack = model.name_or_path, "klt(bits=4) + sketch(keep=0.4)"
    kept = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvcomp" / "calibration"
    before = set(kept.glob("*.safetensors"))
    prompts = [text(50, 90), text(310, 300)]
    asked = [{"prompt": prompt, "tokens": TOKENS} for prompt in prompts]
    written = engine(stack, [asked], model=path, max_model_len=512)["rounds"][0]["outputs"]
    files = sorted(set(kept.glob("*.safetensors")) - before)
    assert [file.name.partition("-")[0] for file in files] == ["klt", "sketch"]
    times = [file.stat().st_mtime_ns for file in files]
    assert "error" not in engine(stack, [], model=path, max_model_len=512)
    assert [file.stat().st_mtime_ns for file in files] == times
    named = Stack.parse(f"klt(bits=4, calibration='{files[0]}') + sketch(keep=0.4, calibration='{files[1]}')")

    def said(prompt: list[int]) -> list[int]:
        ids = torch.tensor([prompt])
        options = {"do_sample": False, "max_new_tokens": TOKENS, "min_new_tokens": TOKENS}
        out = model.generate(ids, past_key_values=CompressedCache(named, model), **options)
        return list(out[0, ids.shape[1] :].tolist())

    assert share(written, [said(prompt) for prompt in prompts]) >= 0.95
    for file in files:
        file.unlink()
