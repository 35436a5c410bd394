"""`kvcomp calibrate`: a file that a stack can name, and one line where it cannot go on."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_folder
from command import refused, run
from typer.testing import Result

from kvcomp.calibration.file import load

METHODS = ("oscar", "svd", "think", "kvzap")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder.save(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "a text.txt"
    path.write_text("The grass is green. The sky is blue. One of the special magic numbers is 7. " * 300)
    return path


def test_help_teaches() -> None:
    result = run("calibrate", "--help")
    assert result.exit_code == 0
    for part in ("--method", "--text", "--out", "--tokens", "20480", "--context", "2048", "calibration='"):
        assert part in result.output


@pytest.mark.parametrize("method", METHODS)
def test_a_calibrated_stack_generates_with_its_model_only(tiny: Path, text: Path, tmp_path: Path, method: str) -> None:
    out = tmp_path / "new folder" / "file.safetensors"
    made = run(
        "calibrate", "--model", tiny, "--method", method, "--text", text, "--text", text,
        "--out", out, "--tokens", 600, "--context", 128,
    )  # fmt: skip
    assert made.exit_code == 0, made.output
    for part in (str(out), method, "2 layers", "600 tokens", " s, ", "B\n"):
        assert part in made.stdout
    found = load(out, method)
    assert (found.tokens, found.context, found.layers) == (600, 128, [0, 1])
    assert [name for name, _ in found.texts] == ["a text.txt"] * 2
    assert str(tiny) in found.model.name

    stack = f"{method}(calibration={str(out)!r}) + window(sinks=2, recent=16)"
    prompt = ("The grass is green. " * 20, "--stack", stack, "--max-new-tokens", 4)
    generated = run("generate", *prompt, "--model", tiny)
    assert generated.exit_code == 0, generated.output
    assert "effective bits" in generated.stdout
    planned = run("plan", "--model", "qwen3-8b", "--stack", f"{method}(calibration='not yet made')")
    assert planned.exit_code == 0, planned.output

    refused(run("generate", *prompt, "--model", tiny, "--stack", f"{method}"), method, "kvcomp calibrate")
    other = tiny_folder.save(tmp_path / "other")
    config = (other / "config.json").read_text()
    (other / "config.json").write_text(config.replace('"rope_theta": 10000.0', '"rope_theta": 50000.0'))
    assert (other / "config.json").read_text() != config
    refused(run("generate", *prompt, "--model", other), str(tiny), str(other), "another model", "kvcomp calibrate")


def test_what_it_refuses(tiny: Path, text: Path, tmp_path: Path) -> None:
    def calibrate(*args: object, method: str = "think", out: str = "new", file: Path = text) -> Result:
        where = ("--text", file, "--out", tmp_path / out)
        return run("calibrate", "--model", tiny, "--method", method, *where, "--tokens", 256, "--context", 64, *args)

    refused(calibrate(method="kivi"), "kivi", "oscar", "svd", "think")
    refused(calibrate(file=tmp_path / "nothing.txt"), "nothing.txt", "No such file")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    refused(calibrate(file=tmp_path / "binary"), "binary", "UTF-8")
    refused(calibrate("--context", 4096, "--tokens", 4096), "context", "4096", "1024")
    refused(calibrate("--context", 512), "tokens", "256")
    assert not (tmp_path / "new").exists()
    (tmp_path / "mine").write_text("keep me")
    refused(calibrate(out="mine"), "mine", "exists")
    assert (tmp_path / "mine").read_text() == "keep me"
    late = calibrate(out="mine/in a file")
    refused(late, "mine", "cannot be written")
    assert "Loading" not in late.stderr
    assert calibrate("--tokens", 0).exit_code == 2
    assert run("calibrate", "--method", "think").exit_code == 2
    (tmp_path / "short").write_text("word " * 100)
    fewer = calibrate("--tokens", 2000, file=tmp_path / "short", out="fewer")
    assert fewer.exit_code == 0, fewer.output
    assert "no more than" in fewer.stdout
