"""Contexts that are compressed before the question is known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import tiny_folder
from command import refused, run

from kvcomp import Stack
from kvcomp.benchmarks.answering import answer, context_tokens
from kvcomp.benchmarks.longbench.datasets import DATASETS
from kvcomp.benchmarks.longbench.items import _item, _item_v2
from kvcomp.benchmarks.longbench.tasks import _asked
from kvcomp.benchmarks.results import Record, RunError
from kvcomp.benchmarks.ruler import TASKS, generate
from kvcomp.benchmarks.samples import TaskError, question_of
from kvcomp.benchmarks.settings import Settings
from kvcomp.integrations.huggingface.models import load_model, load_tokenizer


def untimed(record: Record) -> Record:
    """The record without what varies from run to run."""
    return replace(record, ms_per_token=0.0, prefill_s=0.0, prefill_own_s=None, peak=None)


QUESTIONS = ("\nWhat ", "\nQuestion: ", "\n\nAnswer the question")


@pytest.mark.parametrize("task", sorted(name for name in TASKS if not name.startswith("qa")))
def test_every_question_of_ruler_follows_its_context(task: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_folder.save(tmp_path)))
    (sample,) = generate(task, tokenizer, 8000, samples=1, seed=3)
    assert sample.question is not None
    context, question = sample.prompt[: -sample.question], sample.prompt[-sample.question :]
    assert question.startswith(QUESTIONS)
    assert len(question) < 600
    for reference in sample.references:
        assert reference in context


@pytest.mark.parametrize("name", sorted(DATASETS))
def test_every_question_of_longbench_follows_its_context(name: str) -> None:
    record = {"context": "some text " * 50, "input": "the input", "answers": ["a"], "all_classes": ["a"], "length": 9}
    item = _item(DATASETS[name], False, record)
    assert item.question is not None
    assert item.prompt[: -item.question].endswith("some text ")
    assert "some text" not in item.prompt[-item.question :]
    cut = item.prompt[:40] + item.prompt[-item.question - 20 :] + "<|end of the turn|>"
    asked = _asked(item, cut)
    assert asked is not None
    assert cut[-asked:] == item.prompt[-item.question :] + "<|end of the turn|>"
    assert _asked(item, "cut within the question") is None


def test_items_of_the_second_version_have_questions_and_written_out_ones_have_none() -> None:
    fields = {"context": "text", "question": "which?", "answer": "A", "difficulty": "hard", "length": "long"}
    item = _item_v2(fields | {f"choice_{c}": c for c in "ABCD"})
    assert item.question is not None
    assert "which?" in item.prompt[-item.question :]
    written = {"prompt": "all of it", "answers": ["a"], "length": 3}
    assert _item(next(iter(DATASETS.values())), False, written).question is None


def test_a_template_without_a_context_has_no_question() -> None:
    assert question_of("what is it?", "{context}") is None
    assert question_of("text\nwhat is it?", "{context}\nwhat is {it}?") == len("\nwhat is it?")
    assert question_of("what is it?\nwhat is it?", "{context}\nwhat is {it}?") == len("\nwhat is it?")


@pytest.mark.parametrize("task", ["niah_single_1", "niah_multikey_1"])
def test_answers_of_an_uncompressed_cache_are_the_same(task: str, tmp_path: Path) -> None:
    model, tokenizer = load_model(str(tiny_folder.save(tmp_path)), device="cpu")
    (sample,) = generate(task, tokenizer, 900, samples=1, seed=0)
    stacks = [Stack.parse("none"), Stack.parse("int(bits=8)")]
    whole, first = (list(answer(model, tokenizer, sample, 900, stacks, 8, None, mode)) for mode in (False, True))
    assert untimed(whole[0]) == untimed(first[0])
    assert first[0].prompt_tokens == whole[0].prompt_tokens


def test_policies_do_not_see_the_question(tmp_path: Path) -> None:
    """Whatever is asked, the same tokens of the context stay, and the question stays whole."""
    model, tokenizer = load_model(str(tiny_folder.save(tmp_path)), device="cpu")
    (sample,) = generate("niah_single_1", tokenizer, 900, samples=1, seed=0)
    assert sample.question is not None
    ids = tokenizer(sample.prompt).input_ids
    n = context_tokens(tokenizer, sample, ids)
    other = replace(sample, prompt=sample.prompt[: -sample.question] + sample.prompt[-sample.question :][::-1])
    assert context_tokens(tokenizer, other, tokenizer(other.prompt).input_ids) == n
    stack = [Stack.parse("snapkv(keep=0.25, window=16)")]
    for mode, held in ((True, round(0.25 * n) + len(ids) - n), (False, round(0.25 * (len(ids) - 1)) + 1)):
        (record,) = answer(model, tokenizer, sample, 900, stack, 1, None, mode)
        tokens = record.held / (record.held_dense / len(ids))
        assert tokens == pytest.approx(held, rel=0.25)


def test_what_cannot_be_split_is_refused(tmp_path: Path) -> None:
    folder = str(tiny_folder.save(tmp_path))
    model, tokenizer = load_model(folder, device="cpu")
    (sample,) = generate("niah_single_1", tokenizer, 500, samples=1, seed=0)
    with pytest.raises(TaskError, match="without a question after their context: leave out the task"):
        next(answer(model, tokenizer, replace(sample, question=None), 500, [Stack.parse("none")], 2, None, True))
    with pytest.raises(RunError, match="context-first: --engine vllm"):
        Settings(folder, ("niah_single_1",), (500,), 1, ("none",), engine="vllm", context_first=True)


def test_a_run_knows_whether_it_was_context_first(tmp_path: Path) -> None:
    folder, out = tiny_folder.save(tmp_path / "model"), tmp_path / "out"
    command = ("bench", "--model", str(folder), "--tasks", "niah_single_1", "--context", "500", "--samples", "1")
    command += ("--max-new-tokens", "2", "--stack", "none", "--out", str(out))
    assert run(*command).exit_code == 0
    assert '"context_first"' not in (out / "config.json").read_text()  # as in runs of older versions
    refused(run(*command, "--context-first"), "context_first")
    other = tmp_path / "other"
    assert run(*command[:-1], str(other), "--context-first").exit_code == 0
    assert '"context_first": true' in (other / "config.json").read_text()
