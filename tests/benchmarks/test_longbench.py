"""LongBench as tasks: the published prompts, the cut in the middle, both schemas, and a score for every dataset."""

from __future__ import annotations

import hashlib
import json
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_folder
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from kvcomp.benchmarks import data, longbench
from kvcomp.benchmarks.bench import run
from kvcomp.benchmarks.data import DataError, check, load
from kvcomp.benchmarks.longbench import E_TASKS, TASKS, V1_TASKS, cut_middle, items
from kvcomp.benchmarks.longbench.datasets import DATASETS, EVEN, V2
from kvcomp.benchmarks.samples import TaskError
from kvcomp.benchmarks.settings import Settings

CHAT = "{{ bos_token }}{% for turn in messages %}[{{ turn.role }}] {{ turn.content }}{% endfor %} [assistant]"
PLAIN = {"trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"}
CLASSES = ["Date", "Other location"]
ANSWERS = {"trec": "Date", "lsht": "Date", "passage_count": "7", "passage_retrieval_en": "Paragraph 7"}


def bytewise(chat: str | None = None, begin: bool = False) -> Any:
    """A token a byte: what is cut and kept can be read off the text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate([*alphabet, "<s>"])}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    if begin:
        backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", len(alphabet))])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", chat_template=chat)


TOKENIZER = bytewise()


def record(name: str, **changes: Any) -> dict[str, Any]:
    """An item in the authors' schema."""
    classes = CLASSES if name in ("trec", "lsht") else None
    answer = ANSWERS.get(name, "段落7" if name == "passage_retrieval_zh" else "four red cats")
    values = {"input": "What is it?", "context": f"The text of {name}. " * 40, "answers": [answer]}
    return values | {"length": 100, "dataset": name, "language": "en", "all_classes": classes, "_id": "0"} | changes


def record_v2(**changes: Any) -> dict[str, Any]:
    choices = {f"choice_{letter}": f"choice {letter} " for letter in "ABCD"}
    values = {"context": " A long text. ", "question": "Which?", "answer": "B", "difficulty": "easy", "length": "short"}
    return values | choices | changes


def write(file: Path, records: list[dict[str, Any]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(item) + "\n" for item in records), encoding="utf-8")
    return file


def digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def test_prompts_and_new_tokens_are_the_published_ones() -> None:
    # Of the authors' dataset2prompt.json and dataset2maxlen.json, written with sorted keys, and of prompts/0shot.txt.
    assert digest({name: dataset.prompt for name, dataset in DATASETS.items()}) == "bb89f011861ff65f"
    assert digest({name: dataset.max_new_tokens for name, dataset in DATASETS.items()}) == "39a79d9491ead3dc"
    assert hashlib.sha256(V2.prompt.encode()).hexdigest()[:16] == "e6ea2750f5810f87"
    assert {name for name, dataset in DATASETS.items() if not dataset.chat} == PLAIN
    assert (len(DATASETS), len(E_TASKS), len(TASKS)) == (21, 13, 35)


@given(st.text(alphabet="abc xyz", max_size=60), st.integers(1, 70))
def test_a_cut_keeps_both_ends_and_fills_the_budget(prompt: str, budget: int) -> None:
    text = cut_middle(TOKENIZER, prompt, budget)
    if not prompt:
        assert text is None
    elif len(prompt) <= budget:
        assert text == prompt
    else:
        assert text == prompt[: budget // 2] + prompt[len(prompt) - (budget - budget // 2) :]


@given(st.text(alphabet="词语é🙂a", min_size=1, max_size=40), st.integers(24, 120))
def test_a_cut_through_a_character_still_fits(prompt: str, budget: int) -> None:
    text = cut_middle(TOKENIZER, prompt, budget)
    assert text is not None
    assert len(TOKENIZER(text).input_ids) <= budget
    if len(prompt.encode()) <= budget:
        assert text == prompt


def test_tokens_that_the_tokenizer_adds_count() -> None:
    tokenizer = bytewise(begin=True)
    text = cut_middle(tokenizer, "0123456789", 7)
    assert text == "016789"  # the first half holds the beginning's token, as the authors' does
    assert len(tokenizer(text).input_ids) == 7


@pytest.mark.parametrize("begin", [False, True])
def test_a_chat_template_frames_the_cut_prompt(tmp_path: Path, begin: bool) -> None:
    tokenizer = bytewise(CHAT, begin)
    for name in ("qasper", "lcc"):
        write(tmp_path / f"{name}.jsonl", [record(name, context="0123456789 " * 200)])
    context = 1000
    (sample,) = longbench.samples("qasper", tokenizer, context, 5, tmp_path, chat=True)
    ids = tokenizer(sample.prompt).input_ids
    assert context - 128 - 1 <= len(ids) <= context - 128
    assert tokenizer.decode(ids).count("<s>") == 1
    start = "[user] You are given" if begin else "<s>[user] You are given"
    assert sample.prompt.startswith(start)
    assert sample.prompt.endswith("What is it?\n\nAnswer: [assistant]")
    (code,) = longbench.samples("lcc", tokenizer, context, 5, tmp_path, chat=True)
    assert code.prompt.startswith("Please complete the code")
    with pytest.raises(TaskError, match="chat template"):
        longbench.samples("qasper", TOKENIZER, context, 5, tmp_path, chat=True)


def test_a_context_without_room_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "gov_report.jsonl", [record("gov_report")])
    with pytest.raises(TaskError, match="gov_report beside the 512 tokens"):
        longbench.samples("gov_report", TOKENIZER, 512, 1, tmp_path)


@pytest.mark.parametrize("name", V1_TASKS)
def test_every_dataset_writes_prompts_and_scores(tmp_path: Path, name: str) -> None:
    pytest.importorskip("rouge")
    pytest.importorskip("jieba")
    item = record(name)
    write(tmp_path / f"{name}.jsonl", [item, record(name, context="Another text. " * 500)])
    short, long = longbench.samples(name, TOKENIZER, 3000, 5, tmp_path)
    assert short.prompt == DATASETS[name].prompt.format(**item)
    assert len(TOKENIZER(long.prompt).input_ids) == 3000 - long.max_new_tokens
    assert (short.index, long.index, short.references) == (0, 1, tuple(item["answers"]))
    assert longbench.score(name, item["answers"][0], short) == pytest.approx(1)
    assert longbench.score(name, "", short) == 0
    assert 0 <= longbench.score(name, "Date 7 red\nmore 8", short) <= 1
    assert TASKS[name].count(1, tmp_path) == 1
    assert TASKS[name].count(5, tmp_path) == 2


def test_only_the_first_line_counts_where_the_authors_cut(tmp_path: Path) -> None:
    for name in ("triviaqa", "hotpotqa"):
        write(tmp_path / f"{name}.jsonl", [record(name, answers=["no", "red cats"])])
        (sample,) = longbench.samples(name, TOKENIZER, 3000, 1, tmp_path)
        task = TASKS[name]
        assert task.score("\nred cats", sample) == 1  # the best of the references
        few_shot = name == "triviaqa"
        assert (task.score("\nred cats\nand dogs and more", sample) == 1) is few_shot
        assert task.stop("\nred cats\n", sample) is few_shot
        assert not task.stop("\nred cats", sample)


def test_items_that_are_written_out(tmp_path: Path) -> None:
    mini = {"dataset": "trec", "idx": 3, "prompt": "Question: Where?\nType:"}
    write(tmp_path / "mini" / "trec.jsonl", [mini | {"answers": {"all_classes": CLASSES, "answers": ["Date"]}}])
    write(tmp_path / "mini" / "musique.jsonl", [mini | {"answers": ["here", "there"]}])
    (trec,) = longbench.samples("trec", TOKENIZER, 500, 9, tmp_path)
    assert (trec.prompt, trec.references, trec.classes) == (mini["prompt"], ("Date",), tuple(CLASSES))
    (musique,) = longbench.samples("musique", TOKENIZER, 500, 9, tmp_path)
    assert (musique.references, musique.classes, musique.depth) == (("here", "there"), (), None)
    assert musique.origin.startswith("musique.jsonl")


def test_longbench_e_takes_every_length_in_turn(tmp_path: Path) -> None:
    lengths = [3999, 100, 4000, 7999, 8000, 30]
    write(tmp_path / "hotpotqa_e.jsonl", [record("hotpotqa", length=length, input=str(length)) for length in lengths])
    made = longbench.samples("hotpotqa_e", TOKENIZER, 3000, 10, tmp_path)
    tags = [sample.tags for sample in made]
    assert tags == [("0-4k",), ("4-8k",), ("8k+",), ("0-4k",), ("4-8k",), ("0-4k",)]
    asked = [int(sample.prompt.split("Question: ")[1].split("\n")[0]) for sample in made]
    assert asked == [3999, 4000, 8000, 100, 7999, 30]
    assert longbench.samples("hotpotqa_e", TOKENIZER, 3000, 2, tmp_path) == made[:2]
    assert sorted(E_TASKS) == sorted(f"{name}_e" for name in EVEN)


def test_longbench_v2(tmp_path: Path) -> None:
    (tmp_path / "LongBench-v2").mkdir()
    questions = [record_v2(), record_v2(difficulty="hard", length="long", answer="D", context="word " * 4000)]
    (tmp_path / "LongBench-v2" / "data.json").write_text(json.dumps(questions), encoding="utf-8")
    easy, hard = longbench.samples("longbench_v2", TOKENIZER, 2000, 9, tmp_path)
    assert "<text>\nA long text.\n</text>\n\nWhat is the correct answer to this question: Which?" in easy.prompt
    assert "(A) choice A\n(B) choice B\n" in easy.prompt
    assert (easy.tags, hard.tags) == (("easy", "short"), ("hard", "long"))
    assert len(TOKENIZER(hard.prompt).input_ids) == 2000 - 128
    assert longbench.score("longbench_v2", "The correct answer is (B)", easy) == 1
    assert longbench.score("longbench_v2", "The correct answer is (B)", hard) == 0


def test_the_authors_archive_is_read(tmp_path: Path) -> None:
    lines = json.dumps(record("qasper"))
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.writestr("data/qasper.jsonl", lines)
        archive.writestr("data/qasper_e.jsonl", lines)
    assert load(TASKS["qasper"].source, tmp_path)[0].tags == ()
    assert load(TASKS["qasper_e"].source, tmp_path)[0].tags == ("0-4k",)
    with pytest.raises(DataError, match=r"no lcc\.jsonl"):
        load(TASKS["lcc"].source, tmp_path)
    (tmp_path / "data.zip").write_bytes(b"PK")
    with pytest.raises(DataError, match="not a zip file"):
        load(TASKS["qasper"].source, tmp_path)


def test_the_hub_is_asked_once_for_the_archive(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    items._archive.cache_clear()

    asked = []

    def fetch(repository: str, file: str, repo_type: str) -> str:
        asked.append((repository, file, repo_type))
        raise OSError("no network\nand more")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    for name in ("qasper", "lcc"):
        with pytest.raises(DataError, match=f"{name}: THUDM/LongBench could not be loaded from the hub .no network."):
            load(TASKS[name].source, "hub")
    items._archive.cache_clear()
    assert asked == [("THUDM/LongBench", "data.zip", "dataset")]


@pytest.mark.parametrize(
    ("name", "broken", "reason"),
    [
        ("qasper", {"context": None, "answers": None}, "item 2"),
        ("qasper", {"answers": None}, "item 2"),
        ("trec", {"all_classes": None}, "all_classes"),
        ("hotpotqa_e", {"length": None}, "item 2"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, name: str, broken: dict[str, Any], reason: str) -> None:
    kind = name.removesuffix("_e")
    write(tmp_path / f"{name}.jsonl", [record(kind), record(kind, **broken)])
    with pytest.raises(DataError, match=reason) as error:
        load(TASKS[name].source, tmp_path)
    assert f"{name}.jsonl" in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_data_says_what_to_fetch(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^qasper: no qasper\.jsonl in .*huggingface\.co/datasets/THUDM/LongBench"):
        TASKS["qasper"].count(1, tmp_path)
    with pytest.raises(DataError, match=r"^longbench_v2: needs --data"):
        TASKS["longbench_v2"].count(1, None)
    missing = {finding.source.name for finding in check(tmp_path) if finding.file is None}
    assert {f"longbench/{name}" for name in (*V1_TASKS, *E_TASKS, "v2")} <= missing
    with pytest.raises(TaskError, match="no 'qa'"):
        longbench.samples("qa", TOKENIZER, 1000, 1, tmp_path)


def test_the_hub_archive_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.writestr("data/triviaqa.jsonl", json.dumps(record("triviaqa")))
    items._archive.cache_clear()
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: str(tmp_path / "data.zip"))
    (sample,) = longbench.samples("triviaqa", TOKENIZER, 3000, 1, "hub")
    assert sample.prompt.endswith("What is it?")
    items._archive.cache_clear()
    data._download.cache_clear()


def test_bench_runs_it(tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    write(texts / "trec.jsonl", [record("trec"), record("trec")])
    write(texts / "trec_e.jsonl", [record("trec", length=length) for length in (100, 5000)])
    model = str(tiny_folder.save(tmp_path / "model"))
    names = ("longbench", "trec_e")
    settings = Settings(model, names, (300,), 5, ("none",), max_new_tokens=2, data=str(texts))
    assert settings.tasks == ("trec", "trec_e")  # the other datasets of longbench have no data
    for _ in range(2):  # a complete run has nothing left to do, though there are fewer items than were asked for
        (line,) = run(settings, tmp_path / "out", Console(stderr=True), "kvcomp bench").lines
    row = line.row
    assert row.samples == 4
    assert set(row.by_task) == {"trec", "trec_e", "trec_e 0-4k", "trec_e 4-8k"}
    lines = (tmp_path / "out" / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    assert all(220 < json.loads(line)["prompt_tokens"] <= 300 - 64 for line in lines)
    write(texts / "qasper.jsonl", [record("qasper")])
    with pytest.raises(TaskError, match="chat template"):
        run(replace(settings, tasks=("qasper",), chat=True), tmp_path / "chat", Console(stderr=True), "")
