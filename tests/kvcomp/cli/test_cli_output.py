"""What all commands print alike: `--json` with its documented keys, errors of two lines, exit codes, completion."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_folder
import typer
from command import refused, run

from kvcomp.calibration.stage import Calibrated
from kvcomp.cli import ask, calibrate, data, doctor, generate, options, plan, report, speed, tune
from kvcomp.cli.app import app
from kvcomp.cli.output import Document, print_json
from kvcomp.integrations.huggingface.models import ALIASES
from kvcomp.integrations.huggingface.shapes import builtin
from kvcomp.integrations.options import PACKAGED
from kvcomp.stages.registry import stages

DOCUMENTS = {
    "generate": generate.DOCUMENT,
    "ask": ask.DOCUMENT,
    "bench": report.DOCUMENT,
    "report": report.DOCUMENT,
    "tune": tune.DOCUMENT,
    "plan": plan.DOCUMENT,
    "speed": speed.DOCUMENT,
    "doctor": doctor.DOCUMENT,
    "calibrate": calibrate.DOCUMENT,
    "data check": data.DOCUMENT,
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder.save(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    (folder / "text.txt").write_text("The grass is green. The sky is blue. " * 300, encoding="utf-8")
    (folder / "short.txt").write_text("The grass is green. The sky is blue. " * 12, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def commands(tiny: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[object]]:
    """Arguments of every command that prints figures, each a matter of seconds."""
    out = tmp_path_factory.mktemp("out")
    measured = ["bench", "--model", tiny, "--tasks", "niah_single_1", "--context", 400, "--samples", 2]
    measured += ["--max-new-tokens", 3, "--stack", "none", "--stack", "kivi(bits=2)", "--out", out / "run"]
    tried = ["tune", "--model", tiny, "--text", texts / "text.txt", "--context", 256, "--samples", 1]
    fitted = ["calibrate", "--method", "think", "--model", tiny, "--text", texts / "text.txt", "--tokens", 300]
    return {
        "generate": ["generate", "The sky is", "--model", tiny, "--max-new-tokens", 3],
        "ask": ["ask", texts / "short.txt", "--question", "The sky is", "--model", tiny, "--max-new-tokens", 3],
        "bench": measured,
        "report": ["report", out / "run"],
        "tune": [*tried, "--stack", "int8", "--tvd", "50%", "--out", out / "tuned"],
        "plan": ["plan", "--model", "qwen3-8b", "--stack", "kivi(bits=2)"],
        "speed": ["speed", "--model", tiny, "--stack", "int8", "--context", 100, "--steps", 4],
        "doctor": ["doctor", "--stack", "kivi(bits=4)", "--stack", "pyramidkv + int8"],
        "calibrate": [*fitted, "--context", 100, "--out", out / "file"],
        "data check": ["data", "check", texts],
    }


def names_of(group: Any, before: str = "") -> list[str]:
    """Every command of the program that is no group."""
    found = []
    for name, command in group.commands.items():
        found += names_of(command, f"{before}{name} ") if hasattr(command, "commands") else [f"{before}{name}"]
    return found


def test_every_command_has_json() -> None:
    """But `serve`, whose output is vLLM's."""
    assert {*names_of(typer.main.get_command(app))} == {*DOCUMENTS, "stacks", "serve"}
    for name in [*DOCUMENTS, "stacks"]:
        assert "--json" in run(*name.split(), "--help").output, name


def test_json_has_the_documented_keys_and_nothing_else_is_on_stdout(commands: dict[str, list[object]]) -> None:
    for name, document in DOCUMENTS.items():  # in order: a report needs a run
        result = run(*commands[name], "--json")
        assert result.exit_code == 0, (name, result.output)
        found = json.loads(result.stdout, parse_constant=pytest.fail)
        assert list(found) == list(document.keys), name
        for key in document.keys:
            assert f"{key}: " in " ".join(run(*name.split(), "--help").output.split()), (name, key)


def test_objects_have_the_keys_that_their_description_names(commands: dict[str, list[object]]) -> None:
    """Of every list of objects: the words of the description and the keys of the objects agree."""
    for name in ("plan", "speed", "doctor", "data check"):
        found = json.loads(run(*commands[name], "--json").stdout)
        for key, rows in found.items():
            for row in rows if isinstance(rows, list) else [rows]:
                if isinstance(row, dict) and key not in ("packages", "kernels"):
                    assert [part for part in row if part not in DOCUMENTS[name].keys[key]] == [], (name, key)


def test_json_says_what_the_table_says(commands: dict[str, list[object]]) -> None:
    found = json.loads(run(*commands["generate"], "--json").stdout)
    shown = run(*commands["generate"]).stdout
    assert shown.startswith(found["text"].strip() or "\n")
    for figure in (f"{found['held_ratio']:.2f}x", f"{found['read_ratio']:.2f}x", f"{found['effective_bits']:.2f}"):
        assert figure in shown
    assert found["held"] * found["held_ratio"] == pytest.approx(found["held_dense"])


def test_one_token_is_generated_without_a_decode_step(tiny: Path) -> None:
    command = ("generate", "The sky is", "--model", tiny, "--max-new-tokens", 1)
    found = json.loads(run(*command, "--json").stdout)
    assert found["new_tokens"] == 1
    assert found["read"] is found["read_dense"] is found["read_ratio"] is None
    shown = run(*command)
    assert shown.exit_code == 0
    assert "held" in shown.stdout
    assert "read by" not in shown.stdout


def test_a_document_prints_its_keys_and_no_others(capsys: pytest.CaptureFixture[str]) -> None:
    document = Document(a="first", b="second")
    document.print(b=[1.5, {"x": float("nan")}], a=float("inf"))
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [1.5, {"x": None}]}
    assert document.help.splitlines()[-1] == "  b: second"
    for values in ({"a": 1}, {"a": 1, "b": 2, "c": 3}):
        with pytest.raises(TypeError, match="documented"):
            document.print(**values)
    print_json({"a": (1, 2)})
    assert json.loads(capsys.readouterr().out) == {"a": [1, 2]}


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["frobnicate"], ["frobnicate", "`kvcomp --help`"]),
        (["--frobnicate"], ["--frobnicate"]),
        (["bench"], ["--stack", "`kvcomp bench --help`"]),
        (["bench", "--stack", "none", "--samples", "0"], ["--samples", "`kvcomp bench --help`"]),
        (["bench", "--stack", "none", "--samples", "many"], ["--samples"]),
        (["data"], []),
        (["data", "check"], ["`kvcomp data check --help`"]),
        (["data", "lose"], ["lose", "`kvcomp data --help`"]),
        (["plan", "--bits", "4"], ["--bits"]),
        (["report", "no-such-folder"], ["no-such-folder"]),
        (["generate", "hi", "--stack", "kivi(\nbits=7)"], ["7"]),
        (["speed", "--stack", "none", "--dtype", "int8"], ["int8", "float32"]),
    ],
)
def test_an_error_is_two_lines_and_code_2(arguments: list[str], parts: list[str]) -> None:
    result = run(*arguments)
    if arguments == ["data"]:  # no arguments at all: the help
        assert result.exit_code == 2
        assert "check" in result.output
    else:
        refused(result, *parts)
        assert result.stdout == ""


def test_exit_codes_are_documented_and_right(texts: Path, tmp_path: Path) -> None:
    said = run("--help").output
    for code in ("0", "1", "2", "130"):
        assert any(line.split()[:1] == [code] for line in said.splitlines()), code
    assert run("--version").exit_code == 0
    (tmp_path / "squad.json").write_text("no JSON")
    assert run("data", "check", texts).exit_code == 0
    for option in ([], ["--json"]):
        assert run("data", "check", tmp_path, *option).exit_code == 1
    assert run("generate", "").exit_code == 2


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_an_interrupted_command_exits_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(plan, "_device", interrupt)
    assert run("plan").exit_code == 130


def completed(*words: str) -> list[str]:
    """What bash is offered after these words."""
    asked = {"_KVCOMP_COMPLETE": "complete_bash", "COMP_WORDS": " ".join(words), "COMP_CWORD": str(len(words) - 1)}
    code = (
        "import sys; sys.argv[0] = 'kvcomp'\nimport atexit\n"
        "atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr))\n"
        "from kvcomp.cli.app import app; app(prog_name='kvcomp')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **asked}, check=False
    )
    assert done.stderr.strip() == "False", done.stderr  # a shell does not wait for torch
    return done.stdout.split()


def test_a_shell_completes_commands_options_and_values(tmp_path: Path) -> None:
    assert completed("kvcomp", "do") == ["doctor"]
    assert completed("kvcomp", "data", "") == ["check"]
    assert "--stack" in completed("kvcomp", "bench", "--st")
    assert completed("kvcomp", "plan", "--gpu", "h1") == ["h100"]
    (tmp_path / "model").mkdir()
    (tmp_path / "model.gguf").touch()
    (tmp_path / "model.txt").touch()
    assert completed("kvcomp", "generate", "--model", f"{tmp_path}/mo") == [
        f"{tmp_path}/model/",
        f"{tmp_path}/model.gguf",
    ]


def test_what_is_completed_is_what_there_is() -> None:
    assert set(PACKAGED) == set(ALIASES)
    assert set(options.completed_shapes("")) >= set(builtin())
    assert options.completed_shapes("qwen3-8") == ["qwen3-8b"]
    calibrated = {name for name, stage in stages().items() if issubclass(stage, Calibrated)}
    assert set(calibrate.METHODS) == calibrated


def test_completion_is_installed_by_the_command_itself() -> None:
    said = run("--help").output
    assert "--install-completion" in said
    assert "--show-completion" in said


@pytest.mark.parametrize("name", ["bench", "speed", "calibrate", "doctor"])
def test_nothing_moves_in_a_pipe(name: str, commands: dict[str, list[object]], tmp_path: Path) -> None:
    """stderr of commands that show bars and spinners on a terminal: plain lines."""
    arguments = [str(tmp_path / "new") if str(a).endswith(("run", "file")) else str(a) for a in commands[name]]
    done = subprocess.run([sys.executable, "-m", "kvcomp", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for mark in ("\r", "\x1b", "━", "█", "%|", "it/s"):
        assert mark not in done.stderr, done.stderr
    assert "\x1b" not in done.stdout


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["plan", "--help"], ["stacks"], ["stacks", "--json"]])
def test_output_that_cannot_be_written_is_one_error(arguments: list[str]) -> None:
    """Not a traceback, nor a second error when Python exits."""
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "kvcomp", *arguments], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["error: the output cannot be written: No space left on device."]


def test_a_reader_that_leaves_is_no_error() -> None:
    """As `kvcomp stacks | head -1`."""
    with subprocess.Popen(
        [sys.executable, "-m", "kvcomp", "stacks"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == ""
