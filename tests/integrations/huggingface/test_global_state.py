"""Stacks under whatever of torch's global settings a process has: the same answers as under its defaults."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from generation import greedy, tokens
from letters import Letters
from tiny_models import make
from torch import Tensor

from kvcomp import CompressedCache, prefill
from kvcomp.calibration.stage import Calibrated
from kvcomp.integrations.huggingface.calibrate import calibrate
from kvcomp.stages import Policy, Quantizer, Selector
from kvcomp.stages.registry import stages

ROOT = Path(__file__).parents[3]
FOLDERS = ("kvcomp", "kernels", "quantizers", "sparse", "policies", "integrations", "benchmarks")
FLOATS = {"empty", "zeros", "ones", "full", "rand", "randn", "normal", "eye", "linspace", "logspace", "empty_strided"}
INFERRED = {"tensor", "as_tensor", "asarray", "scalar_tensor"}  # from what may be floats
INTEGERS = {"arange", "randint", "randperm", "tril_indices", "triu_indices"}


def _settings() -> dict[str, Callable[[], object]]:
    dtypes = torch.bfloat16, torch.float16, torch.float64
    return {
        **{f"default dtype {dtype}": lambda dtype=dtype: torch.set_default_dtype(dtype) for dtype in dtypes},
        "default device": lambda: torch.set_default_device("meta"),
        "deterministic": lambda: torch.use_deterministic_algorithms(True),
    }


SETTINGS = _settings()


@contextmanager
def setting(name: str) -> Iterator[None]:
    """Inside, torch's global setting of that name is another; nothing that kvcomp's modules made before is there."""
    forget()
    try:
        SETTINGS[name]()
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
        torch.use_deterministic_algorithms(False)
        forget()


def forget() -> None:
    """Clear every cache of kvcomp's modules: what is made once may be made under any setting."""
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == "kvcomp":
            for thing in list(vars(module).values()):
                if callable(getattr(thing, "cache_clear", None)):
                    thing.cache_clear()


def specs() -> list[str]:
    """Every stage that needs no file, alone or over codes; and options that keep a state."""
    found = []
    for name, stage in stages().items():
        if issubclass(stage, Calibrated) or name in ("kvzip", "dsa"):
            continue
        if issubclass(stage, Quantizer):
            found.append(name)
        elif issubclass(stage, Policy):
            found.append(f"{name} + int(bits=4)")
        elif issubclass(stage, Selector):
            found.append(f"{name}(dense_layers=0) + int8")
    return [
        *found,
        "int(bits=4, basis=hadamard)",
        "int(bits=3, per=channel, basis=random)",
        "turboquant(bits=2.5)",
        "turboquant(bits=3, variant=prod)",
        "quest(top_p=0.8, dense_layers=0, summary_bits=8)",
        "sketch(tokens=32, dense_layers=0) + int8",
        "tova(budget=64) + klt(bits=2)",
        "knorm(budget=64, hold=true)",
    ]


@pytest.mark.parametrize("spec", specs())
def test_answers_do_not_depend_on_torchs_settings(spec: str) -> None:
    model, ids = make("llama", num_hidden_layers=2), tokens(2, 150)

    def logits() -> Tensor:
        return torch.stack(greedy(model, ids, CompressedCache(spec, model), 20).logits)

    expected = logits()
    for name in SETTINGS:
        with setting(name):
            found = logits()
        assert torch.equal(found, expected), name


@torch.no_grad()
def fed(model: Any, ids: Tensor, cache: CompressedCache) -> Tensor:
    """Logits of the next tokens of a cache."""
    logits: Tensor = model(ids, past_key_values=cache).logits
    return logits


def _saved(model: Any, ids: Tensor, folder: Path) -> Tensor:
    cache = CompressedCache("snapkv(keep=0.5) + klt(bits=2) + sketch(keep=0.5)", model)
    fed(model, ids, cache)
    cache.save(folder / "a.kv")
    return fed(model, tokens(2, 3, seed=4), CompressedCache.load(folder / "a.kv", model))


def _filled(model: Any, ids: Tensor, folder: Path) -> Tensor:
    caches = [CompressedCache(spec, model) for spec in ("kvzip(keep=0.5) + int8", "adakv", "streaming(chunk=64)")]
    return torch.cat([found.logits for found in prefill(model, ids, caches, tokenizer=Letters())])


def _compacted(model: Any, ids: Tensor, folder: Path) -> Tensor:
    cache = CompressedCache("none + window(sinks=4, recent=32)", model)
    fed(model, ids, cache)
    cache.compact((40, 150), ids, Letters(), keep=0.2)
    return fed(model, tokens(2, 1, seed=4), cache)


def _preallocated(model: Any, ids: Tensor, folder: Path) -> Tensor:
    return torch.stack(greedy(model, ids, CompressedCache("kivi(bits=4)", model, preallocate=220), 20).logits)


def _calibrated(model: Any, ids: Tensor, folder: Path) -> Tensor:
    text = folder / "text.txt"
    text.write_text("as a rule " * 200, encoding="utf-8")
    calibrate(model, Letters(), "oscar", [text], tokens=512, context=256).save(folder / "c.safetensors")
    spec = f"oscar(calibration='{folder / 'c.safetensors'}')"
    return torch.stack(greedy(model, ids, CompressedCache(spec, model), 5).logits)


@pytest.mark.parametrize("use", [_saved, _filled, _compacted, _preallocated, _calibrated])
@pytest.mark.parametrize("name", SETTINGS)
def test_whatever_is_done_with_a_cache(use: Callable[..., Tensor], name: str, tmp_path: Path) -> None:
    model, ids = make("llama", num_hidden_layers=2), tokens(2, 190)
    expected = use(model, ids, tmp_path)
    with setting(name):
        found = use(model, ids, tmp_path)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "spec", ["none", "int(bits=4)", "kivi(bits=2)", "klt(bits=2) + sketch(keep=0.5)", "h2o(budget=96)"]
)
def test_threads_may_change_between_steps(spec: str) -> None:
    model, ids = make("llama", num_hidden_layers=2), tokens(2, 150)
    had, runs = torch.get_num_threads(), []
    try:
        for counts in ((1,), (1, 2, 3, 1, 2)):
            cache, logits = CompressedCache(spec, model), []
            for step in range(20):
                torch.set_num_threads(counts[step % len(counts)])
                logits.append(fed(model, tokens(2, 1, seed=step) if step else ids, cache)[:, -1])
            runs.append(torch.stack(logits))
    finally:
        torch.set_num_threads(had)
    torch.testing.assert_close(runs[1], runs[0], atol=2e-4, rtol=0)


def factories(text: str) -> Iterator[tuple[int, str]]:
    """Calls of torch's factories that leave a float's dtype, or the device, to torch's defaults: line and call."""
    for call in ast.walk(ast.parse(text)):
        if (
            isinstance(call, ast.Call)
            and isinstance(call.func, ast.Attribute)
            and ast.unparse(call.func.value) == "torch"
        ):
            name, given = call.func.attr, {word.arg for word in call.keywords}
            wanted = {"dtype", "device"} if name in FLOATS | INFERRED else {"device"} if name in INTEGERS else set()
            if wanted - given:
                yield call.lineno, ast.unparse(call)


def test_every_new_tensor_says_its_dtype_and_device() -> None:
    assert list(factories("torch.empty(3, dtype=d)\ntorch.arange(3)\ntorch.zeros(2, dtype=d, device=e)")) == [
        (1, "torch.empty(3, dtype=d)"),
        (2, "torch.arange(3)"),
    ]
    left = [
        f"{path.relative_to(ROOT)}:{line}: {call}"
        for folder in FOLDERS
        for path in sorted((ROOT / folder).rglob("*.py"))
        for line, call in factories(path.read_text(encoding="utf-8"))
    ]
    assert not left, "\n".join(left)
