"""Records in an engine's pool, and a step's view of it."""

from __future__ import annotations

import pytest
import torch

from kvcomp.cache.blocks.centres import Turned, middle, turned, turns
from kvcomp.cache.blocks.pages import Pages
from kvcomp.cache.blocks.setup import Setup
from kvcomp.cache.blocks.step import Step
from kvcomp.errors import KvcompWarning
from kvcomp.stages.stack import Stack

HEADS, DIM, BLOCKS = 3, 64, 7


def begun(positions: torch.Tensor, size: int) -> torch.Tensor:
    """As `Step.begun`, of tokens at these positions."""
    rows = (positions % size == 0).nonzero().flatten()
    return torch.stack([rows, positions[rows] // size])


def setup_of(stack: str, drafts: int = 0) -> Setup:
    return Setup(Stack.parse(stack), layers=4, dim=DIM, dtype=torch.float32, drafts=drafts)


def bound(setup: Setup, biases: Turned | None = None) -> Pages:
    """Pages of layer 3 in a pool that holds nothing but NaN, whatever its bytes are read as."""
    cell = setup.record_bytes(HEADS) // setup.page_size
    pool = torch.full((BLOCKS, HEADS, setup.page_size, cell), 255, dtype=torch.uint8)
    return Pages(setup, 3, HEADS, biases=biases).at(pool)


@pytest.mark.parametrize(
    "stack",
    ["none", "int8", "int(bits=3)", "int(bits=4, basis=hadamard, group=32)", "fp8", "mxfp4", "turboquant(bits=4)"],
)
@pytest.mark.parametrize("biased", [False, True])
def test_token_by_token_makes_the_same_pages(stack: str, biased: bool) -> None:
    """In any order after those that begin pages, and in any company; padding is written nowhere."""
    setup = setup_of(stack)
    assert setup.by_token
    size = setup.page_size
    bias, frequencies = 50 * torch.randn(HEADS, DIM), torch.linspace(1, 0.001, DIM // 2)
    biases = turned(bias, frequencies, 1.0) if biased else None
    k, v = torch.randn(2, 2 * size, HEADS, DIM)
    if biased:
        thresholds = middle(torch.arange(2), size).repeat_interleave(size)
        k += torch.einsum("tf,fhd->thd", turns(frequencies, thresholds), turned(bias, frequencies, 1.0).weights)
    slots = torch.cat([5 * size + torch.arange(size), 2 * size + torch.arange(size)])  # blocks 5 and 2
    one_by_one, together = bound(setup, biases), bound(setup, biases)
    order = torch.cat([torch.tensor([0, size]), torch.randperm(2 * size)])
    for run in order.split(37):
        padded = torch.nn.functional.pad(slots[run], (0, 2), value=-1)
        new = (torch.nn.functional.pad(x[run], (0, 0, 0, 0, 0, 2)) for x in (k, v))
        one_by_one.write_tokens(*new, one_by_one.cells(padded, begun(run, size)))
    together.write_tokens(k, v, together.cells(slots, begun(torch.arange(2 * size), size)))
    assert torch.equal(one_by_one.pool, together.pool)
    assert (one_by_one.pool.view(BLOCKS, -1)[[0, 1, 3, 4, 6]] == 255).all()
    records = torch.tensor([5, 2]) * HEADS + torch.arange(HEADS)[:, None]
    for found, x, ours in zip(together.tokens(records), (k, v), (biased, False), strict=True):
        x = x.transpose(0, 1)
        error = (found - x).norm() / (x.numel() ** 0.5 if ours else x.norm())
        assert error < {"int(bits=3)": 0.25, "none": 1e-6}.get(stack, 0.15)


@pytest.mark.parametrize("stack", ["turboquant(bits=3)", "int(bits=2)", "kivi(bits=4, group=32)", "none"])
def test_tokens_that_come_from_pages(stack: str) -> None:
    """Rewritten in other places of the same pages they stay the same where nothing is shared; others are encoded."""
    torch.manual_seed(0)
    setup = setup_of(stack)
    size = setup.page_size
    pages = bound(setup)
    old = torch.tensor([4, 1, 6]) * HEADS + torch.arange(HEADS)[:, None]
    pages.write_pages(*torch.randn(2, HEADS, 3 * size, DIM), old)
    tokens = [torch.cat([x, torch.randn(HEADS, 9, DIM)], 1) for x in pages.tokens(old)]  # nine that were in no page
    chosen = torch.stack([torch.randperm(3 * size)[: 2 * size - 3].sort().values for _ in range(HEADS)])
    origin = torch.cat([chosen, 3 * size + torch.arange(8).expand(HEADS, -1)], 1)
    kept = [x.take_along_dim(origin[..., None], 1) for x in tokens]
    pages.rewrite(*kept, old[:, :2], old, origin)
    for now, was in zip(pages.tokens(old[:, :2]), kept, strict=True):
        was = was[:, : 2 * size]
        from_page = origin[:, : 2 * size] < 3 * size
        assert not from_page.all()
        if pages.layout.tokenwise and not pages.layout.centres:
            assert torch.equal(now[from_page], was[from_page])
        wrong = (now - was).square().sum((1, 2)) / was.square().sum((1, 2))
        assert wrong.max() < (0.3 if stack == "int(bits=2)" else 0.05)


@pytest.mark.parametrize("stack", ["int8", "turboquant(bits=4)", "kivi(bits=2)", "int8 + quest(pages=2)"])
@pytest.mark.parametrize("spoilt", [torch.nan, torch.inf, -torch.inf])
def test_numbers_that_are_not_finite(stack: str, spoilt: float) -> None:
    """Pages are those of 0 in their place, and a warning says so, as everywhere else."""
    setup = setup_of(stack)
    k, v = torch.randn(2, HEADS, setup.page_size, DIM)
    k[1, 3, 5] = v[2, 7] = 0
    records = 2 * HEADS + torch.arange(HEADS)[:, None]

    def written(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        pages = bound(setup)
        if setup.by_token:
            places = torch.arange(setup.page_size)
            cells = pages.cells(2 * setup.page_size + places, begun(places, setup.page_size))
            pages.write_tokens(k.transpose(0, 1), v.transpose(0, 1), cells)
        else:
            pages.write_pages(k, v, records)
        return pages.pool

    expected = written(k, v)
    k[1, 3, 5] = v[2, 7] = spoilt
    with pytest.warns(KvcompWarning) as seen:
        found = written(k, v)
    assert torch.equal(found, expected)
    assert sorted(str(warning.message).split(" are ")[0] for warning in seen) == [
        "keys of layer 3",
        "values of layer 3",
    ]


@pytest.mark.parametrize(
    "stack", ["kivi(bits=2)", "nvfp4", "int(bits=4, per=channel)", "int8 + quest(pages=4)", "int8 + window(recent=1)"]
)
def test_what_needs_a_window(stack: str) -> None:
    setup = setup_of(stack, drafts=3)
    assert not setup.by_token
    assert setup.slots == setup.geometry.sinks + setup.geometry.recent + setup.page_size + 3


@pytest.mark.parametrize(
    "stack", ["int8", "int8 + window(sinks=4, recent=70)", "kivi(bits=2)", "streaming(sinks=4, recent=64) + int8"]
)
def test_every_token_is_read_once(stack: str) -> None:
    """Pages, exact tokens and what streaming evict are all tokens before the step's own, of each request."""
    setup = setup_of(stack)
    table = torch.arange(1, 1 + 3 * 20).view(3, 20)
    for past in (0, 1, 3, 63, 64, 65, 133, 138, 139, 300):
        lengths = [past + 1, past + 2, past + 5]
        step = Step.of(setup, HEADS, [0, 1, 3, 8], lengths, [0] * 3, table, torch.zeros(8, dtype=torch.int64))
        seen = torch.cat([group.tokens.flatten() for group in step.groups])
        assert sorted(seen.tolist()) == list(range(8))
        for group in step.groups:
            for row, request in enumerate(group.requests.tolist()):
                pages, size = int(group.counts[row * HEADS]), setup.page_size
                gone = setup.geometry.extent(past, 0).gap[1] if setup.geometry.newest else 0
                if setup.by_token:
                    assert pages == past
                    pages = -(-past // size)
                else:
                    assert (pages + gone) * size + group.held[row] == past
                blocks = table[request, gone : gone + pages] * HEADS
                assert group.pages[row * HEADS, :pages].tolist() == blocks.tolist()
                slots = group.slots[row, : group.held[row]].tolist()
                assert len(set(slots)) == len(slots)
                assert all(slot < setup.geometry.sinks + setup.geometry.ring for slot in slots)
