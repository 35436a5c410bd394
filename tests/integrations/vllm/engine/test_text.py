"""What vLLM writes with a stack is what the Hugging Face integration writes with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

MODEL = "smollm2-135m"
TOKENS = 16
ENGINE = Callable[..., dict[str, Any]]
TEXT = Callable[[int, int], list[int]]
SHARE = Callable[[list[list[int]], list[list[int]]], float]

WINDOWED = [
    "none",
    "int(bits=4) + window(recent=16)",
    "int(bits=2, group=32, basis=hadamard) + window(sinks=4, recent=32)",
    "turboquant(bits=4) + window(recent=16)",
    "nvfp4",
    "kivi(bits=2)",
    "kivi(bits=2) + window(sinks=0, recent=0)",
]


def asked(*prompts: list[int], tokens: int = TOKENS) -> list[dict[str, Any]]:
    return [{"prompt": prompt, "tokens": tokens} for prompt in prompts]


@pytest.mark.parametrize("stack", WINDOWED)
def test_text_equals_hugging_face(
    engine: ENGINE, hugging_face: Any, share: SHARE, text: TEXT, loose: TEXT, stack: str
) -> None:
    """Whatever the window keeps: lengths before, at and after the end of a page, decoding over several ends."""
    prompts = [text(5, 30), text(50, 90), loose(64, 1), loose(310, 2)]
    written = engine(stack, [asked(*prompts)], max_num_batched_tokens=4096)["rounds"][0]["outputs"]
    assert share(written, [hugging_face(stack, prompt, TOKENS) for prompt in prompts]) >= 0.95


def test_tokens_written_one_by_one(engine: ENGINE, hugging_face: Any, share: SHARE, text: TEXT) -> None:
    """Without a window the newest tokens are quantized, too; at 8 bits that changes hardly a word."""
    stack = "int8"
    prompts = [text(5, 30), text(50, 90), text(64, 200), text(310, 300)]
    written = engine(stack, [asked(*prompts)], max_num_batched_tokens=4096)["rounds"][0]["outputs"]
    assert share(written, [hugging_face(stack, prompt, TOKENS) for prompt in prompts]) >= 0.95


@pytest.mark.parametrize("stack", ["int(bits=4) + window(recent=16)", "kivi(bits=2)"])
def test_prompts_in_chunks(engine: ENGINE, hugging_face: Any, share: SHARE, loose: TEXT, stack: str) -> None:
    """A prompt that vLLM cuts is the one that Hugging Face cuts alike: a chunk is exact to itself alone."""
    prompt = loose(300, 3)
    written = engine(stack, [asked(prompt)], max_num_batched_tokens=96)["rounds"][0]["outputs"][0]
    assert share([written], [hugging_face(stack, prompt, TOKENS, chunk=96)]) >= 0.95


@pytest.mark.parametrize(
    "stack", ["int(bits=8) + quest(pages=4)", "kivi(bits=4) + quest(pages=6, heads=common, share=2)"]
)
def test_selected_pages(engine: ENGINE, hugging_face: Any, share: SHARE, text: TEXT, stack: str) -> None:
    prompts = [text(40, 140), text(310, 600)]  # where nothing is close: a tie would go another way with the last bit
    written = engine(stack, [asked(*prompts)], max_num_batched_tokens=4096)["rounds"][0]["outputs"]
    assert share(written, [hugging_face(stack, prompt, TOKENS) for prompt in prompts]) >= 0.95


def test_calibrated(engine: ENGINE, hugging_face: Any, share: SHARE, text: TEXT, tmp_path: Path) -> None:
    """Bases out of a file, with bits where that says; prompts and decoding over the ends of pages."""
    from kvcomp.integrations.huggingface.calibrate import calibrate
    from kvcomp.integrations.huggingface.models import load_model

    file = tmp_path / "klt.safetensors"
    licence = Path(__file__).parents[4] / "LICENSE"
    calibrate(*load_model(MODEL), "klt", [licence], 512, 256, MODEL).save(file)
    stack = f"klt(k=4.5, v=3.5, calibration='{file}') + window(sinks=4, recent=16)"
    prompts = [text(50, 90), text(310, 300)]
    written = engine(stack, [asked(*prompts, tokens=40)], max_num_batched_tokens=4096)["rounds"][0]["outputs"]
    assert share(written, [hugging_face(stack, prompt, 40) for prompt in prompts]) >= 0.95
