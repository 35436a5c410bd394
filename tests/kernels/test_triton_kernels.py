"""The Triton kernels against the specification, as they are where there is a GPU.

Elsewhere triton's interpreter runs them, in processes that ask for it before anything imports triton: test_triton.py
starts them.
"""

from __future__ import annotations

from importlib.util import find_spec
from itertools import cycle

import pytest
import torch
from torch import Tensor

from kvcomp import Stack
from kvcomp.attention import Part, Tokens, merge
from kvcomp.attention import attend as attend_reference
from kvcomp.cache.pool import PagePool
from kvcomp.kernels import dispatch, reference
from kvcomp.kernels.triton_backend import Triton
from kvcomp.layout import PageLayout, Summary
from kvcomp.segments import KVLayout
from kvcomp.stages import Codec, PageShape
from kvcomp.stages.plan import LayerPlan

if find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

from kvcomp.kernels import triton as kernels  # noqa: E402
from kvcomp.kernels.triton import ops, plan, tiling  # noqa: E402

QUANTIZERS = [  # every kind of segment, granularity and number of bits
    "none",
    "kivi(bits=2, group=16)",
    "kivi(bits=4, group=16)",
    "kivi(bits=4, group=32)",
    "kivi(k=2, v=4, group=64)",
    "int(bits=2)",
    "int(bits=2, group=8)",
    "int(bits=3)",
    "int(bits=4)",
    "int(bits=4, group=24)",
    "int(bits=4, group=40)",
    "int(bits=4, symmetric=true, basis=hadamard)",
    "int(bits=5, per=channel)",
    "int(bits=6, group=16)",
    "int(bits=7, per=channel, group=48)",
    "int8",
    "turboquant(bits=1)",
    "turboquant(bits=2.5)",
    "turboquant(bits=3)",
    "turboquant(bits=3, variant=prod)",
    "turboquant(bits=4)",
    "klt(bits=1)",
    "klt(bits=2)",
    "klt(bits=4)",
    "klt(k=3.5, v=1.5)",
    "fp8",
    "fp8(format=e5m2)",
    "mxfp4",
    "nvfp4",
    "quest(dense_layers=0) + int(bits=4, group=16)",
]
DIMS = [(64, 64), (80, 80), (96, 96), (128, 128), (256, 256), (192, 128)]
GROUPS = [1, 3, 4, 8]
COUNTS = [[2, 0, 3], [5], [1, 4], [0], [3, 3]]  # pages of each stream
BOUNDS = {torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 2e-2}  # of the largest number of the reference
SIZES = [64, 80, 96, 128, 256]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What kernels are given to write to is full of nan."""
    real = torch.empty

    def empty(*args: object, **kwargs: object) -> Tensor:
        made = real(*args, **kwargs)  # type: ignore[call-overload]
        return made.fill_(torch.nan) if made.is_floating_point() and not made.is_meta else made

    monkeypatch.setattr(ops.torch, "empty", empty)


def fits(spec: str, dims: tuple[int, int]) -> bool:
    """Whether codes and groups of the quantizer fill so many channels."""
    multiple = {"kivi(bits=4, group=32)": 32, "kivi(k=2, v=4, group=64)": 64, "turboquant(bits=2.5)": 64}.get(spec, 16)
    multiple = 24 if "group=24" in spec else 40 if "group=40" in spec else multiple
    return all(dim % multiple == 0 for dim in dims)


def filled(spec: str, pages: int, dims: tuple[int, int], dtype: torch.dtype) -> tuple[PagePool, LayerPlan, Codec]:
    """A pool of random pages, those of stream 0."""
    stack = Stack.parse(f"{spec} + window(recent=0)").plan(0, 1)
    size = stack.page_size
    codec, layout = stack.build(PageShape(size, *dims, 1, dtype, DEVICE, 0))
    pool = PagePool(layout, DEVICE)
    ids, stream = pool.allocate(pages).to(DEVICE), torch.zeros(pages, dtype=torch.int64, device=DEVICE)
    k, v = (torch.randn(pages, size, dim) * torch.randn(dim).exp() for dim in dims)
    k, v = k.to(DEVICE, dtype), v.to(DEVICE, dtype)
    codec.fit(stream[:1], k.flatten(0, 1)[None], v.flatten(0, 1)[None])
    fields = codec.encode(k, v, stream)
    if stack.selector is not None:
        fields |= stack.selector.summarize(k, v)
    pool.write(ids, fields)
    return pool, stack, codec


def sides_of(codec: Codec) -> KVLayout:
    sides = codec.kernel_layouts()
    assert sides is not None
    assert kernels.obstacle(sides) is None
    return sides


def prepared(codec: Codec, layout: PageLayout, dtype: torch.dtype = torch.float32) -> kernels.Prepared:
    return kernels.prepared(sides_of(codec), layout, dtype == torch.float32, DEVICE)


def error(found: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest finite number; infinities must be at the same places."""
    assert found.shape == expected.shape
    assert found.dtype == torch.float32
    assert torch.equal(found.isinf(), expected.isinf())
    assert not bool(found.isnan().any())
    finite = expected.isfinite()
    if not bool(finite.any()):
        return 0.0
    return float((found - expected)[finite].abs().max() / expected[finite].abs().max().clamp_min(1e-6))


def close(found: Part, expected: Part, bound: float) -> None:
    assert error(found.out, expected.out) < bound
    assert error(found.lse, expected.lse) < bound
    assert (found.groups is None) == (expected.groups is None)
    if found.groups is not None and expected.groups is not None:
        assert error(found.groups, expected.groups) < bound


def exact(counts: list[int], dims: tuple[int, int], dtype: torch.dtype) -> Tokens:
    """A window of which a stream's first tokens are there, the rest nan, in a larger room."""
    longest = max(counts)
    k, v = (torch.full((len(counts), longest + 3, dim), torch.nan, dtype=dtype) for dim in dims)
    for i, count in enumerate(counts):
        k[i, :count], v[i, :count] = torch.randn(count, dims[0]).to(dtype), torch.randn(count, dims[1]).to(dtype)
    return Tokens(k[:, :longest].to(DEVICE), v[:, :longest].to(DEVICE), torch.tensor(counts))


def attended(q: Tensor, tokens: Tokens, scale: float, softcap: float | None) -> Part:
    """The reference over exact tokens."""
    seen = torch.arange(tokens.keys.shape[1], device=DEVICE) < tokens.counts.to(DEVICE)[:, None]
    k, v = (x.float().masked_fill(~seen[..., None], 0) for x in tokens[:2])
    return attend_reference(q.float(), k, v, scale, seen[:, None], softcap)


def cases() -> list[tuple[object, ...]]:
    """Every quantizer at one or two dimensions; dimensions, rows, lengths and all else take turns."""
    sizes, rows, counts = cycle(DIMS), cycle([*GROUPS, 24]), cycle(COUNTS)
    dtypes, softcaps = cycle([torch.float32, torch.bfloat16, torch.float16]), cycle([None, None, 1.5])
    flags, splits = cycle([False, True, True, False, False]), cycle([1, 2, 100])
    found = []
    for spec in QUANTIZERS:
        for _ in range(1 + (len(found) % 3 == 0)):
            dims = next(d for d in sizes if fits(spec, d))
            found.append(
                (spec, dims, next(rows), next(counts), next(dtypes), next(softcaps), next(flags), next(splits))
            )
    short = [("mxfp4", (80, 72), torch.float32), ("nvfp4", (72, 88), torch.bfloat16)]  # the last block of channels is
    short += [  # other counts of units, and rows of odd numbers of words
        *(("int(bits=2)", dims, dtype) for dims, dtype in (((64, 64), torch.bfloat16), ((96, 80), torch.float16))),
        *(("klt(bits=2)", dims, dtype) for dims, dtype in (((64, 128), torch.bfloat16), ((80, 96), torch.float32))),
        ("klt(bits=4)", (128, 64), torch.float16),
        ("klt(k=6, v=1.5)", (80, 128), torch.bfloat16),
    ]
    return found + [(spec, dims, 3, [2, 1], dtype, None, True, 1) for spec, dims, dtype in short]


@pytest.mark.parametrize(("spec", "dims", "rows", "counts", "dtype", "softcap", "lse_of_pages", "split"), cases())
def test_attention_is_the_reference(
    spec: str,
    dims: tuple[int, int],
    rows: int,
    counts: list[int],
    dtype: torch.dtype,
    softcap: float | None,
    lse_of_pages: bool,
    split: int,
) -> None:
    torch.manual_seed(rows)
    pages, n = 8, max(*counts, 1) + rows % 2  # sometimes wider than the longest
    pool, _, codec = filled(spec, pages, dims, dtype)
    layout = pool.layout
    ids = torch.randint(0, pages - 2, (len(counts), n + 1), dtype=torch.int32)[:, :n]  # any order, some several times
    handed = torch.zeros(pages, dtype=torch.bool)
    for own, count in zip(ids, counts, strict=True):
        own[count:] = pages - 1  # belongs to nobody
        handed[own[:count].long()] = True
    ids, held, scale = ids.to(DEVICE), torch.tensor(counts, device=DEVICE), dims[0] ** -0.5
    q = torch.randn(len(counts), rows, dims[0]).to(DEVICE, dtype)
    expected = reference.attend_pages(q, pool.data, ids, held, layout, codec, scale, softcap, lse_of_pages)
    pool.data[~handed.to(DEVICE)] = 0xFF  # nan in every float
    before, tokens, bias, read = pool.data.clone(), None, None, q
    if codec.rotates:
        read, bias = codec.read_query(q.float())
    elif rows != 3:
        tokens = exact([(37, 20, 0)[i] for i in range(len(counts))], dims, dtype)
        expected = merge([expected, attended(q, tokens, scale, softcap)])._replace(groups=expected.groups)
    given = kernels.Pages(pool.data, ids, held, prepared(codec, layout, dtype))
    part = kernels.attend(read, given, tokens, scale, softcap, bias, None, lse_of_pages, pages_of_split=split)
    close(part._replace(out=codec.read_output(part.out)), expected, BOUNDS[dtype])
    assert torch.equal(pool.data, before)


@pytest.mark.parametrize(
    ("dtype", "dims", "rows"),
    [
        (torch.float32, (64, 64), 1),
        (torch.bfloat16, (33, 7), 3),
        (torch.float16, (256, 256), 8),
        (torch.bfloat16, (32, 48), 70),
    ],
)
def test_tokens_side_by_side_and_what_came_before(dtype: torch.dtype, dims: tuple[int, int], rows: int) -> None:
    torch.manual_seed(rows)
    tokens = exact([50, 0, 7], dims, dtype)
    q = torch.randn(3, rows, dims[0]).to(DEVICE, dtype)
    prior = Part(torch.randn(3, rows, dims[1], device=DEVICE), torch.randn(3, rows, device=DEVICE))
    prior.lse[:, 0], prior.out[:, 0] = -torch.inf, torch.nan
    whole = prior._replace(out=prior.out.nan_to_num())
    expected = attended(q, tokens, 0.2, None)
    close(kernels.attend(q, None, tokens, 0.2), expected, BOUNDS[dtype])
    close(kernels.attend(q, None, tokens, 0.2, prior=prior), merge([whole, expected]), BOUNDS[dtype])


@pytest.mark.parametrize("spec", ["int(bits=4)", "turboquant(bits=4)"])
def test_dispatch_reads_pages_and_tokens(spec: str) -> None:
    """In one launch, or in two where pages have another basis."""
    torch.manual_seed(0)
    pool, _, codec = filled(spec, 4, (64, 64), torch.bfloat16)
    ids, held = torch.tensor([[0, 1], [2, 3]], device=DEVICE), torch.tensor([2, 1], device=DEVICE)
    q, tokens = torch.randn(2, 4, 64).to(DEVICE, torch.bfloat16), exact([5, 9], (64, 64), torch.bfloat16)
    pages = reference.attend_pages(q, pool.data, ids, held, pool.layout, codec, 0.1, None, True)
    with dispatch.using(Triton(anywhere=True)):
        found = dispatch.attend_pages(q, pool.data, ids, held, pool.layout, codec, 0.1, None, True, tokens)
    close(found, merge([pages, attended(q, tokens, 0.1, None)])._replace(groups=pages.groups), 2e-2)


def test_far_apart_logits_and_long_streams() -> None:
    """Rescaling between tiles, splits and blocks of splits, and pages whose weights underflow."""
    torch.manual_seed(0)
    pool, _, codec = filled("quest(dense_layers=0) + int(bits=4)", 10, (64, 64), torch.float32)
    ids = torch.arange(10, dtype=torch.int32, device=DEVICE).repeat(2).view(1, -1)
    held = torch.tensor([20], device=DEVICE)
    for size in (0.01, 30.0, 1000.0):
        q = torch.randn(1, 4, 64, device=DEVICE) * size
        expected = reference.attend_pages(q, pool.data, ids, held, pool.layout, codec, 0.125, None, True)
        given = kernels.Pages(pool.data, ids, held, prepared(codec, pool.layout))
        found = kernels.attend(q, given, None, 0.125, lse_of_pages=True, pages_of_split=1)
        close(found, expected, 1e-4 * max(size / 100, 1))  # logits of 1e5 have errors of 1e-2


@pytest.mark.parametrize("scale", [0.3, 0.0, -0.3])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_scales_of_either_sign(scale: float, softcap: float | None) -> None:
    """The maximum of a tile's products is one of logits; queries of zeros, and a row's bias, change nothing of that."""
    torch.manual_seed(0)
    pool, _, codec = filled("int(bits=2)", 3, (64, 64), torch.bfloat16)
    ids = torch.arange(3, dtype=torch.int32, device=DEVICE).view(1, -1)
    held = torch.tensor([3], device=DEVICE)
    q = torch.randn(1, 4, 64, device=DEVICE).to(torch.bfloat16)
    q[0, 2] = 0
    expected = reference.attend_pages(q, pool.data, ids, held, pool.layout, codec, scale, softcap, True)
    given = kernels.Pages(pool.data, ids, held, prepared(codec, pool.layout, torch.bfloat16))
    close(kernels.attend(q, given, None, scale, softcap, lse_of_pages=True), expected, BOUNDS[torch.bfloat16])
    bias = torch.randn(1, 4, device=DEVICE)
    found = kernels.attend(q, given, None, scale, bias=bias)
    torch.testing.assert_close(
        found.lse, kernels.attend(q, given, None, scale).lse + bias * scale, rtol=1e-4, atol=1e-4
    )


def small(spec: str = "int(bits=4)") -> kernels.Pages:
    pool, _, codec = filled(spec, 5, (64, 64), torch.float32)
    ids = torch.arange(4, dtype=torch.int32, device=DEVICE).view(2, 2)
    return kernels.Pages(pool.data, ids, torch.tensor([2, 1], device=DEVICE), prepared(codec, pool.layout))


def test_a_workspace_serves_again() -> None:
    given = small()
    tokens, splits = exact([5, 9], (64, 64), torch.float32), 3
    workspace = torch.full((ops.workspace_size(2, 3, splits, 64),), torch.nan, device=DEVICE)
    for _ in range(2):
        q = torch.randn(2, 3, 64, device=DEVICE)
        expected = kernels.attend(q, given, tokens, 0.1, pages_of_split=1)
        found = kernels.attend(q, given, tokens, 0.1, pages_of_split=1, workspace=workspace)
        torch.testing.assert_close(found[:2], expected[:2], rtol=0, atol=0)


def test_short_workspaces_are_refused() -> None:
    given = small()
    with pytest.raises(ValueError, match="workspace"):
        kernels.attend(torch.randn(2, 3, 64, device=DEVICE), given, None, 0.1, workspace=torch.empty(7, device=DEVICE))


@pytest.mark.parametrize("selector", ["quest", "moba", "nsa"])
@pytest.mark.parametrize("bits", [8, 16])
def test_scores_are_the_selectors(selector: str, bits: int) -> None:
    for dim, rows in zip(SIZES, [1, 3, 4, 8, 24], strict=True):
        torch.manual_seed(dim)
        spec = f"none + {selector}(dense_layers=0, summary_bits={bits})"
        pool, stack, _ = filled(spec, 70, (dim, dim), torch.bfloat16)
        ids = torch.randint(1, 70, (3, 68), dtype=torch.int32, device=DEVICE)
        held = torch.tensor([68, 0, 65], device=DEVICE)
        q = torch.randn(3, rows, dim, device=DEVICE) * 10
        expected = stack.selector.logits(q, pool.layout.gather(pool.data, ids, summary=True))
        there = (torch.arange(68, device=DEVICE) < held[:, None]).repeat_interleave(expected.shape[-1] // 68, 1)
        expected = expected.masked_fill(~there[:, None], -torch.inf)
        data, own = pool.data.clone(), ids.clone()
        data[0] = 0xFF  # nobody's
        own[torch.arange(68, device=DEVICE) >= held[:, None]] = 0
        with dispatch.using(Triton(anywhere=True)):
            found = stack.selector.logits(q, Summary(pool.layout, data, own, held))
        assert error(found, expected) < (1e-5 if bits == 16 else 2e-3)


def test_a_graph_holds_them_whole() -> None:
    """torch.compile takes the operators as they are, and what they say of their results is so."""
    given = small("quest(dense_layers=0) + int(bits=4, group=16)")
    tokens = exact([5, 9], (64, 64), torch.float32)
    q = torch.randn(2, 3, 64, device=DEVICE)

    def step(q: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        part = kernels.attend(q * 2, given, tokens, 0.1, lse_of_pages=True)
        fields = {"summary.max": q, "summary.min": -q}
        return *part, kernels.vector_dots(fields, *given[:3], given.prepared.layout)

    found = torch.compile(step, fullgraph=True, backend="aot_eager")(q)
    torch.testing.assert_close(found, step(q))


def test_operators_keep_their_promises() -> None:
    given = small()
    made = given.prepared
    q = torch.randn(2, 3, 64, device=DEVICE)
    args = (
        q,
        None,
        *given[:3],
        made.k_codebook,
        made.v_codebook,
        *[None] * 6,
        made.description,
        1,
        0.1,
        0.0,
        True,
        True,
    )
    torch.library.opcheck(torch.ops.kvcomp.attend_pages.default, args, test_utils=("test_schema", "test_faketensor"))


def test_what_kernels_cannot_read() -> None:
    for spec, words in [
        ("int(per=channel, group=24)", "no multiple of 16"),
        ("int(bits=3, group=12)", "no multiple of 8"),
    ]:
        stack = Stack.parse(spec).plan(0, 1)
        codec, _ = stack.build(PageShape(stack.page_size, 96, 96, 1, torch.float32, DEVICE, 0))
        sides = codec.kernel_layouts()
        assert sides is not None
        assert words in str(kernels.obstacle(sides))


def test_plans() -> None:
    """Splits fill a chip, are no shorter than is worth it, and follow from shapes alone."""
    assert plan.split_pages(1, 4, 8192, 16, 132) * 16 == 256  # one stream of 128k tokens
    assert plan.split_pages(256, 4, 512, 64, 132, programs=4) == 256  # two splits of each of many streams
    assert plan.split_pages(256, 4, 512, 64, 132) == 128  # four, where programs are of one warp
    assert plan.split_pages(4096, 4, 512, 64, 132) == 512
    assert [plan.blocked(rows) for rows in (1, 16, 17, 64, 100)] == [16, 16, 32, 64, 64]


def test_as_many_programs_as_have_room() -> None:
    for spec, programs in (
        ("int(bits=2)", 8),
        ("int(bits=4)", 6),
        ("turboquant(bits=4)", 5),
        ("mxfp4", 4),
        ("klt(bits=2)", 8),
    ):
        pool, _, codec = filled(spec, 2, (128, 128), torch.bfloat16)
        assert ops.programs_of(tiling.described(sides_of(codec), pool.layout)) == programs


def test_descriptions_survive_as_text() -> None:
    for spec in QUANTIZERS:
        if fits(spec, (128, 128)):
            pool, _, codec = filled(spec, 2, (128, 128), torch.bfloat16)
            found = tiling.described(sides_of(codec), pool.layout)
            assert tiling.parsed(str(found)) == found


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type == "cpu", reason="there is no GPU")
def test_a_cuda_graph_replays() -> None:
    given = small()
    counts = torch.tensor([9, 3], device=DEVICE)
    tokens = Tokens(*(torch.randn(2, 9, 64, device=DEVICE) for _ in range(2)), counts)
    q = torch.randn(2, 3, 64, device=DEVICE)
    kernels.attend(q, given, tokens, 0.1)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        part = kernels.attend(q, given, tokens, 0.1)
    q.copy_(torch.randn_like(q))
    given.counts.copy_(torch.tensor([1, 2]))
    graph.replay()
    torch.testing.assert_close(part[:2], kernels.attend(q, given, tokens, 0.1)[:2])
