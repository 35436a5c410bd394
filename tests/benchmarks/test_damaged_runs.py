"""Result files that are damaged, foreign or hostile: one line that says what and where, and nothing lost or escaped."""

from __future__ import annotations

import csv
import importlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import run_folder
import synthetic
import tiny_folder
import torch
import typer
from command import refused, run
from hypothesis import given, settings
from hypothesis import strategies as st
from run_folder import MISSING, edit_config, edit_record, save
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

from kvcomp import KvcompError, KvcompWarning, console
from kvcomp.benchmarks.report import publish
from kvcomp.benchmarks.results import Results, RunError, read_run
from kvcomp.benchmarks.schema import SchemaError, parse_json
from kvcomp.benchmarks.settings import Settings
from kvcomp.benchmarks.tabular import csv_text
from kvcomp.integrations.huggingface.models import on_disk

DEEP = "[" * 5000 + "]" * 5000
RECORDS = [
    *(("score", value) for value in ("x", None, float("nan"), 1e308, -1, 1.5, True, [1], 10**400)),
    *(("task", value) for value in (["a"], "", "a\x1b[2Jb", None, 3, {})),
    *(("context", value) for value in ("512", "../../../..ESCAPED", 0, -1, 512.0, 10**30, None, True)),
    *(("index", value) for value in (-1, "0", None, 1.5)),
    *(("stack", value) for value in ("", None, 7, "a\nb")),
    *(("hash", value) for value in (None, "", ["x"])),
    *(("held", value) for value in ("a", 0, -5, None, 2.5, 10**400)),
    *(("read", value) for value in ("a", 0, None)),
    *(("tags", value) for value in (None, "a", [1], [None], {"a": 1}, [""])),
    *(("references", value) for value in (None, "x", [1])),
    *(("peak", value) for value in ("x", -1, 1.5)),
    *(("ms_per_token", value) for value in (None, "x", -1, float("inf"), float("nan"))),
    *(("prefill_own_s", value) for value in ("x", float("nan"))),
    *(("depth", value) for value in ("x", 2, -0.1, float("nan"))),
    *(("metric", value) for value in ("perplexity", None, 3)),
    *(("prediction", value) for value in (None, 3, "\ud800")),
    *(("effective_bits", value) for value in (None, float("inf"))),
    ("depth", MISSING),
    ("score", MISSING),
    ("something", 1),
]
CONFIGS = [
    ("", {"machine": MISSING}),
    ("", {"versions": MISSING}),
    ("", {"settings": MISSING}),
    ("", {"settings": 3}),
    ("", {"machine": None}),
    ("", {"versions": ["a"]}),
    ("", {"data": "x"}),
    ("", {"data": {"x": [1]}}),
    ("", {"command": 3}),
    ("", {"model": "x"}),
    ("", {"model": {"name": "x"}}),
    ("", {"left_out": [{"task": "x"}]}),
    ("", {"left_out": "x"}),
    ("settings", {"samples": "x"}),
    ("settings", {"samples": 10**400}),
    ("settings", {"seed": 1.5}),
    ("settings", {"seed": float("nan")}),
    ("settings", {"tasks": "niah"}),
    ("settings", {"tasks": [["x"]]}),
    ("settings", {"model": None}),
    ("settings", {"model": ["x"]}),
    ("settings", {"model": "\ud800"}),
    ("settings", {"chat": "yes"}),
    ("settings", {"later": {"nested": 1}}),
    ("settings", {"later": float("nan")}),
    ("versions", {"kvcomp": None}),
    ("machine", {"cores": "two"}),
    ("machine", {"cpu": ["x"]}),
]


def texts(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in ("config.json", "samples.jsonl")]


def refused_without_loss(folder: Path, out: Path, *parts: str) -> None:
    """The run is refused in one line, and its files stay as they are."""
    before = texts(folder)
    with pytest.raises(KvcompError) as error:
        publish([read_run(folder)], out)
    message = str(error.value)
    assert "\n" not in message
    assert message.isprintable()
    assert len(message) < 900
    for part in parts:
        assert part in message
    assert texts(folder) == before
    assert not out.exists()


@pytest.mark.parametrize(("field", "value"), RECORDS, ids=range(len(RECORDS)))
def test_a_damaged_record_is_named(tmp_path: Path, field: str, value: Any) -> None:
    folder = save(tmp_path / "run")
    edit_record(folder, 2, **{field: value})
    refused_without_loss(folder, tmp_path / "out", "line 2", "samples.jsonl", field)
    config = json.loads((folder / "config.json").read_text())
    before = texts(folder)
    with pytest.raises(RunError, match="line 2"):
        Results(folder, config)
    assert texts(folder) == before


@pytest.mark.parametrize(("part", "values"), CONFIGS, ids=range(len(CONFIGS)))
def test_a_damaged_configuration_is_named(tmp_path: Path, part: str, values: dict[str, Any]) -> None:
    folder = save(tmp_path / "run")
    edit_config(folder, part, **values)
    refused_without_loss(folder, tmp_path / "out", "config.json", next(iter(values)), "--out")


@pytest.mark.parametrize(
    "line",
    [
        b"{",
        b"null",
        b"[]",
        b"3",
        b'"x"',
        b"\xff\xfe{}",
        b"{}",
        DEEP.encode(),
        b'{"task": ' + DEEP.encode() + b"}",
        b"9" * 5000,
        b'{"score": 1, "score": 0}',
        b"{'task': 1}",
        b"\0\0\0",
    ],
    ids=range(13),
)
@pytest.mark.parametrize("number", [1, 3, 6])
def test_a_line_that_is_no_record_is_named(tmp_path: Path, line: bytes, number: int) -> None:
    folder = save(tmp_path / "run")
    lines = (folder / "samples.jsonl").read_bytes().splitlines()
    lines[number - 1] = line
    (folder / "samples.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    refused_without_loss(folder, tmp_path / "out", f"line {number}", "damaged", "remove that line")


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", DEEP.encode(), b"\xff\xfe", b"9" * 5000], ids=range(7))
def test_a_configuration_that_is_none_is_refused(tmp_path: Path, text: bytes) -> None:
    folder = save(tmp_path / "run")
    (folder / "config.json").write_bytes(text)
    refused_without_loss(folder, tmp_path / "out", "config.json")


@pytest.mark.parametrize("name", ["config.json", "samples.jsonl"])
def test_what_editors_add_changes_nothing(tmp_path: Path, name: str) -> None:
    folder = save(tmp_path / "run")
    want = publish([read_run(folder)], tmp_path / "plain").lines
    text = (folder / name).read_bytes()
    (folder / name).write_bytes(b"\xef\xbb\xbf" + text.replace(b"\n", b"\r\n") + b"\r\n\r\n")
    assert publish([read_run(folder)], tmp_path / "out").lines == want


@given(st.binary(max_size=80) | st.text(max_size=60).map(str.encode))
@settings(deadline=None, max_examples=150)
def test_any_bytes_are_json_or_a_schema_error(text: bytes) -> None:
    try:
        parse_json(text)
    except SchemaError as error:
        assert len(str(error)) < 300  # noqa: PT017


def test_answers_that_are_there_twice_count_once(tmp_path: Path) -> None:
    folder = save(tmp_path / "run")
    file = folder / "samples.jsonl"
    want = publish([read_run(folder)], tmp_path / "plain").lines
    file.write_bytes(file.read_bytes() * 3)
    with pytest.warns(KvcompWarning, match="12 lines repeat answers"):
        found = read_run(folder)
    assert publish([found], tmp_path / "out").lines == want
    config = json.loads((folder / "config.json").read_text())
    with pytest.warns(KvcompWarning, match="12 lines repeat answers"):
        assert len(Results(folder, config).records) == 6
    copy = shutil.copytree(folder, tmp_path / "copy")
    result = run("report", folder, copy, "--out", tmp_path / "both")
    assert result.exit_code == 0, result.output
    with (tmp_path / "both" / "summary.csv").open() as stream:
        assert {row["samples"] for row in csv.DictReader(stream)} == {"3"}


@pytest.mark.parametrize(("field", "value"), [("score", 0.5), ("prediction", "y")])
def test_answers_that_contradict_each_other_are_refused(tmp_path: Path, field: str, value: Any) -> None:
    folder = save(tmp_path / "run")
    file = folder / "samples.jsonl"
    file.write_bytes(file.read_bytes() * 2)
    edit_record(folder, 8, **{field: value})
    refused_without_loss(folder, tmp_path / "out", "line 8", "line 2", "differently")


def test_a_stack_of_two_hashes_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path / "run")
    edit_record(folder, 5, hash="other")
    refused_without_loss(folder, tmp_path / "out", "line 5", "kivi(bits=2)", "calibration file")


# -- names and texts of files ----------------------------------------------------------------------------------------

NASTY = [
    "[bold]x[/nope]",
    "=1+1",
    "+1",
    "@x",
    "-x",
    "<script>alert(1)</script>",
    "{{ 7 * 7 }}",
    "a|b\u202e",
    ":smile:",
    "../../x",
]


def everything(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("text", NASTY, ids=range(len(NASTY)))
def test_a_foreign_run_writes_only_inside_out_and_is_shown_as_it_is(tmp_path: Path, text: str) -> None:
    folder = save(tmp_path / "run", model=text, tasks=[text])
    for line in range(1, 7):
        edit_record(folder, line, task=text, origin=text, prediction=text, tags=[text])
    for line in range(4, 7):
        edit_record(folder, line, stack=text)
    edit_config(folder, command=text, versions={text: text}, data={text: text})
    edit_config(folder, "machine", cpu=text)
    other = save(tmp_path / "other")
    before = everything(tmp_path)
    result = run("report", folder, other, "--out", tmp_path / "out" / "deep")
    assert result.exit_code == 0, result.output
    assert "Traceback" not in result.output
    assert {path.parent for path in everything(tmp_path) - before} == {tmp_path / "out" / "deep"}
    page = (tmp_path / "out" / "deep" / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "49" not in page or "{{" not in text
    if "[" in text or ":" in text:
        assert text in result.stdout
    with (tmp_path / "out" / "deep" / "summary.csv").open(encoding="utf-8", newline="") as stream:
        cells = [cell for row in csv.reader(stream) for cell in row]
    assert any(text in cell for cell in cells)
    assert not [cell for cell in cells if cell.startswith(("=", "+", "@", "-x"))]


def test_links_in_a_foreign_run_are_not_followed(tmp_path: Path) -> None:
    folder, precious = save(tmp_path / "run"), tmp_path / "precious"
    precious.write_text("mine")
    for name in ("report.html", "summary.csv", "held_512.svg"):
        (folder / name).symlink_to(precious)
    assert run("report", folder).exit_code == 0
    assert precious.read_text() == "mine"
    assert not (folder / "report.html").is_symlink()


def test_numbers_of_a_csv_stay_numbers() -> None:
    text = csv_text([("a", "=b"), (-0.5, 3), (None, "-2 tokens"), ("x", -7)])
    assert text.splitlines() == ["a,'=b", "-0.5000,3", ",'-2 tokens", "x,-7"]


def test_a_record_is_checked_when_it_is_made() -> None:
    with pytest.raises(RunError, match=r"score is nan, expected a number from 0 to 1"):
        run_folder.record(score=float("nan"))
    with pytest.raises(RunError, match=r"score is 701"):
        run_folder.record(score=701, metric="nll")
    assert replace(run_folder.record(), score=1).score == 1.0


# -- the model of a run -----------------------------------------------------------------------------------------------


@pytest.fixture
def started(tmp_path: Path) -> tuple[Path, Callable[[], Any]]:
    """A model and a command whose run lacks its last two answers."""
    tiny, out = tiny_folder.save(tmp_path / "tiny"), tmp_path / "run"
    stacks = ("--stack", "none", "--stack", "kivi(bits=4)")
    command = ("bench", "--model", tiny, "--tasks", "niah_single_1", "--context", 400, "--samples", 2, *stacks)

    def bench() -> Any:
        return run(*command, "--max-new-tokens", 2, "--out", out)

    assert bench().exit_code == 0
    lines = (out / "samples.jsonl").read_text().splitlines(keepends=True)
    (out / "samples.jsonl").write_text("".join(lines[:2]))
    return tmp_path, bench


@pytest.mark.parametrize("weights", ["a" * 64, "b" * 64])
def test_runs_of_other_weights_lend_each_other_no_baseline(tmp_path: Path, weights: str) -> None:
    """They have the same name; the second lacks the uncompressed cache."""
    first, second = save(tmp_path / "first"), save(tmp_path / "second")
    for folder, digest in ((first, "a" * 64), (second, weights)):
        edit_config(folder, model={"name": "tiny", "config": "c" * 64, "weights": digest})
    lines = (second / "samples.jsonl").read_text().splitlines(keepends=True)
    (second / "samples.jsonl").write_text("".join(lines[3:]))
    found = publish([read_run(first), read_run(second)], tmp_path / "out")
    (row,) = [line.row for line in found.lines if line.run == "second"]
    same = weights[0] == "a"
    assert (row.change is not None) == same
    assert found.differing.get("weights") == (None if same else ["a" * 12, "b" * 12])


def other_weights(tiny: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(tiny)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    model.save_pretrained(tiny)


def test_a_run_is_not_continued_with_other_weights(started: tuple[Path, Callable[[], Any]]) -> None:
    folder, bench = started
    before = texts(folder / "run")
    other_weights(folder / "tiny")
    refused(bench(), "out", "other weights", "another --out")
    assert texts(folder / "run") == before


def test_a_run_of_an_older_version_is_continued_with_a_warning(started: tuple[Path, Callable[[], Any]]) -> None:
    folder, bench = started
    edit_config(folder / "run", model=MISSING, left_out=MISSING)
    again = bench()
    assert again.exit_code == 0, again.output
    assert "does not say which weights" in again.stderr
    assert len(read_run(folder / "run").records) == 4
    (folder / "run" / "samples.jsonl").write_text("")
    other_weights(folder / "tiny")
    refused(bench(), "other weights")


def test_weights_that_are_cut_short_or_missing_are_refused(tmp_path: Path) -> None:
    tiny = tiny_folder.save(tmp_path / "tiny")
    weights = tiny / "model.safetensors"
    whole = weights.read_bytes()
    command = ("generate", "The grass is green.", "--model", tiny)
    for size in (len(whole) // 2, 100, 8, 0):
        weights.write_bytes(whole[:size])
        refused(run(*command), "model", "could not be loaded")
    weights.write_bytes(whole)
    model = LlamaForCausalLM.from_pretrained(tiny)
    state = {name: tensor for name, tensor in model.state_dict().items() if "layers.1.mlp" not in name}
    model.save_pretrained(tiny, state_dict=state)
    refused(run(*command), "model", "has no weights", "layers.1.mlp")


def test_the_files_of_a_model_tell_its_weights(tmp_path: Path) -> None:
    """What an engine of another process is known by."""
    tiny = tiny_folder.save(tmp_path / "tiny")
    before = on_disk(str(tiny))
    assert before == on_disk(str(tiny))
    assert before.weights is not None
    other_weights(tiny)
    assert not before.same(on_disk(str(tiny)))


def test_stacks_that_differ_in_the_name_of_a_file_are_one(tmp_path: Path) -> None:
    first = synthetic.write(tmp_path / "a.safetensors", "klt", heads=2, k_dim=16)
    second = shutil.copy(first, tmp_path / "b.safetensors")
    stacks = [f"klt(bits=2, calibration={str(file)!r})" for file in (first, second)]
    given = Settings("m", ("niah_single_1",), (400,), 1, ("none", *stacks, "none"))
    assert given.stacks == ("none", stacks[0])


@pytest.mark.parametrize("module", ["recall", "questions", "peak"])
def test_a_module_that_is_run_refuses_in_one_line(module: str) -> None:
    more = {"recall": ("--text", "/nowhere", "--cache-dtype", "x"), "questions": ("--data", "/nowhere")}
    more["peak"] = ("--child",)
    app = typer.Typer()
    app.command(cls=console.Command)(importlib.import_module(f"kvcomp.benchmarks.{module}").main)
    args = ["--stack", "none", "--model", "./nowhere", *more[module]]
    refused(CliRunner().invoke(app, args), "error:")


@pytest.mark.parametrize("name", ["config.json", "samples.jsonl"])
@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_files_of_a_run_that_never_end(name: str, kind: str, tmp_path: Path) -> None:
    folder = save(tmp_path / "run")
    config = json.loads((folder / "config.json").read_text())
    (folder / name).unlink()
    if kind == "pipe":
        os.mkfifo(folder / name)
    elif kind == "folder":
        (folder / name).mkdir()
    else:
        (folder / name).symlink_to("/dev/zero")
    for use in (lambda: read_run(folder), lambda: Results(folder, config)):
        with pytest.raises(KvcompError, match=name):
            use()


@pytest.mark.parametrize(
    "command",
    [
        ("generate", "--file"),
        ("ask", "--question", "?"),
        ("calibrate", "--method", "klt", "--out", "x.st", "--text"),
        ("tune", "--out", "x", "--text"),
    ],
    ids=lambda command: command[0],
)
def test_texts_that_never_end(command: tuple[str, ...]) -> None:
    result = run(*command, "/dev/zero")
    assert result.exit_code == 2, result.output
    assert "/dev/zero" in result.stderr
    assert "ot a regular file" in result.stderr
