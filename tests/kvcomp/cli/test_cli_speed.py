"""`kvcomp speed` and `kvcomp doctor`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_folder
import torch
from command import refused, run
from torch import Tensor

from kvcomp.attention import Part
from kvcomp.benchmarks import speed
from kvcomp.cache.layer import LayerStore
from kvcomp.kernels import cpu, dispatch
from kvcomp.stages.stack import Stack

STACKS = ("--stack", "kivi(bits=4)", "--stack", "sketch(keep=0.2) + int8")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder.save(tmp_path_factory.mktemp("tiny"))


def test_all_stacks_beside_dense(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "speed"
    result = run("speed", "--model", tiny, *STACKS, "--context", "100,300", "--batch", 2, "--steps", 4, "--out", out)
    assert result.exit_code == 0, result.output
    found = json.loads((out / "speed.json").read_text())
    labels = {"attention": [speed.SDPA], "model": [speed.DYNAMIC, *speed.peers()]}
    stacks = ["kivi(bits=4)", "sketch(keep=0.2) + int8"]
    for what, dense in labels.items():
        for context in (100, 300):
            rows = [t for t in found["timings"] if (t["what"], t["context"]) == (what, context)]
            assert [t["label"] for t in rows] == [*dense, *stacks]
            assert rows[0]["ratio"] == 1
            for row in rows:
                assert 0 < row["low"] <= row["ms"] <= row["high"]
                assert row["ratio"] == pytest.approx(rows[0]["ms"] / row["ms"])
            assert all(row["read"] > 0 for row in rows[-2:])
    assert found["copy_gbps"] > 0
    assert (out / "speed.svg").read_text().startswith("<svg")
    for part in ("Attention of one layer", "Decode step", "GB/s", "of a copy", *stacks):
        assert part in result.stdout
    if not torch.cuda.is_available():
        line = "not timed: FlashInfer, FlashInfer fp8, flash-attention: there is no NVIDIA GPU"
        assert result.stderr.count(line) == 1


def test_bytes_are_those_of_the_stack() -> None:
    geometry, stack = speed.Geometry(6, 2, 64, 32), "quest(keep=0.1, dense_layers=0)"
    few, all_ = speed.attention(
        geometry, [stack, "none"], 2000, 1, 4, torch.float32, torch.device("cpu"), layer=3
    )[1:]  # fmt: skip
    assert few.read < 0.2 * all_.read
    assert all_.read == pytest.approx(2000 * 2 * (64 + 32) * 4, rel=0.01)
    assert all_.gbps == pytest.approx(all_.read / all_.ms / 1e6)


@pytest.mark.parametrize("geometry", [speed.Geometry(6, 2, 64, 32), speed.Geometry(6, 1, 96, 64, latent=True)])
def test_bytes_are_those_of_the_plan(geometry: speed.Geometry) -> None:
    """Also where the cache is written piece by piece."""
    stacks = ["none", "int(bits=4)", "int(bits=4) + sketch(keep=0.1)"]
    dense, *found = speed.attention(geometry, stacks, 12_000, 1, 4, torch.float32, torch.device("cpu"), layer=3)
    assert dense.held == dense.read == 12_000 * geometry.channels * 4
    for row in found:
        assert row.read == pytest.approx(row.plan_read, rel=0.01)
        assert row.held == pytest.approx(row.plan_held, rel=0.01)
    assert 2 * found[2].read < found[1].read < 0.3 * found[0].read


@pytest.mark.skipif(cpu.library() is None, reason="the C kernel is not installed")
def test_a_kernel_that_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = cpu.attend
    monkeypatch.setattr(cpu, "attend", lambda *args, **more: right(*args, **more)._replace(out=torch.ones(1, 1, 64)))
    told: list[str] = []
    shape, stacks, cpu_device = speed.Geometry(1, 1, 64, 64), ["kivi(bits=4)"], torch.device("cpu")
    rows = speed.attention(shape, stacks, 500, 1, 4, torch.float32, cpu_device, 0, told.append)
    assert [row.label for row in rows] == [speed.SDPA]  # which is timed all the same
    assert told[-1].startswith("not timed: kivi(bits=4): its kernel is off by")


@pytest.mark.skipif(cpu.library() is None, reason="the C kernel is not installed")
@pytest.mark.parametrize(("dtype", "timed"), [(torch.float32, False), (torch.bfloat16, True)])
def test_rounding_of_16_bits_is_no_error(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, timed: bool) -> None:
    """What products of bfloat16 are off by on a GPU, 2.2e-3 and more, is far above what float32 is."""
    right = cpu.attend

    def rounded(*args: Any, **more: Any) -> Part:
        part = right(*args, **more)
        return part._replace(out=part.out * (1 + 4e-3))

    monkeypatch.setattr(cpu, "attend", rounded)
    shape, stacks = speed.Geometry(1, 1, 64, 64), ["kivi(bits=4)", "none"]
    rows = speed.attention(shape, stacks, 500, 1, 4, dtype, torch.device("cpu"), 0)
    assert (len(rows) == 3) is timed


@pytest.mark.skipif(cpu.library() is None, reason="the C kernel is not installed")
def test_a_kernel_that_fails_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    right, told = cpu.attend, list[str]()

    def failing(queries: Tensor, pages: Any, *args: Any, **more: Any) -> Part:
        if pages is not None and "k.scale" in {field.name for field in pages.layout.fields}:
            raise RuntimeError("out of memory")
        return right(queries, pages, *args, **more)

    monkeypatch.setattr(cpu, "attend", failing)
    shape, stacks, device = speed.Geometry(1, 1, 64, 64), ["kivi(bits=4)", "none"], torch.device("cpu")
    rows = speed.attention(shape, stacks, 500, 1, 4, torch.float32, device, 0, told.append)
    assert [row.label for row in rows] == [speed.SDPA, "none"]
    assert told[-1] == "not timed: kivi(bits=4): it failed: out of memory"


@pytest.mark.skipif(cpu.library() is None, reason="the C kernel is not installed")
def test_the_reference_alone_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    k = torch.randn(1, 2, 300, 64)
    store = LayerStore(Stack.parse("kivi(bits=4)").plan(0, 1))
    store.start(k, k)
    store.write(k, k, None)
    fast = store.attend(k[:, :, :1], 0.125).out
    monkeypatch.setattr(cpu, "attend", None)
    with dispatch.reference_only():
        torch.testing.assert_close(store.attend(k[:, :, :1], 0.125).out, fast, rtol=1e-3, atol=1e-4)
        assert dispatch.explain(store.codec, store.layout, torch.device("cpu")) == "PyTorch: it was asked for"
    assert dispatch.explain(store.codec, store.layout, torch.device("cpu")).startswith("C, ")


def test_what_it_refuses(tiny: Path, tmp_path: Path) -> None:
    refused(run("speed", "--stack", "kivi", "--geometry", "qwen3-8b"), "geometry", "--attention")
    refused(run("speed", "--stack", "kivi", "--attention", "--dtype", "int8"), "dtype", "int8", "bfloat16")
    refused(run("speed", "--stack", "kivii", "--attention", "--context", 64), "kivii", "kivi")
    refused(run("speed", "--model", tiny, "--stack", "kivi", "--context", "10 tokens"), "context", "10 tokens")


def test_doctor() -> None:
    result = run("doctor")
    assert result.exit_code == 0, result.output
    for part in ("torch", "flash-attn", "C kernels", "kivi", "turboquant", "decode attention on cpu"):
        assert part in result.stdout
    kernel = "C, " if cpu.library() is not None else "PyTorch: the C kernel is not installed"
    asked = run("doctor", "--stack", "kivi(bits=2) + quest(pages=4)", "--head-dim", 64)
    assert kernel in asked.stdout
    shared = run("doctor", "--stack", "int(bits=4, per=channel, group=24)")
    assert "PyTorch: scales that 24 tokens share" in shared.stdout
    refused(run("doctor", "--stack", "kivii"), "kivii", "kivi")


def test_doctor_says_what_vllm_serves() -> None:
    told = {
        "int8": "served",
        "snapkv(budget=256) + kivi(bits=2)": "served",
        "h2o(budget=256) + int8": "served, without hits in the prefix cache",
        "adakv + int8": "refused: adakv keeps other numbers of tokens",
        "turboquant(bits=2.5)": "settles on channels by the first text",
        "klt": "served: the first engine calibrates it for the model",
    }
    for stack, words in told.items():
        lines = run("doctor", "--stack", stack).stdout.splitlines()
        cells = [line.split("│")[-2].strip() for line in lines if line.count("│") >= 3]
        assert words in " ".join(" ".join(cells).split())
