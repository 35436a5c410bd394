"""Bytes held and bytes read. Held is what the allocator holds: storages, not the elements a view happens to show."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from kvcomp.text import size_text

MIB = 1 << 20


@dataclass(frozen=True)
class Memory:
    """What a cache holds, in bytes.

    held: all live bytes. dense: what K and V of all tokens seen (padding excluded) take in the model's dtype.
    effective_bits: held bits per stored element of K and V. parts: held by part; they sum to held.
    """

    held: int
    dense: int
    effective_bits: float
    parts: dict[str, int]

    @property
    def ratio(self) -> float:
        """How many times smaller than dense."""
        return self.dense / self.held if self.held else float("nan")

    def __repr__(self) -> str:
        bits = f", {self.effective_bits:.2f} effective bits" if self.held else ""
        return f"Memory(held={size_text(self.held)}, dense={size_text(self.dense)}{bits}{_by_part(self.parts)})"


@dataclass(frozen=True)
class Traffic:
    """What the last decode step loaded of the cache, in bytes; dense is what full-precision K and V would have cost."""

    read: int
    dense: int
    parts: dict[str, int]

    @property
    def ratio(self) -> float:
        """How many times less than dense."""
        return self.dense / self.read if self.read else float("nan")

    def __repr__(self) -> str:
        return f"Traffic(read={size_text(self.read)}, dense={size_text(self.dense)}{_by_part(self.parts)})"


def _by_part(parts: Mapping[str, int]) -> str:
    return "".join(f", {name} {size_text(size)}" for name, size in parts.items())


class ReadPlan:
    """What attention read: by part, how many things of how many bytes. Numbers that a device holds stay there until
    somebody asks for `bytes`: a decode step does not wait for them."""

    __slots__ = ("counted",)

    def __init__(self) -> None:
        self.counted: list[tuple[str, int, int | Tensor]] = []

    def add(self, part: str, size: int, count: int | Tensor = 1) -> None:
        """`count` more things of `size` bytes; a tensor stands for its sum, and must not change later."""
        if not isinstance(count, int) and count.is_cpu:
            count = sum(count.tolist())
        self.counted.append((part, size, count))

    def bytes(self) -> dict[str, int]:
        """By part. Waits for the device where a number is there."""
        return add_counts((part, size * int(n if isinstance(n, int) else n.sum())) for part, size, n in self.counted)

    @property
    def tensors(self) -> list[Tensor]:
        """Numbers that are not known to the host."""
        return [count for _, _, count in self.counted if isinstance(count, Tensor)]


def add_counts(parts: Iterable[tuple[str, int]]) -> dict[str, int]:
    """Sum by part, in the order in which parts come; empty parts stay."""
    total: dict[str, int] = {}
    for name, size in parts:
        total[name] = total.get(name, 0) + size
    return total


def storage_bytes(tensors: Iterable[Tensor], seen: set[int] | None = None) -> int:
    """Bytes of the distinct storages of `tensors`; those in `seen` (addresses) are skipped and new ones added."""
    seen = set() if seen is None else seen
    total = 0
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
    return total


def add_parts(parts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Sum of several breakdowns, without empty entries."""
    total: Counter[str] = Counter()
    for part in parts:
        total.update(part)
    return {name: value for name, value in total.items() if value}
