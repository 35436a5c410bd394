"""What an engine holds of one layer: its attention, a pool for pages and one for windows, and requests' blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from kvcomp.cache.blocks.centres import Turned
from kvcomp.cache.blocks.decode import DecodeStep
from kvcomp.cache.blocks.layer import BlockLayer
from kvcomp.cache.blocks.pages import Pages
from kvcomp.cache.blocks.setup import Setup
from kvcomp.cache.blocks.step import Step
from kvcomp.cache.blocks.windows import Windows
from kvcomp.stages.stack import Stack

HEADS, GROUP, DIM = 2, 3, 64
COLUMNS, REQUESTS = 20, 6  # blocks of a request


def filled(setup: Setup, blocks: int, device: torch.device) -> Tensor:
    """A pool that holds nothing but NaN, whatever its bytes are read as."""
    cell = setup.record_bytes(HEADS) // setup.page_size
    return torch.full((blocks, HEADS, setup.page_size, cell), 0xFF, dtype=torch.uint8, device=device)


class BlockEngine:
    """A layer of 4, of a stack, for requests that each have all their blocks."""

    def __init__(
        self,
        stack: str,
        device: torch.device,
        layer: int = 2,
        biases: Turned | None = None,
        caching: bool = False,
        sliding: int | None = None,
        sinks: Tensor | None = None,
    ) -> None:
        given = {"layers": 4, "dim": DIM, "dtype": torch.float32, "caching": caching, "sliding": sliding}
        self.setup = setup = Setup(Stack.parse(stack), **given)
        self.device = device
        self.pool = filled(setup, 1 + REQUESTS * COLUMNS, device)
        self.table = 1 + torch.randperm(REQUESTS * COLUMNS).view(REQUESTS, COLUMNS).int()
        self.windows, self.blocks = None, None
        if setup.slots:
            self.windows = Windows(setup, HEADS, HEADS * GROUP)
            blocks = sum(self.windows.blocks(self.pool[0].nbytes))
            self.windows.at(filled(setup, 1 + REQUESTS * blocks, device).zero_())
            self.blocks = (1 + torch.arange(REQUESTS * blocks).view(REQUESTS, blocks)).to(device)
        self.pages = Pages(setup, layer, HEADS, device, biases).at(self.pool)
        self.layer = BlockLayer(self.pages, self.windows, HEADS * GROUP, DIM**-0.5, sinks=sinks)

    def slots(self, starts: list[int], lengths: list[int]) -> Tensor:
        """Places of the new tokens in the pool."""
        size, found = self.setup.page_size, []
        for r, (length, n) in enumerate(zip(lengths, torch.tensor(starts).diff().tolist(), strict=True)):
            place = torch.arange(length - n, length)
            found.append(self.table[r, place // size].long() * size + place % size)
        return torch.cat(found)

    def planned(
        self,
        starts: list[int],
        lengths: list[int],
        prompts: list[int] | None = None,
        found: list[int] | None = None,
    ) -> Step:
        table, slots = (x.to(self.device) for x in (self.table, self.slots(starts, lengths)))
        return Step.of(self.setup, HEADS, starts, lengths, prompts or [1] * len(lengths), table, slots, found)

    def attend(self, step: Step | DecodeStep, *new: Tensor) -> Tensor:
        out = torch.full_like(new[0], 7)
        self.layer.attend(step, *new, out, self.blocks)
        return out

    def random(self, tokens: int) -> list[Tensor]:
        return [torch.randn(tokens, n, DIM).to(self.device) for n in (HEADS * GROUP, HEADS, HEADS)]
