"""Calibration files: they come back as they were written, are read once, and nothing else passes for one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from synthetic import MODEL, write

import kvcomp.calibration as module
from kvcomp import SpecError, Stack
from kvcomp.calibration import CalibrationError, digest, load
from kvcomp.fingerprint import Fingerprint
from kvcomp.stages import PageShape

CPU = torch.device("cpu")
METHODS = ("oscar", "svd", "think")


def shape(heads: int = 2, k_dim: int = 32, v_dim: int = 32, layer: int = 0) -> PageShape:
    return PageShape(64, k_dim, v_dim, heads, torch.float32, CPU, layer)


@pytest.mark.parametrize("method", METHODS)
def test_a_file_comes_back(method: str, tmp_path: Path) -> None:
    path = write(tmp_path / "made" / "c.safetensors", method, 2, 32, layers=3)
    found = load(path, method)
    assert (found.method, found.model, found.tokens, found.context) == (method, MODEL, 512, 512)
    assert found.texts == (("a.txt", "0" * 64),)
    assert found.settings == ({"damping": 1e-4} if method == "svd" else {})
    assert found.layers == [0, 1, 2]
    assert {name: t.dtype for name, t in load_file(path).items()} == dict.fromkeys(found.tensors, torch.float32)
    assert [p.name for p in path.parent.iterdir()] == ["c.safetensors"]
    for name, tensor in found.tensors.items():
        assert tensor.untyped_storage().nbytes() == tensor.nbytes, name


def test_it_is_read_once_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "c", "think", 2, 32)
    spec = f"think(calibration={str(path)!r})"
    reads = []
    monkeypatch.setattr(Path, "read_bytes", lambda self, real=Path.read_bytes: reads.append(self) or real(self))
    hashes = {Stack.parse(spec).hash for _ in range(100)}
    assert len(hashes) == len(reads) == 1
    assert load(path, "think") is load(str(path), "think")
    before = load(path, "think")
    write(path, "think", 3, 32)
    os.utime(path, (1, 1))
    assert load(path, "think") is not before
    assert Stack.parse(spec).hash not in hashes


@pytest.mark.parametrize("method", METHODS)
def test_the_hash_is_the_contents_and_the_spec_the_name(method: str, tmp_path: Path) -> None:
    one, same, other = (tmp_path / name for name in ("one", "a b", "other"))
    write(one, method, 2, 32)
    same.write_bytes(one.read_bytes())
    write(other, method, 3, 32)
    stacks = [Stack.parse(f"{method}(calibration={str(path)!r})") for path in (one, same, other)]
    assert stacks[0].hash == stacks[1].hash != stacks[2].hash
    assert digest(one) == digest(same)
    for stack in stacks:
        assert Stack.parse(str(stack)) == stack
        assert Stack.parse(str(stack)).hash == stack.hash
    assert Stack.parse(f"{method}(calibration='gone')").hash != Stack.parse(f"{method}(calibration='lost')").hash


@pytest.mark.parametrize("method", METHODS)
def test_no_file_no_codec_but_a_plan(method: str, tmp_path: Path) -> None:
    for spec, told in (
        (method, rf"{method} needs calibration='FILE'.*kvcomp calibrate --method {method}"),
        (f"{method}(calibration={str(tmp_path / 'nothing')!r})", "nothing.*No such file"),
        (f"{method}(calibration={str(tmp_path)!r})", r"cannot be read|damaged"),
    ):
        stack = Stack.parse(spec)
        with pytest.raises(CalibrationError, match=told):
            stack.plan(0, 1).build(shape())
        with pytest.raises(CalibrationError, match=told):
            stack.quantizer.serves(lambda: MODEL)
        assert 0 < stack.effective_bits(64, 8192) < 16


def test_what_is_no_calibration_file(tmp_path: Path) -> None:
    good = write(tmp_path / "good", "oscar", 2, 32).read_bytes()
    weights = tmp_path / "model.safetensors"
    save_file({"w": torch.zeros(2)}, weights)
    for name, content, told in (
        ("empty", b"", "damaged"),
        ("text", b"hello, this is a text file and nothing else", "damaged"),
        ("truncated", good[:-100], "damaged"),
        ("header only", good[:40], "damaged"),
        ("foreign", weights.read_bytes(), "not written by this version"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CalibrationError, match=f"{name}.*{told}"):
            load(tmp_path / name, "oscar")
    (tmp_path / "good").write_bytes(good)
    with pytest.raises(CalibrationError, match=r"good.*is for oscar, not for svd.*--method svd"):
        load(tmp_path / "good", "svd")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (shape(heads=3), "2 KV heads of 32 channels in layer 0, and the cache 3 of 32"),
        (shape(k_dim=64, v_dim=64), "2 KV heads of 32 channels in layer 0, and the cache 2 of 64"),
        (shape(layer=2), "layer 2, only layers 0, 1"),
    ],
)
def test_another_shape_is_refused(method: str, wrong: PageShape, told: str, tmp_path: Path) -> None:
    path = write(tmp_path / "c", method, 2, 32, layers=2)
    plan = Stack.parse(f"{method}(calibration={str(path)!r})").plan(wrong.layer, 4)
    with pytest.raises(CalibrationError, match=told):
        plan.build(wrong)
    plan.build(shape(layer=1) if wrong.layer == 1 else shape())


def test_another_model_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "c", "oscar", 2, 32)
    quantizer = Stack.parse(f"oscar(calibration={str(path)!r})").quantizer
    for same in (MODEL, Fingerprint("renamed", "config", "weights"), Fingerprint("config alone", "config")):
        quantizer.serves(lambda same=same: same)
    for other, told in (
        (Fingerprint("B", "config", "tuned"), "calibrated for a synthetic model.*for B, with other weights"),
        (Fingerprint("B", "larger", "weights"), "calibrated for a synthetic model.*for B, which is another model"),
        (Fingerprint("B", "larger"), "which is another model"),
    ):
        with pytest.raises(CalibrationError, match=told):
            quantizer.serves(lambda other=other: other)


def test_stages_without_a_file_never_ask_which_model_it_is() -> None:
    def asked() -> Fingerprint:
        raise AssertionError

    for stage in Stack.parse("kivi + window(sinks=4, recent=16) + streaming").stages:
        stage.serves(asked)


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    found = load(write(tmp_path / "c", "think", 1, 8), "think")
    with pytest.raises(CalibrationError, match=r"file/c.*cannot be written"):
        found.save(tmp_path / "file" / "c")


@pytest.mark.parametrize("method", METHODS)
def test_a_file_that_is_half_written_never_has_its_name(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "replace", fails)
    with pytest.raises(CalibrationError, match="No space left"):
        write(tmp_path / "c", method, 1, 8)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("oscar(bits=5)", "2, 3 or 4"),
        ("oscar(k_clip=0)", "k_clip"),
        ("oscar(v_clip=1.5)", "v_clip"),
        ("oscar(group=0)", "group"),
        ("svd(rank=0)", "rank"),
        ("svd(rank=1.5)", "rank"),
        ("svd(bits=1)", "bits"),
        ("think(keep=0.0)", "keep"),
        ("think(bits=9)", "bits"),
        ("think(group=8)", "group"),
        ("svd(calibration=7)", "expected None or str|expected str or None"),
    ],
)
def test_arguments_out_of_range(spec: str, told: str) -> None:
    with pytest.raises(SpecError, match=told):
        Stack.parse(spec)
