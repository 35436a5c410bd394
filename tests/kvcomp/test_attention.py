"""Attention over parts: whatever the split, the merge is the softmax over the union."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvcomp import attention
from kvcomp.attention import Part, attend, attend_causal, merge, sink_logit


def naive(
    q: Tensor, k: Tensor, v: Tensor, scale: float, visible: Tensor | None = None, softcap: float | None = None
) -> Part:
    """Softmax attention in float64, one query at a time; no visible token gives zeros and -inf."""
    q, k, v = q.double(), k.double(), v.double()
    visible = torch.ones(()).bool() if visible is None else visible
    visible = visible.expand(q.shape[0], q.shape[1], k.shape[1])
    out, lse = q.new_zeros(*q.shape[:2], v.shape[-1]), q.new_full(q.shape[:2], -torch.inf)
    for s in range(q.shape[0]):
        for r in range(q.shape[1]):
            logits = k[s, visible[s, r]] @ q[s, r] * scale
            logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
            if len(logits):
                lse[s, r] = logits.logsumexp(0)
                out[s, r] = logits.softmax(0) @ v[s, visible[s, r]]
    return Part(out.float(), lse.float())


def assert_same(ours: Part, theirs: Part) -> None:
    torch.testing.assert_close(ours.out, theirs.out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.lse, theirs.lse, rtol=1e-5, atol=1e-5)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, float, Tensor | None, float | None]:
    torch.manual_seed(draw(st.integers(0, 2**31)))
    s, r, n = draw(st.integers(1, 3)), draw(st.integers(1, 5)), draw(st.integers(1, 40))
    dk, dv = draw(st.sampled_from([(8, 8), (16, 5), (3, 7)]))
    size = draw(st.sampled_from([0.01, 1.0, 30.0]))
    shape = draw(st.sampled_from([None, (s, r, n), (1, 1, n), (s, 1, n), (s, r, 1), (1, r, n)]))
    visible = None if shape is None else torch.rand(shape) < draw(st.sampled_from([0.0, 0.3, 0.9]))
    softcap = draw(st.sampled_from([None, 2.0, 50.0]))
    return size * torch.randn(s, r, dk), torch.randn(s, n, dk), torch.randn(s, n, dv), dk**-0.5, visible, softcap


@given(problems())
@settings(deadline=None, max_examples=60)
def test_attend_is_softmax_attention(problem: tuple) -> None:
    assert_same(attend(*problem), naive(*problem))


@given(problems(), st.data())
@settings(deadline=None, max_examples=60)
def test_any_split_merges_to_the_same(problem: tuple, data: st.DataObject) -> None:
    q, k, v, scale, visible, softcap = problem
    n, parts = k.shape[1], data.draw(st.integers(1, 4))
    belongs = torch.tensor([data.draw(st.integers(0, parts - 1)) for _ in range(n)])
    seen = torch.ones(1, 1, n, dtype=torch.bool) if visible is None else visible.expand(-1, -1, n)
    split = [
        attend(q, k[:, belongs == i], v[:, belongs == i], scale, seen[..., belongs == i], softcap)
        for i in range(parts)
        if bool((belongs == i).any())
    ]
    whole = naive(*problem)
    assert_same(merge(split), whole)
    assert_same(merge(split[::-1]), whole)
    nested = split[0]
    for part in split[1:]:
        nested = merge([part, nested])
    assert_same(nested, whole)
    nothing = Part(torch.zeros_like(whole.out), torch.full_like(whole.lse, -torch.inf))
    assert_same(merge([nothing, *split, nothing]), whole)
    assert_same(merge([nothing, nothing]), nothing)


@given(problems(), st.integers(1, 64))
@settings(deadline=None, max_examples=60)
def test_blocks_change_nothing(problem: tuple, logits: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "MAX_LOGITS", logits)
        assert_same(attend(*problem), naive(*problem))


def test_never_more_logits_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    largest, bmm = 0, torch.bmm

    def watched(a: Tensor, b: Tensor) -> Tensor:
        nonlocal largest
        out = bmm(a, b)
        if out.shape[-1] != 6:  # the logits; 6 is Dv
            largest = max(largest, out.numel())
        return out

    monkeypatch.setattr(attention, "MAX_LOGITS", 300)
    monkeypatch.setattr(torch, "bmm", watched)
    attend(torch.randn(2, 7, 8), torch.randn(2, 100, 8), torch.randn(2, 100, 6), 1.0)
    assert 0 < largest <= 300


def test_large_logits_do_not_overflow() -> None:
    q, k, v = 1e3 * torch.randn(1, 2, 8), 1e3 * torch.randn(1, 30, 8), torch.randn(1, 30, 8)
    parts = [attend(q, k[:, i : i + 7], v[:, i : i + 7], 1.0) for i in range(0, 30, 7)]
    whole = merge(parts)
    assert bool(whole.out.isfinite().all())
    torch.testing.assert_close(whole.out, naive(q, k, v, 1.0).out, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_are_computed_in_float32(dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(2, n, 64).to(dtype) for n in (3, 200, 200))
    ours = attend(q, k, v, 0.125)
    assert ours.out.dtype == ours.lse.dtype == torch.float32
    assert_same(ours, naive(q, k, v, 0.125))


@given(problems(), st.integers(1, 64))
@settings(deadline=None, max_examples=60)
def test_a_key_with_bias_log_w_counts_w_times(problem: tuple, logits: int) -> None:
    q, k, v, scale, visible, softcap = problem
    s, n = k.shape[:2]
    times = torch.randint(0, 4, (n,))  # 0: a bias of -inf, not seen
    index = torch.arange(n).repeat_interleave(times)
    seen = None if visible is None else visible.expand(-1, -1, n)[..., index]
    if not len(index):
        return
    expected = naive(q, k[:, index], v[:, index], scale, seen, softcap)
    bias = times.log().expand(s, n)
    assert_same(attend(q, k, v, scale, visible, softcap, key_bias=bias), expected)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "MAX_LOGITS", logits)
        assert_same(attend(q, k, v, scale, visible, softcap, key_bias=bias), expected)


def test_key_biases_of_minus_infinity_hide_a_part() -> None:
    q, k, v = torch.randn(2, 3, 8), torch.randn(2, 9, 8), torch.randn(2, 9, 4)
    part = attend(q, k, v, 0.3, key_bias=torch.full((2, 9), -torch.inf))
    assert not bool(part.out.any())
    assert bool((part.lse == -torch.inf).all())


def test_a_sink_logit_takes_its_share_of_the_softmax() -> None:
    q, k, v = torch.randn(2, 3, 8), torch.randn(2, 9, 8), torch.randn(2, 9, 4)
    sink = torch.randn(2, 3)
    logits = torch.cat([torch.einsum("srd,snd->srn", q, k) * 0.3, sink[..., None]], -1)
    out = torch.einsum("srn,snd->srd", logits.softmax(-1)[..., :-1], v)
    assert_same(sink_logit(attend(q, k, v, 0.3), sink), Part(out, logits.logsumexp(-1)))


@pytest.mark.parametrize(
    ("streams", "rows", "tokens", "dim"), [(2, 70, 500, 64), (3, 200, 400, 256), (1, 257, 300, 80)]
)
@pytest.mark.parametrize("hides", ["nothing", "by stream", "for all", "whole rows"])
def test_many_logits_give_what_few_do(
    streams: int, rows: int, tokens: int, dim: int, hides: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's flash attention where there are many, against the definition."""
    torch.manual_seed(rows)
    q, k, v = (torch.randn(streams, n, dim) for n in (rows, tokens, tokens))
    seen = {
        "nothing": None,
        "by stream": torch.rand(streams, 1, tokens) > 0.5,
        "for all": torch.rand(rows, tokens) > 0.9,
        "whole rows": (torch.rand(streams, rows, tokens) > 0.5) & (torch.arange(rows) > 0)[:, None],
    }[hides]
    assert streams * rows * tokens >= attention.MANY_LOGITS
    monkeypatch.setattr(attention, "MAX_LOGITS", 50 * tokens)
    fast = attention.attend(q, k, v, 0.1, seen)
    monkeypatch.setattr(attention, "MANY_LOGITS", 1 << 60)
    slow = attention.attend(q, k, v, 0.1, seen)
    assert torch.equal(fast.lse.isinf(), slow.lse.isinf())
    torch.testing.assert_close(fast.out, slow.out, atol=2e-6, rtol=0)
    torch.testing.assert_close(fast.lse.nan_to_num(neginf=0), slow.lse.nan_to_num(neginf=0), atol=5e-6, rtol=0)


@pytest.mark.parametrize(("n", "softcap"), [(1, None), (5, None), (257, None), (257, 20.0)])
@pytest.mark.parametrize("dims", [(64, 64), (24, 16)])
def test_new_tokens_see_those_up_to_their_own(n: int, softcap: float | None, dims: tuple[int, int]) -> None:
    q, k, v = torch.randn(2, 3, n, dims[0]), torch.randn(2, n, dims[0]), torch.randn(2, n, dims[1])
    ours = attend_causal(q, k, v, 0.2, softcap)
    logits = torch.einsum("sgqd,snd->sgqn", q.double(), k.double()) * 0.2
    logits = logits if softcap is None else (logits / softcap).tanh() * softcap
    logits = logits.masked_fill(torch.arange(n) > torch.arange(n)[:, None], -torch.inf)
    out = torch.einsum("sgqn,snd->sgqd", logits.softmax(-1), v.double())
    assert_same(ours, Part(out.flatten(1, 2).float(), logits.logsumexp(-1).flatten(1, 2).float()))
