"""`kvcomp ask`: a text, questions, and the file of its cache."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_folder
from command import refused, run


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder.save(tmp_path_factory.mktemp("model"))


def test_questions_saved_and_asked_again(model: Path, tmp_path: Path) -> None:
    text, file = tmp_path / "text.txt", tmp_path / "text.kv"
    text.write_text("The grass is green. The sky is blue. " * 12, encoding="utf-8")
    asked = ["--question", "The sky is", "--question", "Grass?", "--model", model, "--max-new-tokens", "3"]
    shown = run("ask", text, *asked)
    assert shown.exit_code == 0, shown.output
    assert all(part in shown.stdout for part in ("The sky is", "Grass?", "kivi(bits=4): ", "tokens of context in"))
    first = run("ask", text, *asked, "--stack", "kivi(bits=4) + window(recent=16)", "--save", file, "--json")
    document = json.loads(first.stdout)
    assert [answer["question"] for answer in document["answers"]] == ["The sky is", "Grass?"]
    assert document["held_ratio"] == pytest.approx(document["held_dense"] / document["held"])
    again = json.loads(run("ask", text, *asked, "--load", file, "--json").stdout)
    assert again["answers"] == document["answers"]
    assert again["hash"] == document["hash"]
    refused(run("ask", text, *asked, "--save", file), "save:", "exists")
    refused(run("ask", text, *asked, "--load", file, "--stack", "none"), "stack, load:")
    (tmp_path / "other.txt").write_text("The grass is green.", encoding="utf-8")
    refused(run("ask", tmp_path / "other.txt", *asked, "--load", file), "the cache holds")


def test_texts_that_cannot_be_asked(model: Path, tmp_path: Path) -> None:
    asked = ["--question", "What?", "--model", model]
    refused(run("ask", tmp_path / "none.txt", *asked), "context:", "none.txt", "No such file")
    (tmp_path / "bytes").write_bytes(b"\xff\xff")
    refused(run("ask", tmp_path / "bytes", *asked), "context:", "is not UTF-8")
    (tmp_path / "empty").write_text(" \n")
    refused(run("ask", tmp_path / "empty", *asked), "expected a text that is not empty")
    (tmp_path / "long").write_text("The grass is green. " * 500)
    refused(run("ask", tmp_path / "long", *asked), "context:", "are more than the 1024", "Shorten the text")
