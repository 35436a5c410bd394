"""What selectors compute in C against its specification in PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from math import gcd

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvcomp.kernels import cpu, dispatch, select
from kvcomp.kernels.cpu import compiled
from kvcomp.layout import SUMMARY, Field, PageLayout, Summary

pytestmark = pytest.mark.skipif(cpu.library() is None, reason="the C kernel is not installed")
BEST = compiled.level() if compiled.library() is not None else 0


def specified(call: Callable[[], Tensor]) -> Tensor:
    """What PyTorch gives."""
    with dispatch.reference_only():
        return call()


NAME, OTHER, SCALE = f"{SUMMARY}a", f"{SUMMARY}b", f"{SUMMARY}scale"


def held(layout: PageLayout, counts: list[int]) -> Summary:
    """Pages of random bytes in random places of a pool; everything that no stream holds is 0xFF."""
    streams, pages = len(counts), max(counts)
    pool = torch.full((streams * pages + 3, layout.bytes_per_page), 255, dtype=torch.uint8)
    ids = torch.randperm(len(pool))[: streams * pages].view(streams, pages).int()
    exists = torch.arange(pages) < torch.tensor(counts)[:, None]
    pool[ids[exists].long()] = torch.randint(0, 256, (int(exists.sum()), layout.bytes_per_page), dtype=torch.uint8)
    return Summary(layout, pool, ids, torch.tensor(counts))


@given(
    streams=st.integers(1, 4),
    heads=st.sampled_from([1, 3, 4, 8, 17]),
    dim=st.sampled_from([8, 36, 64, 80, 96, 128, 256]),
    pages=st.sampled_from([1, 3, 65, 130]),
    fields=st.integers(1, 2),
    blocks=st.sampled_from([None, 1, 4]),
    bits=st.sampled_from([16, 8]),
    level=st.integers(0, 2),
)
@settings(deadline=None, max_examples=120)
def test_vector_dots(
    streams: int, heads: int, dim: int, pages: int, fields: int, blocks: int | None, bits: int, level: int
) -> None:
    torch.manual_seed(dim * pages)
    each = () if blocks is None else (blocks,)
    names, runs = (NAME, OTHER)[:fields], gcd(dim, 8)
    kind = torch.float16 if bits == 16 else torch.int8
    scales = () if bits == 16 else (Field(SCALE, (*each, runs), torch.float16),)
    body = Field("k", (48,), torch.uint8)
    layout = PageLayout(16, (body, *(Field(name, (*each, dim), kind) for name in names), *scales))
    summary = held(layout, [pages - s % 3 if pages > 3 else pages for s in range(streams)])
    exists = torch.arange(pages) < summary.counts[:, None]
    for view in layout.views(summary.pool, summary=True).values():
        if view.dtype == torch.float16:  # random bytes are no numbers
            view[summary.ids[exists].long()] = torch.randn(int(exists.sum()), *view.shape[1:]).to(view.dtype)
    q = torch.randn(streams, heads, dim)
    parts = (q,) if fields == 1 else (q.clamp(max=0), q.clamp(min=0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "level", lambda: min(level, BEST))
        got = select.vector_dots(q, summary, names, SCALE)
    expected = specified(lambda: select.vector_dots(q, summary, names, SCALE))
    exists = exists.repeat_interleave(blocks or 1, 1)[:, None]
    got, expected = (x.masked_fill(~exists, 0) for x in (got, expected))
    size = float(expected.abs().max())
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5 * size)
    by_hand = torch.zeros(streams, heads, pages * (blocks or 1))
    for part, name in zip(parts, names, strict=True):
        x = summary[name].float()
        if bits == 8:
            x = x * summary[SCALE].float().repeat_interleave(dim // runs, -1)
        by_hand += torch.einsum("sgd,sud->sgu", part, x.view(streams, -1, dim))
    torch.testing.assert_close(got, by_hand.masked_fill(~exists, 0), rtol=1e-4, atol=1e-5 * size)


@given(
    streams=st.integers(1, 5),
    heads=st.sampled_from([1, 3, 4, 8]),
    rank=st.sampled_from([2, 6, 8, 16, 64]),
    pages=st.sampled_from([1, 3, 65, 130]),
    size=st.sampled_from([16, 48, 64, 80, 128]),
    bits=st.sampled_from([4, 8]),
)
@settings(deadline=None, max_examples=60)
def test_code_dots(streams: int, heads: int, rank: int, pages: int, size: int, bits: int) -> None:
    torch.manual_seed(rank * pages)
    layout = PageLayout(size, (Field("k", (16,), torch.uint8), Field(NAME, (rank * bits // 8, size), torch.uint8)))
    summary = held(layout, [pages - s % 3 if pages > 3 else pages for s in range(streams)])
    codes, q = summary[NAME], torch.randn(streams, heads, rank)
    got = select.code_dots(q, summary, NAME, bits)
    expected = specified(lambda: select.code_dots(q, summary, NAME, bits))
    exists = (torch.arange(pages) < summary.counts[:, None]).repeat_interleave(size, 1)[:, None]
    got, expected = (x.masked_fill(~exists, 0) for x in (got, expected))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-3 * 2**bits / 16)
    plain = codes.float() if bits == 8 else torch.cat([codes & 15, codes >> 4], 2).float()
    by_definition = torch.einsum("sjr,snrp->sjnp", q, plain + 0.5 - 2 ** (bits - 1)).flatten(2).masked_fill(~exists, 0)
    torch.testing.assert_close(got, by_definition, rtol=1e-4, atol=1e-3 * 2**bits / 16)


@given(
    counts=st.lists(st.integers(0, 700), min_size=1, max_size=5),
    heads=st.sampled_from([1, 3, 8]),
    size=st.sampled_from([0.1, 10.0, 1000.0]),
    spoilt=st.sampled_from([None, float("nan"), float("inf"), float("-inf")]),
)
@settings(deadline=None, max_examples=80)
def test_shares(counts: list[int], heads: int, size: float, spoilt: float | None) -> None:
    torch.manual_seed(sum(counts))
    n = max(*counts, 1)
    logits, held = size * torch.randn(len(counts), heads, n), torch.tensor(counts)
    logits.masked_fill_((torch.arange(n) >= held[:, None])[:, None], float("nan"))  # what is not there is not read
    if spoilt is not None:
        logits[0, 0, 0] = spoilt
    expected = specified(lambda: select.shares(logits.clone(), held))
    got = select.shares(logits.clone(), held)
    torch.testing.assert_close(got, expected, rtol=2e-5, atol=1e-7)
    if spoilt is None:
        torch.testing.assert_close(got.sum(1), (held > 0).float(), rtol=1e-4, atol=1e-4)


@given(
    data=st.data(),
    n=st.sampled_from([1, 2, 17, 700, 3000]),
    streams=st.integers(1, 4),
    levels=st.sampled_from([1, 2, 5, 10**6]),
)
@settings(deadline=None, max_examples=120)
def test_largest(data: st.DataObject, n: int, streams: int, levels: int) -> None:
    torch.manual_seed(n + streams)
    x = torch.randint(0, levels, (streams, n)).float()  # few levels: many equals
    wanted = torch.tensor([data.draw(st.integers(0, n)) for _ in range(streams)])
    width = max(int(wanted.max()), 1)
    got = select.largest(x, wanted, width)
    assert got.shape == (streams, width)
    for row, places, k in zip(x, got, wanted.tolist(), strict=True):
        assert bool((places[:k].diff() > 0).all())
        torch.testing.assert_close(row[places[:k]].sort().values, row.sort().values[n - k :])
        assert bool((places[k:] == n - 1).all())


def test_regroup() -> None:
    torch.manual_seed(0)
    fields = (
        Field("k", (16, 40), torch.uint8),
        Field("scale", (16, 3), torch.float16),
        Field("v", (16, 5), torch.float32),
    )
    layout = PageLayout(16, (*fields, Field(f"{SUMMARY}mean", (8,), torch.float16)))
    pool = torch.randint(0, 256, (30, layout.bytes_per_page), dtype=torch.uint8)
    ids = torch.randint(0, 30, (4, 7), dtype=torch.int32)
    tokens = torch.randint(0, 7 * 16, (4, 48))
    got = layout.views(select.regroup(layout, pool, ids, tokens))
    expected = layout.views(specified(lambda: select.regroup(layout, pool, ids, tokens)))
    for name in ("k", "scale", "v"):
        assert torch.equal(got[name].view(torch.uint8), expected[name].view(torch.uint8))
