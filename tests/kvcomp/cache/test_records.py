"""Records are written where their ids say, and nowhere below 0, whoever writes: C, PyTorch, or PyTorch that looks at
nothing."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kvcomp import Stack
from kvcomp.cache.records import PageMemory, Records
from kvcomp.errors import KvcompWarning
from kvcomp.kernels.dispatch import reference_only
from kvcomp.stages import PageShape

SPECS = [
    "none",
    "int(bits=4)",
    "kivi(bits=2, group=16)",
    "turboquant(bits=4)",
    "kivi(bits=2, group=16) + quest(dense_layers=0)",
    "nvfp4 + moba",
]
STREAMS, DIM, PAGES, FILL = 3, 64, 11, 0xA5
IDS = [
    [[4, -1], [0, 7], [-1, -1]],
    [[-1, -1], [-1, -1], [-1, -1]],
    [[-1, 0], [-1, -1], [-1, -1]],
    [[1, 2], [3, 4], [5, 6]],
    [[-1, -1], [-1, -1], [9, 0]],
]


class LooksAtNothing(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        indexing = func in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default)
        looks = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags)
        assert indexing or not looks, func
        return func(*args, **(kwargs or {}))


def made(spec: str, host: bool | None = None) -> Records:
    plan = Stack.parse(spec + " + window(recent=0)").plan(0, 1)
    shape = PageShape(plan.page_size, DIM, DIM, STREAMS, torch.float32, torch.device("cpu"), 0)
    records = Records(plan, shape)
    data = torch.full((PAGES, records.layout.bytes_per_page + 32), FILL, dtype=torch.uint8)  # wider, as an engine's
    records.memory = PageMemory(records.layout, data, host)
    return records


def at_hand(records: Records, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Streams, and keys and values for pages ids [S, m] and some that are still in the window."""
    generator = torch.Generator().manual_seed(0)
    n = records.layout.page_size * ids.shape[1] + 5
    k, v = (torch.randn(STREAMS, n, DIM, generator=generator) for _ in range(2))
    return torch.arange(STREAMS), k, v


@pytest.mark.parametrize("ids", IDS)
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("path", ["kernel", "reference", "unseen"])
def test_ids_below_0_are_written_nowhere(spec: str, ids: list[list[int]], path: str) -> None:
    unseen = path == "unseen"
    every, some = made(spec), made(spec, host=False if unseen else None)
    place = torch.tensor(ids)
    page = torch.arange(place.numel()).view_as(place)
    streams, k, v = at_hand(some, place)
    with nullcontext() if path == "kernel" else reference_only():
        every.encode(page, k, v, streams)
        if unseen:  # as where graphs are recorded
            due = torch.ones(STREAMS, dtype=torch.bool)
            some.codec.reserve(STREAMS)
            with LooksAtNothing():
                some.encode(place, k, v, streams, due)
        else:
            some.encode(place, k, v, streams)
    expected, there, width = torch.full_like(some.data, FILL), place >= 0, some.layout.bytes_per_page
    expected[place[there], :width] = every.data[page[there], :width]
    assert torch.equal(some.data, expected)


@pytest.mark.parametrize("look", [True, False])
@pytest.mark.parametrize("spec", ["kivi(bits=2, group=16)", "int(bits=4)", "mxfp4", "none"])
def test_what_is_not_finite_becomes_0(spec: str, look: bool) -> None:
    """With a warning where the host may look; a codec that loses nothing keeps it."""
    records, ids = made(spec), torch.tensor([[0], [1], [2]])
    k = torch.randn(STREAMS, records.layout.page_size, DIM)
    k[1, 3, 5], k[2, 0, 0] = torch.nan, torch.inf
    v = torch.randn_like(k)
    quiet = records.codec.lossless or not look
    with nullcontext() if quiet else pytest.warns(KvcompWarning, match="keys of layer 0 are not finite"):
        records.encode(ids, k, v, torch.arange(STREAMS), look=look)
    back, _ = records.decode(ids.flatten(), torch.arange(STREAMS))
    if records.codec.lossless:
        torch.testing.assert_close(back, k, equal_nan=True, rtol=0, atol=0)
    else:
        assert bool(back.isfinite().all())
