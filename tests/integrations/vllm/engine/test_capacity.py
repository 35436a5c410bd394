"""A pool of the same bytes holds more tokens, as vLLM reports it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

ENGINE = Callable[..., dict[str, Any]]

LENGTH = 8192


@pytest.fixture(scope="module")
def dense() -> dict[str, int]:
    return {}


@pytest.mark.parametrize(
    ("stack", "times"),
    [
        (None, 1.0),
        ("none", 1.0),
        ("int8", 1.85),
        ("int(bits=4)", 3.45),  # 4.5 bits and 1/8 for centres
        ("turboquant(bits=4)", 3.5),
        ("int(bits=2)", 6.0),
        ("turboquant(bits=2)", 6.0),
        ("kivi(bits=2, group=64) + window(sinks=0, recent=0)", 6.0),
        ("h2o(budget=512) + int8", 1.8),
    ],
)
def test_capacity(
    engine: Callable[..., dict[str, Any]], dense: dict[str, int], stack: str | None, times: float
) -> None:
    options = {"dtype": "bfloat16", "max_model_len": LENGTH, "kv_cache_memory_bytes": 256 << 20}
    result = engine(stack, [], **options)
    assert "error" not in result, result
    capacity = result["capacity"]
    if stack is None:
        dense["capacity"] = capacity
    print(f"{stack or 'vLLM alone'}: {capacity} tokens, {capacity / dense['capacity']:.2f}x")
    assert capacity >= times * dense["capacity"] * 0.999


def test_more_requests_at_once(engine: ENGINE, text: Callable[[int, int], list[int]]) -> None:
    """Where vLLM alone lets requests wait for want of room, a stack in the same bytes runs all of them at once."""
    requests = [{"prompt": text(150, 40 * i), "tokens": 8} for i in range(6)]
    options = {"dtype": "bfloat16", "max_model_len": 512, "max_num_batched_tokens": 1024}
    alone, packed = (
        engine(stack, [requests], kv_cache_memory_bytes=16 << 20, **options) for stack in (None, "int(bits=4)")
    )
    assert alone["block_size"] == packed["block_size"] == 64
    most = [max(result["rounds"][0]["held"]) for result in (alone, packed)]
    assert most[0] < 6 * 3 == most[1]  # each request needs three blocks
