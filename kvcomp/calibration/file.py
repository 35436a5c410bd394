"""Calibration files: what `kvcomp calibrate` writes."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvcomp import __version__
from kvcomp.errors import KvcompError
from kvcomp.files import expanded, named, readable, reason, write_whole
from kvcomp.fingerprint import Fingerprint
from kvcomp.stages import PageShape
from kvcomp.state import CHECKSUM, DamagedError, State, checksum, described, parsed
from kvcomp.text import brief, quote

KIND = "kvcomp calibration 2"
WORDS = ("kind", "method", "settings", "model", "config", "weights", "texts", "tokens", "context", "kvcomp")
HUGE = 1e20  # no moment of keys and queries, or map made of one, has larger numbers
LARGEST = 2 << 30  # bytes of a calibration file


class CalibrationError(KvcompError):
    """A calibration file that is missing, damaged, or was made for something else."""


@dataclass(frozen=True, eq=False)
class Calibration:
    """A calibration file: safetensors, with everything but the tensors in its metadata.

    method: the stage it is for; settings: those of its `calibrate`. model: which one was run. texts: name and sha256 of
    each file, of which `tokens` tokens were used in contexts of `context`. version: of the kvcomp that wrote it.
    tensors: what the method computed, float32, by "<layer>.<name>", each [H, ...] for H KV heads.
    """

    method: str
    settings: Mapping[str, Any]
    model: Fingerprint
    texts: tuple[tuple[str, str], ...]
    tokens: int
    context: int
    tensors: Mapping[str, Tensor]
    version: str = ""
    path: Path = Path()

    def __post_init__(self) -> None:
        for name, tensor in self.tensors.items():
            if not bool(tensor.isfinite().all()):
                raise CalibrationError(
                    f"{name} of {self.method} is not finite: the model gave nan or infinities on these texts, in its "
                    "dtype; calibrate in float32, and check that the model writes sense"
                )

    @property
    def layers(self) -> list[int]:
        """The layers that were calibrated, by number."""
        return sorted({int(name.partition(".")[0]) for name in self.tensors})

    def tensor(self, name: str, shape: PageShape, *dims: int | None) -> Tensor:
        """float32 [heads, *dims] of the layer that `shape` describes, on its device; None: any size.

        Raises:
            CalibrationError: the file lacks that layer, or has it for other heads or head dimensions.
        """
        found = self.tensors.get(f"{shape.layer}.{name}")
        if found is None:
            layers = ", ".join(map(str, self.layers))
            raise CalibrationError(
                f"{str(self.path)!r} has no {name} of layer {shape.layer}, only layers {layers}: calibrate the model "
                "that the cache is for"
            )
        found, wanted = shape.of_rank(found), (shape.heads, *dims)
        if found.dim() != len(wanted) or any(w not in (None, n) for w, n in zip(wanted, found.shape, strict=True)):
            channels = found.shape[1] if found.dim() > 1 else "no"
            raise CalibrationError(
                f"{str(self.path)!r} has {found.shape[0]} KV heads of {channels} channels in layer {shape.layer}, and "
                f"the cache {shape.heads} of {dims[0]}: calibrate the model that the cache is for"
            )
        return found.to(shape.device)

    def save(self, path: Path) -> None:
        """Write the file; it appears under its name only when it is whole.

        Raises:
            CalibrationError: it cannot be written.
        """
        from safetensors.torch import save

        metadata = {
            "kind": KIND,
            "method": self.method,
            "settings": json.dumps(dict(self.settings)),
            "model": self.model.name,
            "config": self.model.config,
            "weights": self.model.weights or "",
            "parameters": self.model.parameters or "",
            "texts": json.dumps([{"name": name, "sha256": digest} for name, digest in self.texts]),
            "tokens": str(self.tokens),
            "context": str(self.context),
            "kvcomp": __version__,
        }
        tensors = {name: t.float().contiguous() for name, t in self.tensors.items()}
        content = save(tensors, metadata | {CHECKSUM: checksum(metadata, tensors)})
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, content)
        except OSError as error:
            raise CalibrationError(f"{str(path)!r} cannot be written: {reason(error)}") from error


def load(path: str | Path, method: str) -> Calibration:
    """The calibration in a file, read once as long as it does not change.

    Raises:
        CalibrationError: no such file, one that is damaged or of another kind, or the calibration of another method.
    """
    try:
        given = readable(expanded(path))
        stat = given.stat()
        found = _read(given.resolve(), stat.st_mtime_ns, stat.st_size)
    except OSError as error:
        raise CalibrationError(
            f"calibration={named(path)} cannot be read ({reason(error)}): give a file that "
            f"`kvcomp calibrate --method {method}` wrote"
        ) from error
    if found.method != method:
        raise CalibrationError(
            f"calibration={named(path)} is for {brief(found.method, 40)}, not for {method}: give a file that "
            f"`kvcomp calibrate --method {method}` wrote"
        )
    return found


def digest(path: str | Path) -> str | None:
    """sha256 of a file's content, computed once as long as it does not change; None where it cannot be read, and of
    what is no file, or too large for a calibration."""
    try:
        given = readable(expanded(path))
        stat = given.stat()
        return None if stat.st_size > LARGEST else _digest(given.resolve(), stat.st_mtime_ns, stat.st_size)
    except OSError:
        return None


@lru_cache(maxsize=64)
def _digest(path: Path, changed: int, size: int) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@lru_cache(maxsize=4)
def _read(path: Path, changed: int, size: int) -> Calibration:
    from safetensors import SafetensorError, safe_open

    if size > LARGEST:
        raise CalibrationError(f"{str(path)!r} is no calibration file: its {size:,} bytes are more than {LARGEST:,}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("kind") != KIND:
                raise CalibrationError(
                    f"{str(path)!r} was not written by this version's `kvcomp calibrate` "
                    f"(kind {quote(metadata.get('kind'), 40)}, expected {KIND!r}): calibrate again"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return _checked(State(metadata, "its header"), tensors, path)
    except (SafetensorError, DamagedError, RuntimeError, MemoryError) as error:
        raise CalibrationError(f"{str(path)!r} is damaged, or no calibration file: {error}") from error


def _checked(words: State, tensors: Mapping[str, Tensor], path: Path) -> Calibration:
    """The calibration of a file with such metadata and tensors; a DamagedError where it is none."""
    if CHECKSUM not in words:
        words.only(*WORDS)
    others = {name: words.text(name) for name in words if name != CHECKSUM}
    if CHECKSUM in words and words.text(CHECKSUM) != checksum(others, tensors):
        raise DamagedError("its checksum is not that of its content")
    for name, tensor in tensors.items():
        numbered = re.fullmatch(r"\d{1,6}\.\S+", name) is not None
        words.require(numbered, f"{quote(name, 40)} is the name of no tensor of a layer")
        words.require(tensor.dtype == torch.float32 and tensor.dim() > 0, f"{name} is {described(tensor)}")
        words.require(not bool((tensor.abs() > HUGE).any()), f"{name} has numbers beyond {HUGE:g}")
    texts = [State(text, f"{words.where}: a text") for text in parsed(words, "texts", list)]
    return Calibration(
        method=words.text("method"),
        settings=parsed(words, "settings", dict),
        model=Fingerprint(
            words.text("model"), words.text("config"), words.text("weights") or None, words.get("parameters") or None
        ),
        texts=tuple((text.text("name"), text.text("sha256")) for text in texts),
        tokens=_count(words, "tokens"),
        context=_count(words, "context"),
        tensors=tensors,
        version=words.text("kvcomp"),
        path=path,
    )


def _count(words: State, name: str) -> int:
    found = words.text(name)
    words.require(re.fullmatch(r"\d{1,18}", found) is not None, f"{name} is {described(found)}, expected a number")
    return int(found)
