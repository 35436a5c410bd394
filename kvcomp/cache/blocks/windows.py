"""The exact windows of all requests in one layer: sinks, recent tokens and a page that is not full yet.

They lie in blocks of the same pool as the pages do, so that an engine has one kind of memory to hand out.
"""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from kvcomp.errors import UnsupportedError
from kvcomp.kernels.dispatch import runs

from .setup import Setup


class Slot(NamedTuple):
    """What a slot holds."""

    shape: tuple[int, int]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


class Windows:
    """`setup.slots` slots per request, each K and V [H, D] in `setup.exact_dtype`. `at` binds them to the pool.

    Where a policy has voters, as many slots for their queries [Hq, D] in the model's dtype come after those, in blocks
    of their own, which are free once the prompt is in.
    """

    def __init__(self, setup: Setup, heads: int, query_heads: int) -> None:
        self.setup = setup
        self.token = Slot((heads, 2 * setup.dim), setup.exact_dtype)
        self.query = Slot((query_heads, setup.dim), setup.dtype)
        self.pool = torch.empty(0, dtype=torch.uint8, device="cpu")

    def blocks(self, block_bytes: int) -> tuple[int, int]:
        """How many blocks of so many bytes a request needs for its tokens, and for the queries of its prompt.

        Raises:
            UnsupportedError: a block has no space for one token.
        """
        largest = max(self.token.nbytes, self.query.nbytes if self.setup.voters else 0)
        if block_bytes < largest:
            raise UnsupportedError(
                f"{self.setup.stack}: a block of {block_bytes} bytes is smaller than one token in full precision, "
                f"{largest} bytes: use larger blocks"
            )
        kept, more = (
            -(-slots // (block_bytes // slot.nbytes))
            for slots, slot in ((self.setup.slots, self.token), (self.setup.voters, self.query))
        )
        return kept, more

    def at(self, pool: Tensor) -> Windows:
        """Bound to blocks uint8 [blocks, ...], contiguous."""
        self.pool = pool
        return self

    def starts(self, blocks: Tensor, slots: Tensor) -> Tensor:
        """int64 [R, n]: where slots [R, n] of requests whose blocks are [R, m] begin, in every layer alike."""
        return self._starts(self.token, blocks, slots)

    def read(self, starts: Tensor) -> Tensor:
        """Keys and values [R, H, n, 2 * D] in the model's dtype, side by side, of slots that begin at starts [R, n]."""
        heads, width = self.token.shape
        head = torch.arange(0, heads * width, width, device=starts.device)
        held: Tensor = runs(self._flat(self.token), starts[:, None] + head[:, None], width)
        return held.to(self.setup.dtype)

    def write(self, starts: Tensor, keys: Tensor, values: Tensor) -> None:
        """Keep keys and values [w, H, D] in slots that begin at starts [w]."""
        self._put(self.token, starts, torch.cat([keys, values], -1))

    def read_queries(self, blocks: Tensor, slots: Tensor) -> Tensor:
        """Queries [n, Hq, D] in slots [n] of a request whose blocks are [m]."""
        starts = self._starts(self.query, self._behind(blocks[None]), slots[None])[0]
        shape = self.query.shape
        kept: Tensor = runs(self._flat(self.query), starts, prod(shape)).unflatten(1, shape)
        return kept

    def write_queries(self, blocks: Tensor, slots: Tensor, queries: Tensor) -> None:
        """Keep queries [w, Hq, D] in slots [w] of requests whose blocks are [w, m]."""
        self._put(self.query, self._starts(self.query, self._behind(blocks), slots[:, None])[:, 0], queries)

    def _put(self, slot: Slot, starts: Tensor, rows: Tensor) -> None:
        rows = rows.flatten(1).to(slot.dtype)
        self._flat(slot)[starts[:, None] + torch.arange(rows.shape[1], device=starts.device)] = rows

    def _behind(self, blocks: Tensor) -> Tensor:
        """Those of a request's blocks [R, m] that are for queries."""
        return blocks[:, -(-self.setup.slots // self._room(self.token)) :]

    def _flat(self, slot: Slot) -> Tensor:
        """The pool's elements in the slot's dtype."""
        return self.pool.view(-1).view(slot.dtype)

    def _room(self, slot: Slot) -> int:
        """Slots in a block."""
        return self.pool[0].nbytes // slot.nbytes

    def _starts(self, slot: Slot, blocks: Tensor, slots: Tensor) -> Tensor:
        room, block = self._room(slot), self.pool[0].nbytes // slot.dtype.itemsize
        return blocks.gather(1, slots // room) * block + slots % room * prod(slot.shape)
