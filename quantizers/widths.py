"""Bits per element of K and V: together, or each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvcomp.stages import Quantizer, arg

BITS = "bits per element of K and V"
K_BITS = "bits per element of K, where it differs"
V_BITS = "bits per element of V, where it differs"


@dataclass(frozen=True)
class WidthQuantizer(Quantizer):
    """A quantizer of so many bits: `bits` for both sides, `k` and `v` for one.

    Equal stacks are written alike, so that results of the same stack meet: `bits` alone where K and V agree, otherwise
    `k` and `v` alone.
    """

    widths: ClassVar[tuple[float, ...]]  # what is accepted

    bits: int | float | None = arg(4, BITS)
    k: int | float | None = arg(None, K_BITS)
    v: int | float | None = arg(None, V_BITS)

    def __post_init__(self) -> None:
        super().__post_init__()
        *head, last = (f"{width:g}" for width in self.widths)
        accepted = f"{', '.join(head)} or {last}"
        for argument in ("bits", "k", "v"):
            value = getattr(self, argument)
            self.check(value is None or value in self.widths, argument, accepted)
        if self.bits is None:
            self.check(self.k is not None, "k", f"{accepted} where there are no bits")
            self.check(self.v is not None, "v", f"{accepted} where there are no bits")
        k, v = self.k_bits, self.v_bits
        settled = {"bits": k, "k": None, "v": None} if k == v else {"bits": None, "k": k, "v": v}
        for argument, value in settled.items():
            object.__setattr__(self, argument, value)

    @property
    def implied(self) -> tuple[str, ...]:
        return ("bits",) if self.bits is None else ("k", "v")

    @property
    def k_bits(self) -> int | float:
        return _plain(self.bits if self.k is None else self.k)

    @property
    def v_bits(self) -> int | float:
        return _plain(self.bits if self.v is None else self.v)


def _plain(bits: float | None) -> int | float:
    """2.0 and 2 are written alike."""
    assert bits is not None
    return int(bits) if bits == int(bits) else bits
