"""Pages that the C kernel writes: what codecs encode, bit for bit."""

from __future__ import annotations

from itertools import cycle

import pytest
import torch
from torch import Tensor

from kvcomp import Stack
from kvcomp.cache.layer import LayerStore
from kvcomp.cache.pool import PagePool
from kvcomp.errors import KvcompError
from kvcomp.kernels import cpu, dispatch
from kvcomp.kernels.cpu import compiled as compiled_kernel
from kvcomp.kernels.cpu import encode, memory
from kvcomp.kernels.cpu.backend import C
from kvcomp.layout import PageLayout
from kvcomp.quantizers.codecs import GridCodec, RawGrid
from kvcomp.quantizers.grid import UniformGrid
from kvcomp.quantizers.segments import SegmentedGrid
from kvcomp.segments import Codebook, Dense, Floats, Plane, Segment, SideLayout
from kvcomp.stages import Codec, PageShape

compiled = pytest.mark.skipif(cpu.library() is None, reason="the C kernel is not installed: no compiler")

HOST = torch.device("cpu")
BEST = compiled_kernel.level() if cpu.library() is not None else 0
DTYPES = [torch.bfloat16, torch.float32, torch.float16]
DIMS = [64, 80, 96, 128, 256]
ANY = [1, 7, 33, 64]  # tokens of a page
Specs = list[tuple[str, list[int], list[int]]]
UNIFORM: Specs = [  # every granularity, width and option, and what is stored without a grid
    ("none", ANY, DIMS),
    ("kivi(bits=2, group=16)", [16, 48], DIMS),
    ("kivi(bits=4)", [32, 96], [64, 96, 128, 256]),
    ("kivi(k=2, v=4, group=64)", [64], [64, 128, 256]),
    ("int(bits=2, group=8)", ANY, DIMS),
    ("int(bits=3)", ANY, DIMS),
    ("int(bits=4)", ANY, DIMS),
    ("int(bits=4, group=40)", ANY, [80]),
    ("int(bits=4, group=16, clip=0.9, symmetric=true)", ANY, DIMS),
    ("int(bits=5, per=channel)", ANY, DIMS),
    ("int(bits=6, group=32, basis=hadamard)", ANY, [64, 96, 128, 256]),
    ("int(bits=7, per=channel, group=11, clip=0.8)", [11, 33], DIMS),
    ("int(bits=8, symmetric=true, basis=random)", ANY, DIMS),
    ("int8", ANY, DIMS),
    ("fp8", ANY, DIMS),
    ("fp8(format=e5m2)", ANY, DIMS),
    ("nvfp4", ANY, [*DIMS, 72]),
    ("mxfp4", ANY, [*DIMS, 24, 72]),
    ("mxfp4(basis=hadamard)", ANY, [64, 96, 128, 256]),
]
BOOKS: Specs = [
    ("turboquant(bits=1)", ANY, DIMS),
    ("turboquant(bits=2)", ANY, DIMS),
    ("turboquant(bits=2.5)", ANY, DIMS),
    ("turboquant(bits=3)", ANY, DIMS),
    ("turboquant(bits=3.5)", ANY, [64, 96, 128, 256]),
    ("turboquant(bits=4)", ANY, DIMS),
    ("turboquant(bits=3, variant=prod)", ANY, DIMS),
]
JOINT: Specs = [(f"klt(bits={bits})", [7, 33, 64], DIMS) for bits in (2, 4, 6)]  # codes of 1 to 8 bits
Case = tuple[str, int, int, torch.dtype, int, int]


def cases(specs: Specs) -> list[Case]:
    """Each quantizer at all dimensions and levels, in turn with page sizes, dtypes and numbers of pages."""
    dtypes, pages, found = cycle(DTYPES), cycle([7, 1]), []
    for spec, sizes, dims in specs:
        size = cycle(sizes)
        found += [
            (spec, dim, next(size), next(dtypes), next(pages), level) for dim in dims for level in range(BEST + 1)
        ]
    return found


def built(spec: str, dim: int, size: int, dtype: torch.dtype, centred: bool = True) -> tuple[Codec, PageLayout]:
    quantizer = Stack.parse(spec).plan(0, 1).quantizer
    codec = quantizer.codec(PageShape(size, dim, dim, 1, dtype, HOST, 0, centred))
    return codec, PageLayout(size, codec.fields)


def difficult(pages: int, size: int, dim: int, dtype: torch.dtype, most: float) -> Tensor:
    """Pages whose channels differ in size; some tokens are constant, as large as `most`, or as small as can be."""
    x = (torch.randn(pages * size, dim) * torch.randn(dim).mul(2).exp()).clamp(-most, most).to(dtype)
    most, tiny = min(most, torch.finfo(dtype).max), torch.finfo(dtype).tiny
    odd = torch.tensor([0, -1.5, most, -most, tiny, 2.0**-24, 3 * 2.0**-25, 65520.0]).clamp_max(most)
    rows = x[len(x) // 2 :][: len(odd)]
    rows[:] = odd[: len(rows), None].to(dtype)
    x[len(x) // 3, 1::2] *= -1e-6
    return x.view(pages, size, dim)


def compared(
    codec: Codec, layout: PageLayout, k: Tensor, v: Tensor, level: int, monkeypatch: pytest.MonkeyPatch
) -> tuple[Tensor, Tensor]:
    """The pool as the codec encodes pages, and as the kernel writes them; it was full of 0xFF, nan in every float."""
    streams = torch.zeros(len(k), dtype=torch.int64)
    if len(k):
        codec.fit(streams[:1], k.flatten(0, 1)[None], v.flatten(0, 1)[None])
    pool = PagePool(layout, HOST)
    ids = pool.allocate(len(k) + 2).flip(0)[: len(k)]  # two belong to nobody
    pool.data.fill_(0xFF)
    found = pool.data.clone()
    pool.write(ids, codec.encode(k, v, streams))
    sides, x = codec.kernel_layouts(), codec.kernel_input(k, v, streams)
    assert sides is not None
    assert x is not None
    assert encode.obstacle(sides) is None
    monkeypatch.setattr(compiled_kernel, "level", lambda: level)
    encode.write(found, ids, *x, sides, layout)
    return pool.data, found


@compiled
@pytest.mark.parametrize(("spec", "dim", "size", "dtype", "pages", "level"), cases(UNIFORM))
def test_records_are_the_codecs(
    spec: str, dim: int, size: int, dtype: torch.dtype, pages: int, level: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole records, gaps between fields included, and nothing else of the pool."""
    torch.manual_seed(dim + size)
    codec, layout = built(spec, dim, size, dtype)
    most = 1e6 if "basis" in spec else torch.inf
    k, v = (difficult(pages, size, dim, dtype, most) for _ in range(2))
    expected, found = compared(codec, layout, k, v, level, monkeypatch)
    for (name, a), b in zip(layout.views(found).items(), layout.views(expected).values(), strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)), name
    assert torch.equal(found, expected)


@compiled
@pytest.mark.parametrize(("spec", "dim", "size", "dtype", "pages", "level"), cases(BOOKS))
def test_codes_of_books_are_the_codecs(
    spec: str, dim: int, size: int, dtype: torch.dtype, pages: int, level: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A norm is a sum in another order: its last bit may differ. Where it does not, all codes are the same."""
    torch.manual_seed(dim + size)
    codec, layout = built(spec, dim, size, dtype)
    k, v = (difficult(pages, size, dim, dtype, 1e6) for _ in range(2))
    expected, found = compared(codec, layout, k, v, level, monkeypatch)
    a, b = layout.views(found), layout.views(expected)
    for norm in (name for name in a if name.endswith(".norm")):
        off = (a[norm].view(torch.int16).int() - b[norm].view(torch.int16).int()).abs()[..., 0]  # [pages, P]
        assert int(off.max()) <= 1
        assert float((off > 0).float().mean()) < 0.02
        for codes in (name for name in a if name.startswith(norm.removesuffix("norm") + "codes")):
            assert torch.equal(a[codes][off == 0], b[codes][off == 0]), codes
        b[norm].copy_(a[norm])
        for codes in (name for name in a if name.startswith(norm.removesuffix("norm") + "codes")):
            b[codes][off > 0] = a[codes][off > 0]
    assert torch.equal(found, expected)  # gaps, and nobody's pages


@compiled
@pytest.mark.parametrize(("spec", "dim", "size", "dtype", "pages", "level"), cases(JOINT))
def test_codes_that_share_a_norm_are_the_codecs(
    spec: str, dim: int, size: int, dtype: torch.dtype, pages: int, level: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All codes are; a norm is made of sums in another order: its last bit may differ."""
    torch.manual_seed(dim + size)
    codec, layout = built(spec, dim, size, dtype)
    k, v = (difficult(pages, size, dim, dtype, 3e4) for _ in range(2))
    expected, found = compared(codec, layout, k, v, level, monkeypatch)
    a, b = layout.views(found), layout.views(expected)
    for norm in ("k.norm", "v.norm"):
        off = (a[norm].view(torch.int16).int() - b[norm].view(torch.int16).int()).abs()
        assert int(off.max()) <= 1
        assert float((off > 0).float().mean()) < 0.02
        b[norm].copy_(a[norm])
    assert torch.equal(found, expected)


@compiled
@pytest.mark.parametrize("level", range(BEST + 1))
def test_products_are_rounded_before_they_are_added(level: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which shows in few of many clipped blocks, where a compiler would fuse the two."""
    torch.manual_seed(0)
    codec, layout = built("int(bits=4, group=8, clip=0.9)", 256, 64, torch.float32)
    k, v = torch.randn(2, 120, 64, 256)
    expected, found = compared(codec, layout, k, v, level, monkeypatch)
    assert torch.equal(found, expected)


@compiled
@pytest.mark.parametrize("level", range(BEST + 1))
@pytest.mark.parametrize("pages", [0, 1, 7])
def test_what_no_quantizer_of_ours_asks_for(pages: int, level: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of tokens and channels, 1 bit, K and V of other sizes, a segment without a grid beside one that has it."""
    torch.manual_seed(pages)
    one, other = UniformGrid("k", 12, 40, 1, 4, 8), UniformGrid("v", 12, 24, 3, 3, 12, symmetric=True, clip=0.7)
    raw, codes = RawGrid("raw", 12, 5, torch.float32), UniformGrid("codes", 12, 19, 8, 6, 19)
    mixed = SegmentedGrid((raw, codes), (5, 19))
    for k_grid, v_grid, k_dim in [(one, other, 40), (one, mixed, 40), (mixed, other, 24)]:
        codec = GridCodec(k_grid, v_grid)
        k, v = torch.randn(pages, 12, k_dim) * 10, torch.randn(pages, 12, 24) * 10
        expected, found = compared(codec, PageLayout(12, codec.fields), k, v, level, monkeypatch)
        assert torch.equal(found, expected)


SINGLE = [
    "none",
    "int(bits=3)",
    "int(bits=4, group=16)",
    "int8",
    "turboquant(bits=3)",
    "turboquant(bits=2.5)",
    "klt(bits=2)",
    "fp8",
    "mxfp4",
]


@compiled
@pytest.mark.parametrize("level", range(BEST + 1))
@pytest.mark.parametrize("spec", SINGLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_written_one_by_one_make_the_same_pages(
    spec: str, level: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In any order; what lies between fields and tokens that are not written stay as they were."""
    torch.manual_seed(1)
    size, pages = 16, 3
    codec, layout = built(spec, 64, size, dtype, centred=False)
    k, v = (difficult(pages, size, 64, dtype, 1e4) for _ in range(2))
    _, whole = compared(codec, layout, k, v, level, monkeypatch)
    x, sides = codec.kernel_input(k, v, torch.zeros(pages, dtype=torch.int64)), codec.kernel_layouts()
    assert x is not None
    assert sides is not None
    token = torch.randperm(pages * size)[1:]
    missing = next(iter(set(range(pages * size)) - set(token.tolist())))
    ids = PagePool(layout, HOST).allocate(pages + 2).flip(0)[:pages]
    found = torch.full_like(whole, 0xFF)
    one_by_one = (t.flatten(0, 1)[token][:, None] for t in x)
    encode.write(found, ids[token // size], *one_by_one, sides, layout, token % size)
    for (name, a), b in zip(layout.views(found).items(), layout.views(whole).values(), strict=True):
        b[ids[missing // size], missing % size].view(torch.uint8).fill_(0xFF)
        assert torch.equal(a[ids].view(torch.uint8), b[ids].view(torch.uint8)), name
    filled = sum(f.nbytes for f in layout.fields)
    assert int((found[ids] == 0xFF).sum()) >= pages * (layout.bytes_per_page - filled)


@compiled
@pytest.mark.parametrize("spec", [spec for spec in SINGLE if spec != "none" and "klt" not in spec])
def test_single_tokens_have_no_centre_of_their_own(spec: str) -> None:
    codec, layout = built(spec, 64, 16, torch.float32)
    sides, pool = codec.kernel_layouts(), torch.zeros(1, layout.bytes_per_page, dtype=torch.uint8)
    x, at = torch.randn(1, 1, 64), torch.zeros(1, dtype=torch.int64)
    assert sides is not None
    with pytest.raises(KvcompError, match="share scales or a centre"):
        encode.write(pool, at, x, x, sides, layout, at)


@compiled
@pytest.mark.parametrize("level", range(BEST + 1))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "dim"), [(16, 64), (24, 80), (64, 128), (80, 96), (128, 256), (33, 576)])
@pytest.mark.parametrize(
    "spec",
    ["int(bits=4)", "int(bits=4, symmetric=true, per=channel)", "int8", "fp8", "fp8(format=e5m2)", "nvfp4", "mxfp4"],
)
def test_keys_with_a_large_mean(
    spec: str, size: int, dim: int, dtype: torch.dtype, level: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Centres and codes are the codec's to the last bit, whatever is subtracted."""
    torch.manual_seed(size)
    codec, layout = built(spec, dim, size, dtype)
    k = (torch.randn(3, size, dim) + torch.randn(3, 1, dim) * torch.tensor([0.1, 10, 1000])[:, None, None]).to(dtype)
    expected, found = compared(codec, layout, k, k.flip(0), level, monkeypatch)
    assert torch.equal(found, expected)


@compiled
@pytest.mark.parametrize("spec", ["kivi(bits=2)", "int(bits=3)", "turboquant(bits=2.5)"])
@pytest.mark.parametrize("level", range(BEST + 1))
def test_no_pages_change_nothing(spec: str, level: int, monkeypatch: pytest.MonkeyPatch) -> None:
    codec, layout = built(spec, 64, 32, torch.float32)
    k = torch.randn(0, 32, 64)
    expected, found = compared(codec, layout, k, k, level, monkeypatch)
    assert len(found) == 2
    assert torch.equal(found, expected)


@compiled
@pytest.mark.parametrize("spec", ["kivi(bits=4)", "int(bits=3)"])
def test_threads_share_pages(spec: str) -> None:
    """More work than one thread does alone, of V that is not contiguous, into records with gaps between them."""
    torch.manual_seed(0)
    codec, layout = built(spec, 128, 32, torch.float32)
    k, v, streams = torch.randn(41, 32, 128), torch.randn(41, 128, 32).mT, torch.zeros(41, dtype=torch.int64)
    sides, x = codec.kernel_layouts(), codec.kernel_input(k, v, streams)
    assert sides is not None
    assert x is not None
    ids, expected = torch.randperm(50)[:41], PagePool(layout, HOST)
    expected.allocate(50)
    expected.data.fill_(0xFF)
    expected.write(ids, codec.encode(k, v, streams))
    had = torch.get_num_threads()
    for threads in (1, 3):
        pool = torch.full((50, layout.bytes_per_page + 48), 0xFF, dtype=torch.uint8)
        torch.set_num_threads(threads)
        try:
            encode.write(pool, ids, *x, sides, layout)
        finally:
            torch.set_num_threads(had)
        assert torch.equal(pool[:, : layout.bytes_per_page], expected.data)
        assert bool((pool[:, layout.bytes_per_page :] == 0xFF).all())


WHERE_THEY_LIE = ["none", "kivi(bits=2, group=16)", "int(bits=4)", "int8", "turboquant(bits=3)", "turboquant(bits=2.5)"]


@compiled
@pytest.mark.parametrize("level", range(BEST + 1))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spec", WHERE_THEY_LIE)
def test_tokens_are_read_where_they_lie(
    spec: str, dtype: torch.dtype, level: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of [B, n, H, D] in memory, and of larger strides: nothing is copied first; records are the same."""
    torch.manual_seed(2)
    codec, layout = built(spec, 80, 16, dtype)
    monkeypatch.setattr(compiled_kernel, "level", lambda: level)
    wide, deep = torch.randn(1, 3 + 4 * 16, 3, 80).to(dtype).transpose(1, 2)[0], torch.randn(5, 99, 161).to(dtype)
    written, streams, ids = [], torch.zeros(12, dtype=torch.int64), torch.arange(3, 15)
    for x in (wide[:, 3:], deep[1:4, 2:66, 1:81], deep[2, :64, 3:83].expand(3, 64, 80)):
        k = x.unflatten(1, (4, 16))  # [3, 4, 16, 80]
        found, *how = memory.pages("keys", k, dtype, (12, 16, 80))
        assert (found.data_ptr(), *how) == (x.data_ptr(), 4, x.stride(0), x.stride(1))
        each, flat = [], k.flatten(0, 1)
        for keys, values in ((k, k), (flat, flat), (k, flat)):
            pool = torch.full((20, layout.bytes_per_page), 0xFF, dtype=torch.uint8)
            assert dispatch.encode_pages(pool, ids, layout, codec, keys, values, streams)
            each.append(pool)
        assert torch.equal(each[0], each[1])
        assert torch.equal(each[0], each[2])
        written.append(each[0])
    assert not torch.equal(written[0], written[1])


@compiled
@pytest.mark.parametrize("spec", ["int(bits=4) + quest(pages=2)", "snapkv(budget=90) + kivi(group=16)"])
def test_a_store_writes_its_pages_so(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the kernel, but not inside `reference_only`; records are the same, summaries included."""
    torch.manual_seed(0)
    k, v = (torch.randn(2, 2, 150, 64) for _ in range(2))
    q, steps = torch.randn(2, 6, 150, 64), [torch.randn(2, 2, 1, 64) for _ in range(20)]
    plan = Stack.parse(f"{spec} + window(recent=8, sinks=2)").plan(1, 3)
    called: list[int] = []
    real = encode.write

    def watched(pool: Tensor, ids: Tensor, *rest: Tensor) -> None:
        called.append(len(ids))
        real(pool, ids, *rest)

    monkeypatch.setattr(encode, "write", watched)

    def held() -> LayerStore:
        store = LayerStore(plan)
        store.start(k, v)
        store.write(k, v, None, q, 0.125)
        for x in steps:
            store.settle()
            store.append(x, x)
        return store

    with dispatch.reference_only():
        expected = held()
    assert not called
    found = held()
    assert len(called) > 1
    assert torch.equal(found.table.ids(), expected.table.ids())
    used = found.pool.owned()
    assert torch.equal(found.pool.data[used], expected.pool.data[used])


@pytest.mark.parametrize("spec", ["fp8", "mxfp4", "nvfp4", "kivi(bits=4)"])
def test_what_no_kernel_can_write_is_left_to_the_codec(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes that it does not know, and any without the library."""
    if spec in ("kivi(bits=4)", "fp8"):
        monkeypatch.setattr(compiled_kernel, "library", lambda: None)
    else:
        monkeypatch.setattr(encode, "FLOATS", {})
    with dispatch.using(C()):
        is_left_to_the_codec(spec)


def is_left_to_the_codec(spec: str) -> None:
    codec, layout = built(spec, 64, 32, torch.float32)
    k = torch.randn(2, 32, 64)
    streams = torch.zeros(2, dtype=torch.int64)
    pool, other = PagePool(layout, HOST), PagePool(layout, HOST)
    ids = pool.allocate(2)
    other.allocate(2)
    pool.data.fill_(0xFF)
    assert not dispatch.encode_pages(pool.data, ids, layout, codec, k, k, streams)
    assert bool((pool.data == 0xFF).all())
    pool.encode(ids, codec, k, k, streams, {})
    other.write(ids, codec.encode(k, k, streams))
    assert torch.equal(pool.data, other.data)


def test_a_codec_without_input_for_kernels_encodes_itself() -> None:
    codec, layout = built("kivi(bits=4)", 64, 32, torch.float32)

    class Own(GridCodec):
        def kernel_input(self, keys: Tensor, values: Tensor, streams: Tensor) -> None:
            return None

    assert isinstance(codec, GridCodec)
    own, pool = Own(codec.k_grid, codec.v_grid), PagePool(layout, HOST)
    k, streams = torch.randn(2, 32, 64), torch.zeros(2, dtype=torch.int64)
    assert not dispatch.encode_pages(pool.data, pool.allocate(2), layout, own, k, k, streams)


def test_obstacles_name_what_is_wrong() -> None:
    plane, codebook = (Plane("k.codes4", 4),), torch.zeros(16)
    segments: list[tuple[Segment, str]] = [
        (Dense(64, "k", torch.float64), "numbers of torch.float64"),
        (Floats(64, plane, "e2m1", 16, "k.scale", "e4m3"), "floating-point codes"),
        (Codebook(64, plane, "k.norm", codebook), "more than their segment"),
        (Codebook(64, plane, "k.norm", codebook.to("meta"), torch.zeros(15)), "another device"),
    ]
    for segment, words in segments:
        assert words in str(encode.obstacle((SideLayout((segment,)), SideLayout(()))))
        assert words in str(encode.obstacle((SideLayout(()), SideLayout((segment,)))))
