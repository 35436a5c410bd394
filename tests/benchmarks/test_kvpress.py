"""A run in kvpress's format: its scorers, as published, compute from predictions.csv what metrics.json says."""

from __future__ import annotations

import csv
import json
import re
import string
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import replace
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import pytest
import run_folder
import yaml
from typer.testing import CliRunner

from kvcomp.benchmarks.exporting import find_format
from kvcomp.benchmarks.kvpress import export
from kvcomp.benchmarks.results import NLL, Record, Results, Run, RunError
from kvcomp.cli.app import app

RULER = run_folder.record(
    task="niah_multivalue",
    context=4096,
    score=0.5,
    prediction="=1234 and 99",
    references=["1234", "5678"],
    depth=0.5,
    prompt_tokens=4000,
    prefill_s=0.1,
    peak=None,
)
SMALL = {"stack": "snapkv(keep=0.25) + int(bits=4)", "hash": "1", "held": 2**18}
CONFIG: dict[str, Any] = {
    "settings": {"model": "org/model", "seed": 3, "samples": 2, "context_first": True},
    "versions": {"kvcomp": "0"},
    "machine": {"gpu": None},
}
FILES = {"predictions.csv", "metrics.json", "config.yaml"}
PREDICTIONS = ["=1234 and 99", 'nothing, "said"\nin two lines', "12\n34 5678", "ABC, abc", "", "-5678 1234"]


def run_of(*records: Record, **settings: Any) -> Run:
    return Run(Path("out/run"), {**CONFIG, "settings": {**CONFIG["settings"], **settings}}, list(records))


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "predictions.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def published(rows: list[dict[str, str]]) -> dict[str, dict[str, float]]:
    """RULER's metric (arXiv:2404.06654, scripts/eval): string_match_part of qa, string_match_all of others."""
    by_task = defaultdict(list)
    for row in rows:
        by_task[row["task"]].append(
            (re.sub(r"[\x00-\x1f]", "", row["predicted_answer"].strip()).strip(), row["answer"])
        )
    scores = {}
    for task, pairs in by_task.items():
        total = 0.0
        for prediction, answer in pairs:
            found = [1.0 if r.lower() in prediction.lower() else 0.0 for r in json.loads(answer)]
            total += max(found) if task.split("_")[0] == "qa" else sum(found) / len(found)
        scores[task] = {"string_match": round(total / len(pairs) * 100, 2)}
    return scores


def test_rulers_metric_is_that_of_the_published_scorer(tmp_path: Path) -> None:
    records = [
        replace(RULER, task=task, index=index, prediction=prediction, **stack)
        for task in ("niah_multivalue", "qa_1", "vt")
        for index, prediction in enumerate(PREDICTIONS)
        for stack in ({}, SMALL)
    ]
    folders, other = export([run_of(*records)], tmp_path)
    assert other == []
    assert [folder.name for folder in folders] == [
        "ruler__4096__org--model__no_press__0.00",
        "ruler__4096__org--model__snapkv_keep_0.25_int_bits_4__0.75",
    ]
    for folder in folders:
        rows = rows_of(folder)
        assert [row["predicted_answer"] for row in rows] == PREDICTIONS * 3  # as they are
        metrics = json.loads((folder / "metrics.json").read_text())
        assert metrics == published(rows)
        assert metrics["niah_multivalue"] != metrics["qa_1"]
        config = yaml.safe_load((folder / "config.yaml").read_text())
        assert (config["dataset"], config["data_dir"], config["query_aware"]) == ("ruler", "4096", False)
        assert config["compression_ratio"] == (0.75 if "snapkv" in folder.name else 0)
        assert config["kvcomp"]["versions"] == CONFIG["versions"]


def bag_f1(prediction: list[str], reference: list[str]) -> float:
    same = (Counter(prediction) & Counter(reference)).total()
    if not same:
        return 0.0
    precision, recall = same / len(prediction), same / len(reference)
    return 2 * precision * recall / (precision + recall)


def plain_words(text: str) -> list[str]:
    return re.sub(r"\b(a|an|the)\b", " ", re.sub(f"[{re.escape(string.punctuation)}]", "", text.lower())).split()


MARKS = "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣"
MARKS += "､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."


def plain_words_zh(text: str) -> list[str]:
    words = pytest.importorskip("jieba").cut(text, cut_all=False)
    plain = ["".join("".join(c for c in w.lower() if c not in string.punctuation + MARKS).split()) for w in words]
    return [word for word in plain if word]


def rouge(prediction: str, reference: str) -> float:
    try:
        scores = pytest.importorskip("rouge").Rouge().get_scores([prediction], [reference], avg=True)
    except ValueError:
        return 0.0
    return float(scores["rouge-l"]["f"])


def cut(text: str) -> str:
    return " ".join(pytest.importorskip("jieba").cut(text, cut_all=False))


def numbers(prediction: str, wanted: str) -> float:
    found = re.findall(r"\d+", prediction)
    return sum(number == wanted for number in found) / len(found) if found else 0.0


def code(prediction: str, reference: str) -> float:
    lines = (line for line in prediction.lstrip("\n").split("\n") if not set("`#") & set(line) and "//" not in line)
    return round(100 * SequenceMatcher(None, next(lines, ""), reference).ratio()) / 100


def classes_named(prediction: str, reference: str, classes: list[str]) -> float:
    found = [name for name in classes if name in prediction]
    for name in found:  # while it shrinks, as published
        if name in reference and name != reference:
            found.remove(name)
    return 1 / len(found) if reference in found else 0.0


ENGLISH, SUMMARY = ("qasper", "hotpotqa", "triviaqa"), ("gov_report", "samsum")
PUBLISHED: dict[str, Callable[[str, str], float]] = {
    **dict.fromkeys(ENGLISH, lambda p, r: bag_f1(plain_words(p), plain_words(r))),
    "multifieldqa_zh": lambda p, r: bag_f1(plain_words_zh(p), plain_words_zh(r)),
    **dict.fromkeys(SUMMARY, rouge),
    "vcsum": lambda p, r: rouge(cut(p), cut(r)),
    "passage_count": numbers,
    "passage_retrieval_en": lambda p, r: numbers(p, re.findall(r"Paragraph (\d+)", r)[0]),
    "passage_retrieval_zh": lambda p, r: numbers(p, re.findall(r"段落(\d+)", r)[0]),
    "lcc": code,
}
CLASSES = ["NUM", "Number of something", "Definition of something", "Other number"]
REFERENCES = {
    "multifieldqa_zh": ["北京清华大学。"],
    "vcsum": ["我来到北京清华大学"],
    "passage_count": ["12"],
    "passage_retrieval_en": ["Paragraph 12"],
    "passage_retrieval_zh": ["段落12"],
    "lcc": ["    return self.value"],
    "trec": ["Number of something"],
    "lsht": ["Other number"],
}
ANSWERS = (
    "\n\n  The cat, sat.\nAnd a dog ran",
    " 12",
    "Paragraph 12, or 13\nParagraph 12",
    "   # first\n    return self.value\n",
    "    return self.value",
    "Number of something, or Other number",
    " NUM\nNumber of something",
    "我来到北京清华大学，很好",
    "",
    ", ".join(CLASSES),
)


def published_longbench(rows: list[dict[str, str]]) -> float:
    """LongBench's metrics (arXiv:2308.14508, eval.py and metrics.py) of texts without leading white space."""
    task, classes = rows[0]["task"], json.loads(rows[0]["all_classes"])
    total = 0.0
    for row in rows:
        text = row["predicted_answer"].lstrip()
        if task in ("trec", "triviaqa", "samsum", "lsht"):
            text = text.split("\n")[0]
        scored = PUBLISHED.get(task, lambda p, r: classes_named(p, r, classes))
        total += max(scored(text, reference) for reference in json.loads(row["answers"]))
    return round(100 * total / len(rows), 2)


@pytest.mark.parametrize("task", [*PUBLISHED, "trec", "lsht"])
def test_longbenchs_metric_is_that_of_the_published_scorer(tmp_path: Path, task: str) -> None:
    references = REFERENCES.get(task, ["a cat sat", "Dog ran. The cat sat"])
    classes = CLASSES if task in ("trec", "lsht") else None
    records = [
        replace(RULER, task=task, index=i, prediction=prediction, references=references, classes=classes, score=0.0)
        for i, prediction in enumerate(ANSWERS)
    ]
    ((folder,), _) = export([run_of(*records)], tmp_path)
    rows = rows_of(folder)
    assert [row["predicted_answer"] for row in rows] == list(ANSWERS)
    metric = json.loads((folder / "metrics.json").read_text())
    assert metric == published_longbench(rows)
    assert 0 < metric < 100


def test_longbench_has_a_folder_a_task_and_context(tmp_path: Path) -> None:
    said = {"references": ["a b c d e f g"], "prediction": "b"}
    tasks = [replace(RULER, task=task, **said) for task in ("qasper", "hotpotqa")]
    whole = replace(tasks[0], context=8192, prediction=said["references"][0])
    folders, _ = export([run_of(*tasks, whole, context_first=False)], tmp_path)
    assert sorted(folder.name for folder in folders) == [
        "longbench__hotpotqa__org--model__no_press__0.00__max_context4096__query_aware",
        "longbench__qasper__org--model__no_press__0.00__max_context4096__query_aware",
        "longbench__qasper__org--model__no_press__0.00__max_context8192__query_aware",
    ]
    assert sorted(json.loads((folder / "metrics.json").read_text()) for folder in folders) == [28.57, 28.57, 100]
    assert {"task", "answers", "all_classes", "predicted_answer"} <= set(rows_of(folders[0])[0])


def test_what_has_no_place_is_named_and_nothing_else_is_refused(tmp_path: Path) -> None:
    text = replace(RULER, task="perplexity_text", metric=NLL, score=2.0)
    folders, other = export([run_of(RULER, text, replace(RULER, task="trec"))], tmp_path)
    assert (len(folders), set(other)) == (1, {"perplexity_text", "trec"})
    with pytest.raises(RunError, match=r"^export: .*no task that kvpress has a format for \(perplexity_text\)"):
        export([run_of(text)], tmp_path)
    with pytest.raises(RunError, match=r"^export: 'csv' is no format: expected kvpress, mbe"):
        find_format("csv")


def test_equal_names_do_not_share_a_folder(tmp_path: Path) -> None:
    other = replace(RULER, stack="int(bits=4)", hash="1")
    folders, _ = export([run_of(other, replace(other, stack="int[bits=4]", hash="2")), run_of(other)], tmp_path)
    assert len(set(folders)) == 3
    assert export([run_of(other)], tmp_path)[0] == folders[:1]  # made again, in its place


@pytest.mark.parametrize("stack", ["../../etc", "a" * 300, "calibrated(file=/tmp/x.json)", ".."])
def test_names_stay_in_the_folder(tmp_path: Path, stack: str) -> None:
    (folder,), _ = export([run_of(replace(RULER, stack=stack), model="../up/model")], tmp_path / "kvpress")
    assert folder.parent == tmp_path / "kvpress"
    assert len(folder.name) < 255
    assert (folder / "metrics.json").is_file()


def test_the_command_exports_what_it_reports(tmp_path: Path) -> None:
    results = Results(tmp_path / "run", CONFIG)
    for record in (RULER, replace(RULER, **SMALL), replace(RULER, task="trec")):
        results.append(record)
    said = CliRunner().invoke(app, ["report", str(tmp_path / "run"), "--export", "kvpress", "--json"])
    assert said.exit_code == 0, said.output
    found = json.loads(said.stdout)
    assert len(found["exported"]) == 2
    assert all(
        set(map(str, Path(folder).iterdir())) == {f"{folder}/{n}" for n in FILES} for folder in found["exported"]
    )
    assert [note for note in found["notes"] if "trec" in note]
    wrong = CliRunner().invoke(app, ["report", str(tmp_path / "run"), "--export", "csv"])
    assert wrong.exit_code == 2
