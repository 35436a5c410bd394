"""LongBench's items: the authors' files and MiniLongBench's, from a folder, the authors' `data.zip` or the hub."""

from __future__ import annotations

import itertools
import json
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from kvcomp.benchmarks.data import DataError, Source, hub_rows, read_json, read_jsonl, register
from kvcomp.benchmarks.longbench.datasets import V2, Dataset
from kvcomp.benchmarks.longbench.metrics import classification

REPOSITORY = "THUDM/LongBench"
LENGTHS = {"0-4k": 4000, "4-8k": 8000, "8k+": float("inf")}  # LongBench-E's, by the words of an item


@dataclass(frozen=True)
class Item:
    """One question with its text in place. question: as of `Sample`."""

    prompt: str
    answers: tuple[str, ...]
    classes: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    question: int | None = None


def source(task: str, dataset: Dataset, even: bool) -> Source[list[Item]]:
    """Return the source of a v1 task, `even` for one of LongBench-E, whose items are tagged by their length."""
    read = partial(_read_file, f"{task}.jsonl", partial(_item, dataset, even))
    return register(
        Source(
            name=f"longbench/{task}",
            tasks=(task,),
            files=(f"{task}.jsonl", "LongBench/data.zip", "data.zip"),
            read=read,
            fetch=f"{task}.jsonl of LongBench, or the data.zip that holds it (huggingface.co/datasets/{REPOSITORY})",
            hub=partial(_download, read),
        )
    )


def source_v2() -> Source[list[Item]]:
    """Return the source of LongBench v2, whose items are tagged by difficulty and length."""
    return register(
        Source(
            name="longbench/v2",
            tasks=("longbench_v2",),
            files=("longbench_v2.json", "longbench_v2/data.json", "LongBench-v2/data.json"),
            read=lambda file: _spread(_items(read_json(file), _item_v2)),
            fetch=f"LongBench-v2/data.json, which is data.json of huggingface.co/datasets/{REPOSITORY}-v2",
            hub=lambda: _spread(_items(hub_rows(f"{REPOSITORY}-v2", None, "train"), _item_v2)),
        )
    )


def _read_file(name: str, convert: Callable[[Mapping[str, Any]], Item], file: Path) -> list[Item]:
    if file.suffix != ".zip":
        return _spread(_items(read_jsonl(file), convert))
    try:
        with zipfile.ZipFile(file) as archive:
            members = [member for member in archive.namelist() if member.split("/")[-1] == name]
            if not members:
                raise LookupError(f"it holds no {name}")
            with archive.open(members[0]) as lines:
                return _spread(_items((json.loads(line) for line in lines if line.strip()), convert))
    except zipfile.BadZipFile as error:
        raise ValueError(str(error)) from error


def _download(read: Callable[[Path], list[Item]]) -> list[Item]:
    archive = _archive()
    if isinstance(archive, str):
        raise DataError(f"{REPOSITORY} could not be loaded from the hub ({archive}).")
    return read(archive)


@cache
def _archive() -> Path | str:
    """Return the authors' archive, or why it cannot be had: who reads many datasets waits for the hub once."""
    # The repository holds an archive and a loading script; the datasets package runs no scripts since its version 4.
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(REPOSITORY, "data.zip", repo_type="dataset"))
    except Exception as error:  # the hub's client passes on whatever its back ends raise
        return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _items(records: Iterable[Any], convert: Callable[[Mapping[str, Any]], Item]) -> list[Item]:
    items = []
    for number, record in enumerate(records, start=1):
        try:
            items.append(convert(record))
        except (LookupError, TypeError, AttributeError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"item {number}: {reason}") from error
    return items


def _spread(items: Sequence[Item]) -> list[Item]:
    """Return the items in rounds, one of each group a round, so that the first few are of every length."""
    groups: dict[tuple[str, ...], list[Item]] = {}
    for item in items:
        groups.setdefault(item.tags, []).append(item)
    rounds = itertools.zip_longest(*(groups[tags] for tags in sorted(groups)))
    return [item for items in rounds for item in items if item is not None]


def _item(dataset: Dataset, even: bool, record: Mapping[str, Any]) -> Item:
    answers, classes = record["answers"], record.get("all_classes")
    if isinstance(answers, Mapping):  # MiniLongBench's classifications
        answers, classes = answers["answers"], answers["all_classes"]
    if dataset.metric is classification and not classes:
        raise LookupError("all_classes is empty")
    whole = "prompt" in record and "context" not in record  # MiniLongBench's items are written out
    prompt = record["prompt"] if whole else dataset.prompt.format_map(record)
    tags = (next(tag for tag, end in LENGTHS.items() if record["length"] < end),) if even else ()
    asked = None if whole else _question(dataset.prompt, record)
    return Item(prompt, tuple(map(str, answers)), tuple(classes or ()), tags, asked)


def _question(template: str, record: Mapping[str, Any]) -> int | None:
    return len(template.partition("{context}")[2].format_map(record)) or None


def _item_v2(record: Mapping[str, Any]) -> Item:
    fields = {name: record[name].strip() for name in ("context", "question", *(f"choice_{c}" for c in "ABCD"))}
    tags = record["difficulty"], record["length"]
    return Item(V2.prompt.format_map(fields), (record["answer"],), tags=tags, question=_question(V2.prompt, fields))
