"""Calibration files: they come back as they were written, are read once, and nothing else passes for one."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from synthetic import MODEL, write

from kvcomp import SpecError, Stack
from kvcomp.cache.eviction import chunk_of
from kvcomp.calibration.file import CalibrationError, digest, load
from kvcomp.fingerprint import Fingerprint
from kvcomp.stages import PageShape
from kvcomp.state import checksum

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

    monkeypatch.setattr(os, "replace", fails)
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


# -- damaged files ----------------------------------------------------------------------------------------------------

EVERY = (*METHODS, "klt", "kvzap")


def use(path: object, method: str) -> torch.Tensor:
    """Keys and values through a calibrated stack, or the scores of a policy."""
    stack = Stack.parse(f"{method}(calibration={str(path)!r}) + window(sinks=0, recent=0)")
    assert stack.hash
    for stage in stack.stages:
        stage.serves(lambda: MODEL)
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 1, 2, 64, 32, generator=generator).unbind()
    for policy in stack.policies:
        return policy.scores(chunk_of(stack.plan(0, 1), None, keys, values, 0.25))
    return torch.cat(stack.roundtrip(keys, values))


def content(path: Path, old: bool) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata; as the first kvcomp wrote them, where `old`."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        new = ("crc32", "parameters") if old else ()
        return tensors, {name: word for name, word in file.metadata().items() if name not in new}


@pytest.mark.parametrize("method", EVERY)
def test_a_file_of_the_first_kvcomp(method: str, tmp_path: Path) -> None:
    new = write(tmp_path / "new", method, 2, 32)
    tensors, metadata = content(new, old=True)
    save_file(tensors, tmp_path / "old", metadata)
    assert torch.equal(use(tmp_path / "old", method), use(new, method))
    assert load(tmp_path / "old", method).model == Fingerprint(MODEL.name, MODEL.config, MODEL.weights)


@pytest.mark.parametrize("method", EVERY)
def test_every_bit_and_byte_counts(method: str, tmp_path: Path) -> None:
    good = write(tmp_path / "good", method, 2, 32).read_bytes()
    header, chance = 8 + int.from_bytes(good[:8], "little"), random.Random(0)
    for place in [chance.randrange(header) for _ in range(20)] + [chance.randrange(len(good)) for _ in range(20)]:
        damaged = bytearray(good)
        damaged[place] ^= 1 << chance.randrange(8)
        (tmp_path / "bad").write_bytes(damaged)
        with pytest.raises(CalibrationError):
            use(tmp_path / "bad", method)
        (tmp_path / "bad").write_bytes(good[:place])
        with pytest.raises(CalibrationError, match="damaged"):
            use(tmp_path / "bad", method)


@pytest.mark.parametrize("method", EVERY)
def test_metadata_that_says_nothing(method: str, tmp_path: Path) -> None:
    tensors, metadata = content(write(tmp_path / "good", method, 2, 32), old=True)
    words = ("", "x", "null", "[]", "[1]", '[{"name": 1}]', "-3", "1.5", "9" * 5000, "[" * 100_000, "NaN", "²")
    free = {"model": words, "kvcomp": words, "weights": ("",), "settings": (), "texts": ("[]",)}  # what may be any text
    for name in metadata:
        save_file(tensors, tmp_path / "bad", {other: word for other, word in metadata.items() if other != name})
        with pytest.raises(CalibrationError):
            use(tmp_path / "bad", method)
        for word in words:
            save_file(tensors, tmp_path / "bad", metadata | {name: word})
            if word in free.get(name, ()):
                use(tmp_path / "bad", method)
            else:
                with pytest.raises(CalibrationError):
                    use(tmp_path / "bad", method)


@pytest.mark.parametrize("method", EVERY)
@pytest.mark.parametrize("text", ["y" * 10**5, "\x1b[2Jx", "a\nb", "[bold]x[/nope]"], ids=range(4))
def test_messages_are_short_whatever_a_file_says(method: str, text: str, tmp_path: Path) -> None:
    """Also with a checksum of the content, and where the model is another one."""
    tensors, metadata = content(write(tmp_path / "good", method, 2, 32), old=True)
    renamed = {text if name.endswith("mean") else name: x for name, x in tensors.items()}
    for damaged, words in [(renamed, metadata), *((tensors, metadata | {name: text}) for name in metadata)]:
        save_file(damaged, tmp_path / "bad", words | {"crc32": checksum(words, damaged)})
        stack = Stack.parse(f"{method}(calibration={str(tmp_path / 'bad')!r}) + window(sinks=0, recent=0)")
        stage = next(stage for stage in stack.stages if stage.name == method)
        with pytest.raises(CalibrationError) as error:
            stage.serves(lambda: Fingerprint(text, "larger"))
        assert str(error.value).isprintable()
        assert len(str(error.value)) < 900


WRONG = {
    "scalar": lambda x: torch.tensor(1.0),
    "flat": lambda x: x.reshape(-1),
    "half": lambda x: x.half(),
    "whole": lambda x: x.int(),
    "double": lambda x: x.double(),
    "one head": lambda x: x[:1].contiguous(),
    "few channels": lambda x: x[..., :8].contiguous(),
    "no heads": lambda x: x[:0].contiguous(),
    "nested": lambda x: x[None],
    "nan": lambda x: torch.full_like(x, float("nan")),
    "huge": lambda x: torch.full_like(x, 1e30),
}


def alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


@pytest.mark.parametrize("method", EVERY)
def test_tensors_that_no_calibration_gives(method: str, tmp_path: Path) -> None:
    tensors, metadata = content(write(tmp_path / "good", method, 2, 32), old=True)
    cases = {
        f"{name} {what}": tensors | {name: wrong}
        for name in tensors
        for what, make in WRONG.items()
        if not alike(wrong := make(tensors[name]), tensors[name])
    }
    for name in tensors:
        cases[f"{name} gone"] = {other: x for other, x in tensors.items() if other != name}
        cases[f"{name} renamed"] = {("x" + other if other == name else other): x for other, x in tensors.items()}
        if not name.endswith("mean") and method != "kvzap":  # whose weights may be any
            cases[f"{name} zero"] = tensors | {name: torch.zeros_like(tensors[name])}
            cases[f"{name} doubled"] = tensors | {name: tensors[name] * (2 if method in ("oscar", "svd") else -1)}
    if method != "kvzap":
        cases["all zero"] = {name: torch.zeros_like(x) for name, x in tensors.items()}
    for told, damaged in cases.items():
        if method == "klt" and told.endswith("basis doubled"):  # -D is as good a basis
            continue
        save_file(damaged, tmp_path / "bad", metadata)
        with pytest.raises(CalibrationError):
            use(tmp_path / "bad", method)


@pytest.mark.parametrize("method", EVERY)
def test_paths_of_no_file(method: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(40 * 10**9)
    for path in (tmp_path / "pipe", "/dev/zero", tmp_path, "~nosuchuser/x", tmp_path / "sparse"):
        assert digest(path) is None
        with pytest.raises(CalibrationError, match=r"cannot be read|no calibration file"):
            use(path, method)
    for path in ("a\0b", "a\ud800b"):  # specs refuse them before anything is looked for
        assert digest(path) is None
        with pytest.raises(CalibrationError, match=r"cannot be read|no calibration file"):
            load(path, method)
        with pytest.raises(SpecError, match="calibration must be text, without control characters"):
            use(path, method)


def test_a_file_has_the_permissions_that_it_would_have(tmp_path: Path) -> None:
    path = write(tmp_path / "c", "think", 1, 8)
    umask = os.umask(0o077)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask
    path.chmod(0o604)
    (tmp_path / "link").symlink_to(path)
    write(tmp_path / "link", "think", 2, 8)
    assert (tmp_path / "link").is_symlink()
    assert path.stat().st_mode & 0o777 == 0o604
    assert load(path, "think").tensors["0.score"].shape == (2, 8)
