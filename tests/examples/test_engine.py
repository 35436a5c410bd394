"""The example engine: every request writes what it would alone, whoever joins, leaves or is preempted."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tiny_folder
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from kvcomp.errors import KvcompError, UnsupportedError

PATH = Path(__file__).parents[2] / "examples" / "engine.py"
CONFIGS = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
LENGTHS = (20, 130, 64, 1, 63)
TOKENS = 70  # over a page's end
STACKS = ["none", "int8", "int(bits=4)", "int(bits=4, basis=hadamard)", "fp8", "mxfp4", "turboquant(bits=4)"]


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("engine_example", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def model_of(kind: str = "llama") -> Any:
    """Random weights, far from a tie."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 64}
    config = CONFIGS[kind](**sizes, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2)
    return AutoModelForCausalLM.from_config(config).eval()


def prompts() -> list[list[int]]:
    return [[(7 * i + 11 * k) % 512 for k in range(n)] for i, n in enumerate(LENGTHS)]


def written(example: ModuleType, stack: str, model: Any, **options: Any) -> tuple[Any, list[list[int]]]:
    """What requests write of which one joins in every third step, and others are done by then."""
    engine = example.Engine(model, stack, **options)
    requests = []
    for i, prompt in enumerate(prompts()):
        requests.append(engine.add(prompt, TOKENS - 10 * i))
        for _ in range(3):
            engine.step()
    engine.run()
    assert sorted(engine.free) == list(range(1, len(engine.pools[0])))
    assert [len(request.tokens) for request in requests] == [n + TOKENS - 10 * i for i, n in enumerate(LENGTHS)]
    return engine, [request.tokens[request.prompt :] for request in requests]


def alone(example: ModuleType, stack: str, model: Any) -> list[list[int]]:
    texts = []
    for i, prompt in enumerate(prompts()):
        engine = example.Engine(model, stack)
        request = engine.add(prompt, TOKENS - 10 * i)
        engine.run()
        texts.append(request.tokens[request.prompt :])
    return texts


@pytest.mark.parametrize("kind", CONFIGS)
def test_without_a_stack_it_is_generate(example: ModuleType, kind: str) -> None:
    model = model_of(kind)
    expected = []
    for i, prompt in enumerate(prompts()):
        ids = torch.tensor([prompt])
        how = {"do_sample": False, "max_new_tokens": TOKENS - 10 * i, "min_new_tokens": TOKENS - 10 * i}
        out = model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **how)
        expected.append(out[0, len(prompt) :].tolist())
    assert written(example, "none", model)[1] == expected


@pytest.mark.parametrize("stack", STACKS)
def test_texts_are_those_of_requests_alone(example: ModuleType, stack: str) -> None:
    model = model_of()
    expected = alone(example, stack, model)
    engine, texts = written(example, stack, model, running=3)
    assert engine.preemptions == 0
    assert texts == expected
    tight, texts = written(example, stack, model, blocks=6)
    assert tight.preemptions > 0
    assert texts == expected


def test_refused(example: ModuleType) -> None:
    model = model_of()
    for stack in ("kivi(bits=2)", "int8 + quest(pages=2)", "snapkv + int8", "int8 + window(recent=4)"):
        with pytest.raises(UnsupportedError, match="token by token"):
            example.Engine(model, stack)
    engine = example.Engine(model, "int8", blocks=3)
    with pytest.raises(KvcompError, match="need 3 blocks"):
        engine.add([1] * 129, 1)
    with pytest.raises(KvcompError, match="at least one of each"):
        engine.add([], 1)
    engine.add([1] * 128, 1)
    engine.run()


def test_full_attention_alone(example: ModuleType) -> None:
    engine = example.Engine(model_of(), "int8")
    x = torch.zeros(1, 1, 1, 64)
    with pytest.raises(UnsupportedError, match="softcap=30"):
        example.attend(None, x, x, x, None, 1.0, softcap=30.0, layers=engine.layers)


def test_from_the_command_line(
    example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(tiny_folder.save(tmp_path))
    example.main(["--model", folder, "--stack", "int(bits=4)", "--tokens", "5", "--prompt", "one", "--prompt", "more"])
    said = capsys.readouterr().out
    assert "one|" in said
    assert "more|" in said
    assert "2 blocks at most" in said
