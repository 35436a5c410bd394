"""The texts of benchmarks: where they are looked for, what is said where they are not, and which ones were used."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import texts_folder

from kvcomp.benchmarks import data
from kvcomp.benchmarks.data import DataError, Source
from kvcomp.benchmarks.ruler.qa import HOTPOTQA, SQUAD
from kvcomp.benchmarks.ruler.texts import ESSAYS, NOUNS
from kvcomp.benchmarks.tasks import all_tasks, choose, find_task, origins


@pytest.fixture
def source(monkeypatch: pytest.MonkeyPatch) -> Iterator[Source[Any]]:
    monkeypatch.setattr(data, "SOURCES", dict(data.SOURCES))
    yield data.register(
        Source("test/numbers", ("task_a", "task_b"), ("best.json", "other*.json"), data.read_json, "best.json of X")
    )
    data._read.cache_clear()
    data._download.cache_clear()


def test_files_are_found_two_levels_deep_and_the_best_name_wins(source: Source[Any], tmp_path: Path) -> None:
    deep = texts_folder.write(tmp_path / "a" / "b" / "other 1.json", [1])
    assert data.find(source, tmp_path) == deep
    shallow = texts_folder.write(tmp_path / "a" / "other.json", [1, 2])
    assert data.find(source, str(tmp_path)) == shallow
    best = texts_folder.write(tmp_path / "z" / "z" / "best.json", [1, 2, 3])
    assert data.find(source, tmp_path) == best
    texts_folder.write(tmp_path / "1" / "2" / "3" / "best.json", [])
    assert data.load(source, tmp_path) == [1, 2, 3]


def test_a_file_that_changes_is_read_again(source: Source[Any], tmp_path: Path) -> None:
    texts_folder.write(tmp_path / "best.json", [1])
    first = data.load(source, tmp_path), data.origin(source, tmp_path)
    assert data.load(source, tmp_path) is first[0]
    texts_folder.write(tmp_path / "best.json", [1, 2])
    assert data.load(source, tmp_path) == [1, 2]
    assert data.origin(source, tmp_path) != first[1]


def test_origins_are_the_same_wherever_the_file_lies(source: Source[Any], tmp_path: Path) -> None:
    for folder in ("one", "two"):
        texts_folder.write(tmp_path / folder / "best.json", [1])
    one, two = (data.origin(source, tmp_path / folder) for folder in ("one", "two"))
    assert one == two
    assert one.startswith("best.json (sha256 ")


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_a_damaged_file_is_one_line(source: Source[Any], tmp_path: Path, content: str) -> None:
    file = tmp_path / "best.json"
    file.write_text(content)
    with pytest.raises(DataError) as caught:
        data.load(source, tmp_path)
    line = str(caught.value)
    assert line.startswith("task_a, task_b: ")
    assert str(file) in line
    assert "\n" not in line


def test_what_is_missing_says_what_to_fetch(source: Source[Any], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"task_a, task_b: needs --data: a folder with best\.json of X\."):
        data.load(source, None)
    with pytest.raises(DataError, match=r"no best\.json in .*\. Put there best\.json of X\."):
        data.load(source, tmp_path)
    with pytest.raises(DataError, match="not a folder"):
        data.load(source, tmp_path / "nowhere")
    with pytest.raises(DataError, match="not on the hub"):
        data.load(source, "hub")
    with pytest.raises(DataError, match=r"qa_1: .*--data hub to download it"):
        data.load(SQUAD, None)


@pytest.mark.parametrize(
    ("source", "content"),
    [(ESSAYS, {"texts": ""}), (SQUAD, {"data": [{"paragraphs": [{}]}]}), (HOTPOTQA, [{"question": "?"}])],
)
def test_another_schema_is_refused(source: Source[Any], content: Any, tmp_path: Path) -> None:
    texts_folder.write(tmp_path / source.files[0], content)
    with pytest.raises(DataError, match=f"{source.tasks[0]}.*is not"):
        data.load(source, tmp_path)


def test_the_hub_gives_the_same_as_the_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Rows in the hub's schemas, made of the files."""
    texts_folder.save(tmp_path)
    squad = [
        {
            "title": article["title"],
            "context": paragraph["context"],
            "question": qa["question"],
            "answers": {"text": [answer["text"] for answer in qa["answers"]], "answer_start": [0, 0]},
        }
        for article in data.read_json(tmp_path / "dev-v2.0.json")["data"]
        for paragraph in article["paragraphs"]
        for qa in paragraph["qas"]
    ]
    hotpotqa = [
        row
        | {
            "context": dict(zip(("title", "sentences"), zip(*row["context"], strict=True), strict=True)),
            "supporting_facts": dict(
                zip(("title", "sent_id"), zip(*row["supporting_facts"], strict=True), strict=True)
            ),
        }
        for row in data.read_json(tmp_path / "hotpot_dev_distractor_v1.json")
    ]
    essays = {"text": data.read_json(tmp_path / "PaulGrahamEssays.json")["text"].split("\n\n")}
    hub = {
        ("baber/paul_graham_essays", None, "train"): essays,
        ("rajpurkar/squad_v2", None, "validation"): squad,
        ("hotpotqa/hotpot_qa", "distractor", "validation"): hotpotqa,
    }

    def load_dataset(path: str, name: str | None, split: str) -> Any:
        return hub[path, name, split]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    data._download.cache_clear()
    for source in (ESSAYS, SQUAD, HOTPOTQA):
        assert data.load(source, "hub") == data.load(source, tmp_path)
        assert data.origin(source, "hub") == "hub"
    assert data.load(NOUNS, "hub") == data.load(NOUNS, None)  # not on the hub, and not needed from there
    data._download.cache_clear()


def test_a_hub_out_of_reach_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(path: str, *_: Any, **__: Any) -> Any:
        asked.append(path)
        raise ConnectionError("no route\nto host")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    data._download.cache_clear()
    with pytest.raises(DataError) as caught:
        data.load(HOTPOTQA, "hub")
    assert str(caught.value).startswith("qa_2: ")
    assert "no route" in str(caught.value)
    assert "\n" not in str(caught.value)
    chosen, left_out = choose(("ruler",), "hub")  # essays must not be replaced without being asked
    assert chosen == ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "vt", "cwe", "fwe")
    assert len(left_out) == 3
    assert len(asked) == len(set(asked)) == 3  # each once: to wait for a hub takes long
    data._download.cache_clear()


def test_a_group_leaves_out_what_it_has_no_data_for(tmp_path: Path) -> None:
    texts_folder.save(tmp_path)
    (tmp_path / "hotpot_dev_distractor_v1.json").unlink()
    chosen, left_out = choose(("vt", "ruler"), tmp_path)
    assert chosen[0] == "vt"
    assert len(chosen) == len(set(chosen)) == 12
    assert "qa_2" not in chosen
    assert [line.split(":")[0] for line in left_out] == ["qa_2"]
    with pytest.raises(DataError, match="qa_2"):
        choose(("ruler", "qa_2"), tmp_path)
    with pytest.raises(DataError, match="qasper_e"):  # nothing of the group is there
        choose(("longbench_e",), tmp_path)


def test_origins_name_every_text(tmp_path: Path) -> None:
    texts_folder.save(tmp_path)
    found = origins(("niah_single_2", "vt", "qa_1"), tmp_path)
    assert found["ruler/essays"].startswith("PaulGrahamEssays.json (sha256 ")
    assert found["ruler/squad"].startswith("dev-v2.0.json (sha256 ")
    assert found["ruler/nounlist"] == "the wonderwords package"


def test_every_task_says_what_it_reads() -> None:
    for name in all_tasks():
        for source in find_task(name).sources:
            assert name in source.tasks
            assert data.SOURCES[source.name] is source
    for source in data.SOURCES.values():
        for task in source.tasks:
            assert source in find_task(task).sources
