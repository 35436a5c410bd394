"""A run as kvpress's `evaluation/evaluate.py` leaves one, for its leaderboard: a folder for each stack and dataset.

`predictions.csv` has a row per sample with the columns that kvpress's scorers read, `metrics.json` what they compute
from it, and `config.yaml` kvpress's fields, with the stack as `press_name` and, under `kvcomp`, model, data, versions
and machine. Written for kvpress 8bb29b9. Metrics are computed from predictions as its scorers do
(evaluation/benchmarks/{ruler,longbench}/calculate_metrics.py). RULER: string match in percent by task, over predictions
without control characters. LongBench: the mean of the best score over references, in percent, of predictions without
leading white space, which changes lines of code. One difference: `rouge` fails on sentences of about a thousand words
at Python's recursion limit, which kvpress scores 0; here it does not fail.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from kvcomp.benchmarks import longbench, ruler
from kvcomp.benchmarks.longbench.metrics import classification
from kvcomp.benchmarks.merging import in_order
from kvcomp.benchmarks.results import ACCURACY, Record, Run, RunError, write_text
from kvcomp.benchmarks.summary import DENSE
from kvcomp.text import quote

CONTROL = re.compile(r"[\x00-\x1f]")
LONGEST = 80  # characters of a part of a folder's name


def export(runs: Sequence[Run], out: Path) -> tuple[list[Path], list[str]]:
    """Write the folders of runs into `out`; return them, and the tasks that have no place in this format.

    Raises:
        RunError: a run has no task that has one, or `out` cannot be written.
    """
    made: list[Path] = []
    other: dict[str, None] = {}
    for run in runs:
        groups: dict[tuple[str, str, int, str], list[Record]] = {}
        for record in in_order(run):
            place = _dataset(record)
            if place is None:
                other[record.task] = None
            else:
                groups.setdefault((*place, record.context, record.stack), []).append(record)
        if not groups:
            raise RunError(
                f"export: {quote(str(run.folder))} has no task that kvpress has a format for ({', '.join(other)}): "
                "measure tasks of ruler or longbench, or leave out --export."
            )
        _write(run, groups, out, made)
    return made, list(other)


def _write(run: Run, groups: Mapping[tuple[str, str, int, str], list[Record]], out: Path, made: list[Path]) -> None:
    for (dataset, part, context, stack), records in groups.items():
        ratio = max(0.0, 1 - sum(r.held for r in records) / sum(r.held_dense for r in records))
        config = _config(run, dataset, part, context, stack, ratio)
        folder = _folder(out, config, made)
        rows = [_row(record, dataset, ratio) for record in records]
        write_text(folder / "predictions.csv", _csv(rows))
        write_text(folder / "metrics.json", json.dumps(_metrics(dataset, records), indent=4) + "\n")
        write_text(folder / "config.yaml", yaml.safe_dump(config, sort_keys=False, width=200))
        made.append(folder)


def _dataset(record: Record) -> tuple[str, str] | None:
    """kvpress's dataset and data_dir of a sample; None: it has none for the task."""
    if record.metric != ACCURACY:
        return None
    if record.task in ruler.TASKS:
        return "ruler", str(record.context)
    if record.task in longbench.V1_TASKS and (record.classes or not _classifies(record.task)):
        return "longbench", record.task
    return None


def _classifies(task: str) -> bool:
    """Whether a task's scorer reads classes; records of older versions have none."""
    return longbench.V1_TASKS[task].dataset.metric is classification


def _row(record: Record, dataset: str, ratio: float) -> dict[str, Any]:
    """The columns of kvpress that are known of a sample; lists as JSON."""
    references = json.dumps(record.references, ensure_ascii=False)
    if dataset == "ruler":
        answers: dict[str, Any] = {"answer": references}
    else:
        answers = {"answers": references, "all_classes": json.dumps(record.classes or [], ensure_ascii=False)}
    return {
        "task": record.task,
        **answers,
        "index": record.index,
        "predicted_answer": record.prediction,
        "compression_ratio": ratio,
    }


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Texts as they are, also those that a spreadsheet would take for a formula: a scorer reads them."""
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def _metrics(dataset: str, records: Sequence[Record]) -> Any:
    if dataset == "longbench":
        return _percent([_longbench(record) for record in records])
    by_task: dict[str, list[float]] = {}
    for record in sorted(records, key=lambda record: record.task):
        by_task.setdefault(record.task, []).append(_string_match(record))
    return {task: {"string_match": _percent(found)} for task, found in by_task.items()}


def _percent(scores: Sequence[float]) -> float:
    return round(100 * (sum(scores) / len(scores)), 2)


def _string_match(record: Record) -> float:
    """The share of references in the prediction; of questions, whether there is any."""
    text = CONTROL.sub("", record.prediction.strip()).strip().lower()
    found = [float(reference.lower() in text) for reference in record.references]
    return max(found) if record.task.startswith("qa_") else sum(found) / len(found)


def _longbench(record: Record) -> float:
    """The best score over references."""
    dataset = longbench.V1_TASKS[record.task].dataset
    text = record.prediction.lstrip()
    read = text.split("\n")[0] if dataset.first_line else text
    return max((dataset.metric(read, reference, record.classes or ()) for reference in record.references), default=0.0)


def _config(run: Run, dataset: str, part: str, context: int, stack: str, ratio: float) -> dict[str, Any]:
    """The fields of kvpress's `EvaluationConfig`, and what kvcomp knows beside them."""
    settings = run.config["settings"]
    return {
        "dataset": dataset,
        "data_dir": part,
        "model": settings.get("model", "?"),
        "device": run.config["machine"].get("gpu") or "cpu",
        "press_name": "no_press" if stack == DENSE else stack,
        "compression_ratio": round(ratio, 4),
        "key_channel_compression_ratio": None,
        "fraction": 1.0,
        "max_new_tokens": settings.get("max_new_tokens"),
        "max_context_length": None if dataset == "ruler" else context,
        "query_aware": not settings.get("context_first", False),
        "needle_depth": None,
        "compression_interval": None,
        "target_size": None,
        "hidden_states_buffer_size": None,
        "output_dir": "./results",
        "log_level": "INFO",
        "model_kwargs": {"dtype": settings.get("dtype") or "auto"},
        "press_init_command": stack,
        "seed": settings.get("seed"),
        "fp8": False,
        "kvcomp": {
            "stack": stack,
            "samples": settings.get("samples"),
            "model": dict(run.config.get("model", {})),
            "data": run.config.get("data", {}),
            "versions": run.config["versions"],
            "machine": run.config["machine"],
        },
    }


def _folder(out: Path, config: Mapping[str, Any], taken: Sequence[Path]) -> Path:
    """The folder that kvpress would name: its parts joined by "__", numbered where two are the same."""
    parts = [config["dataset"], config["data_dir"], config["model"], config["press_name"]]
    names = [re.sub(r"[^A-Za-z0-9.-]+", "_", str(part).replace("/", "--"))[:LONGEST].strip("_.") for part in parts]
    names.append(f"{config['compression_ratio']:.2f}")
    if config["max_context_length"] is not None:
        names.append(f"max_context{config['max_context_length']}")
    if config["query_aware"]:
        names.append("query_aware")
    name, number = "__".join(names), 0
    while (folder := out / (f"{name}__{number}" if number else name)) in taken:
        number += 1
    return folder
