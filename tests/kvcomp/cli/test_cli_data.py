"""`kvcomp data check`, and what bench does about data that is missing."""

from __future__ import annotations

from pathlib import Path

import pytest
import texts_folder
from command import refused, run
from typer.testing import Result

from kvcomp.benchmarks.tasks import all_tasks


def line(result: Result, task: str) -> str:
    (found,) = (text for text in result.stdout.splitlines() if text.split()[:1] == [task])
    return found


def test_check_says_what_every_task_has(tmp_path: Path) -> None:
    texts_folder.save(tmp_path / "texts")
    result = run("data", "check", tmp_path)
    assert result.exit_code == 0, result.output
    assert "generated" in line(result, "vt")
    assert "texts/PaulGrahamEssays.json" in line(result, "niah_multivalue")
    assert "words" in line(result, "niah_multivalue")
    assert "60 questions  texts/dev-v2.0.json" in line(result, "qa_1")
    assert "20 questions  texts/hotpot_dev_distractor_v1.json" in line(result, "qa_2")
    assert "missing: " in line(result, "qasper")
    ready = len(all_tasks()) - sum("missing: " in text for text in result.stdout.splitlines())
    assert f"{ready} of {len(all_tasks())} tasks can run with --data {tmp_path}" in result.stdout


def test_check_of_an_empty_folder_says_what_to_fetch(tmp_path: Path) -> None:
    result = run("data", "check", tmp_path)
    assert result.exit_code == 0
    assert "public-domain novel" in line(result, "niah_single_2")
    assert "dev-v2.0.json of SQuAD 2.0" in line(result, "qa_1")
    ready = len(all_tasks()) - sum("missing: " in text for text in result.stdout.splitlines())
    assert 0 < ready < len(all_tasks())
    assert f"{ready} of {len(all_tasks())} tasks" in result.stdout


def test_check_names_a_damaged_file_and_fails(tmp_path: Path) -> None:
    (tmp_path / "dev-v2.0.json").write_text("{")
    result = run("data", "check", tmp_path)
    assert result.exit_code == 1
    assert "dev-v2.0.json" in line(result, "qa_1")
    assert "JSONDecodeError" in result.stdout


@pytest.mark.parametrize("command", [("data", "check"), ("bench", "--stack", "none", "--tasks", "qa_1", "--data")])
def test_no_such_folder(command: tuple[str, ...], tmp_path: Path) -> None:
    result = run(*command, tmp_path / "nowhere")
    assert result.exit_code == 2
    assert "not a folder" in result.stderr


def test_bench_needs_the_data_of_a_task_that_is_named(tmp_path: Path) -> None:
    result = run("bench", "--stack", "none", "--tasks", "qa_2", "--data", tmp_path, "--out", tmp_path / "out")
    refused(result, "error: qa_2: no hotpot_dev_distractor_v1.json in")
    assert not (tmp_path / "out").exists()


def test_bench_names_what_it_leaves_out_of_a_group(tmp_path: Path) -> None:
    result = run("bench", "--stack", "kivvi", "--data", tmp_path, "--out", tmp_path / "out")  # ends at the stack
    left_out = [text for text in result.stderr.splitlines() if text.startswith("left out: ")]
    assert [text.split(":")[1].strip() for text in left_out] == ["qa_1", "qa_2"]
    assert "dev-v2.0.json" in left_out[0]
