"""The ids and positions of the tokens that a cache was given: whether the next ones follow them."""

from __future__ import annotations

import warnings
from array import array
from copy import copy
from typing import Any

import torch
from torch import Tensor

from kvcomp.errors import KvcompWarning, UnsupportedError
from kvcomp.state import State

MERGED = 64  # single tokens whose ids stay on their device before they are brought to the host together


class Turns:
    """What the first compressed layer of a cache knows of ids and positions.

    Positions follow if a row's next token has that of its real tokens, of its columns, of what the mask shows, or the
    one that continues the positions so far. They are the caller's own affair (`free`) once a chunk does not count up.

    ids: those of each row's columns, on the host, four bytes each; None where some were not seen, or none are kept
    (`record`).
    """

    def __init__(self, record: bool = True) -> None:
        self.record = record
        self.asked = True  # whether a turn may begin with the next forward
        self.entered = False  # whether the model's own arguments were looked at before its first layer ran
        self.incoming: Tensor | None = None
        self.reset()

    def reset(self) -> None:
        self.ids: list[array[int]] | None = [] if self.record else None
        self.ahead: list[Tensor] = []  # ids that still lie where they came
        self._pairs: list[list[int]] | None = None  # `offsets`
        self.free = False
        self.jumped = False

    # -- ids ------------------------------------------------------------------------------------------------------

    def announce(self, ids: Any) -> None:
        """The ids [B, n] that come next, where a tensor is given and a record is kept."""
        self.incoming = ids if isinstance(ids, Tensor) and self.ids is not None else None

    def take(self, rows: int, n: int) -> None:
        """n columns come, with the incoming ids if they are as many."""
        new, self.incoming = self.incoming, None
        if self.ids is None:
            return
        if new is None or tuple(new.shape) != (rows, n):
            self.ids, self.ahead = None, []
            return
        self.ahead.append(new.detach())
        if n > 1 or new.device.type == "cpu" or len(self.ahead) >= MERGED:
            self._write()

    def _write(self) -> None:
        """Bring the ids that still lie where they came to the host."""
        if self.ahead and self.ids is not None:
            rows = (self.ahead[0] if len(self.ahead) == 1 else torch.cat(self.ahead, 1)).tolist()
            self.ids = self.ids or [array("i") for _ in rows]
            for record, row in zip(self.ids, rows, strict=True):
                record.extend(row)
        self.ahead = []

    def held(self, columns: int) -> Tensor | None:
        """int32 [B, columns]: the ids of all columns; None where they are not known."""
        self._write()
        if not self.ids or len(self.ids[0]) != columns:
            return None
        rows = [record.tolist() for record in self.ids]
        return torch.tensor(rows, dtype=torch.int32, device="cpu")

    def crop(self, n: int) -> None:
        """Forget the last n columns."""
        self._write()
        if n and self.ids:
            self.ids = [record[:-n] for record in self.ids]

    def select(self, rows: Tensor) -> None:
        """Keep, repeat and order rows."""
        self._write()
        if self.ids:
            self.ids = [self.ids[row][:] for row in rows.tolist()]
        self._settle(None if self.offsets is None else self.offsets[rows.cpu()])

    def fork(self) -> Turns:
        """A record that goes on by itself."""
        twin = copy(self)
        twin.ids = None if self.ids is None else [record[:] for record in self.ids]
        twin.ahead = list(self.ahead)
        return twin

    def state(self) -> dict[str, Any] | None:
        """What `restore` takes; None where positions are the usual ones."""
        plain = self._pairs is None and not self.free
        return None if plain else {"offsets": self._pairs, "free": self.free}

    def restore(self, state: State | None, rows: int) -> None:
        """Go on from a saved `state` of so many rows; the ids are not part of it.

        Raises:
            DamagedError: it is no such state.
        """
        self.reset()
        self.ids = None
        if state is None:
            return
        state.only("offsets", "free")
        self.free = state.flag("free")
        if state["offsets"] is not None:
            pairs = [list(pair) for pair in state.sequence("offsets", rows) if isinstance(pair, list | tuple)]
            plain = len(pairs) == rows and all(len(p) == 2 and all(type(x) is int for x in p) for p in pairs)
            state.require(plain, f"offsets is no list of two integers for each of {rows} rows")
            self._pairs = pairs

    # -- positions ------------------------------------------------------------------------------------------------

    def check(
        self, position_ids: Any, counts: Tensor, columns: int, valid: Tensor | None, shown: Tensor | None
    ) -> None:
        """Refuse positions [B or 1, n] that do not follow `columns` columns with counts [B] real tokens.

        valid bool [B, n]: which new tokens are no padding; None: all. shown int [B or 1]: cached tokens that the mask
        shows. On a GPU single tokens are looked at where a turn may begin, as looking waits for the device.

        Raises:
            UnsupportedError: a position that was there before comes again.
        """
        asked, self.asked = self.asked, False
        if self.free or not isinstance(position_ids, Tensor) or position_ids.dim() != 2:
            return
        rows, n = len(counts), position_ids.shape[1]
        if n == 0 or position_ids.shape[0] not in (1, rows) or (valid is not None and valid.shape[1] != n):
            return
        if n == 1 and valid is None:
            if not asked and position_ids.device.type != "cpu":
                return
            if columns and self._as_before(position_ids.flatten().tolist(), counts, columns):
                return
        positions = position_ids.cpu().expand(rows, n)
        real = torch.ones(rows, n, dtype=torch.bool, device="cpu") if valid is None else valid.cpu().expand(rows, n)
        before = torch.stack([counts, torch.full_like(counts, columns)], -1)  # [B, 2]
        ranks = torch.stack([real.cumsum(-1) - 1, torch.arange(n, device="cpu").expand(rows, n)], -1)  # [B, n, 2]
        offsets = positions[..., None] - ranks - before[:, None]  # [B, n, 2]: the same over a chunk that counts up
        some = real.any(1)
        first = real.int().argmax(1)
        every = torch.arange(rows, device="cpu")
        found = offsets[every, first]  # [B, 2]
        even = ((offsets == found[:, None]) | ~real[..., None]).all(1).any(1) | ~some
        if not bool(even.all()):
            self.free = True
            return
        old = self.offsets
        if columns:
            known = torch.zeros_like(found) if old is None else old
            due = ((found == 0) | (found == known)).any(1) | ~some
            start = positions[every, first]
            if shown is not None:
                due = due | (start == shown.cpu())
            if not bool(due.all()):
                row = int((~due).int().argmax())
                self._judge(row, int(start[row]), int(counts[row] + known[row, 0]))
        last = n - 1 - real.flip(1).int().argmax(1)
        ends = offsets[every, last]
        if old is not None:
            ends = torch.where(some[:, None], ends, old)
        self._settle(ends if bool(ends.any()) else None)

    def _as_before(self, positions: list[int], counts: Tensor, columns: int) -> bool:
        """Whether single tokens have the positions that continue those so far, by tokens and by columns."""
        if self._pairs is None:
            return all(position == columns for position in positions) and int(counts.min()) == columns
        each = positions if len(positions) == len(self._pairs) else positions * len(self._pairs)
        rows = zip(each, counts.tolist(), self._pairs, strict=True)
        return all(p - count == by_count and p - columns == by_column for p, count, (by_count, by_column) in rows)

    @property
    def offsets(self) -> Tensor | None:
        """int64 [B, 2]: a row's positions less its real tokens, and less its columns; None: all 0."""
        return None if self._pairs is None else torch.tensor(self._pairs, dtype=torch.int64, device="cpu")

    def _settle(self, offsets: Tensor | None) -> None:
        self._pairs = None if offsets is None else offsets.tolist()

    def _judge(self, row: int, position: int, due: int) -> None:
        """Refuse a position that is less than the one that was due; warn once of a greater one."""
        said = (
            f"the next token of row {row} has position {position}, but the tokens that the cache holds end before {due}"
        )
        if position < due:
            raise UnsupportedError(
                f"{said}: its ids or its attention mask do not go on from this cache, so call cache.reuse(ids) with "
                "all ids of the turn first, then generate(ids, past_key_values=cache), or start over with reset()"
            )
        if not self.jumped:
            warnings.warn(
                f"{said}: positions jump, as they do where the attention mask is longer than the cache and its new "
                "tokens; call cache.reuse(ids) first if that was not meant",
                KvcompWarning,
                stacklevel=2,
            )
            self.jumped = True


def common_prefix(a: Tensor, b: Tensor) -> int:
    """How many columns [B, n], [B, m] have in common from the start, in all rows."""
    n = min(a.shape[1], b.shape[1])
    differ = (a[:, :n] != b[:, :n]).any(0)
    return int(differ.int().argmax()) if bool(differ.any()) else n
