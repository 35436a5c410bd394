"""Texts scored through the cache: the dense row is the model's own likelihood, and a stack changes it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import run_folder
import tiny_folder
import torch
from rich.console import Console

from kvcomp import Stack
from kvcomp.benchmarks import data, decoding, likelihood
from kvcomp.benchmarks.answering import answer
from kvcomp.benchmarks.bench import run
from kvcomp.benchmarks.perplexity import TASKS
from kvcomp.benchmarks.results import NLL, Record, Run, read_run
from kvcomp.benchmarks.samples import TaskError
from kvcomp.benchmarks.settings import Settings
from kvcomp.benchmarks.tasks import expand
from kvcomp.integrations.huggingface.models import load_model

CONTEXT = 400
TEXT = TASKS["perplexity_text"]
SPECS = ("none", "kivi(bits=2, group=16) + window(recent=16)", "streaming(sinks=4, recent=16)")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder.save(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def loaded(folder: Path) -> tuple[Any, Any]:
    return load_model(str(folder), device="cpu")


def test_none_is_the_likelihood_of_one_forward_pass(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    (sample,) = TEXT.generate(tokenizer, CONTEXT, 1, 0, None)
    (record,) = answer(model, tokenizer, sample, CONTEXT, [Stack.parse("none")], None)
    ids = tokenizer(sample.prompt, return_tensors="pt").input_ids
    with torch.no_grad():
        rows = model(ids).logits[0, :-1].log_softmax(-1)  # [L - 1, V]
    nll = -rows.gather(1, ids[0, 1:, None])[-TEXT.continuation :].mean()
    assert record.score == pytest.approx(float(nll), abs=1e-5)
    assert record.metric == NLL
    assert (record.prompt_tokens, record.new_tokens) == (ids.shape[1] - TEXT.continuation, TEXT.continuation)
    assert record.held_dense == 2 * 2 * 2 * (ids.shape[1] - 1) * 16 * 4  # K and V, layers, heads, tokens, dimension


def untimed(record: Record) -> Record:
    """The record without what varies from run to run."""
    return replace(record, ms_per_token=0.0, prefill_s=0.0, prefill_own_s=None, peak=None)


def test_together_as_alone_and_compressed(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    (sample,) = TEXT.generate(tokenizer, CONTEXT, 1, 0, None)
    stacks = [Stack.parse(spec) for spec in SPECS]
    together = {r.stack: r for r in answer(model, tokenizer, sample, CONTEXT, stacks, max_new_tokens=50)}
    for stack in stacks:
        (alone,) = answer(model, tokenizer, sample, CONTEXT, [stack], max_new_tokens=50)
        record = together[str(stack)]
        assert untimed(replace(record, score=0)) == untimed(replace(alone, score=0))
        assert record.score == pytest.approx(alone.score, abs=1e-5)
        assert record.new_tokens == 50
    assert len({record.score for record in together.values()}) == 3
    quantized, dense = (together[str(stack)] for stack in (stacks[1], stacks[0]))
    assert quantized.held < dense.held


def test_tokens_fed_together_are_scored_as_one_by_one(loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = loaded
    (sample,) = TEXT.generate(tokenizer, CONTEXT, 1, 0, None)
    stacks = [Stack.parse(spec) for spec in SPECS]
    chunked = list(answer(model, tokenizer, sample, CONTEXT, stacks, None))
    monkeypatch.setattr(decoding, "CHUNK", 1)
    for single, record in zip(answer(model, tokenizer, sample, CONTEXT, stacks, None), chunked, strict=True):
        assert untimed(replace(record, score=0)) == untimed(replace(single, score=0))
        assert record.score == pytest.approx(single.score, abs=1e-5 if single.stack == "none" else 1e-3)


def test_windows_fill_the_context_and_do_not_depend_on_their_number(loaded: tuple[Any, Any]) -> None:
    tokenizer = loaded[1]
    few, many = (TEXT.generate(tokenizer, CONTEXT, n, 0, None) for n in (2, 5))
    assert few == many[:2]
    for sample in many:
        tokens = len(tokenizer(sample.prompt).input_ids)
        assert CONTEXT - 20 <= tokens <= CONTEXT  # within a word
    assert len({sample.prompt for sample in many}) == 5
    assert many != TEXT.generate(tokenizer, CONTEXT, 5, 1, None)
    with pytest.raises(TaskError, match="256 tokens that perplexity_text needs"):
        TEXT.generate(tokenizer, 255, 1, 0, None)


def test_local_texts(tmp_path: Path, loaded: tuple[Any, Any]) -> None:
    words = " ".join(f"word{i}" for i in range(3000))
    (tmp_path / "gutenberg").mkdir()
    (tmp_path / "wikitext2").mkdir()
    (tmp_path / "wikitext2" / "test.txt").write_text(" \n = Title = \n \n" + words)
    book = (
        f"Preface.\n*** START OF THIS PROJECT GUTENBERG EBOOK X ***\n{words}\n*** END OF THIS PROJECT GUTENBERG X\nEnd."
    )
    (tmp_path / "gutenberg" / "SOURCE.txt").write_text("not a book")
    (tmp_path / "gutenberg" / "x_17.txt").write_text("\ufeff" + book)
    assert expand(("perplexity",), tmp_path) == tuple(TASKS)
    assert expand(("perplexity",), None) == ("perplexity_text", "perplexity_code")
    assert "standard library of Python 3" in TASKS["perplexity_code"].generate(loaded[1], CONTEXT, 1, 0, None)[0].origin
    assert "".join(data.load(TASKS["perplexity_gutenberg"].source, tmp_path)).strip() == words
    (sample,) = TASKS["perplexity_wikitext2"].generate(loaded[1], CONTEXT, 1, 0, tmp_path)
    assert "test.txt (sha256" in sample.origin
    (tmp_path / "perplexity.txt").write_text("too short " * 10)
    with pytest.raises(TaskError, match=r"more than the .* tokens of the text"):
        TEXT.generate(loaded[1], CONTEXT, 1, 0, tmp_path)


def record(index: int, stack: str, score: float) -> Record:
    return run_folder.record(
        task="perplexity_text", context=64, index=index, stack=stack, hash=stack, score=score, metric=NLL
    )


def test_rows_are_ratios_of_perplexities_on_the_same_texts() -> None:
    scores = {"none": (1.0, 2.0, 4.0), "small": (1.5, 2.5, 4.2)}
    records = [record(i, stack, score) for stack, all_ in scores.items() for i, score in enumerate(all_)]
    none, small = likelihood.summarize([Run(Path("x"), {}, records)])
    assert none.perplexity == pytest.approx(math.exp(7 / 3))
    assert none.ratio is None
    assert small.ratio == pytest.approx(math.exp(0.4))
    assert small.ratio_low is not None
    assert small.ratio_high is not None
    assert math.exp(0.2) <= small.ratio_low < small.ratio < small.ratio_high <= math.exp(0.5)
    (alone,) = likelihood.summarize([Run(Path("x"), {}, [record(0, "small", 1.0)])])
    assert (alone.ratio, alone.ratio_low) == (None, None)


def test_a_run_keeps_perplexity_apart_from_accuracy(folder: Path, tmp_path: Path) -> None:
    """Two kinds of tasks in one run, resumed; and a run of texts alone, which has no accuracies."""
    settings = Settings(
        str(folder), ("perplexity_text", "niah_single_1"), (CONTEXT,), 1, ("none", "kivi(bits=2)"), max_new_tokens=4
    )
    console = Console(stderr=True, quiet=True)
    both = run(settings, tmp_path / "both", console, "kvcomp bench")
    assert [line.row.samples for line in both.lines] == [1, 1]
    assert [set(line.row.by_task) for line in both.lines] == [{"niah_single_1"}] * 2
    assert [row.stack for row in both.texts] == list(settings.stacks)
    records = read_run(tmp_path / "both").records
    assert run(settings, tmp_path / "both", console, "kvcomp bench").texts == both.texts
    assert read_run(tmp_path / "both").records == records
    page = (tmp_path / "both" / "report.html").read_text(encoding="utf-8")
    assert "<h2>Perplexity</h2>" in page
    texts = run(replace(settings, tasks=("perplexity_text",)), tmp_path / "texts", console, "kvcomp bench")
    assert texts.lines == []
    assert {file.name for file in (tmp_path / "texts").iterdir()} == {
        "config.json",
        "config.yaml",
        "samples.jsonl",
        "perplexity.csv",
        "report.html",
    }
