"""Decoding token by token as a CUDA graph replays it, by the Triton kernels. Run as test_triton_kernels.py is."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch
from far_device import FAR, FarDevice
from torch import Tensor

from kvcomp import Stack
from kvcomp.attention import attend, merge
from kvcomp.cache.blocks.centres import turned
from kvcomp.cache.blocks.decode import Decoder, DecodeStep, most_channels, obstacle
from kvcomp.cache.blocks.pages import Pages
from kvcomp.cache.blocks.setup import Setup
from kvcomp.kernels import dispatch, reference
from kvcomp.kernels.triton_backend import Triton

if find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

from kvcomp.kernels import triton as kernels  # noqa: E402
from kvcomp.kernels.triton import plan  # noqa: E402

LENGTHS = [200, 1, 63, 0, 64, 65, 0]  # with the new token; 0: padding
OTHERS = [1, 129, 0, 64, 2, 200, 66]
LONGEST, BLOCKS = 320, 40
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
CASES = [
    ("none", 2, 4, 64, torch.bfloat16),
    ("int(bits=4)", 3, 3, 64, torch.float32),
    ("int(bits=2)", 1, 4, 64, torch.float32),
    ("int(bits=2, group=16)", 2, 1, 80, torch.bfloat16),
    ("int(bits=3, basis=hadamard)", 1, 8, 96, torch.float32),
    ("int8", 2, 4, 128, torch.bfloat16),
    ("turboquant(bits=4)", 2, 3, 64, torch.float32),
    ("turboquant(bits=3, variant=prod)", 1, 4, 64, torch.bfloat16),
    ("turboquant(bits=2)", 1, 1, 256, torch.bfloat16),
    ("fp8", 2, 8, 64, torch.float32),
    ("mxfp4", 3, 3, 96, torch.bfloat16),
]


def begun(lengths: list[int], size: int) -> Tensor:
    """As `Step.begun`, of the last tokens of so many, one a request."""
    positions = torch.tensor(lengths, dtype=torch.int64) - 1
    rows = (positions % size == 0).nonzero().flatten()
    return torch.stack([rows, positions[rows] // size]).to(DEVICE)


class Case:
    """A layer of a stack, in a pool of records that are wider than pages, full of 0xFF where nobody has written."""

    def __init__(self, stack: str, heads: int, group: int, dim: int, dtype: torch.dtype, biased: bool = False) -> None:
        torch.manual_seed(dim)
        self.setup = Setup(Stack.parse(stack), layers=4, dim=dim, dtype=dtype, drafts=0)
        assert self.setup.by_token
        self.heads, self.group, self.dtype, self.scale = heads, group, dtype, dim**-0.5
        size = self.setup.page_size
        cell = self.setup.record_bytes(heads) // size + 3
        pool = torch.full((BLOCKS, heads, size, cell), 0xFF, dtype=torch.uint8, device=DEVICE)
        biases = turned(20 * torch.randn(heads, dim), torch.linspace(1, 0.001, dim // 2), 1.0) if biased else None
        self.pages = Pages(self.setup, 3, heads, DEVICE, biases).at(pool)
        self.decoder = self.made(DEVICE)
        assert obstacle(self.pages, group, torch.device("cuda")) is None

    def made(self, device: torch.device) -> Decoder:
        sizes = self.setup.page_size, self.heads, self.group, most_channels([self.pages.codec], self.setup.dim)
        return Decoder.on(device, len(LENGTHS), LONGEST, *sizes, self.pages.frequencies)

    def random(self, tokens: int, heads: int) -> Tensor:
        return torch.randn(tokens, heads, self.setup.dim, device=DEVICE).to(self.dtype)

    def batch(self, lengths: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Table, lengths and slots of requests whose past tokens are written; after, a poisoned block's stale ids."""
        size, free = self.setup.page_size, iter(torch.randperm(BLOCKS - 2).add(2).tolist())
        table = torch.ones(len(lengths), -(-LONGEST // size) + 1, dtype=torch.int32)
        slots = torch.full((len(lengths),), -1)
        self.pages.pool.fill_(0xFF)
        for r, length in enumerate(lengths):
            for page in range(-(-length // size)):
                table[r, page] = next(free)
            if length:
                place = torch.arange(length)
                at = table[r, place // size].long() * size + place % size
                slots[r] = at[-1]
                with dispatch.reference_only():
                    new = self.random(2 * (length - 1), self.heads).chunk(2)
                    first = begun(list(range(1, length)), size)
                    self.pages.write_tokens(*new, self.pages.cells(at[:-1].to(DEVICE), first))
        return table.to(DEVICE), torch.tensor(lengths, dtype=torch.int32, device=DEVICE), slots.to(DEVICE)

    def check(self, step: DecodeStep, table: Tensor, lengths: Tensor, slots: Tensor) -> None:
        """The step's output is the specification's, its tokens are written, and all else is as it was."""
        requests, pages = len(lengths), self.pages
        q, k, v = (self.random(requests + 2, n) for n in (self.heads * self.group, self.heads, self.heads))
        out = torch.full_like(q, 7)
        expected, written = self.specified(table, lengths, slots, q, k, v)
        step.attend(pages, q, k, v, self.scale, None, out)
        assert (out[requests:] == 7).all()
        assert (out[:requests][lengths == 0] == 0).all()
        assert not out.isnan().any()
        worst = (out[:requests] - expected).abs().max() / expected.abs().max()
        assert float(worst) < BOUNDS[self.dtype]
        off = float((pages.pool != written).float().mean())
        if "turboquant" in str(self.setup.stack):  # whose norms may differ in the last bit
            assert off < 1e-3
        else:  # what is subtracted is the product of a matrix, which batches of other sizes round otherwise
            assert off < (1e-4 if len(pages.frequencies) else 1e-9)
        changed = (pages.pool != self.before).any(1).nonzero().flatten().tolist()
        at = slots[slots >= 0].div(self.setup.page_size, rounding_mode="floor")
        assert changed == sorted(int(block) * self.heads + h for block in at for h in range(self.heads))

    def specified(self, table: Tensor, lengths: Tensor, slots: Tensor, *x: Tensor) -> tuple[Tensor, Tensor]:
        """Attention over pages as the codec decodes them and the new token as it is; and the pool after the step."""
        pages, heads = self.pages, self.heads
        q, k, v = (y[: len(lengths)].unflatten(1, (heads, -1)).flatten(0, 1) for y in x)
        ids = (table.long()[:, None] * heads + torch.arange(heads, device=DEVICE)[:, None]).flatten(0, 1)
        past = (lengths.long() - 1).clamp_min(0).repeat_interleave(heads)
        held = pages.pool, ids, past, pages.layout, pages.codec, self.scale
        own = attend(q.float(), k.float(), v.float(), self.scale)
        there = (lengths > 0).repeat_interleave(heads)[:, None]
        own = own._replace(lse=own.lse.masked_fill(~there, -torch.inf))
        both = merge([reference.attend_pages(q, *held, in_tokens=True), own])
        out = both.out.masked_fill(~there[..., None], 0).view(len(lengths), -1, self.setup.dim)
        self.before = pages.pool.clone()
        with dispatch.reference_only():
            real = slots >= 0
            new = (y[: len(lengths)][real] for y in x[1:])
            first = begun([n for n in lengths.tolist() if n], pages.setup.page_size)
            pages.write_tokens(*new, pages.cells(slots[real], first))
        written = pages.pool.clone()
        pages.pool.copy_(self.before)
        return out, written


@pytest.fixture(autouse=True)
def by_triton() -> Iterator[None]:
    with dispatch.using(Triton(anywhere=True)):
        yield


@pytest.mark.parametrize(
    ("case", "biased"),
    [*((case, False) for case in CASES), *((case, True) for case in CASES[1:5] + CASES[6:7])],
    ids=lambda x: "biased" * x if isinstance(x, bool) else "-".join(map(str, x[:4])),
)
def test_decoding_is_the_specification(case: tuple[str, int, int, int, torch.dtype], biased: bool) -> None:
    """At ends of pages and besides, for padding, in pages that are filled in part; again in the same buffers."""
    layer = Case(*case, biased)
    batch = layer.batch(LENGTHS)
    first = layer.decoder.plan(*batch)
    layer.check(first, *batch)
    batch = layer.batch(OTHERS)
    layer.decoder.plan(*batch)
    layer.check(first, *batch)  # as a graph that was recorded of it
    few = [x[:3] for x in layer.batch(LENGTHS)]
    layer.check(layer.decoder.plan(*few), *few)


def test_addresses_stay() -> None:
    layer = Case(*CASES[1])
    steps = [layer.decoder.plan(*layer.batch(lengths)) for lengths in (LENGTHS, OTHERS)]
    addresses = [
        [x.data_ptr() for x in (s.ids, s.counts, s.own, s.cells.records, s.cells.rows, s.cells.heads, s.workspace)]
        for s in steps
    ]
    assert addresses[0] == addresses[1]


@pytest.mark.parametrize("case", [CASES[0], CASES[3], CASES[6]], ids=lambda case: case[0])
def test_nothing_waits_for_the_device(case: tuple[str, int, int, int, torch.dtype]) -> None:
    layer = Case(*case)
    pages = Pages(layer.setup, 3, layer.heads, FAR)
    cell = layer.setup.record_bytes(layer.heads) // layer.setup.page_size
    pages.at(torch.zeros(BLOCKS, layer.heads, layer.setup.page_size, cell, dtype=torch.uint8, device=FAR))
    q, k, v = (x.to(FAR) for x in (layer.random(7, layer.heads * layer.group), *layer.random(14, layer.heads).chunk(2)))
    table, lengths, slots = (x.to(FAR) for x in layer.batch(LENGTHS))
    decoder, out = layer.made(FAR), torch.empty_like(q)
    decoder.plan(table, lengths, slots).attend(pages, q, k, v, 0.1, None, out)  # makes what is made once
    with FarDevice() as seen:
        step = decoder.plan(table, lengths, slots)
        step.attend(pages, q, k, v, layer.scale, 5.0, out)
        assert not seen.moved
        with pytest.raises(RuntimeError, match="item"):
            step.read(pages.layout)  # which counts on the host


def test_what_is_read() -> None:
    """Tokens of pages, and pages' ids and centres: none of the new tokens, and nothing of padding."""
    layer = Case("int(bits=4)", 2, 4, 64, torch.float32)
    step = layer.decoder.plan(*layer.batch(LENGTHS))
    token = 2 * (64 // 2 + 2 + 2)  # K and V: codes of 4 bits, scale and zero
    page = 4 + 2 * 64
    assert step.read(layer.pages.layout) == 2 * ((199 + 62 + 63 + 64) * token + (4 + 1 + 1 + 1) * page)


@pytest.mark.parametrize("requests", [1, 3, 7])
def test_room_for_as_many_splits_as_there_are(requests: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a chip with many processors, where few requests are cut into many splits."""
    for module in (plan, kernels):
        monkeypatch.setattr(module, "processors", lambda _: 132)
    layer = Case("int(bits=4)", 1, 4, 64, torch.float32)
    decoder = Decoder.on(DEVICE, requests, 128 * 64, 64, 1, 4, 64, layer.pages.frequencies)
    decoder.workspace.fill_(torch.nan)
    batch = [x[:requests] for x in layer.batch(LENGTHS)]
    layer.check(decoder.plan(*batch), *batch)


@pytest.mark.parametrize(
    ("stack", "words"), [("kivi(bits=4)", "one by one"), ("int(bits=3, group=4)", "no multiple of 8")]
)
def test_what_is_not_decoded_so(stack: str, words: str) -> None:
    setup = Setup(Stack.parse(stack), layers=4, dim=64, dtype=torch.float32, drafts=0)
    assert words in str(obstacle(Pages(setup, 0, 2), 3, torch.device("cuda")))
