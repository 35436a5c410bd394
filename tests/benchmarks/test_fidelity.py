"""Next-token distributions of compressed caches against the dense ones: the task, its rows, and what reports say."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import run_folder
import tiny_folder
import torch
from rich.console import Console

from kvcomp import Stack
from kvcomp.benchmarks import decoding, divergence
from kvcomp.benchmarks.answering import answer
from kvcomp.benchmarks.bench import run
from kvcomp.benchmarks.fidelity import TASKS
from kvcomp.benchmarks.results import FIDELITY, Record, Run, RunError, read_run
from kvcomp.benchmarks.settings import Settings
from kvcomp.benchmarks.tasks import expand
from kvcomp.benchmarks.terminal import tables
from kvcomp.errors import KvcompError
from kvcomp.integrations.huggingface import CompressedCache, prefill
from kvcomp.integrations.huggingface.models import load_model
from kvcomp.integrations.loading import Loading

CONTEXT = 300
TEXT = TASKS["fidelity_text"]
QUIET = Console(stderr=True, quiet=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder.save(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def loaded(folder: Path) -> tuple[Any, Any]:
    return load_model(str(folder), device="cpu")


def answers(loaded: tuple[Any, Any], specs: list[str], limit: int | None = None) -> dict[str, Record]:
    model, tokenizer = loaded
    (sample,) = TEXT.generate(tokenizer, CONTEXT, 1, 0, None)
    stacks = [Stack.parse(spec) for spec in specs]
    return {record.stack: record for record in answer(model, tokenizer, sample, CONTEXT, stacks, limit)}


def test_figures_are_those_of_the_definitions() -> None:
    p, q = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.25, 0.5, 0.25]])
    reader = decoding.Agreement([1, 2, 3, 4], torch.cat([p, p, torch.tensor([[1.0, 0, 0]])]).log())
    reader.take(q.log() + 3)  # logits are known up to a constant
    reader.take(torch.cat([p, p]).log())
    assert reader.kl == pytest.approx([0.25 * torch.tensor(2.0).log().item(), 0, torch.tensor(2.0).log().item()])
    assert reader.overlap == pytest.approx([0.75, 1, 0.5])
    assert reader.top1 == [0, 1, 1]
    assert reader.score == pytest.approx(0.75)
    assert reader.ahead(5) == []


@pytest.mark.parametrize("spec", ["int(bits=3, basis=hadamard)", "streaming(sinks=4, recent=64)"])
@torch.inference_mode()
def test_predictions_of_a_stack_are_compared_with_one_dense_forward_pass(loaded: tuple[Any, Any], spec: str) -> None:
    model, tokenizer = loaded
    record = answers(loaded, [spec], 20)[spec := str(Stack.parse(spec))]
    (sample,) = TEXT.generate(tokenizer, CONTEXT, 1, 0, None)
    ids = tokenizer(sample.prompt, return_tensors="pt").input_ids
    start = ids.shape[1] - TEXT.continuation
    p = model(ids).logits[0, start - 1 : start + 19].log_softmax(-1)
    cache = CompressedCache(spec, model)
    prefill(model, ids[:, : start - 1], [cache])
    fed = [model(ids[:, i : i + 1], past_key_values=cache).logits[0, 0] for i in range(start - 1, start + 19)]
    q = torch.stack(fed).log_softmax(-1)
    overlap = 1 - (p.exp() - q.exp()).abs().sum(-1) / 2
    torch.testing.assert_close(torch.tensor(record.overlap), overlap, atol=2e-3, rtol=0)
    assert record.score == pytest.approx(float(overlap.mean()), abs=1e-3)
    assert record.top1 == (p.argmax(-1) == q.argmax(-1)).int().tolist()
    torch.testing.assert_close(torch.tensor(record.kl), (p.exp() * (p - q)).sum(-1), atol=2e-3, rtol=1e-2)


def test_none_agrees_and_fewer_bits_are_farther(loaded: tuple[Any, Any]) -> None:
    specs = ["none", "int(bits=8)", "int(bits=4)", "turboquant(bits=1)"]
    found = answers(loaded, specs)
    scores = [found[str(Stack.parse(spec))].score for spec in specs]
    assert scores[0] == pytest.approx(1, abs=1e-5)
    assert scores[0] >= scores[1] > scores[2] > scores[3]
    assert set(found["none"].top1 or ()) == {1}
    assert all(len(record.kl or ()) == TEXT.continuation == record.new_tokens for record in found.values())
    assert {record.metric for record in found.values()} == {FIDELITY}


def test_a_run_with_all_kinds_of_tasks(folder: Path, tmp_path: Path) -> None:
    settings = Settings(
        str(folder),
        ("fidelity", "perplexity_text", "niah_single_1"),
        (400,),
        2,
        ("none", "kivi(bits=2)"),
        max_new_tokens=8,
    )
    assert [task for task in settings.tasks if "fidelity" in task] == ["fidelity_text", "fidelity_code"]
    out = tmp_path / "out"
    found = run(settings, out, QUIET, "kvcomp bench")
    assert [(row.task, row.stack, row.samples, row.tokens) for row in found.fidelity] == [
        (task, stack, n, 8 * n)
        for task, n in (("all texts", 4), ("fidelity_code", 2), ("fidelity_text", 2))
        for stack in settings.stacks
    ]
    dense, small = found.fidelity[:2]
    assert dense.overlap > 0.9999
    assert dense.overlap > small.overlap
    assert small.overlap_low <= small.overlap <= small.overlap_high
    assert small.held_ratio > 1.5
    assert run(settings, out, QUIET, "kvcomp bench").fidelity == found.fidelity
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "<h2>Fidelity</h2>" in page
    assert "1 - TVD, %" in (out / "fidelity_400.svg").read_text(encoding="utf-8")
    with (out / "summary.csv").open(encoding="utf-8") as file:
        (first, second) = csv.DictReader(file)
    assert float(first["overlap"]) == pytest.approx(1, abs=1e-3)
    assert float(second["kl"]) == pytest.approx(small.kl, abs=1e-4)
    with (out / "fidelity.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["stack"] for row in rows] == [*settings.stacks] * 3
    titles = [str(table.title) for table in tables(found)]
    assert any(title.startswith("all texts, 400 tokens, 4 samples") for title in titles)
    only = run(replace(settings, tasks=("fidelity_text",)), tmp_path / "only", QUIET, "kvcomp bench")
    assert only.lines == []
    assert not (tmp_path / "only" / "summary.csv").exists()
    assert [row.task for row in only.fidelity] == ["fidelity_text"] * 2


def test_pooled_rows_are_of_all_texts_or_of_the_only_one() -> None:
    def record(task: str, index: int, stack: str, overlap: list[float]) -> Record:
        return run_folder.record(
            task=task,
            context=64,
            index=index,
            stack=stack,
            hash=stack,
            score=sum(overlap) / len(overlap),
            metric=FIDELITY,
            kl=[0.5] * len(overlap),
            overlap=overlap,
            top1=[1] * len(overlap),
        )

    texts = ("fidelity_text", "fidelity_code")
    records = [record(task, 0, "a", [1.0, 0.5, 0.5, 0.0]) for task in texts] + [record(texts[0], 1, "b", [0.25] * 8)]
    rows = divergence.pooled(divergence.summarize([Run(Path("x"), {}, records)]))
    assert [(row.task, row.stack, row.samples) for row in rows] == [("all texts", "a", 2), ("all texts", "b", 1)]
    assert (rows[0].near, rows[0].far, rows[0].overlap, rows[0].kl) == (1.0, 0.0, 0.5, 0.5)
    assert (rows[0].kl_low, rows[0].kl_high) == (None, None)
    rows = divergence.summarize([Run(Path("x"), {}, records[-1:])])
    assert divergence.pooled(rows) == rows
    with pytest.raises(RunError, match="kl, overlap and top1"):
        replace(records[0], kl=None)
    with pytest.raises(RunError, match="kl, overlap and top1"):
        replace(records[0], top1=[1])
    with pytest.raises(RunError, match=r"overlap\[0\]"):
        replace(records[0], overlap=[1.5, 0, 0, 0])


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(RunError, match=r"tasks: fidelity_code compares whole distributions.*--engine huggingface"):
        Settings("m", ("fidelity_code",), (512,), 1, ("none",), engine="vllm")
    with pytest.raises(KvcompError, match="dtype: 'int8' is none of float32, bfloat16, float16"):
        Loading(dtype="int8")
    with pytest.raises(RunError, match="dtype: with --engine vllm"):
        Settings("m", ("perplexity_code",), (512,), 1, ("none",), engine="vllm", loading=Loading(dtype="bfloat16"))
    assert expand(("fidelity",), None) == ("fidelity_text", "fidelity_code")


def test_half_precision(folder: Path, tmp_path: Path) -> None:
    settings = Settings(str(folder), ("fidelity_text",), (200,), 1, ("none", "int8"), loading=Loading(dtype="bfloat16"))
    run(settings, tmp_path / "out", QUIET, "kvcomp bench")
    records = read_run(tmp_path / "out").records
    assert all(record.held_dense == 2 * 2 * 2 * (record.prompt_tokens + 63) * 16 * 2 for record in records)
    with pytest.raises(RunError, match="dtype: 'bfloat16' there, None now"):
        run(replace(settings, loading=Loading()), tmp_path / "out", QUIET, "kvcomp bench")
