"""States as files give them back: named values whose types, shapes and numbers are checked before they are used."""

from __future__ import annotations

import json
import sys
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from kvcomp.errors import KvcompError
from kvcomp.text import quote, shorten

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
CHECKSUM = "crc32"  # in the metadata of a file: `checksum` of the rest; files of the first kvcomp have none


class DamagedError(KvcompError):
    """A file whose content is not what kvcomp writes."""


class State(Mapping[str, Any]):
    """A dict of a state, whose content is not trusted: what is asked for is of the type asked for, or an error says
    what is wrong. `where` names the state in errors.

    Raises:
        DamagedError: in every method, and where `value` is no dict of named values.
    """

    def __init__(self, value: Any, where: str) -> None:
        if not isinstance(value, Mapping) or any(type(name) is not str for name in value):
            raise DamagedError(f"{where} is {described(value)}, expected named values")
        self._values, self.where = value, where

    @classmethod
    def of(cls, value: Any, where: str) -> State:
        """The state itself if it is one already, under the name that it has."""
        return value if isinstance(value, State) else cls(value, where)

    def __getitem__(self, name: str) -> Any:
        self.require(name in self._values, f"{name} is missing")
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, name: object) -> bool:
        return name in self._values

    def get(self, name: str, default: Any = None) -> Any:
        return self._values.get(name, default)

    def require(self, fulfilled: bool | Tensor, told: str) -> None:
        """Raise an error that says `told` of this state, unless `fulfilled`."""
        if not fulfilled:
            raise DamagedError(f"{self.where}: {told}")

    def only(self, *names: str) -> None:
        """Nothing but these names."""
        unknown = [name for name in self._values if name not in names]
        self.require(not unknown, f"{shorten(', '.join(map(quote, unknown)))} is unknown")

    def tensor(self, name: str, shape: tuple[int | None, ...], *dtypes: torch.dtype) -> Tensor:
        """A tensor of one of these dtypes and of this shape; None: any size."""
        found: Tensor = self[name]
        fits = (
            isinstance(found, Tensor)
            and found.dtype in dtypes
            and found.dim() == len(shape)
            and all(want in (None, size) for want, size in zip(shape, found.shape, strict=True))
        )
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        self.require(fits, f"{name} is {described(found)}, expected {kinds} [{wanted}]")
        return found

    def numbers(self, name: str, shape: tuple[int | None, ...], dtype: torch.dtype, low: int, high: int) -> Tensor:
        """A tensor of integers on the host, each of them from `low` to `high`."""
        found = self.tensor(name, shape, dtype)
        if found.numel():
            least, most = (int(x) for x in found.aminmax())
            self.require(low <= least and most <= high, f"{name} has {least} to {most}, expected {low} to {high}")
        return found

    def finite(self, name: str, shape: tuple[int | None, ...], *dtypes: torch.dtype) -> Tensor:
        """A tensor without nan and infinities."""
        found = self.tensor(name, shape, *dtypes)
        self.require(found.is_meta or bool(found.isfinite().all()), f"{name} is not finite")
        return found

    def integer(self, name: str, low: int, high: int | None = None) -> int:
        """An integer from `low` to `high`."""
        found: int = self[name]
        fits = type(found) is int and low <= found and (high is None or found <= high)
        upper = "" if high is None else f" to {high}"
        self.require(
            fits, f"{name} is {described(found)}, expected an integer, {low}{upper}{'' if upper else ' or more'}"
        )
        return found

    def flag(self, name: str) -> bool:
        """True or False."""
        found: bool = self[name]
        self.require(type(found) is bool, f"{name} is {described(found)}, expected True or False")
        return found

    def text(self, name: str) -> str:
        """A string."""
        found: str = self[name]
        self.require(type(found) is str, f"{name} is {described(found)}, expected text")
        return found

    def number(self, name: str) -> float:
        """A finite number."""
        found = self[name]
        fits = type(found) in (int, float) and abs(found) <= sys.float_info.max
        self.require(fits, f"{name} is {described(found)}, expected a finite number")
        return float(found)

    def sequence(self, name: str, length: int | None = None) -> list[Any]:
        """A list or a tuple."""
        found = self[name]
        fits = isinstance(found, list | tuple) and length in (None, len(found))
        self.require(fits, f"{name} is {described(found)}, expected a list{'' if length is None else f' of {length}'}")
        return list(found)

    def part(self, name: str) -> State:
        """A state in this one."""
        return State(self[name], f"{self.where}.{name}")


def described(value: Any) -> str:
    """A value of any kind in a few words."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if value is None or isinstance(value, bool | float):
        return str(value)
    if isinstance(value, int):
        return str(value) if abs(value) < 10**20 else "a huge integer"
    if isinstance(value, str):
        return repr(value if len(value) <= 40 else value[:37] + "...")
    return f"a {type(value).__name__}"


def learned(state: State, fresh: Mapping[str, Tensor], streams: int, device: torch.device) -> State:
    """The tensors of what a codec or an index learned of so many streams, on `device`, or where `fresh` has them.

    fresh: the same before anything was learned. Tensors of those names have the same dtypes, and the same sizes but
    where those are 0; numbers are finite. Others, of an older form perhaps, are for the codec to check.
    """
    found = {}
    for name in state:
        like = fresh.get(name)
        state.require(isinstance(state[name], Tensor), f"{name} is {described(state[name])}, expected a tensor")
        if like is not None:
            tensor = state.tensor(name, tuple(size or None for size in like.shape), like.dtype)
            many = tensor.dim() > 1 and not like.shape[0] and len(tensor) > streams
            state.require(not many, f"{name} is {described(tensor)}, but there are {streams} streams")
        tensor = state[name]
        state.require(tensor.is_meta or bool(tensor.isfinite().all()), f"{name} is not finite")
        found[name] = tensor.to(device if like is None else like.device)
    return State(found, state.where)


def parsed(words: State, name: str, kind: type) -> Any:
    """The JSON that a word of a file's metadata is, a list or a dict.

    Raises:
        DamagedError: it is none.
    """
    try:
        found = json.loads(words.text(name))
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{words.where}: {name} is no JSON") from error
    words.require(isinstance(found, kind), f"{name} is {described(found)}, expected a {kind.__name__}")
    return found


def checksum(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """CRC-32 of metadata and of contiguous tensors on the host, with their names, dtypes and shapes."""
    found = 0
    for name in sorted(metadata):
        found = zlib.crc32(f"{len(name)} {len(metadata[name])} {name}{metadata[name]}".encode(), found)
    for name in sorted(tensors):
        tensor = tensors[name]
        found = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode(), found)
        if tensor.numel():
            content: Any = tensor.reshape(-1).view(torch.uint8).numpy()
            found = zlib.crc32(content, found)
    return f"{found:08x}"
