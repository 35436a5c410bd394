"""`--config`: options from a YAML file, the same in every command that has many."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import tiny_folder
import yaml
from command import refused, run
from typer.main import get_command

from kvcomp.cli.app import app
from kvcomp.cli.config_file import options_of
from kvcomp.errors import KvcompError

COMMANDS = ("ask", "bench", "calibrate", "generate", "speed", "tune")


def written(folder: Path, text: str) -> Path:
    file = folder / "options.yaml"
    file.write_text(text, encoding="utf-8")
    return file


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_can_stand_in_a_file(name: str, tmp_path: Path) -> None:
    command = get_command(app).commands[name]  # type: ignore[attr-defined]
    options = [p for p in command.params if p.param_type_name == "option" and p.name not in ("config", "help")]
    values = {p.opts[0].lstrip("-"): True if p.is_flag else ["1"] if p.multiple else "1" for p in options}
    found = options_of(written(tmp_path, yaml.safe_dump(values)), command)
    assert found == {p.name: values[p.opts[0].lstrip("-")] for p in options}
    assert "--config" in run(name, "--help").output


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("stacks: [none]", ["'stacks'", "no option of bench", "did you mean 'stack'"]),
        ("zzz: 1", ["'zzz'", "no option of bench"]),
        ("samples: [1, 2]", ["samples", "takes one value"]),
        ("samples: {a: 1}", ["samples", "expected text or a number"]),
        ("stack: [none, [int8]]", ["stack", "a list of these"]),
        ("stack: none\nstacK: none", ["'stacK'"]),
        ("prefill-chunk: 4\nprefill_chunk: 5", ["twice"]),
        ("chat: 3", ["chat", "true or false"]),
        ("samples: true", ["samples", "True"]),
        ("samples: many\nstack: none", ["--samples", "integer"]),
        ("samples: 0\nstack: none", ["--samples"]),
        ("- none", ["no options"]),
        ("", ["no options"]),
        ("stack: [none", ["no YAML, line"]),
        ("a: !!python/object/apply:os.system [true]", ["no YAML, line 1"]),
        ("config: other.yaml", ["'config'", "no option"]),
        ("[" * 5000, ["no YAML"]),
    ],
)
def test_files_that_say_something_else_are_refused(text: str, named: list[str], tmp_path: Path) -> None:
    refused(run("bench", "--config", written(tmp_path, text)), *named)


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    refused(run("bench", "--config", tmp_path / "none.yaml"), "none.yaml", "No such file")
    refused(run("bench", "--config", tmp_path), "cannot be read")
    (tmp_path / "bytes.yaml").write_bytes(b"stack: \xff\xfe")
    refused(run("bench", "--config", tmp_path / "bytes.yaml"), "no UTF-8")
    (tmp_path / "large.yaml").write_bytes(b"#" * (2 << 20))
    with pytest.raises(KvcompError, match="more than 1048576 bytes"):
        options_of(tmp_path / "large.yaml", get_command(app).commands["bench"])  # type: ignore[attr-defined]


def test_a_run_is_repeated_by_the_file_that_it_leaves(tmp_path: Path) -> None:
    model, first, again = tiny_folder.save(tmp_path / "model"), tmp_path / "first", tmp_path / "again"
    options = {
        "model": str(model),
        "tasks": "niah_single_1",
        "context": [400, 450],
        "samples": 1,
        "max-new-tokens": 3,
        "seed": 4,
        "stack": ["none", "int(bits=8) + quest(keep=0.5)"],
    }
    result = run("bench", "--config", written(tmp_path, yaml.safe_dump(options)), "--samples", "2", "--out", first)
    assert result.exit_code == 0, result.output
    left = yaml.safe_load((first / "config.yaml").read_text())
    assert left == options | {"samples": 2}
    assert run("bench", "--config", first / "config.yaml", "--out", again).exit_code == 0
    rows = [[line.split(",")[:6] for line in (out / "summary.csv").read_text().splitlines()] for out in (first, again)]
    assert rows[0] == rows[1]
    assert (again / "config.yaml").read_text() == (first / "config.yaml").read_text()


def test_divergences_are_repeated_to_the_digit(tmp_path: Path) -> None:
    model, first, again = tiny_folder.save(tmp_path / "model"), tmp_path / "first", tmp_path / "again"
    options = {"model": str(model), "tasks": "fidelity_text,fidelity_code", "context": [300], "samples": 2}
    options["stack"] = [
        "none",
        "kivi(bits=2) + window(recent=16)",
        "snapkv(keep=0.5) + int(bits=4)",
        "int8 + quest(pages=2)",
    ]
    assert run("bench", "--config", written(tmp_path, yaml.safe_dump(options)), "--out", first).exit_code == 0
    assert run("bench", "--config", first / "config.yaml", "--out", again).exit_code == 0
    settings = [json.loads((out / "config.json").read_text())["settings"] for out in (first, again)]
    assert settings[0] == settings[1]
    figures = []
    for out in (first, again):
        with (out / "fidelity.csv").open(encoding="utf-8", newline="") as table:
            rows = list(csv.DictReader(table))
        times = ("ms_per_token", "prefill_s", "prefill_own_s", "peak_mib")
        figures.append([{name: value for name, value in row.items() if name not in times} for row in rows])
    assert figures[0] == figures[1]
    assert len(figures[0]) == 3 * 4  # both texts, and together
    assert len({row["kl"] for row in figures[0]}) > 6
