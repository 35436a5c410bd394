"""The specification itself: decode everything, then softmax, and nothing that is not passed is ever read."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvcomp import Stack, attention
from kvcomp.attention import Part
from kvcomp.cache.pool import PagePool
from kvcomp.kernels import dispatch
from kvcomp.kernels.reference import attend_pages
from kvcomp.kernels.reference import pages as reference
from kvcomp.layout import PageLayout
from kvcomp.stages import Codec, PageShape

QUANTIZERS = [
    "none",
    "kivi(bits=2, group=16)",
    "kivi(bits=4, group=16)",
    "int(bits=4)",
    "int(bits=8, basis=hadamard)",
    "quest(dense_layers=0) + int(bits=4, basis=hadamard, group=16)",
]


def filled(spec: str, pages: int, dims: tuple[int, int], dtype: torch.dtype) -> tuple[PagePool, PageLayout, Codec]:
    """A pool of random pages."""
    plan = Stack.parse(f"{spec} + window(recent=0)").plan(0, 1)
    size = plan.page_size
    codec, layout = plan.build(PageShape(size, *dims, 1, dtype, torch.device("cpu"), 0))
    pool = PagePool(layout, torch.device("cpu"))
    ids = pool.allocate(pages)
    k, v = torch.randn(pages, size, dims[0]).to(dtype), torch.randn(pages, size, dims[1]).to(dtype)
    fields = codec.encode(k, v, torch.zeros(pages, dtype=torch.int64))
    if plan.selector is not None:
        fields |= plan.selector.summarize(k, v)
    pool.write(ids, fields)
    return pool, layout, codec


def decoded(pool: PagePool, layout: PageLayout, codec: Codec) -> tuple[Tensor, Tensor]:
    """All pages in original coordinates, float64."""
    k, v = codec.inverse(*codec.decode(layout.views(pool.data)), torch.zeros(len(pool.data), dtype=torch.int64))
    return k.double(), v.double()


def dense(q: Tensor, k: Tensor, v: Tensor, pages: list[list[int]], scale: float, softcap: float | None) -> Part:
    """Softmax over the tokens of each stream's pages, one query at a time."""
    out, lse = q.new_zeros(*q.shape[:2], v.shape[-1]).double(), torch.full(q.shape[:2], -torch.inf).double()
    for s, own in enumerate(pages):
        if own:
            logits = q[s].double() @ k[own].flatten(0, 1).T * scale
            logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
            out[s], lse[s] = logits.softmax(-1) @ v[own].flatten(0, 1), logits.logsumexp(-1)
    return Part(out.float(), lse.float())


@given(
    seed=st.integers(0, 2**31),
    spec=st.sampled_from(QUANTIZERS),
    dims=st.sampled_from([(64, 64), (80, 80), (96, 96), (128, 128), (256, 256), (192, 128), (64, 112)]),
    rows=st.sampled_from([1, 3, 4, 8, 12]),
    counts=st.lists(st.integers(0, 5), min_size=1, max_size=4),
    softcap=st.sampled_from([None, 1.5]),
    blocks=st.sampled_from([1, 10_000, 1 << 22]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
@settings(deadline=None, max_examples=80)
def test_pages_handed_over_are_attended_and_no_other_is_read(
    seed: int,
    spec: str,
    dims: tuple[int, int],
    rows: int,
    counts: list[int],
    softcap: float | None,
    blocks: int,
    dtype: torch.dtype,
) -> None:
    torch.manual_seed(seed)
    streams, pages = len(counts), sum(counts) + 4
    pool, layout, codec = filled(spec, pages, dims, dtype)
    k, v = decoded(pool, layout, codec)
    order = torch.randperm(pages - 1) + 1  # page 0 belongs to nobody: the padding of the table points at it
    n = max(max(counts), 1) + seed % 2  # sometimes wider than the longest
    ids, owned, at = torch.zeros(streams, n, dtype=torch.int32), [], 0
    for s, count in enumerate(counts):
        ids[s, :count] = order[at : at + count]
        owned.append(ids[s, :count].tolist())
        at += count
    handed = torch.zeros(pages, dtype=torch.bool)
    handed[[p for own in owned for p in own]] = True
    pool.data[~handed] = 0xFF  # NaN in float16, bfloat16 and float32
    q = torch.randn(streams, rows, dims[0]).to(dtype)
    before = pool.data.clone()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "MAX_DECODED", blocks)
        part = attend_pages(q, pool.data, ids, torch.tensor(counts), layout, codec, 0.2, softcap)
    expected = dense(q, k, v, owned, 0.2, softcap)
    assert part.out.dtype == part.lse.dtype == torch.float32
    torch.testing.assert_close(part.out, expected.out, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(part.lse, expected.lse, rtol=1e-4, atol=2e-5)
    assert torch.equal(pool.data, before)


@pytest.mark.parametrize("attend", [attend_pages, dispatch.attend_pages], ids=["specification", "dispatched"])
@pytest.mark.parametrize("spec", ["none", "int(bits=4)", "kivi(bits=2, group=16)"])
@pytest.mark.parametrize("alike", [False, True])
@pytest.mark.parametrize("rows", [3, 70])
def test_pages_filled_in_part(
    attend: Callable[..., Part], spec: str, alike: bool, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counts of tokens, at ends of pages and between them: what lies after the last is not read, by torch's kernels
    for many queries neither."""
    monkeypatch.setattr(attention, "MANY_LOGITS", 1)
    torch.manual_seed(0)
    pool, layout, codec = filled(spec, 18, (64, 64), torch.float32)
    size, (k, v) = layout.page_size, decoded(pool, layout, codec)
    ids, counts = torch.randperm(18).view(6, 3), [0, 1, size - 1, size, size + 1, 3 * size]
    counts = [size + 3] * 6 if alike else counts
    q = torch.randn(len(counts), rows, 64)
    flat = [x[ids].flatten(1, 2) for x in (k, v)]  # [S, 3 * P, 64]
    expected = [
        dense(q[s : s + 1], *(x[s : s + 1, :n] for x in flat), [[0] * (n > 0)], 0.2, None) for s, n in enumerate(counts)
    ]
    if layout.tokenwise:
        for name in (f.name for f in layout.token_fields):
            field = layout.views(pool.data)[name]
            poisoned = field[ids].flatten(1, 2)
            for tokens, n in zip(poisoned, counts, strict=True):
                tokens[n:] = torch.nan if field.dtype.is_floating_point else 255
            layout.views(pool.data)[name][ids] = poisoned.unflatten(1, (3, size))
    part = attend(q, pool.data, ids, torch.tensor(counts), layout, codec, 0.2, in_tokens=True)
    torch.testing.assert_close(part.out, torch.cat([x.out for x in expected]), rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(part.lse, torch.cat([x.lse for x in expected]), rtol=1e-4, atol=2e-5)


def test_the_poison_is_poison() -> None:
    """The test above would see a page too many: passed, it makes NaN."""
    for spec in QUANTIZERS:
        pool, layout, codec = filled(spec, 2, (64, 64), torch.bfloat16)
        pool.data[1] = 0xFF
        q = torch.randn(1, 1, 64)
        part = attend_pages(q, pool.data, torch.tensor([[0, 1]]), torch.tensor([2]), layout, codec, 0.1)
        assert not bool(part.out.isfinite().all())


def test_a_page_in_several_streams_is_read_for_each() -> None:
    torch.manual_seed(0)
    pool, layout, codec = filled("kivi(group=16)", 3, (64, 64), torch.float32)
    q = torch.randn(1, 2, 64).expand(3, 2, 64)
    ids = torch.tensor([[0, 1], [0, 1], [1, 0]], dtype=torch.int32)
    part = attend_pages(q, pool.data, ids, torch.tensor([2, 2, 2]), layout, codec, 0.125)
    torch.testing.assert_close(part.out[0], part.out[1], rtol=0, atol=0)
    torch.testing.assert_close(part.out[0], part.out[2], rtol=1e-5, atol=1e-5)  # pages need no order


def test_never_more_decoded_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    pool, layout, codec = filled("int", 40, (64, 64), torch.float32)
    largest, attend = [], reference.attend

    def watched(q: Tensor, k: Tensor, v: Tensor, *rest: object) -> Part:
        largest.append(max(k.numel(), v.numel()))
        return attend(q, k, v, *rest)

    monkeypatch.setattr(reference, "MAX_DECODED", 2 * 3 * 64 * 64)
    monkeypatch.setattr(reference, "attend", watched)
    attend_pages(
        torch.randn(2, 1, 64), pool.data, torch.arange(40).view(2, 20), torch.full((2,), 20), layout, codec, 1.0
    )
    assert 0 < max(largest) <= 2 * 3 * 64 * 64
    assert sum(largest) == 40 * 64 * 64
