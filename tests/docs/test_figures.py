"""Files of options in benchmarks/figures: each is that of the CSV beside it, and a document says how to run it."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import documents
import pytest
import texts_folder
import yaml
from typer.main import get_command

from kvcomp import Stack
from kvcomp.benchmarks.settings import Settings, as_options
from kvcomp.cli.app import app
from kvcomp.cli.config_file import options_of

FIGURES = Path(__file__).parents[2] / "benchmarks" / "figures"
FILES = sorted(FIGURES.glob("*.yaml"))


def settings_of(options: dict[str, Any], data: Path) -> Settings:
    whole = (tuple(options["tasks"].split(",")), tuple(options["context"]), options["samples"])
    rest = {"seed": options["seed"], "max_new_tokens": options.get("max-new-tokens")}
    return Settings(options["model"], *whole, tuple(options["stack"]), data=str(data), **rest)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_options_are_those_of_the_csv(file: Path, tmp_path: Path) -> None:
    options = yaml.safe_load(file.read_text(encoding="utf-8"))
    assert options_of(file, get_command(app).commands["bench"])  # type: ignore[attr-defined]
    settings = settings_of(options, texts_folder.save(tmp_path))
    assert {name: value for name, value in as_options(settings).items() if name != "data"} == options
    with file.with_suffix(".csv").open(encoding="utf-8", newline="") as table:
        rows = list(csv.DictReader(table))
    assert [Stack.parse(row["stack"]) for row in rows] == [Stack.parse(stack) for stack in settings.stacks]
    assert {int(row["context"]) for row in rows} == set(settings.contexts)
    assert {int(row["samples"]) for row in rows} == {settings.samples * len(settings.tasks)}
    assert all(task in rows[0] or task == rows[0].get("task") for task in settings.tasks)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_document_runs_it(file: Path) -> None:
    command = f"kvcomp bench --config benchmarks/figures/{file.name} "
    assert command in documents.read(documents.DOCS / "results.md")


def test_there_are_files() -> None:
    assert len(FILES) >= 2
