"""What adapts to a prompt: the second moment of a stream's queries, until something was fitted to it."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy

import torch
from torch import Tensor
from torch.nn import functional as F

LARGEST = 1e15  # of a query's channels: their squares can be summed
LOUD = 8.0  # a query counts at most as one that is so many times as large as the median one of its chunk


class QueryMoments:
    """Per stream, the sum of q q' over its queries [S, D, D], dropped when all streams are fitted. Streams come as they
    are named. Tensors are never changed in place: forks share them."""

    def __init__(self, dim: int, device: torch.device) -> None:
        self.sums = torch.zeros(0, dim, dim, device=device, dtype=torch.float32)
        self.fitted = torch.zeros(0, dtype=torch.bool, device=device)

    def reserve(self, streams: int) -> None:
        """Know so many streams."""
        if streams > len(self.fitted):
            self.fitted = F.pad(self.fitted, (0, streams - len(self.fitted)))

    def add(self, streams: Tensor, queries: Tensor) -> None:
        """See queries [s, R, D] of `streams` (int64 [s])."""
        self.reserve(int(streams.max()) + 1)
        mine = ~self.fitted[streams]
        if bool(mine.any()):
            self.sums = F.pad(self.sums, (0, 0, 0, 0, 0, len(self.fitted) - len(self.sums)))
            q = queries[mine].float().clamp(-LARGEST, LARGEST)
            size = q.abs().amax(-1, keepdim=True)
            limit = LOUD * size.median(1, keepdim=True).values
            if bool((size > limit).any()):  # hardly ever
                q = q * (limit / size.clamp_min(1e-30)).clamp_max(1)
            self.sums = self.sums.index_add(0, streams[mine], q.mT @ q)

    def missing(self, streams: Tensor) -> Tensor:
        """bool [s]: those of `streams` that nothing was fitted to."""
        self.reserve(int(streams.max()) + 1)
        return ~self.fitted[streams]

    def take(self, streams: Tensor) -> Tensor:
        """The moments [s, D, D] of `streams`, which are fitted from now on; the identity where no query was seen."""
        dim = self.sums.shape[-1]
        weight = self.sums[streams] if len(self.sums) else self.sums.new_zeros(len(streams), dim, dim)
        weight[weight.diagonal(dim1=1, dim2=2).sum(-1) == 0] = torch.eye(dim, device=weight.device, dtype=torch.float32)
        self.fitted = self.fitted.index_fill(0, streams, True)
        if bool(self.fitted.all()):
            self.sums = self.sums[:0].clone()
        return weight

    def select(self, streams: Tensor) -> None:
        """Keep, repeat and order streams."""
        most = int(streams.max()) + 1 if len(streams) else 0
        self.reserve(most)
        self.fitted = self.fitted[streams]
        if len(self.sums):
            self.sums = F.pad(self.sums, (0, 0, 0, 0, 0, max(most - len(self.sums), 0)))[streams]

    def fork(self) -> QueryMoments:
        return copy(self)

    def constants(self) -> list[Tensor]:
        return [self.sums, self.fitted]

    def state(self) -> dict[str, Tensor]:
        return {"moment": self.sums, "fitted": self.fitted}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.sums, self.fitted = state["moment"], state["fitted"]

    def lacks(self, paged: Tensor, *fits: Tensor) -> str | None:
        """As `Codec.lacks`: bool [S] `paged`, and the tensors [n, ...] that were fitted to n streams."""
        streams = len(paged)
        if len(self.sums) > len(self.fitted) or max(map(len, (self.fitted, *fits))) > streams:
            return f"it was fitted to more than {streams} streams"
        used = paged.nonzero().flatten()
        known = min(map(len, (self.fitted, *fits))) > int(used.max()) if len(used) else True
        if not known or not (self.fitted.is_meta or bool(self.fitted[used.to(self.fitted.device)].all())):
            return "some streams have pages, but it was not fitted to them"
        return None
