"""What a codec learns of each stream from its first tokens, once and for all."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy

import torch
from torch import Tensor
from torch.nn import functional as F

from kvcomp.state import DamagedError

TINY = 1e-30
LOUD = 2.0  # a token counts at most as one that is so many times as large as the median token


class PerStream:
    """A vector per stream, settled once.

    values [S, D], until settled zeros, or 0, 1, ... where they are `counted`; settled bool [S]. Streams come as they
    are named. Once there is memory for all of them, both tensors are changed in place.

    shared: there are n values for n heads, and stream s has value s mod n.
    """

    shared = False

    def __init__(self, dim: int, dtype: torch.dtype, device: torch.device, counted: bool = False) -> None:
        self.counted = counted
        self.values = torch.zeros(0, dim, dtype=dtype, device=device)
        self.settled = torch.zeros(0, dtype=torch.bool, device=device)

    def reserve(self, streams: int) -> None:
        """Know so many streams."""
        missing = streams - len(self.settled)
        if missing > 0 and not self.shared:
            self.values = torch.cat([self.values, self._blank(missing)])
            self.settled = F.pad(self.settled, (0, missing))

    def new(self, streams: Tensor, due: Tensor | None) -> Tensor | None:
        """bool [s]: those of `streams` that are to be settled, as `Codec.fit` has them; None: surely none is."""
        if due is None:
            self.reserve(int(streams.max()) + 1)
        settled = self.settled[self._at(streams)]
        if due is None and settled.is_cpu and bool(settled.all()):  # elsewhere the host would wait
            return None
        return ~settled if due is None else ~settled & due

    def settle(self, streams: Tensor, new: Tensor, values: Tensor) -> None:
        """Take values [s, D] for those of `streams` that are `new`."""
        at = self._at(streams)
        self.values[at] = torch.where(new[:, None], values.to(self.values.dtype), self.values[at])
        self.settled[at] = self.settled[at] | new

    def of(self, streams: Tensor) -> Tensor:
        """[m, D] of `streams` [m]."""
        return self.values[self._at(streams)] if len(self.values) else self._blank(len(streams))

    def all(self, streams: int) -> Tensor:
        """[streams, D]: of all streams in order."""
        self.reserve(streams)
        return self.values.repeat(streams // len(self.values), 1) if self.shared else self.values

    def share(self, values: Tensor, settled: Tensor) -> None:
        """Have values [n, D], of which some are settled bool [n], for n heads.

        Raises:
            DamagedError: as `restore`.
        """
        self._check("what heads share", values, settled)
        self.values, self.settled, self.shared = values, settled, True

    def _blank(self, streams: int) -> Tensor:
        """[streams, D]: of those that are not settled."""
        row = self.values.new_zeros(self.values.shape[1])
        if self.counted:
            row = torch.arange(len(row), dtype=row.dtype, device=row.device)
        return row.expand(streams, -1)

    def _at(self, streams: Tensor) -> Tensor:
        return streams % len(self.settled) if self.shared else streams

    def select(self, streams: Tensor) -> None:
        """Keep, repeat and order streams."""
        if len(streams):
            self.reserve(int(streams.max()) + 1)
        at = self._at(streams)
        self.values, self.settled, self.shared = self.values[at], self.settled[at], False

    def fork(self) -> PerStream:
        twin = copy(self)
        twin.values, twin.settled = self.values.clone(), self.settled.clone()
        return twin

    @property
    def tensors(self) -> list[Tensor]:
        return [self.values, self.settled]

    def state(self, name: str) -> dict[str, Tensor]:
        return {f"{name}.values": self.values, f"{name}.settled": self.settled}

    def restore(self, name: str, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` gave.

        Raises:
            DamagedError: values and marks of other numbers of streams, or an order that does not name every channel.
        """
        values, settled = state[f"{name}.values"], state[f"{name}.settled"]
        self._check(name, values, settled)
        self.values, self.settled = values, settled

    def _check(self, name: str, values: Tensor, settled: Tensor) -> None:
        if settled.shape != values.shape[:1]:
            raise DamagedError(f"{name} has values of {len(values)} streams, but marks {tuple(settled.shape)} of them")
        if self.counted and not values.is_meta:
            channels = torch.arange(values.shape[-1], dtype=values.dtype, device=values.device)
            if bool((values.sort(-1).values != channels).any()):
                raise DamagedError(f"{name} does not name every channel once")


def weights(x: Tensor, loud: float = LOUD) -> tuple[Tensor, Tensor]:
    """[s, n, 1]: what each token of x [s, n, D] counts for, 1 or less, single outliers as `loud` usual ones at most;
    and [s, 1, 1]: how large a usual one is; of x's dtype, a float of 32 bits or more.

    w_t = min(1, `loud` m / |x_t|); |.| is the largest magnitude and m its median over tokens.
    """
    size = x.abs().amax(-1, keepdim=True)
    unit = size.median(1, keepdim=True).values
    return (loud * unit / size.clamp_min(TINY)).clamp_max(1), unit.clamp_min(TINY)
