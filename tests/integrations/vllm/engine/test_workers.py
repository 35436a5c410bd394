"""Pages beyond one worker: KV heads over two of them, and pages that a connector takes to another engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ENGINE = Callable[..., dict[str, Any]]
LAYERS, HEADS, DIM = 2, 2, 64
LENGTHS = (20, 100, 150)
FLOAT32 = 4


@pytest.fixture(scope="module")
def requests() -> list[dict[str, Any]]:
    prompts = [[(7 * i + 11 * k) % 512 for k in range(n)] for i, n in enumerate(LENGTHS)]
    return [{"prompt": prompt, "tokens": 80} for prompt in prompts]


@pytest.mark.parametrize("stack", ["kivi(bits=2)", "h2o(budget=64) + int(bits=4)"])
def test_two_ranks_write_what_one_does(
    engine: ENGINE, tiny: dict[str, Any], requests: list[dict[str, Any]], stack: str
) -> None:
    one, two = (
        engine(stack, [requests], tensor_parallel_size=ranks, distributed_executor_backend=executor, **tiny)
        for ranks, executor in ((1, "uni"), (2, "mp"))
    )
    assert two["rounds"][0]["outputs"] == one["rounds"][0]["outputs"]


def test_a_connector_moves_compressed_pages(
    engine: ENGINE, tiny: dict[str, Any], requests: list[dict[str, Any]], tmp_path: Path
) -> None:
    """What one engine stores, the next one reads as it would a prefix of its own; files take the bytes of pages."""
    given = {
        "kv_connector": "ExampleConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"shared_storage_path": str(tmp_path)},
    }
    first = engine("int8", [requests], kv_transfer_config=given, **tiny)["rounds"][0]
    moved = sum(file.stat().st_size for file in tmp_path.rglob("*.safetensors"))
    second = engine("int8", [requests], kv_transfer_config=given, **tiny)["rounds"][0]
    whole = [(n - 1) // 64 * 64 for n in LENGTHS]
    assert first["cached"] == [0, 0, 0]
    assert second["cached"] == whole
    hits = engine("int8", [requests, requests], enable_prefix_caching=True, **tiny)["rounds"][1]
    assert hits["cached"] == whole
    assert second["outputs"] == hits["outputs"]
    dense = sum(whole) * LAYERS * 2 * HEADS * DIM * FLOAT32
    assert dense / moved > 0.95 * 32 / 8.25  # float32 by 8 bits and a scale of 16 for 64 of them
