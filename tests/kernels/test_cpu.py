"""The C kernel against the specification, and what is done where it cannot serve."""

from __future__ import annotations

import ctypes
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvcomp import Stack
from kvcomp.attention import Part, Tokens, merge
from kvcomp.attention import attend as attend_reference
from kvcomp.cache.pool import PagePool
from kvcomp.errors import KvcompWarning
from kvcomp.kernels import backends, cpu, dispatch, reference
from kvcomp.kernels.cpu import compiled as compiled_kernel
from kvcomp.kernels.cpu import loading
from kvcomp.kernels.cpu.backend import C
from kvcomp.layout import PageLayout
from kvcomp.stages import Codec, PageShape

compiled = pytest.mark.skipif(cpu.library() is None, reason="the C kernel is not installed: no compiler")

QUANTIZERS = [
    "none",
    "kivi(bits=2, group=16)",
    "kivi(bits=4, group=16)",
    "kivi(bits=4, group=64)",
    "kivi(k=2, v=4, group=16)",
    "int(bits=3)",
    "int(bits=4, group=8)",
    "int(bits=4, symmetric=true)",
    "int(bits=5, per=channel)",
    "int(bits=7, per=channel, group=16)",
    "int(bits=6, basis=hadamard)",
    "int8",
    "turboquant(bits=1)",
    "turboquant(bits=2)",
    "turboquant(bits=2.5)",
    "turboquant(bits=3)",
    "turboquant(bits=4)",
    "turboquant(bits=3, variant=prod)",
    "klt(bits=1)",
    "klt(bits=2)",
    "klt(k=3.5, v=2.5)",
    "klt(bits=4)",
    "klt(bits=6)",
    "fp8",
    "fp8(format=e5m2)",
    "mxfp4",
    "mxfp4(basis=hadamard)",
    "nvfp4",
    "quest(dense_layers=0) + int(bits=4, group=16)",
]
DIMS = [(64, 64), (80, 80), (96, 96), (128, 128), (256, 256), (192, 128), (64, 112), (576, 512)]
BEST = compiled_kernel.level() if compiled_kernel.library() is not None else 0
BOUND = 1e-4  # of the largest number of the reference


def filled(spec: str, pages: int, dims: tuple[int, int], dtype: torch.dtype) -> tuple[PagePool, PageLayout, Codec]:
    """A pool of random pages, those of stream 0, or a skip where the codec does not take these dimensions."""
    plan = Stack.parse(f"{spec} + window(recent=0)").plan(0, 1)
    size = plan.page_size
    codec, layout = plan.build(PageShape(size, *dims, 1, dtype, torch.device("cpu"), 0))
    pool = PagePool(layout, torch.device("cpu"))
    ids, stream = pool.allocate(pages), torch.zeros(pages, dtype=torch.int64)
    k, v = (torch.randn(pages, size, dim) * torch.randn(dim).exp() for dim in dims)
    k, v = k.to(dtype), v.to(dtype)
    codec.fit(stream[:1], k.flatten(0, 1)[None], v.flatten(0, 1)[None])
    fields = codec.encode(k, v, stream)
    if plan.selector is not None:
        fields |= plan.selector.summarize(k, v)
    pool.write(ids, fields)
    return pool, layout, codec


def fits(spec: str, dim: int) -> bool:
    """Whether codes and groups of the quantizer fill so many channels."""
    if "group=64" in spec or "2.5" in spec:
        return dim % 64 == 0
    return not ("3" in spec and "turbo" in spec and dim % 8)


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


def poisoned(like: Tensor, *shape: int) -> Tensor:
    """What `new_empty` gives, with nan where memory may hold anything."""
    return torch.full(shape, torch.nan, dtype=like.dtype)


@compiled
@given(
    seed=st.integers(0, 2**31),
    spec=st.sampled_from(QUANTIZERS),
    dims=st.sampled_from(DIMS),
    rows=st.sampled_from([1, 2, 3, 4, 8, 17, 70, 130]),
    counts=st.lists(st.integers(0, 20), min_size=1, max_size=4),
    softcap=st.sampled_from([None, 1.5]),
    lse_of_pages=st.booleans(),
    exact=st.booleans(),
    level=st.integers(0, 2),
    threads=st.sampled_from([1, 2, 3]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
@settings(deadline=None, max_examples=150)
def test_the_kernel_is_the_reference(
    seed: int,
    spec: str,
    dims: tuple[int, int],
    rows: int,
    counts: list[int],
    softcap: float | None,
    lse_of_pages: bool,
    exact: bool,
    level: int,
    threads: int,
    dtype: torch.dtype,
) -> None:
    if not all(fits(spec, dim) for dim in dims):
        return
    torch.manual_seed(seed)
    pages, n = 12, max(max(counts), 1) + seed % 2  # sometimes wider than the longest
    pool, layout, codec = filled(spec, pages, dims, dtype)
    ids = torch.randint(0, pages - 2, (len(counts), n + 1), dtype=torch.int32)[:, :n]  # any order, some several times
    handed = torch.zeros(pages, dtype=torch.bool)
    for own, count in zip(ids, counts, strict=True):
        own[count:] = pages - 1  # belongs to nobody
        handed[own[:count].long()] = True
    args = (pool.data, ids, torch.tensor(counts), layout, codec, dims[0] ** -0.5, softcap, lse_of_pages)
    q = torch.randn(len(counts), rows, dims[0]).to(dtype)
    expected, tokens = reference.attend_pages(q, *args), None
    if exact:
        both = torch.randn(len(counts), 40, sum(dims)).to(dtype)  # keys and values side by side, or each by itself
        room = both.split(dims, -1) if seed % 3 else (x.contiguous() for x in both.split(dims, -1))
        tokens = Tokens(*(x[:, :37] for x in room), torch.randint(0, 38, (len(counts),)))
        seen = (torch.arange(37) < tokens.counts[:, None])[:, None]
        other = attend_reference(q, tokens.keys, tokens.values, args[5], seen, softcap)
        expected = merge([expected, other])._replace(groups=expected.groups)
    pool.data[~handed] = 0xFF  # nan in every float
    before, had = pool.data.clone(), torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "new_empty", poisoned)
        patch.setattr(compiled_kernel, "level", lambda: min(level, BEST))
        torch.set_num_threads(threads)
        try:
            assert dispatch.obstacle(codec, layout, q.device, rows) is None
            part = dispatch.attend_pages(q, *args, tokens)
        finally:
            torch.set_num_threads(had)
    assert torch.equal(pool.data, before)
    assert error(part.out, expected.out) < BOUND
    assert error(part.lse, expected.lse) < BOUND
    assert (part.groups is None) == (not lse_of_pages)
    if part.groups is not None and expected.groups is not None:
        assert error(part.groups, expected.groups) < BOUND


@compiled
@given(
    seed=st.integers(0, 2**31),
    spec=st.sampled_from([spec for spec in QUANTIZERS if not any(x in spec for x in ("kivi", "per=channel", "nvfp4"))]),
    dims=st.sampled_from(DIMS),
    rows=st.sampled_from([1, 2, 3, 4, 8, 17, 70, 130]),
    counts=st.lists(st.integers(0, 300), min_size=1, max_size=4),
    softcap=st.sampled_from([None, 1.5]),
    lse_of_pages=st.booleans(),
    level=st.integers(0, 2),
    threads=st.sampled_from([1, 2, 3]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
@settings(deadline=None, max_examples=120)
def test_pages_filled_in_part(
    seed: int,
    spec: str,
    dims: tuple[int, int],
    rows: int,
    counts: list[int],
    softcap: float | None,
    lse_of_pages: bool,
    level: int,
    threads: int,
    dtype: torch.dtype,
) -> None:
    """Counts of tokens: what lies after them, in their last page too, is nan in every scale, and has no effect."""
    if not all(fits(spec, dim) for dim in dims):
        return
    torch.manual_seed(seed)
    size = Stack.parse(f"{spec} + window(recent=0)").page_size
    n = max(1, -(-max(counts) // size))
    pool, layout, codec = filled(spec, len(counts) * n, dims, dtype)
    assert layout.tokenwise
    ids = torch.randperm(len(counts) * n).to(torch.int32).view(len(counts), n)
    held = torch.tensor(counts)
    args = (pool.data, ids, held, layout, codec, dims[0] ** -0.5, softcap, lse_of_pages)
    q = torch.randn(len(counts), rows, dims[0]).to(dtype)
    seen = torch.arange(n * size) < held[:, None]
    whole = reference.attend_pages(q, pool.data, ids, held.new_full((len(counts),), n), *args[3:])
    expected = reference.attend_pages(q, *args, in_tokens=True)
    unseen = ~seen.unflatten(1, (n, size))
    for field in layout.token_fields:
        at = layout.offsets[field.name]
        of_tokens = pool.data[:, at : at + field.nbytes].unflatten(1, (size, -1))
        of_tokens[ids.long()[unseen.any(-1)]] = of_tokens[ids.long()[unseen.any(-1)]].masked_fill(
            unseen[unseen.any(-1)][..., None], 0xFF
        )
    poisoned_too = reference.attend_pages(q, *args, in_tokens=True)
    had = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "new_empty", poisoned)
        patch.setattr(compiled_kernel, "level", lambda: min(level, BEST))
        torch.set_num_threads(threads)
        try:
            part = dispatch.attend_pages(q, *args, in_tokens=True)
        finally:
            torch.set_num_threads(had)
    assert torch.equal(poisoned_too.out, expected.out)
    if bool(seen.all()):
        assert error(expected.out, whole.out) < BOUND
    assert error(part.out, expected.out) < BOUND
    assert error(part.lse, expected.lse) < BOUND
    if part.groups is not None and expected.groups is not None:
        assert error(part.groups, expected.groups) < BOUND


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_runs(dtype: torch.dtype) -> None:
    """As indexing gives them, with one thread and with several."""
    x, starts = torch.randn(5000).to(dtype), torch.randint(0, 5000 - 24, (3, 2, 150))
    expected = x[starts[..., None] + torch.arange(24)]
    for threads in (1, 3):
        torch.set_num_threads(threads)
        assert torch.equal(dispatch.runs(x, starts, 24), expected)
    torch.set_num_threads(1)


@compiled
@given(
    seed=st.integers(0, 2**31),
    dims=st.sampled_from([*DIMS, (24, 40), (33, 7)]),
    rows=st.sampled_from([1, 3, 8]),
    counts=st.lists(st.integers(0, 300), min_size=1, max_size=4),
    softcap=st.sampled_from([None, 1.5]),
    prior=st.booleans(),
    level=st.integers(0, 2),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
@settings(deadline=None, max_examples=80)
def test_tokens_side_by_side_and_what_came_before(
    seed: int,
    dims: tuple[int, int],
    rows: int,
    counts: list[int],
    softcap: float | None,
    prior: bool,
    level: int,
    dtype: torch.dtype,
) -> None:
    torch.manual_seed(seed)
    streams, longest = len(counts), max([*counts, 1])
    room = torch.full((2, streams, longest + 3, max(dims)), torch.nan, dtype=dtype)
    k, v = (x[..., :dim].contiguous()[:, :longest] for x, dim in zip(room, dims, strict=True))
    for s, count in enumerate(counts):
        k[s, :count], v[s, :count] = torch.randn(count, dims[0]).to(dtype), torch.randn(count, dims[1]).to(dtype)
    q, held = torch.randn(streams, rows, dims[0]), torch.tensor(counts)
    before = Part(torch.randn(streams, rows, dims[1]), torch.randn(streams, rows)) if prior else None
    if before is not None:
        before.lse[:, 0], before.out[:, 0] = -torch.inf, 0
    seen = (torch.arange(longest) < held[:, None])[:, None]
    empty = ~seen.transpose(1, 2)
    expected = attend_reference(q, k.masked_fill(empty, 0), v.masked_fill(empty, 0), 0.2, seen, softcap)
    expected = expected if before is None else merge([before, expected])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "new_empty", poisoned)
        patch.setattr(compiled_kernel, "level", lambda: min(level, BEST))
        part = dispatch.attend_tokens(q, Tokens(k, v, held), 0.2, softcap, before)
    assert error(part.out, expected.out) < BOUND
    assert error(part.lse, expected.lse) < BOUND


@compiled
def test_far_apart_logits_and_long_streams() -> None:
    """Rescaling between blocks, splits over threads, and pages whose weights underflow."""
    torch.manual_seed(0)
    pool, layout, codec = filled("none", 40, (64, 64), torch.float32)
    ids = torch.arange(40, dtype=torch.int32).repeat(1, 20).view(1, -1)
    for size in (0.01, 30.0, 1000.0):
        q = torch.randn(1, 4, 64) * size
        args = (q, pool.data, ids, torch.tensor([800]), layout, codec, 0.125, None, True)
        found, expected = dispatch.attend_pages(*args), reference.attend_pages(*args)
        assert error(found.out, expected.out) < BOUND * max(size / 100, 1)  # logits of 1e5 have errors of 1e-2
        assert error(found.lse, expected.lse) < BOUND
        assert found.groups is not None
        assert expected.groups is not None
        assert error(found.groups, expected.groups) < BOUND


@compiled
def test_what_is_not_finite_stays_so() -> None:
    pool, layout, codec = filled("none", 2, (64, 64), torch.float32)
    layout.views(pool.data)["v"][1, 3, 5] = torch.nan
    args = (pool.data, torch.tensor([[0], [1]]), torch.tensor([1, 1]), layout, codec, 0.1)
    out = dispatch.attend_pages(torch.randn(2, 1, 64), *args).out
    assert bool(out[0].isfinite().all())
    assert bool(out[1, 0, 5].isnan())
    layout.views(pool.data)["k"][0, 3, 5] = torch.nan
    assert bool(dispatch.attend_pages(torch.randn(2, 1, 64), *args).out[0].isnan().all())


@compiled
def test_explanations() -> None:
    cpu_device = torch.device("cpu")
    for spec, rows, device, words in [
        ("kivi", 3, cpu_device, "C, "),
        ("kivi", dispatch.MOST_ROWS + 1, cpu_device, "C, "),
        ("nvfp4", 1, cpu_device, "C, "),
        ("int(per=channel, group=24)", 1, cpu_device, "no multiple of 16"),
        ("kivi", 1, torch.device("meta"), "meta"),
    ]:
        plan = Stack.parse(spec).plan(0, 1)
        codec, layout = plan.build(PageShape(plan.page_size, 64, 64, 1, torch.float32, cpu_device, 0))
        assert words in dispatch.explain(codec, layout, device, rows)


def test_without_the_extension_it_warns_once_and_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled_kernel, "library", lambda: None)
    backends._warn.cache_clear()
    with dispatch.using(C()):
        is_right_without_it()


def is_right_without_it() -> None:
    pool, layout, codec = filled("kivi", 3, (64, 64), torch.float32)
    args = (torch.randn(1, 2, 64), pool.data, torch.arange(3)[None], torch.tensor([3]), layout, codec, 0.1)
    with pytest.warns(KvcompWarning, match="C kernel is not installed"):
        found = dispatch.attend_pages(*args)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = dispatch.attend_pages(*args)
    for part in (found, again):
        torch.testing.assert_close(part, reference.attend_pages(*args), rtol=0, atol=0)
    assert "not installed" in dispatch.explain(codec, layout, torch.device("cpu"))
    k = torch.randn(2, 5, 64)
    held = torch.tensor([5, 2])
    part = dispatch.attend_tokens(torch.randn(2, 1, 64), Tokens(k, k, held), 0.1)
    assert bool(part.out.isfinite().all())


def test_a_library_that_does_not_load_counts_as_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: str) -> None:
        raise OSError("libgomp.so.1: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", broken)
    assert loading.load() == (None, loading.MISSING)
    monkeypatch.setattr(loading, "candidates", tuple)
    assert loading.load() == (None, loading.MISSING)


@compiled
@pytest.mark.parametrize("spec", ["int(bits=4)", "kivi(bits=2, group=16)", "turboquant", "klt", "fp8", "nvfp4"])
@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize("odd", [torch.nan, torch.inf, 1e30, 1e-30])
def test_numbers_that_are_none_or_extreme_stay_so(spec: str, level: int, odd: float) -> None:
    """Rounding to integers must not make numbers of what is none."""
    pool, layout, codec = filled(spec, 3, (64, 64), torch.float32)
    q = torch.randn(1, 2, 64)
    q[0, 0, 5] = odd
    q[0, 1] *= 0 if odd < 1 else 1
    args = (pool.data, torch.arange(3, dtype=torch.int32)[None], torch.tensor([3]), layout, codec, 0.125)
    expected = reference.attend_pages(q, *args)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled_kernel, "level", lambda: min(level, BEST))
        part = dispatch.attend_pages(q, *args)
    assert torch.equal(part.out[0, 0].isfinite(), expected.out[0, 0].isfinite())
    assert error(part.out[0, 1], expected.out[0, 1]) < 2e-3


BLOCKED = [
    *(f"klt(bits={bits})" for bits in (1, 1.5, 2, 3, 4, 5, 6)),
    *("fp8", "fp8(format=e5m2)", "mxfp4", "mxfp4(basis=random)", "nvfp4"),
    *("turboquant(bits=2.5)", "turboquant(bits=3)", "turboquant(bits=2.5, variant=prod)", "kivi(bits=4, group=16)"),
    *("int(bits=3)", "int(bits=7, per=channel, group=16)", "int8", "none"),
]


@compiled
@pytest.mark.parametrize("spec", BLOCKED)
@pytest.mark.parametrize("level", [0, 1, 2])
def test_every_width_for_any_number_of_queries(spec: str, level: int) -> None:
    """GQA of 1, 3, 4, 8 and 128, and a chunk; exact tokens beside; streams of no page, some, and more than a block."""
    for dim in (64, 80, 128, 576) if spec in ("klt(bits=2)", "fp8", "nvfp4", "int8") else (64, 96):
        if not fits(spec, dim):
            continue
        torch.manual_seed(dim)
        pool, layout, codec = filled(spec, 9, (dim, dim), torch.float32)
        pages = 300 // layout.page_size + 2
        ids = torch.randint(0, 9, (3, pages), dtype=torch.int32)
        args = (pool.data, ids, torch.tensor([pages, 0, 1]), layout, codec, dim**-0.5)
        for rows in (1, 3, 4, 8, 128, 200) if dim < 576 else (2, 128):
            q, (k, v) = torch.randn(3, rows, dim), torch.randn(2, 3, 20, dim)
            tokens = Tokens(k, v, torch.tensor([20, 7, 0]))
            other = attend_reference(q, k, v, args[5], (torch.arange(20) < tokens.counts[:, None])[:, None])
            expected = merge([reference.attend_pages(q, *args), other])
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Tensor, "new_empty", poisoned)
                patch.setattr(compiled_kernel, "level", lambda: min(level, BEST))
                part = dispatch.attend_pages(q, *args, tokens=tokens)
            assert error(part.out, expected.out) < BOUND
            assert error(part.lse, expected.lse) < BOUND
