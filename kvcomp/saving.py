"""A compressed cache in one safetensors file: its tensors as they are held, and metadata that says what they are.

A state is plain values, tensors, and lists, tuples and dicts of them. Its tensors become the file's, each storage once;
the rest becomes JSON in the metadata, where {"$tensor": name} stands for a tensor.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kvcomp import __version__
from kvcomp.errors import KvcompError, UnsupportedError
from kvcomp.stack import Stack

FORMAT, VERSION = "kvcomp cache", "1"
PLAIN = (type(None), bool, int, float, str)

FilePath = str | os.PathLike[str]


@dataclass(frozen=True)
class Saved:
    """What a file holds.

    stack: the cache's. dtype: of its keys and values, as in "bfloat16"; "" where it holds none. model: what the writer
    said of the model. layers: a state per layer, tensors on the host.
    """

    stack: Stack
    dtype: str
    model: dict[str, Any]
    layers: list[Any]


def write(path: FilePath, saved: Saved) -> None:
    """Write a file whole or not at all: an earlier one at `path` stays until the new one is complete.

    Raises:
        KvcompError: it cannot be written.
        UnsupportedError: a state holds something else than plain values and tensors.
    """
    tensors = _Tensors()
    layers = [_pack(layer, f"layers.{i}", tensors) for i, layer in enumerate(saved.layers)]
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "kvcomp": __version__,
        "stack": str(saved.stack),
        "stack_hash": saved.stack.hash,
        "dtype": saved.dtype,
        "model": json.dumps(saved.model),
        "layers": json.dumps(layers),
    }
    file = Path(path)
    part = file.parent / f".{uuid4().hex}.part"
    try:
        save_file(tensors.by_name, part, metadata)
        os.replace(part, file)
    except (OSError, SafetensorError) as error:
        raise KvcompError(f"save({str(file)!r}): it cannot be written: {_reason(error)}") from error
    finally:
        with suppress(OSError):
            part.unlink()


def read(path: FilePath) -> Saved:
    """Read a file that `write` made.

    Raises:
        KvcompError: no such file, an incomplete one, one of something else or of another version of the format, or a
            stack that means something else by now.
        SpecError: a stack with stages that are not installed.
    """
    file = Path(path)
    asked = f"load({str(file)!r})"
    if not file.is_file():
        raise KvcompError(f"{asked}: there is no such file")
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise KvcompError(f"{asked}: it holds tensors, but no cache: expected a file that save() wrote")
            if metadata["version"] != VERSION:
                raise KvcompError(
                    f"{asked}: format version {metadata['version']}, written by kvcomp {metadata['kvcomp']}; kvcomp "
                    f"{__version__} reads version {VERSION}"
                )
            names = opened.keys()
            tensors = {name: opened.get_tensor(name).clone() for name in names}  # views would keep the file mapped
    except (OSError, SafetensorError) as error:
        raise KvcompError(f"{asked}: no complete safetensors file: {_reason(error)}") from error
    stack = Stack.parse(metadata["stack"])
    if stack.hash != metadata["stack_hash"]:
        raise KvcompError(
            f"{asked}: {str(stack)!r} means something else here than where kvcomp {metadata['kvcomp']} wrote it: "
            "a default of a stage has changed, or the content of a file that the stack names"
        )
    layers = [_unpack(layer, tensors) for layer in json.loads(metadata["layers"])]
    return Saved(stack, metadata["dtype"], json.loads(metadata["model"]), layers)


def _reason(error: Exception) -> str:
    """What the system or safetensors says, without where in safetensors it was said."""
    return str(error).rpartition("I/O error: ")[2].partition(" at path ")[0]


class _Tensors:
    """Tensors by name, on the host and contiguous; one that is given twice is kept once."""

    def __init__(self) -> None:
        self.by_name: dict[str, Tensor] = {}
        self._names: dict[Any, str] = {}

    def add(self, name: str, tensor: Tensor) -> str:
        """Returns the name that the tensor has. It has to stay alive as long as others are added."""
        where = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if where not in self._names:
            self._names[where] = name
            own = tensor.detach().cpu().contiguous()
            self.by_name[name] = own if own.untyped_storage().nbytes() == own.nbytes else own.clone()
        return self._names[where]


def _pack(value: Any, name: str, tensors: _Tensors) -> Any:
    """A state as JSON; its tensors are added to `tensors` under names that start with `name`."""
    if isinstance(value, Tensor):
        return {"$tensor": tensors.add(name, value)}
    if isinstance(value, torch.dtype):
        return {"$dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"$device": None}
    if type(value) in (list, tuple):
        items = [_pack(item, f"{name}.{i}", tensors) for i, item in enumerate(value)]
        return items if type(value) is list else {"$tuple": items}
    if type(value) is dict:
        return {"$dict": [[_plain(key, name), _pack(item, f"{name}.{key}", tensors)] for key, item in value.items()]}
    return _plain(value, name)


def _plain(value: Any, name: str) -> Any:
    if type(value) not in PLAIN:
        raise UnsupportedError(
            f"save: {name} is a {type(value).__name__}, but a file holds tensors, numbers and words: this cache cannot "
            "be saved"
        )
    return value


def _unpack(packed: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The state of which `packed` is the JSON, on the host."""
    if isinstance(packed, list):
        return [_unpack(item, tensors) for item in packed]
    if not isinstance(packed, dict):
        return packed
    ((kind, value),) = packed.items()
    if kind == "$tensor":
        return tensors[value]
    if kind == "$dtype":
        return getattr(torch, value)
    if kind == "$device":
        return torch.device("cpu")
    if kind == "$tuple":
        return tuple(_unpack(item, tensors) for item in value)
    return {key: _unpack(item, tensors) for key, item in value}
