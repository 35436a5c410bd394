"""Which tokens came in: logical lengths, and where the padding was."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from typing import Any

import torch
from torch import Tensor

from kvcomp.state import State

LONGEST = 1 << 40  # tokens that a run of a file may have


class History:
    """Per row: how many tokens were seen, and which of them were padding, as runs of equal treatment.

    `length` counts columns (padding included): the logical length that engines ask for. `counts` [B] counts real
    tokens.
    """

    def __init__(self) -> None:
        self.runs: list[tuple[int, Tensor | None]] = []
        self.length = 0
        self._counts = torch.zeros(0, dtype=torch.int64, device="cpu")
        self._ahead = 0  # columns without padding that `_counts` lacks
        self._total: int | None = 0  # forgotten where rows come, go or differ

    @property
    def counts(self) -> Tensor:
        """int64 [B]: real tokens."""
        if self._ahead:
            self._counts += self._ahead
            self._ahead = 0
        return self._counts

    @counts.setter
    def counts(self, counts: Tensor) -> None:
        self._counts, self._ahead = counts, 0

    def start(self, rows: int) -> None:
        self.counts, self._total = torch.zeros(rows, dtype=torch.int64, device="cpu"), 0

    @property
    def total(self) -> int:
        """Real tokens of all rows."""
        if self._total is None:
            self._total = int(self.counts.sum())
        return self._total

    def append(self, n: int, valid: Tensor | None) -> None:
        """n more columns; valid bool [B, n], or None where none is padding."""
        if valid is None and self.runs and self.runs[-1][1] is None:
            self.runs[-1] = (self.runs[-1][0] + n, None)
        else:
            self.runs.append((n, valid))
        self.length += n
        if valid is None:
            self._ahead += n
            self._total = None if self._total is None else self._total + n * self._counts.shape[0]
        else:
            self.counts += valid.sum(-1).cpu()
            self._total = None

    def newest(self, n: int) -> Tensor:
        """int64 [B]: real tokens among the last n columns."""
        total, left = torch.zeros_like(self.counts), n
        for size, valid in reversed(self.runs):
            take = min(size, left)
            total += take if valid is None else valid[:, size - take :].sum(-1).cpu()
            left -= take
            if not left:
                break
        return total

    def crop(self, n: int) -> None:
        """Forget the last n columns."""
        self.counts -= self.newest(n)
        self._total = None
        self.length -= n
        while n:
            size, valid = self.runs.pop()
            if size > n:
                self.runs.append((size - n, None if valid is None else valid[:, : size - n]))
            n -= min(size, n)

    def hide(self, gone: Tensor) -> None:
        """Real tokens that count as padding from now on: bool [B, length], on the host."""
        valid = self.valid()
        valid = ~gone if valid is None else valid & ~gone
        first = int(gone.any(0).int().argmax())
        kept, left = [], first
        for size, run in self.runs:
            take = min(size, left)
            if take:
                kept.append((take, None if run is None else run[:, :take]))
            left -= take
        self.runs = [*kept, (self.length - first, valid[:, first:].clone())]
        self.counts, self._total = valid.sum(-1), None

    def select(self, rows: Tensor) -> None:
        """Keep, repeat and order rows."""
        self.counts, self._total = self.counts[rows], None
        self.runs = [(n, None if valid is None else valid[rows.to(valid.device)]) for n, valid in self.runs]

    def fork(self) -> History:
        """A copy that goes on by itself."""
        twin = copy(self)
        twin.runs, twin.counts = list(self.runs), self.counts.clone()
        return twin

    @property
    def unpadded(self) -> bool:
        """Whether no run says where padding is."""
        one = len(self.runs) == 1 and self.runs[0][1] is None  # as in every layer of a step of most caches
        return one or all(valid is None for _, valid in self.runs)

    def valid(self) -> Tensor | None:
        """bool [B, length], or None where there was no padding."""
        if self.unpadded:
            return None
        rows = len(self.counts)
        every = torch.ones(rows, 1, dtype=torch.bool, device="cpu")
        pieces = [every.expand(-1, n) if valid is None else valid.cpu() for n, valid in self.runs]
        return torch.cat(pieces, 1)

    def state(self) -> dict[str, Any]:
        """What `restore` takes."""
        return {"counts": self.counts, "runs": [list(run) for run in self.runs]}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Become the history whose `state` this is: one of as many rows.

        Raises:
            DamagedError: the state is none of such a history.
        """
        state, rows = State.of(state, "history"), len(self.counts)
        state.only("counts", "runs")
        runs, seen = [], torch.zeros(rows, dtype=torch.int64, device="cpu")
        for i, run in enumerate(state.sequence("runs")):
            entry = State({"run": run}, f"{state.where}.runs.{i}")
            entry = State(dict(zip(("tokens", "valid"), entry.sequence("run", 2), strict=True)), entry.where)
            n = entry.integer("tokens", 0, LONGEST)
            valid = None if entry["valid"] is None else entry.tensor("valid", (rows, n), torch.bool)
            seen += n if valid is None else valid.sum(-1).cpu()
            runs.append((n, valid))
        counts = state.tensor("counts", (rows,), torch.int64)
        state.require(torch.equal(counts, seen), f"counts are {counts.tolist()}, but the runs have {seen.tolist()}")
        self.counts, self._total, self.runs = counts, None, runs
        self.length = sum(n for n, _ in runs)

    def tensors(self) -> list[Tensor]:
        return [self.counts] + [valid for _, valid in self.runs if valid is not None]
