"""A compressed cache in one safetensors file: its tensors as they are held, and metadata that says what they are.

A state is plain values, tensors, and lists, tuples and dicts of them. Its tensors become the file's, each storage once;
the rest becomes JSON in the metadata, where {"$tensor": name} stands for a tensor. A checksum covers all of it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from reprlib import repr as short
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kvcomp import __version__
from kvcomp.errors import KvcompError, UnsupportedError
from kvcomp.files import FilePath, named, readable, reason, whole
from kvcomp.stages.stack import Stack
from kvcomp.state import CHECKSUM, DamagedError, State, checksum, described, parsed
from kvcomp.text import brief, quote

FORMAT, VERSION = "kvcomp cache", "1"
WORDS = ("format", "version", "kvcomp", "stack", "stack_hash", "dtype", "model", "layers")
PLAIN = (type(None), bool, int, float, str)
DEEPEST = 100  # lists in lists of a state
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
        *(torch.uint64, torch.uint32, torch.uint16, torch.complex64),
    )
}


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
    metadata[CHECKSUM] = checksum(metadata, tensors.by_name)
    try:
        with whole(path) as scratch:
            save_file(tensors.by_name, scratch, metadata)
    except (OSError, SafetensorError) as error:
        raise KvcompError(f"save({named(path)}): it cannot be written: {_reason(error)}") from error


def read(path: FilePath) -> Saved:
    """Read a file that `write` made.

    Raises:
        KvcompError: no such file, an incomplete or damaged one, one of something else or of another version of the
            format, or a stack that means something else by now.
        SpecError: a stack with stages that are not installed.
    """
    with opened(path) as file:
        return file.saved()


@contextmanager
def opened(path: FilePath) -> Iterator[CacheFile]:
    """A file that `write` made, of which only the header is read. A DamagedError of the block names the file.

    Raises:
        KvcompError, SpecError: as `read`.
    """
    asked = f"load({named(path)})"
    try:
        with _mapped(asked, path) as tensors:
            yield CacheFile(asked, tensors)
    except DamagedError as error:
        raise KvcompError(f"{asked}: the file is damaged: {error}") from error


def _mapped(asked: str, path: FilePath) -> Any:
    """A safetensors file, mapped into memory."""
    try:
        file = readable(path)
        size = file.stat().st_size
        if size > _memory():
            raise KvcompError(f"{asked}: its {size:,} bytes are more than the memory of this machine")
        return safe_open(file, framework="pt")
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise KvcompError(f"{asked}: there is no such file") from error
    except (OSError, SafetensorError) as error:
        raise KvcompError(f"{asked}: no complete safetensors file: {_reason(error)}") from error
    except (RuntimeError, MemoryError) as error:  # torch, of a file that it cannot map
        raise KvcompError(f"{asked}: it cannot be mapped into memory: {error}") from error


class CacheFile:
    """An open file.

    outline: its description, with None in place of tensors.
    """

    def __init__(self, asked: str, tensors: Any) -> None:
        self._tensors, self._names = tensors, sorted(tensors.keys())
        metadata = tensors.metadata() or {}
        if metadata.get("format") != FORMAT:
            raise KvcompError(f"{asked}: it holds tensors, but no cache: expected a file that save() wrote")
        words = State(metadata, "the header")
        wrote = f"kvcomp {brief(words.text('kvcomp'), 40)}"
        if words.text("version") != VERSION:
            raise KvcompError(
                f"{asked}: format version {brief(words['version'], 40)}, written by {wrote}; kvcomp "
                f"{__version__} reads version {VERSION}"
            )
        if CHECKSUM not in metadata:
            words.only(*WORDS)
        self._checksum, self._metadata = metadata.pop(CHECKSUM, None), metadata
        stack = Stack.parse(words.text("stack"))
        if stack.hash != words.text("stack_hash"):
            raise KvcompError(
                f"{asked}: {quote(str(stack))} means something else here than where {wrote} wrote it: "
                "a default of a stage has changed, or the content of a file that the stack names"
            )
        self._layers, model = parsed(words, "layers", list), parsed(words, "model", dict)
        layers, used = _unpacked(self._layers, dict.fromkeys(self._names))
        words.require(used == set(self._names), "some tensors are in no layer")
        dtype = words.text("dtype")
        words.require(dtype in ("", *DTYPES), f"dtype is {described(dtype)}")
        self.outline = Saved(stack, dtype, model, layers)

    def saved(self) -> Saved:
        """All of it, on the host.

        Raises:
            DamagedError: it is not what was written.
        """
        try:
            found = {name: self._tensors.get_tensor(name) for name in self._names}
            if self._checksum is not None and self._checksum != checksum(self._metadata, found):
                raise DamagedError("its checksum is not that of its content")
            own = {name: tensor.clone() for name, tensor in found.items()}  # views would keep the file mapped
        except (SafetensorError, RuntimeError, MemoryError) as error:
            raise DamagedError(f"its tensors cannot be read: {error}") from error
        return replace(self.outline, layers=_unpacked(self._layers, own)[0])


def _memory() -> float:
    """Bytes of memory that this machine has; infinite where the system does not say."""
    try:
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, ValueError, OSError):
        return float("inf")


def _reason(error: Exception) -> str:
    """What the system or safetensors says, without where in safetensors it was said."""
    if isinstance(error, OSError):
        return reason(error)
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


def _unpacked(packed: Any, tensors: Mapping[str, Any]) -> tuple[Any, set[str]]:
    """The state of which `packed` is the JSON, on the host, and the names of its tensors.

    Raises:
        DamagedError: it is no state's, or names tensors that are not there.
    """
    used: set[str] = set()

    def unpack(packed: Any, depth: int) -> Any:
        if depth > DEEPEST:
            raise DamagedError(f"the layers are nested more than {DEEPEST} deep")
        if isinstance(packed, list):
            return [unpack(item, depth + 1) for item in packed]
        if not isinstance(packed, dict):
            return packed
        kind, value = next(iter(packed.items())) if len(packed) == 1 else ("", None)
        if kind == "$tensor" and isinstance(value, str) and value in tensors:
            used.add(value)
            return tensors[value]
        if kind == "$dtype" and isinstance(value, str) and value in DTYPES:
            return DTYPES[value]
        if kind == "$device" and value is None:
            return torch.device("cpu")
        if kind == "$tuple" and isinstance(value, list):
            return tuple(unpack(item, depth + 1) for item in value)
        if kind == "$dict" and isinstance(value, list) and all(map(_is_entry, value)):
            return {key: unpack(item, depth + 1) for key, item in value}
        raise DamagedError(f"the layers have {short(packed)}, which stands for nothing that a state holds")

    return unpack(packed, 0), used


def _is_entry(entry: Any) -> bool:
    """Whether it is a key and an item of a dict."""
    return isinstance(entry, list) and len(entry) == 2 and type(entry[0]) in PLAIN
