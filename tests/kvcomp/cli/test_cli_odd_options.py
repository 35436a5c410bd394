"""Options of any content: an answer, or one line and exit code 2; never a traceback, never without end."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import tiny_folder
from command import refused, run
from typer.testing import Result

from kvcomp.text import QUOTED

LONG, DIGITS, NASTY = "a" * 5000, "9" * 5000, "[bold]x[/nope]"
LOADING = ("--dtype", "--device", "--device-map", "--attn-implementation", "--quantization", "--revision")
BENCH: list[tuple[Any, ...]] = [
    ("--samples", 10**30),
    ("--samples", 100_001),
    ("--samples", DIGITS),
    ("--samples", -1),
    ("--samples", NASTY),
    ("--context", 10**30),
    ("--context", DIGITS),
    ("--context", "1e3"),
    ("--context", "-5"),
    ("--context", ","),
    ("--context", NASTY),
    ("--context", "٤٠٠٠"),
    ("--context", 10**11),
    ("--seed", 10**30),
    ("--seed", -(10**30)),
    ("--seed", "x"),
    ("--max-new-tokens", 10**30),
    ("--max-new-tokens", 0),
    ("--prefill-chunk", 10**30),
    ("--tasks", NASTY),
    ("--tasks", LONG),
    ("--tasks", ""),
    ("--tasks", "qa_1"),
    ("--data", "/dev/null"),
    ("--data", "~nosuchuser/x"),
    ("--data", LONG),
    ("--data", NASTY),
    ("--data", "a\0b"),
    ("--engine", NASTY),
    ("--engine", ""),
    ("--model", ""),
    ("--model", LONG),
    ("--model", "./" + LONG),
    ("--model", "~nosuchuser/x"),
    ("--model", f"./{NASTY}"),
    ("--model", "./x.gguf"),
    ("--model", "a\0b"),
    ("--model", "/dev/null"),
    ("--out", LONG),
    ("--out", "/dev/null/x"),
    ("--out", "a\0b"),
    ("--out", "/proc/self/x"),
    ("--stack", "9" * 5000),
    ("--stack", f"snapkv(keep={'9' * 400})"),
    ("--stack", NASTY),
    ("--stack", "oscar(calibration='/nowhere')"),
    ("--stack", "\ud800"),
    *((option, value) for option in LOADING for value in (NASTY, LONG, "", "a\0b", "~nosuchuser/x", "/dev/null")),
    ("--nothing", "1"),
]
OTHERS: list[tuple[Any, ...]] = [
    ("generate", "hi", "--max-new-tokens", 10**30),
    ("generate", "hi", "--model", f"./{NASTY}"),
    ("generate", "--file", LONG),
    ("generate", "--file", NASTY),
    ("generate", "--file", "a\0b"),
    ("generate", "\ud800"),
    ("plan", "--context", DIGITS),
    ("plan", "--context", 10**30),
    ("plan", "--batch", DIGITS),
    ("plan", "--model", LONG),
    ("plan", "--model", NASTY),
    ("plan", "--model", "~nosuchuser/x"),
    ("plan", "--gpu", NASTY),
    ("plan", "--gpu", LONG),
    ("plan", "--assume", "x/0"),
    ("plan", "--assume", "x/nan"),
    ("plan", "--assume", "x/1e-300"),
    ("plan", "--assume", f"{LONG}"),
    ("plan", "--weight-bits", "nan"),
    ("plan", "--tflops", "1e999", "--bandwidth", 1),
    ("plan", "--memory", -1),
    ("plan", "--stack", "random(seed=99999999999999999999999) + x"),
    ("doctor", "--stack", NASTY),
    ("doctor", "--head-dim", 10**30),
    ("doctor", "--head-dim", 0),
    ("report", LONG),
    ("report", NASTY),
    ("report", "a\0b"),
    ("report", "/dev/null"),
    ("calibrate", "--method", NASTY, "--text", "/dev/null", "--out", "new.safetensors"),
    ("calibrate", "--method", "klt", "--text", NASTY, "--out", "new.safetensors"),
    ("calibrate", "--method", "klt", "--text", "x", "--out", LONG),
    ("calibrate", "--method", "klt", "--text", "x", "--out", "a\0b"),
    ("data", "check", LONG),
    ("data", "check", NASTY),
    ("data", "check", "~nosuchuser"),
    ("data", "check", "a\0b"),
    ("speed", "--stack", "none", "--context", DIGITS),
    ("speed", "--stack", "none", "--threads", 10**9),
    ("speed", "--stack", "none", "--attention", "--geometry", "qwen3-8b", "--context", 10**11),
    ("speed", "--stack", "none", "--dtype", NASTY),
    ("speed", "--stack", NASTY, "--attention"),
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder.save(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def refused_shortly(result: Result, start: float) -> None:
    assert result.exit_code == 2, (result.output, result.exception)
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert "Traceback" not in result.output
    assert time.perf_counter() - start < 20
    line = result.stderr.strip().splitlines()[-1]
    if line.startswith("error:"):
        assert len(line) < 6 * QUOTED
        assert line.isprintable()


@pytest.mark.parametrize("options", BENCH, ids=range(len(BENCH)))
def test_bench_refuses_in_one_line(tiny: Path, tmp_path: Path, options: tuple[Any, ...]) -> None:
    given = {
        "--model": tiny,
        "--stack": "none",
        "--out": tmp_path / "run",
        "--tasks": "niah_single_1",
        "--context": 400,
    }
    given |= dict([options])
    start = time.perf_counter()
    refused_shortly(run("bench", *(part for pair in given.items() for part in pair)), start)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", OTHERS, ids=range(len(OTHERS)))
def test_every_command_refuses_in_one_line(command: tuple[Any, ...]) -> None:
    start = time.perf_counter()
    refused_shortly(run(*command), start)


def test_names_in_brackets_are_names(tiny: Path, tmp_path: Path) -> None:
    """rich would take them for markup."""
    out, model = tmp_path / NASTY, tmp_path / "a[/x]b"
    model.parent.mkdir()
    tiny.rename(model)
    try:
        command = ("bench", "--model", model, "--tasks", "niah_single_1", "--context", 400, "--samples", 1)
        for _ in range(2):
            result = run(*command, "--max-new-tokens", 2, "--stack", "none", "--out", out)
            assert result.exit_code == 0, result.output
            assert f"Report: {out / 'report.html'}" in result.stdout
        assert f"{out} already holds 1 answers" in result.stderr
        result = run("report", out)
        assert f"Report: {out / 'report.html'}" in result.stdout
        result = run("generate", "The grass is green.", "--model", model, "--max-new-tokens", 2)
        assert result.exit_code == 0, result.output
        (tmp_path / "[red]data[bold]").mkdir()
        assert "--data [red]data[bold]" in run("data", "check", "[red]data[bold]").stdout
    finally:
        model.rename(tiny)


def test_a_task_of_a_group_that_does_not_fit_is_left_out(tiny: Path, tmp_path: Path) -> None:
    """niah_multikey_3 and others need more than 512 tokens of the tiny tokenizer; the run goes on without them."""
    command = ("bench", "--model", tiny, "--tasks", "ruler", "--context", "700", "--samples", 1, "--max-new-tokens", 1)
    out = tmp_path / "run"
    result = run(*command, "--stack", "none", "--out", out)
    assert result.exit_code == 0, result.output
    left = [line for line in result.stderr.splitlines() if line.startswith("left out:") and "700 tokens" in line]
    assert any("niah_multikey_3 at 700 tokens: context: 700 is less than the" in line for line in left)
    page = (out / "report.html").read_text()
    assert "niah_multikey_3 at 700 tokens" in page
    assert "left out: niah_multikey_3 at 700 tokens" in run("report", out).output
    again = run(*command, "--stack", "none", "--out", out)
    assert again.exit_code == 0, again.output
    assert "Loading" not in again.stderr
    assert [line for line in again.stderr.splitlines() if line in left] == left


def test_a_named_task_that_does_not_fit_is_refused_before_the_model_is_loaded(tiny: Path, tmp_path: Path) -> None:
    command = ("bench", "--model", tiny, "--stack", "none", "--out", tmp_path / "run")
    result = run(*command, "--tasks", "niah_single_1,niah_multikey_3", "--context", 700)
    refused(result, "context: 700", "niah_multikey_3")
    assert "Loading" not in result.stderr
    result = run(*command, "--tasks", "ruler", "--context", "100,900")
    refused(result, "context: 100", "niah_single_1")
    assert "Loading" not in result.stderr
    assert not (tmp_path / "run").exists()
