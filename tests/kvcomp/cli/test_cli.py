"""The command line: what it prints, what it writes, and one readable line where it cannot go on."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import tiny_folder
from command import refused, run
from typer.testing import Result

import kvcomp
from kvcomp.stages.registry import stages


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder.save(tmp_path_factory.mktemp("tiny"))


def test_version() -> None:
    assert run("--version").output == f"kvcomp {kvcomp.__version__}\n"


@pytest.mark.parametrize("command", [[], ["stacks"], ["generate"], ["bench"]])
def test_help_teaches(command: list[str]) -> None:
    result = run(*command, "--help")
    assert result.exit_code == 0
    assert "kvcomp " in result.output or command == ["stacks"]


def test_help_imports_no_torch() -> None:
    code = "import sys; import kvcomp.cli.app; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_stacks_lists_every_stage_with_its_arguments() -> None:
    text = run("stacks").output
    described = json.loads(run("stacks", "--json").output)
    assert set(described) == set(stages())
    for name, stage in described.items():
        assert name in text
        assert stage["summary"]
        for argument in stage["arguments"]:
            assert argument["help"], f"{name}({argument['name']}) has no help"
            assert f"{argument['name']}={argument['default']}" in text


def test_generate_streams_text_and_compares_sizes(tiny: Path, tmp_path: Path) -> None:
    prompt = "The grass is green. The sky is blue. " * 10
    (tmp_path / "prompt.txt").write_text(prompt)
    options = ("--model", tiny, "--stack", "kivi(bits=2)", "--max-new-tokens", 5)
    direct = run("generate", prompt, *options)
    assert direct.exit_code == 0, direct.output
    for part in ("held", "read by the last step", "effective bits", "dense", "kivi"):
        assert part in direct.stdout
    assert run("generate", "-", *options, stdin=prompt).stdout == direct.stdout
    assert run("generate", "--file", tmp_path / "prompt.txt", *options).stdout == direct.stdout


def test_generate_refuses_what_it_cannot_do(tiny: Path, tmp_path: Path) -> None:
    refused(run("generate", "", "--model", tiny), "prompt", "empty")
    refused(run("generate", "-", "--model", tiny, stdin=" \n"), "prompt", "empty")
    refused(run("generate", "--model", tiny), "prompt", "--file")
    refused(run("generate", "hi", "--file", tiny / "config.json", "--model", tiny), "prompt", "--file")
    refused(run("generate", "--file", tmp_path / "nope.txt"), "nope.txt", "No such file")
    refused(run("generate", "0 " * 2000, "--model", tiny), "prompt", "1024", "--max-new-tokens")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    refused(run("generate", "--file", tmp_path / "binary"), "UTF-8")


@pytest.mark.parametrize("command", [("generate", "hello"), ("bench",)])
@pytest.mark.parametrize(
    ("stack", "part"),
    [("kivvi(bits=2)", "kivi"), ("kivi(bitz=2)", "bits"), ("kivi(bits=7)", "7"), ("kivi(", "kivi(")],
)
def test_a_mistyped_stack_names_what_would_be_right(
    tiny: Path, tmp_path: Path, command: tuple[str, ...], stack: str, part: str
) -> None:
    out = ("--out", tmp_path / "out") if command == ("bench",) else ()
    refused(run(*command, "--model", tiny, "--stack", stack, *out), part)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("missing.gguf", ["no file", "missing.gguf"]),
        ("./missing", ["no folder", "missing"]),
        ("empty", ["config.json"]),
        ("nobody/no-such-model", ["hub", "network", "smollm2-135m"]),
    ],
)
def test_a_model_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, parts: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "empty").mkdir()
    refused(run("generate", "hello", "--model", name), "model", *parts)


TASKS = ("niah_single_1", "niah_multikey_1")
BENCH = (
    "--tasks",
    ",".join(TASKS),
    "--context",
    400,
    "--samples",
    2,
    "--max-new-tokens",
    3,
    "--stack",
    "none",
    "--stack",
    "kivi(bits=2)",
)


def test_bench_measures_writes_and_continues(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = ("bench", "--model", tiny, *BENCH, "--out", out)
    first = run(*command)
    assert first.exit_code == 0, first.output
    lines = (out / "samples.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert len(records) == 2 * 2 * 2  # tasks, samples, stacks
    assert {(r["task"], r["stack"]) for r in records} == {(t, r["stack"]) for t in TASKS for r in records}
    for record in records:
        assert 0.9 * 400 - 128 <= record["prompt_tokens"] <= 400 - 128
        assert 1 <= record["new_tokens"] <= 3
        assert record["held"] > 0
        assert record["read"] > 0
    dense, small = ({r["stack"]: r for r in records}[stack] for stack in ("none", records[1]["stack"]))
    assert small["held"] < dense["held"]
    page = (out / "report.html").read_text()
    assert "kivi(" in page
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//""", page)
    assert (out / "summary.csv").read_text().count("\n") == 3
    for picture in out.glob("*.svg"):
        ElementTree.parse(picture)
        assert "currentColor" not in picture.read_text()
    assert {picture.name for picture in out.glob("*.svg")} == {"held_400.svg", "read_400.svg"}

    # Cut the last record short, as a killed process would: only its sample runs again.
    (out / "samples.jsonl").write_text("\n".join(lines)[:-20])
    again = run(*command)
    assert again.exit_code == 0, again.output
    assert "cut short" in again.stderr
    kept = (out / "samples.jsonl").read_text().splitlines()
    assert kept[:-1] == lines[:-1]
    assert len(kept) == len(lines)

    # All is there: nothing is loaded or measured, the table is the same.
    shutil.copytree(out, tmp_path / "copy")
    third = run(*command)
    assert third.stdout == again.stdout
    assert "Loading" not in third.stderr

    # Another configuration in the same folder is refused, and nothing changes.
    refused(run(*command, "--seed", 7), "out", "seed", "another --out")
    for file in ("config.json", "samples.jsonl", "summary.csv"):
        assert (out / file).read_bytes() == (tmp_path / "copy" / file).read_bytes()


def test_bench_refuses_what_it_cannot_do(tiny: Path, tmp_path: Path) -> None:
    def bench(*args: object, out: str = "new") -> Result:
        return run("bench", "--model", tiny, "--stack", "none", "--out", tmp_path / out, *args)

    refused(bench("--tasks", "niah_singel_1"), "niah_singel_1", "niah_single_1")
    refused(bench("--tasks", ","), "task")
    refused(bench("--context", "4k"), "4k")
    refused(bench("--context", 100), "context", "100")
    refused(bench("--context", 4096, out="new"), "context", "4096", "1024")
    assert not (tmp_path / "new").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep me")
    refused(bench(out="mine"), "mine", "--out")
    assert [file.name for file in (tmp_path / "mine").iterdir()] == ["notes.txt"]
    assert bench("--samples", 0).exit_code == 2
