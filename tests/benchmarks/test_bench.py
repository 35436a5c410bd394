"""The paired run answers as the model itself would, and its sums are right."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import run_folder
import tiny_folder
from rich.console import Console

from kvcomp import CompressedCache, Stack
from kvcomp.benchmarks.answering import answer
from kvcomp.benchmarks.bench import run
from kvcomp.benchmarks.decoding import TIMED
from kvcomp.benchmarks.results import Record, Results, RunError, read_run
from kvcomp.benchmarks.ruler import TASKS, generate
from kvcomp.benchmarks.settings import Settings
from kvcomp.benchmarks.summary import summarize
from kvcomp.integrations.huggingface.models import load_model

RECORD = run_folder.record(task="a", context=64, depth=0.5, prompt_tokens=60, prefill_s=0.1, peak=None)
CONFIG = {"settings": {"seed": 0}, "versions": {}, "machine": {}}


def untimed(record: Record) -> Record:
    """The record without what varies from run to run."""
    return replace(record, ms_per_token=0.0, prefill_s=0.0, prefill_own_s=None, peak=None)


def test_none_answers_as_generate_does(tmp_path: Path) -> None:
    model, tokenizer = load_model(str(tiny_folder.save(tmp_path)), device="cpu")
    (sample,) = generate("niah_single_1", tokenizer, 500, samples=1, seed=0)
    (record,) = answer(model, tokenizer, sample, 500, [Stack.parse("none")], max_new_tokens=12)
    inputs = tokenizer(sample.prompt, return_tensors="pt")
    whole = model.generate(**inputs, max_new_tokens=record.new_tokens, do_sample=False)
    new = whole[0, inputs.input_ids.shape[1] :]
    assert record.prediction == tokenizer.decode(new, skip_special_tokens=True)
    assert record.prompt_tokens == inputs.input_ids.shape[1]
    assert record.held >= record.held_dense
    cached = record.prompt_tokens + record.new_tokens - 1  # the last token is never fed back
    assert record.held_dense == 2 * 2 * 2 * cached * 16 * 4  # K and V, layers, heads, tokens, dimension, bytes


def test_stacks_do_not_disturb_each_other(tmp_path: Path) -> None:
    model, tokenizer = load_model(str(tiny_folder.save(tmp_path)), device="cpu")
    (sample,) = generate("niah_multikey_1", tokenizer, 500, samples=1, seed=1)
    specs = ("none", "kivi(bits=2)", "streaming(sinks=2, recent=32, chunk=64)", "snapkv(keep=0.5)", "none")
    stacks = [Stack.parse(spec) for spec in specs]
    together = list(answer(model, tokenizer, sample, 500, stacks, max_new_tokens=40))
    assert {record.new_tokens for record in together} != {TIMED}  # most of them in one batch
    for stack in stacks:
        (alone,) = answer(model, tokenizer, sample, 500, [stack], max_new_tokens=40)
        for record in together:
            if record.hash == stack.hash:
                assert untimed(record) == untimed(alone)
    assert len(together) == len(stacks)


BATCHED = (
    "none",
    "kivi(bits=2)",
    "streaming(sinks=2, recent=32, chunk=64)",
    "snapkv(keep=0.5)",
    "int(bits=4) + quest(pages=2)",
)


@pytest.mark.parametrize(
    ("tasks", "options"),
    [
        (("niah_multikey_1",), {}),
        (("niah_single_1", "niah_multivalue"), {"context_first": True}),
        (("perplexity_text", "fidelity_text"), {}),
    ],
)
def test_samples_of_a_batch_are_answered_as_if_alone(
    tmp_path: Path, tasks: tuple[str, ...], options: dict[str, Any]
) -> None:
    model = str(tiny_folder.save(tmp_path / "model"))
    settings = Settings(model, tasks, (500,), 3, BATCHED, max_new_tokens=24, **options)
    found = {}
    for batch in (1, 3):
        run(settings, tmp_path / str(batch), Console(stderr=True), "", batch=batch)
        found[batch] = {record.key: record for record in read_run(tmp_path / str(batch)).records}
    assert found[1].keys() == found[3].keys()
    for key, record in found[3].items():
        alone = found[1][key]
        same = ("score", "kl", "overlap", "held", "read", "effective_bits", "prediction", "new_tokens", "prompt_tokens")
        for name in same:
            one, other = getattr(record, name), getattr(alone, name)
            assert one == (other if name == "prediction" or other is None else pytest.approx(other, rel=1e-4, abs=1e-5))
    if "niah_multikey_1" in tasks:
        assert len({record.prompt_tokens for record in found[3].values()}) > 1
        assert max(r.new_tokens for r in found[3].values()) > TIMED


def test_a_batch_that_was_interrupted_goes_on_with_another_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = str(tiny_folder.save(tmp_path / "model"))
    settings = Settings(model, ("niah_single_1",), (500,), 5, ("none", "int(bits=4)"), max_new_tokens=20)
    append, left = Results.append, [3]

    def interrupted(self: Results, record: Record) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        append(self, record)

    monkeypatch.setattr(Results, "append", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(settings, tmp_path / "out", Console(stderr=True), "", batch=4)
    monkeypatch.setattr(Results, "append", append)
    assert len(read_run(tmp_path / "out").records) == 3
    run(settings, tmp_path / "out", Console(stderr=True), "", batch=2)
    run(settings, tmp_path / "alone", Console(stderr=True), "")
    alone, out = ({r.key: untimed(r) for r in read_run(tmp_path / name).records} for name in ("alone", "out"))
    assert out == alone


@pytest.mark.parametrize(
    ("options", "how", "told"),
    [
        ({}, {"batch": 0}, "batch: 0 is not between 1 and"),
        ({}, {"batch": 10**6}, "batch: 1000000 is not between 1 and"),
        (
            {},
            {"batch": 2, "workers": 2},
            "batch: with --workers 2, samples are answered one by one: leave out --batch 2",
        ),
        ({"engine": "vllm"}, {"batch": 2}, "batch: with --engine vllm, samples are answered one by one"),
    ],
)
def test_batches_that_cannot_be_are_refused(
    tmp_path: Path, options: dict[str, Any], how: dict[str, int], told: str
) -> None:
    settings = Settings("smollm2-135m", ("vt",), (500,), 1, ("int8",), **options)
    with pytest.raises(RunError) as error:
        run(settings, tmp_path / "out", Console(stderr=True), "", **how)
    assert str(error.value).startswith(told)
    assert not (tmp_path / "out").exists()


def test_a_stack_that_takes_its_prompt_in_chunks_is_prefilled_alone(tmp_path: Path) -> None:
    model, tokenizer = load_model(str(tiny_folder.save(tmp_path)), device="cpu")
    (sample,) = generate("niah_single_1", tokenizer, 500, samples=1, seed=0)
    specs = ("none", "streaming(sinks=2, recent=32)", "streaming(sinks=2, recent=32, chunk=64)")
    stacks = [Stack.parse(spec) for spec in specs]
    none, dense, chunked = answer(model, tokenizer, sample, 500, stacks, max_new_tokens=2)
    assert none.prefill_s == dense.prefill_s > 0 == chunked.prefill_s
    assert all(record.prefill_own_s for record in (none, dense, chunked))
    cache = CompressedCache(stacks[2], model)
    inputs = tokenizer(sample.prompt, return_tensors="pt")
    whole = model.generate(**inputs, past_key_values=cache, max_new_tokens=2, do_sample=False, prefill_chunk_size=64)
    assert chunked.prediction == tokenizer.decode(whole[0, -2:], skip_special_tokens=True)


def test_samples_of_older_versions_are_read(tmp_path: Path) -> None:
    Results(tmp_path, CONFIG).append(RECORD)
    values = json.loads((tmp_path / "samples.jsonl").read_text())
    for name in ("metric", "prefill_own_s", "peak"):
        del values[name]
    (tmp_path / "samples.jsonl").write_text(json.dumps(values) + "\n")
    (row,) = summarize(Results(tmp_path, CONFIG).records)
    assert (row.prefill_s, row.prefill_own_s, row.peak_mib) == (0.1, None, None)


def test_means_count_every_task_of_a_group_the_same() -> None:
    a, b, c = (replace(RECORD, task=task) for task in ("qasper", "trec", "vt"))
    records = [a, replace(a, index=1), replace(b, score=0.0), c, replace(a, stack="small")]
    tagged = [
        replace(RECORD, task=task, tags=[tag], score=score)
        for task, tag, score in (("qasper_e", "0-4k", 1.0), ("trec_e", "0-4k", 0.5), ("trec_e", "8k+", 0.0))
    ]
    row, small = summarize([*records, *tagged])
    assert row.by_group == {
        "mean of 2 longbench tasks": (0.5, 3),
        "mean of 2 longbench_e tasks": (0.625, 3),
        "mean of 2 longbench_e tasks, 0-4k": (0.75, 2),
    }
    assert small.by_group == {}


def test_rows_pair_each_stack_with_none() -> None:
    small = replace(RECORD, stack="small", hash="1", held=2**18, read=2**19)
    records = [
        RECORD,
        replace(RECORD, index=1),
        small,
        replace(small, index=1, score=0.0),
        replace(small, context=128, score=0.0),
    ]
    none, paired, alone = summarize(records)
    assert (none.change, alone.change) == (None, None)
    assert (paired.accuracy, paired.change, paired.held_ratio, paired.read_ratio) == (0.5, -0.5, 4.0, 2.0)
    assert paired.held_mib == 0.25
    assert paired.by_task == {"a": (0.5, 2)}
    assert paired.by_depth == {5: (0.5, 2)}
    assert alone.context == 128


def test_a_damaged_folder_is_refused(tmp_path: Path) -> None:
    results = Results(tmp_path, CONFIG)
    assert list(tmp_path.iterdir()) == []
    for index in range(3):
        results.append(replace(RECORD, index=index))
    assert Results(tmp_path, CONFIG).records == results.records
    lines = (tmp_path / "samples.jsonl").read_text().splitlines()
    (tmp_path / "samples.jsonl").write_text("\n".join([lines[0], "{", lines[2]]) + "\n")
    with pytest.raises(RunError, match="line 2"):
        Results(tmp_path, CONFIG)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(RunError, match="config"):
        Results(tmp_path, CONFIG)


@pytest.mark.parametrize(("tasks", "refused"), [("perplexity", True), ("perplexity_text,vt", False), ("vt", False)])
def test_chat_needs_a_task_that_has_one(tasks: str, refused: bool) -> None:
    def settings() -> Settings:
        return Settings("tiny", tuple(tasks.split(",")), (512,), 1, ("none",), chat=True)

    if refused:
        with pytest.raises(RunError, match=r"^chat: no prompt of perplexity_text, .*: leave out --chat"):
            settings()
    else:
        assert settings().chat


def test_settings_are_canonical(tmp_path: Path) -> None:
    settings = Settings("m", ("ruler", "niah_single_1"), (64, 32, 64), 1, ("none", "kivi( bits = 2 )", "kivi(bits=2)"))
    assert settings.tasks == tuple(task for task in TASKS if not task.startswith("qa"))  # no --data, no questions
    assert settings.contexts == (32, 64)
    assert settings.stacks == ("none", str(Stack.parse("kivi(bits=2)")))
    assert json.loads(json.dumps(asdict(settings)))["seed"] == 0
    with pytest.raises(RunError, match="samples"):
        replace(settings, samples=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="out"):
        run(settings, tmp_path / "file", Console(stderr=True), "kvcomp bench")


def test_no_space_keeps_what_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = Results(tmp_path / "run", CONFIG)
    results.append(RECORD)
    opened = Path.open

    def full(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if mode == "a":
            with opened(self, "a") as file:
                file.write('{"task": "a", "cont')  # as much as there was space for
            raise OSError(errno.ENOSPC, "No space left on device", str(self))
        return opened(self, mode, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        with pytest.raises(RunError, match=r"samples.jsonl.*No space left.*1 finished answers.* kept"):
            results.append(replace(RECORD, index=1))
    with pytest.warns(UserWarning, match="cut short"):
        again = Results(tmp_path / "run", CONFIG)
    again.append(replace(RECORD, index=1))
    assert [record.index for record in Results(tmp_path / "run", CONFIG).records] == [0, 1]


def test_no_space_for_the_first_record_leaves_a_folder_that_can_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, *_: object, **__: object) -> int:
        self.touch()
        raise OSError(errno.ENOSPC, "No space left on device", str(self))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(RunError, match=r"out: .*config.json.*No space left"):
            Results(tmp_path / "run", CONFIG).append(RECORD)
    (tmp_path / "run" / "config.json.part").touch()  # of a process that was killed right there
    Results(tmp_path / "run", CONFIG).append(RECORD)
    assert len(Results(tmp_path / "run", CONFIG).records) == 1


@pytest.mark.parametrize("started", [False, True])
def test_a_folder_that_cannot_be_written_is_refused_before_measuring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, started: bool
) -> None:
    if started:
        Results(tmp_path / "run", CONFIG).append(RECORD)
    monkeypatch.setattr(os, "access", lambda *_: False)  # the superuser may write to read-only folders
    with pytest.raises(RunError, match=r"not writable.*another --out"):
        Results(tmp_path / "run", CONFIG)
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="not a folder"):
        Results(tmp_path / "file" / "run", CONFIG)


def test_a_folder_that_cannot_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Results(tmp_path / "run", CONFIG).append(RECORD)

    def forbidden(self: Path) -> bytes:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_bytes", forbidden)
    with pytest.raises(RunError, match=r"config.json.*Permission denied"):
        Results(tmp_path / "run", CONFIG)
