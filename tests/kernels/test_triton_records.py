"""Pages that the Triton kernel writes: what codecs encode, bit for bit. Run as test_triton_kernels.py is."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace
from importlib.util import find_spec
from itertools import cycle

import pytest
import torch
from torch import Tensor

from kvcomp import Stack
from kvcomp.cache.layer import LayerStore
from kvcomp.cache.pool import PagePool
from kvcomp.kernels import dispatch, reference
from kvcomp.kernels.triton_backend import Triton
from kvcomp.layout import PageLayout
from kvcomp.segments import Codebook, Plane, SideLayout, Uniform
from kvcomp.stages import Codec, PageShape

if find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HOST = torch.device("cpu")

from kvcomp.kernels import triton as kernels  # noqa: E402
from kvcomp.kernels.triton import pieces  # noqa: E402


def by_triton() -> AbstractContextManager[None]:
    """Inside, the Triton kernels serve what they can, on any device."""
    return dispatch.using(Triton(anywhere=True))


UNIFORM = [  # every granularity, width and option, and what is stored without a grid
    ("none", [64, 80, 100, 256]),
    ("kivi(bits=2, group=16)", [64, 80, 128]),
    ("kivi(bits=4, group=32)", [96, 256]),
    ("kivi(k=2, v=4, group=64)", [64, 128]),
    ("kivi(bits=2, group=48)", [96]),
    ("kivi(bits=4, group=96)", [96]),
    ("int(bits=2, group=8)", [64, 80]),
    ("int(bits=3)", [96, 256]),
    ("int(bits=3, group=24)", [96]),
    ("int(bits=4)", [64, 80, 100, 128]),
    ("int(bits=4, group=40)", [80]),
    ("int(bits=4, clip=0.9, symmetric=true)", [96]),
    ("int(bits=5, per=channel)", [64, 80]),
    ("int(bits=4, per=channel)", [100]),
    ("int(bits=6, group=16, basis=hadamard)", [128]),
    ("int(bits=7, per=channel, group=48, clip=0.8)", [96]),
    ("int(bits=8, symmetric=true, basis=random)", [80]),
    ("int8", [256]),
    ("fp8", [64, 80]),
    ("fp8(format=e5m2)", [256]),
    ("mxfp4", [80, 96, 128]),
    ("mxfp4(basis=hadamard)", [80]),
    ("nvfp4", [64, 72, 256]),
]
BOOKS = [
    ("turboquant(bits=1)", [64, 128]),
    ("turboquant(bits=2)", [80]),
    ("turboquant(bits=2.5)", [64, 256]),
    ("turboquant(bits=3)", [96]),
    ("turboquant(bits=4)", [80, 256]),
    ("turboquant(bits=1, variant=prod)", [96]),
    ("turboquant(bits=3, variant=prod)", [64, 80]),
    ("turboquant(bits=3.5, variant=prod)", [128, 256]),
    ("turboquant(k=2.5, v=1, variant=prod)", [64]),
]
JOINT = [  # and tokens of a page
    ("klt(bits=1)", 64, 64),
    ("klt(bits=2)", 80, 48),
    ("klt(bits=2)", 128, 16),
    ("klt(k=3.5, v=1.5)", 96, 64),
    ("klt(bits=3)", 72, 80),
    ("klt(k=4.5, v=6)", 256, 16),
]
DTYPES = [torch.bfloat16, torch.float32, torch.float16]


def built(
    spec: str, dim: int, dtype: torch.dtype, device: torch.device = HOST, size: int | None = None
) -> tuple[Codec, PageLayout]:
    """Codec and pages, of `size` tokens if told; one that fits its basis has seen channels that differ in size."""
    stack = Stack.parse(f"{spec} + window(recent=0)").plan(0, 1)
    stack = replace(stack, page_size=size or stack.page_size)
    codec, layout = stack.build(PageShape(stack.page_size, dim, dim, 1, dtype, device, 0))
    seen = torch.randn(1, 512, dim, generator=torch.Generator().manual_seed(0)) * torch.linspace(1, -1, dim).exp()
    codec.fit(torch.zeros(1, dtype=torch.int64, device=device), seen.to(device), seen.to(device))
    return codec, layout


def cases(specs: list[tuple[str, list[int]]]) -> list[tuple[str, int, torch.dtype, int]]:
    dtypes, pages = cycle(DTYPES), cycle([1, 2, 3])
    return [(spec, dim, next(dtypes), next(pages)) for spec, dims in specs for dim in dims]


def difficult(pages: int, size: int, dim: int, dtype: torch.dtype) -> Tensor:
    """Pages whose channels differ in size; the last has constants, outliers, the largest and the smallest numbers."""
    x = (torch.randn(pages, size, dim) * torch.randn(dim).mul(2).exp()).to(dtype)
    x[-1, :, 1], x[-1, 3], x[-1, 5] = 0.37, 0, -1.5
    x[-1, 7] *= 1e-7
    x[-1, 9] = torch.finfo(dtype).max
    x[-1, 13:15] = 0
    x[-1, 13, 0], x[-1, 14, 0] = 448 * (1 + 1 / 256), 448 * (1 + 3 / 256)  # whose 448th is between two bfloat16
    x[-1, 11], x[-1, 12] = -torch.finfo(dtype).max, torch.finfo(dtype).tiny
    return x


def written(
    spec: str, dim: int, dtype: torch.dtype, pages: int, size: int | None = None, most: float = torch.inf
) -> tuple[PageLayout, Tensor, Tensor]:
    """Records of the pages as the codec encodes them, and as the kernel writes them, in a pool full of 0xFF."""
    torch.manual_seed(dim + pages)
    codec, layout = built(spec, dim, dtype, size=size)
    size = layout.page_size
    k, v = (difficult(pages, size, dim, dtype).clamp(-most, most) for _ in range(2))
    streams = torch.zeros(pages, dtype=torch.int64)
    pool = PagePool(layout, HOST)
    ids = pool.allocate(pages + 2).flip(0)[:pages]  # two belong to nobody
    pool.data.fill_(0xFF)
    found = pool.data.clone().to(DEVICE)
    pool.write(ids, codec.encode(k, v, streams))
    sides, x = codec.kernel_layouts(), codec.kernel_input(k, v, streams)
    assert sides is not None
    assert x is not None
    assert kernels.write_obstacle(sides) is None
    kernels.write(found, ids, *(y.to(DEVICE) for y in x), kernels.written(sides, layout, DEVICE))
    return layout, pool.data, found.cpu()


@pytest.mark.parametrize(("spec", "dim", "dtype", "pages"), cases(UNIFORM))
def test_records_are_the_codecs(spec: str, dim: int, dtype: torch.dtype, pages: int) -> None:
    """Whole records, gaps between fields included, and nothing else of the pool."""
    layout, expected, found = written(spec, dim, dtype, pages)
    for (name, a), b in zip(layout.views(found).items(), layout.views(expected).values(), strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)), name
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dim", [32, 80])  # of 80 the last block is shorter
def test_powers_of_two_are_the_codecs_where_two_are_nearly_as_good(dim: int) -> None:
    """Errors that differ in the last bit, on either side of where the choice of values changes: sums have one order."""
    codec, layout = built("mxfp4", dim, torch.float32)
    size, streams = layout.page_size, torch.zeros(1, dtype=torch.int64)
    x = 1.5 * torch.randn(1, size, dim, generator=torch.Generator().manual_seed(0))
    x[..., 31::32] = torch.linspace(6.5, 7.9, size)[:, None]  # the largest of a block
    low, high = torch.zeros(size), torch.full((size,), 7.9)

    def page(first: Tensor) -> Tensor:
        y = x.clone()
        y[..., ::32] = first[:, None]
        return y

    def scales(first: Tensor) -> Tensor:
        return codec.encode(page(first), page(first), streams)["v.scale"].view(torch.uint8)[0, :, 0]

    before, after = scales(low), scales(high)
    for _ in range(40):
        middle = (low + high) / 2
        same = scales(middle) == before
        low, high = torch.where(same, middle, low), torch.where(same, high, middle)
    turns = before != after
    assert int(turns.sum()) > size // 4
    assert torch.equal(torch.nextafter(low, high)[turns], high[turns])
    pool = PagePool(layout, HOST)
    ids, sides = pool.allocate(2), codec.kernel_layouts()
    pool.data.zero_()
    found = pool.data.clone().to(DEVICE)
    pages = torch.cat([page(low), page(high)])
    pool.write(ids, codec.encode(pages, pages, streams.expand(2)))
    assert sides is not None
    kernels.write(found, ids, pages.to(DEVICE), pages.to(DEVICE), kernels.written(sides, layout, DEVICE))
    assert torch.equal(found.cpu(), pool.data)


@pytest.mark.parametrize(("spec", "dim", "dtype", "pages"), cases(BOOKS))
def test_codes_of_books_are_the_codecs(spec: str, dim: int, dtype: torch.dtype, pages: int) -> None:
    """A norm is a sum in another order: its last bit may differ. Where it does not, all codes are the same."""
    layout, expected, found = written(spec, dim, dtype, pages)
    a, b = layout.views(found), layout.views(expected)
    for norm in (name for name in a if name.endswith(".norm")):
        off = (a[norm].view(torch.int16).int() - b[norm].view(torch.int16).int()).abs()[..., 0]  # [pages, P]
        assert int(off.max()) <= 1
        assert float((off > 0).float().mean()) < 0.02
        for codes in (name for name in a if name.startswith(norm.removesuffix("norm") + "codes")):
            assert torch.equal(a[codes][off == 0], b[codes][off == 0]), codes
    assert torch.equal(found[:2], expected[:2])  # nobody's


@pytest.mark.parametrize(("spec", "dim", "size"), JOINT)
@pytest.mark.parametrize(("dtype", "pages"), [(torch.bfloat16, 2), (torch.float32, 1)])
def test_codes_that_share_a_norm_are_the_codecs(spec: str, dim: int, size: int, dtype: torch.dtype, pages: int) -> None:
    """All codes are, and nothing else is touched; a norm is made of sums in another order: its last bit may differ."""
    layout, expected, found = written(spec, dim, dtype, pages, size, most=6e4)
    a, b = layout.views(found), layout.views(expected)
    for norm in ("k.norm", "v.norm"):
        assert bool(b[norm][2:].isfinite().all())
        off = (a[norm].view(torch.int16).int() - b[norm].view(torch.int16).int()).abs()
        assert int(off.max()) <= 1
        assert int((off > 0).sum()) <= 2
        a[norm].copy_(b[norm])
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "spec", ["kivi(bits=4)", "turboquant(bits=4)", "turboquant(bits=4, variant=prod)", "klt(bits=6)"]
)
def test_what_is_written_is_read(spec: str) -> None:
    torch.manual_seed(0)
    codec, layout = built(spec, 64, torch.float32, DEVICE)
    sizes = torch.linspace(1, -1, 64, device=DEVICE).exp()
    k, v = (torch.randn(2, layout.page_size, 64, device=DEVICE) * sizes for _ in range(2))
    pool = PagePool(layout, DEVICE)
    ids, streams = pool.allocate(2), torch.zeros(2, dtype=torch.int64, device=DEVICE)
    pool.data.fill_(0xFF)
    with by_triton():
        assert dispatch.encode_pages(pool.data, ids, layout, codec, k, v, streams)
    q, held = torch.randn(1, 3, 64, device=DEVICE), torch.tensor([2], device=DEVICE)
    part = reference.attend_pages(q, pool.data, ids[None].to(DEVICE), held, layout, codec, 0.125)
    exact = torch.nn.functional.scaled_dot_product_attention(q, k.flatten(0, 1)[None], v.flatten(0, 1)[None])
    assert float((part.out - exact).norm() / exact.norm()) < 0.3


@pytest.mark.parametrize("spec", ["int(bits=3, group=4)"])
def test_what_the_kernel_cannot_write_is_left_to_the_codec(spec: str) -> None:
    codec, layout = built(spec, 64, torch.float32)
    k = torch.randn(2, layout.page_size, 64)
    streams = torch.zeros(2, dtype=torch.int64)
    pool, other = PagePool(layout, HOST), PagePool(layout, HOST)
    ids = pool.allocate(2)
    other.allocate(2)
    pool.data.fill_(0xFF)
    with by_triton():
        assert not dispatch.encode_pages(pool.data, ids, layout, codec, k, k, streams)
        assert bool((pool.data == 0xFF).all())
        pool.encode(ids, codec, k, k, streams, {})
    other.write(ids, codec.encode(k, k, streams))
    assert torch.equal(pool.data, other.data)


def test_obstacles_name_what_is_wrong() -> None:
    plane = (Plane("k.codes1", 1),)
    for segment, words in [
        (Uniform(64, plane, 4096, 1, "k.scale", "k.zero"), "4096 tokens share, more than 2048"),
        (Uniform(64, plane, 16, 4, "k.scale", "k.zero"), "4 channels share, which fill no whole bytes"),
        (Codebook(64, plane, "k.norm", torch.zeros(2)), "more than their segment"),
    ]:
        side = SideLayout((segment,))
        assert words in str(kernels.write_obstacle((side, side)))


@pytest.mark.skipif(DEVICE.type != "cpu", reason="a store on the host, with the kernels interpreted")
@pytest.mark.parametrize("spec", ["int(bits=4) + quest(pages=2)", "snapkv(budget=90) + kivi(group=16)"])
def test_a_store_writes_its_pages_so(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    k, v = (torch.randn(2, 2, 150, 64) for _ in range(2))
    q, steps = torch.randn(2, 6, 150, 64), [torch.randn(2, 2, 1, 64) for _ in range(20)]
    plan = Stack.parse(f"{spec} + window(recent=8, sinks=2)").plan(1, 3)

    def held() -> LayerStore:
        store = LayerStore(plan)
        store.start(k, v)
        store.write(k, v, None, q, 0.125)
        for x in steps:
            store.settle()
            store.append(x, x)
        return store

    expected, called = held(), []
    real = kernels.write
    monkeypatch.setattr(kernels, "write", lambda *args: called.append(len(args[1])) or real(*args))
    with by_triton():
        found = held()
    assert len(called) > 1
    assert torch.equal(found.table.ids(), expected.table.ids())
    used = found.pool.owned()
    assert torch.equal(found.pool.data[used], expected.pool.data[used])


def test_descriptions_survive_as_text() -> None:
    for spec, dim in [*((spec, dims[0]) for spec, dims in UNIFORM + BOOKS), *(case[:2] for case in JOINT)]:
        codec, layout = built(spec, dim, torch.bfloat16)
        sides = codec.kernel_layouts()
        assert sides is not None
        found = pieces.described(sides, layout)
        assert pieces.parsed(str(found)) == found


def test_the_operator_keeps_its_promises() -> None:
    codec, layout = built("kivi(bits=4)", 64, torch.float32)
    sides = codec.kernel_layouts()
    assert sides is not None
    how = kernels.written(sides, layout, DEVICE)
    pool = torch.zeros(3, layout.bytes_per_page, dtype=torch.uint8, device=DEVICE)
    x, ids = torch.randn(2, layout.page_size, 64, device=DEVICE), torch.tensor([2, 0], device=DEVICE)
    args = (pool, ids, x, x, how.k_thresholds, how.v_thresholds, how.description)
    torch.library.opcheck(torch.ops.kvcomp.write_pages.default, args, test_utils=("test_schema", "test_faketensor"))

    def step(pool: Tensor, x: Tensor) -> Tensor:
        kernels.write(pool, ids, x * 2, x, how)
        return pool.sum()

    a, b = pool.clone(), pool.clone()
    assert int(torch.compile(step, fullgraph=True, backend="aot_eager")(a, x)) == int(step(b, x)) > 0
    assert torch.equal(a, b)
