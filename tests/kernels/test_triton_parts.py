"""Pages that are filled in part, single tokens and records of other widths, by the Triton kernels against the
specification. Run as test_triton_kernels.py is."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from itertools import cycle

import pytest
import torch
from torch import Tensor

from kvcomp import Stack
from kvcomp.attention import Part, Tokens, merge
from kvcomp.attention import attend as attend_reference
from kvcomp.kernels import dispatch, reference, select
from kvcomp.layout import PageLayout
from kvcomp.segments import KVLayout
from kvcomp.stages import Codec, PageShape

if find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

from kvcomp.kernels import triton as kernels  # noqa: E402
from kvcomp.kernels.triton import ops, plan  # noqa: E402

BOUNDS = {torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 2e-2}
STACKS = [  # stack, dimension, whether tokens of a page share nothing
    ("none", 80, True),
    ("none", 256, True),
    ("int(bits=4)", 64, True),
    ("int(bits=4)", 128, True),
    ("int(bits=3, group=24)", 96, True),
    ("int(bits=2)", 64, True),
    ("int(bits=2, group=16)", 80, True),
    ("int(bits=4, symmetric=true, basis=hadamard)", 96, True),
    ("int8", 256, True),
    ("turboquant(bits=4)", 128, True),
    ("turboquant(bits=3, variant=prod)", 64, True),
    ("klt(bits=2)", 64, True),
    ("klt(bits=4)", 96, True),
    ("fp8", 80, True),
    ("mxfp4", 96, True),
    ("quest(dense_layers=0) + int(bits=4, group=16)", 64, True),  # pages of 16, and a summary after
    ("kivi(bits=2, group=16)", 64, False),
    ("nvfp4", 128, False),
]
COUNTS = [[130, 0, 64, 1], [63, 65], [1], [0, 0], [200, 17, 128]]
PAGES, WIDER = 12, 48  # of the pool, and bytes of a record that belong to nothing


def built(
    spec: str, dim: int, dtype: torch.dtype, page_size: int | None = None, centred: bool = True
) -> tuple[Codec, PageLayout]:
    stack = Stack.parse(f"{spec} + window(recent=0)").plan(0, 1)
    stack = replace(stack, page_size=page_size or stack.page_size)
    codec, layout = stack.build(PageShape(stack.page_size, dim, dim, 1, dtype, DEVICE, 0, centred))
    seen = torch.randn(1, 512, dim, generator=torch.Generator().manual_seed(0)) * torch.linspace(1, -1, dim).exp()
    codec.fit(torch.zeros(1, dtype=torch.int64, device=DEVICE), seen.to(DEVICE), seen.to(DEVICE))
    return codec, layout


def sides_of(codec: Codec) -> KVLayout:
    sides = codec.kernel_layouts()
    assert sides is not None
    return sides


def rows_of(layout: PageLayout, pool: Tensor) -> list[Tensor]:
    """Bytes of each token, uint8 [pages, P, bytes], of fields that have a row per token."""
    rows = [pool[:, layout.offsets[f.name] : layout.offsets[f.name] + f.nbytes] for f in layout.token_fields]
    return [x.unflatten(1, (layout.page_size, -1)) for x in rows]


def held(layout: PageLayout, codec: Codec, dim: int, dtype: torch.dtype) -> Tensor:
    """A pool of random pages in records that are wider, 0xFF where there is no field."""
    pool = torch.full((PAGES, layout.bytes_per_page + WIDER), 0xFF, dtype=torch.uint8, device=DEVICE)
    k, v = (torch.randn(PAGES, layout.page_size, dim, device=DEVICE).to(dtype) for _ in range(2))
    fields = codec.encode(k, v, torch.zeros(PAGES, dtype=torch.int64, device=DEVICE))
    for name, view in layout.views(pool).items():
        view.copy_(fields[name])
    return pool


def close(found: Part, expected: Part, bound: float) -> None:
    for x, y in zip(found, expected, strict=True):
        if x is None or y is None:
            assert x is y
            continue
        assert torch.equal(x.isinf(), y.isinf())
        assert not x.isnan().any()
        there = y.isfinite()
        assert (
            float((x - y)[there].abs().sum()) == 0
            or float((x - y)[there].abs().max() / y[there].abs().max().clamp_min(1e-6)) < bound
        )


def cases() -> list[tuple[object, ...]]:
    rows, counts, splits = cycle([1, 3, 4, 8]), cycle(COUNTS), cycle([1, None, 2, 100])
    dtypes = cycle([torch.float32, torch.bfloat16, torch.float16])
    softcaps, flags = cycle([None, 1.5, None]), cycle([False, True, False, False])
    return [
        (*case, next(rows), next(counts), next(dtypes), next(softcaps), next(flags), next(splits)) for case in STACKS
    ]


@pytest.mark.parametrize(
    ("spec", "dim", "tokenwise", "rows", "counts", "dtype", "softcap", "lse_of_pages", "split"), cases()
)
def test_first_tokens_of_pages(
    spec: str,
    dim: int,
    tokenwise: bool,
    rows: int,
    counts: list[int],
    dtype: torch.dtype,
    softcap: float | None,
    lse_of_pages: bool,
    split: int | None,
) -> None:
    """In records that are wider than pages; what lies after a stream's tokens, in a page too, may be anything."""
    torch.manual_seed(dim + rows)
    codec, layout = built(spec, dim, dtype)
    assert layout.tokenwise is tokenwise
    size, pool = layout.page_size, held(layout, codec, dim, dtype)
    n = max(-(-max(counts) // size), 1) + 2  # wider than any count, as in a graph
    used, ids = iter(torch.randperm(PAGES - 1).tolist() * 4), torch.full((len(counts), n), PAGES - 1, dtype=torch.int32)
    for own, count in zip(ids, counts, strict=True):
        for page in range(-(-count // size)):
            own[page] = next(used)
    ids, tokens = ids.to(DEVICE), torch.tensor(counts, device=DEVICE)
    q, scale = torch.randn(len(counts), rows, dim).to(DEVICE, dtype), dim**-0.5
    args = pool, ids, tokens, layout, codec, scale, softcap, lse_of_pages
    expected = reference.attend_pages(q, *args, in_tokens=True)
    read = torch.zeros(PAGES, size, dtype=torch.bool)
    for own, count in zip(ids.tolist(), counts, strict=True):
        for page in range(-(-count // size)):
            read[own[page], : count - page * size] = True
    pool[~read.any(1).to(DEVICE)] = 0xFF
    if tokenwise:
        for field in rows_of(layout, pool):
            field[~read.to(DEVICE)] = 0xFF
    given = kernels.Pages(pool, ids, tokens, kernels.prepared(sides_of(codec), layout, dtype == torch.float32, DEVICE))
    asked, bias = codec.read_query(q.float()) if codec.rotates else (q, None)
    workspace = torch.full((1 << 20,), torch.nan, device=DEVICE)
    how = {"pages_of_split": split, "workspace": workspace, "in_tokens": True}
    found = kernels.attend(asked, given, None, scale, softcap, bias, None, lse_of_pages, **how)
    close(found._replace(out=codec.read_output(found.out)), expected, BOUNDS[dtype])


@pytest.mark.parametrize("splits", [1, 2, 5, 40])
def test_splits_follow_each_stream(splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever room there is, all is read once, with the exact tokens; and nothing is read that was not written."""
    torch.manual_seed(splits)
    for module in (plan, kernels):
        monkeypatch.setattr(module, "processors", lambda _: splits)
    codec, layout = built("none", 64, torch.float32, page_size=16)
    pool, counts = held(layout, codec, 64, torch.float32), [2000, 0, 1, 300, 257, 256, 15]
    ids = torch.randint(0, PAGES, (len(counts), 140), dtype=torch.int32, device=DEVICE)
    tokens = torch.tensor(counts, device=DEVICE)
    own = torch.randn(len(counts), 1, 64, device=DEVICE)
    alone = torch.tensor([1, 0, 1, 1, 0, 1, 1], device=DEVICE)
    given = kernels.Pages(pool, ids, tokens, kernels.prepared(sides_of(codec), layout, True, DEVICE))
    workspace = torch.full((1 << 18,), torch.nan, device=DEVICE)
    q = torch.randn(len(counts), 3, 64, device=DEVICE)
    exact = Tokens(own, -own, alone)
    found = kernels.attend(q, given, exact, 0.1, workspace=workspace, in_tokens=True)
    of_pages = reference.attend_pages(q, pool, ids, tokens, layout, codec, 0.1, in_tokens=True)
    of_tokens = attend_reference(q, own, -own, 0.1)
    of_tokens = of_tokens._replace(lse=of_tokens.lse.masked_fill(alone[:, None] == 0, -torch.inf))
    close(found, merge([of_pages, of_tokens]), 1e-5)
    written = int(workspace.isfinite().sum())
    assert written < ops.workspace_size(len(counts), 3, -(-140 // 16) + 1, 64)  # idle splits write nothing


@pytest.mark.parametrize(("spec", "dim"), [case[:2] for case in STACKS if case[2] and "quest" not in case[0]])
def test_tokens_are_written_one_by_one(spec: str, dim: int) -> None:
    """In any order: pages as the codec encodes them whole; tokens that go nowhere, and all else of the pool, stay."""
    torch.manual_seed(dim)
    dtype = torch.bfloat16 if dim == 80 else torch.float32
    (_, layout), (codec, plain) = built(spec, dim, dtype), built(spec, dim, dtype, centred=False)  # centres are given
    assert layout.token_fields == plain.token_fields
    single, size = built(spec, dim, dtype, 1, centred=False)[0], layout.page_size
    k, v = (torch.randn(2, size, dim, device=DEVICE).to(dtype) for _ in range(2))
    room = torch.full((7, layout.bytes_per_page + WIDER), 0xFF, dtype=torch.uint8, device=DEVICE)
    pool, streams = room[2:], torch.zeros(2, dtype=torch.int64, device=DEVICE)
    expected = pool.clone()
    fields = codec.encode(k, v, streams)
    for name, view in layout.views(expected).items():
        for i, page in enumerate([3, 1]):
            if name in fields:
                view[page] = fields[name][i]
    places = torch.cat([torch.randperm(2 * size), torch.full((3,), -1)]).to(DEVICE)  # the last go nowhere
    ids = torch.where(places < 0, -2, torch.where(places < size, 3, 1))
    x = [y.flatten(0, 1)[places][:, None] for y in (k, v)]
    how = kernels.written(sides_of(single), layout, DEVICE, single=True)
    asked = single.kernel_input(*x, torch.zeros(len(places), dtype=torch.int64, device=DEVICE))
    assert asked is not None
    for run in torch.arange(len(places), device=DEVICE).split(37):
        kernels.write(pool, ids[run], *(y[run] for y in asked), how, places[run] % size)
    found, wanted = layout.views(pool), layout.views(expected)
    norms = [name for name in found if name.endswith(".norm")]
    for name in norms:  # sums of squares in another order: the last bit of some may differ, and codes with it
        off = (found[name].view(torch.int16).int() - wanted[name].view(torch.int16).int()).abs()
        assert int(off.max()) <= 1
        assert float((off > 0).float().mean()) < 0.02
        side = name.removesuffix("norm")
        for codes in (other for other in found if other.startswith(side + "codes")):
            same = (off[[3, 1], :, 0] == 0)[..., None].expand_as(found[codes][[3, 1]])
            assert torch.equal(found[codes][[3, 1]][same], wanted[codes][[3, 1]][same])
            found[codes].copy_(wanted[codes])
        found[name].copy_(wanted[name])
    assert torch.equal(pool, expected)
    assert (room[:2] == 0xFF).all()  # what ids below 0 would point at


def test_pages_in_wider_records_are_written_whole() -> None:
    """And those below 0 are not."""
    torch.manual_seed(0)
    codec, layout = built("kivi(bits=4)", 64, torch.float32)
    k, v = (torch.randn(3, layout.page_size, 64, device=DEVICE) for _ in range(2))
    room = torch.full((5, layout.bytes_per_page + WIDER), 0xFF, dtype=torch.uint8, device=DEVICE)
    pool, streams = room[1:], torch.zeros(3, dtype=torch.int64, device=DEVICE)
    expected = pool.clone()
    fields = codec.encode(k, v, streams)
    expected[[2, 0], : layout.bytes_per_page] = 0  # between fields, too
    for name, view in layout.views(expected).items():
        view[[2, 0]] = fields[name][[0, 2]]
    how = kernels.written(sides_of(codec), layout, DEVICE)
    kernels.write(pool, torch.tensor([2, -1, 0], device=DEVICE), k, v, how)
    assert torch.equal(pool, expected)
    assert (room[0] == 0xFF).all()


def test_chosen_tokens_of_wider_records_are_read() -> None:
    """Pages that are made of them lack the summary: their records are narrower than pages."""
    torch.manual_seed(0)
    codec, layout = built("quest(dense_layers=0) + int(bits=4, group=16)", 64, torch.float32)
    assert layout.body_bytes < layout.bytes_per_page
    pool = held(layout, codec, 64, torch.float32)
    ids = torch.randint(0, PAGES, (2, 5), dtype=torch.int32, device=DEVICE)
    chosen = torch.stack([torch.randperm(5 * 16)[:32].sort().values for _ in range(2)]).to(DEVICE)
    with dispatch.reference_only():
        expected = select.regroup(layout, pool, ids, chosen)
    records = kernels.regroup(layout, pool, ids, chosen)
    for field in layout.token_fields:
        assert torch.equal(*(layout.views(x)[field.name] for x in (records, expected)))
    for field in layout.centres:
        layout.views(records)[field.name].zero_()
    assert torch.equal(layout.views(expected)["k.centre"], torch.zeros(4, 1, 64, dtype=torch.float16, device=DEVICE))
    q, counts = torch.randn(2, 3, 64, device=DEVICE), torch.tensor([2, 1], device=DEVICE)
    ids = torch.arange(4, device=DEVICE).view(2, 2)
    given = kernels.Pages(records, ids, counts, kernels.prepared(sides_of(codec), layout, True, DEVICE))
    whole = torch.zeros(4, layout.bytes_per_page, dtype=torch.uint8, device=DEVICE)
    whole[:, : layout.body_bytes] = records
    expected = reference.attend_pages(q, whole, ids, counts, layout, codec, 0.1)
    close(kernels.attend(q, given, None, 0.1), expected, 1e-5)
