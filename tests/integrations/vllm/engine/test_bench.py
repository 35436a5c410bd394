"""`kvcomp bench --engine vllm` measures what the Hugging Face harness does."""

from __future__ import annotations

import io
from importlib.util import find_spec
from pathlib import Path

import pytest
from rich.console import Console

from kvcomp.benchmarks import bench
from kvcomp.benchmarks.results import NLL, Record, RunError, read_run
from kvcomp.benchmarks.settings import ENGINES, Settings

STACK = "kivi(bits=4) + window(recent=64)"


def measured(engine: str, out: Path) -> dict[str, Record]:
    settings = Settings(
        "smollm2-135m", ("niah_single_1", "perplexity_text"), (512,), 2, (STACK,), max_new_tokens=12, engine=engine
    )
    bench.run(settings, out, Console(file=io.StringIO()), "test")
    return {f"{record.task} {record.index}": record for record in read_run(out).records}


def test_the_same_answers_and_bytes(tmp_path: Path) -> None:
    ours, theirs = (measured(engine, tmp_path / engine) for engine in ENGINES)
    assert ours.keys() == theirs.keys()
    for key, one in ours.items():
        two = theirs[key]
        assert (one.prediction, one.prompt_tokens, one.new_tokens) == (
            two.prediction,
            two.prompt_tokens,
            two.new_tokens,
        )
        assert two.score == pytest.approx(one.score, abs=0.01 if one.metric == NLL else 0)
        assert two.read == pytest.approx(one.read, rel=0.02)
        assert two.held_dense == one.held_dense
        assert one.read < two.held < 1.5 * one.held  # blocks are whole, and the window is as long as it may become


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RunError, match="engine: 'sglang' is none of huggingface, vllm"):
        measured("sglang", tmp_path)
    monkeypatch.setattr("kvcomp.benchmarks.vllm_engine.find_spec", lambda name: None)
    assert find_spec("vllm")
    with pytest.raises(RunError, match="vllm is not installed: pip install"):
        measured("vllm", tmp_path / "out")
