"""SnapKV against its definition: full attention matrices, pooled votes, the best within the budget."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvcomp import Stack
from kvcomp.cache.layer import LayerStore
from kvcomp.kernels.received import received
from kvcomp.kernels.reference import received as reference
from kvcomp.policies.snapkv import SnapKV
from kvcomp.stages import Chunk, Policy
from kvcomp.stages import registry as reg


def attention_matrix(q: Tensor, k: Tensor, scale: float, alive: Tensor) -> Tensor:
    """The whole causal softmax [Hq, n, n] of one row in float64: q [Hq, n, D], k [Hkv, n, D], alive [Hkv, n]."""
    n, group = q.shape[1], q.shape[0] // k.shape[0]
    out = []
    for h in range(q.shape[0]):
        logits = q[h].double() @ k[h // group].double().T * scale
        hidden = torch.ones(n, n).triu(1).bool() | ~alive[h // group]
        out.append(logits.masked_fill(hidden, -torch.inf).softmax(-1).nan_to_num(0))
    return torch.stack(out)


def definition(
    q: Tensor, k: Tensor, scale: float, window: int, kernel: int, pooling: str, alive: Tensor | None = None
) -> Tensor:
    """Scores [Hkv, n - window] of one row's prefix, in float64: loops over heads and positions."""
    heads, n = k.shape[0], k.shape[1]
    alive = torch.ones(heads, n).bool() if alive is None else alive
    votes = attention_matrix(q, k, scale, alive)[:, n - window :, : n - window].sum(1)  # [Hq, prefix]
    pooled, half = torch.zeros_like(votes), kernel // 2
    for j in range(votes.shape[1]):
        near = votes[:, max(j - half, 0) : j + half + 1]
        pooled[:, j] = near.sum(-1) / kernel if pooling == "avg" else near.amax(-1)
    return pooled.unflatten(0, (heads, -1)).mean(1)


def chunk(q: Tensor, k: Tensor, scale: float, sinks: int = 0, recent: int = 0, alive: Tensor | None = None) -> Chunk:
    alive = torch.ones(k.shape[:3], dtype=torch.bool) if alive is None else alive
    return Chunk(q, k, k, alive, 0, sinks, recent, scale, 0, 1)


@given(
    seed=st.integers(0, 2**31),
    shape=st.tuples(st.integers(1, 2), st.integers(1, 3), st.sampled_from([1, 3, 4, 8])),
    n=st.integers(2, 90),
    window=st.integers(1, 40),
    kernel=st.sampled_from([1, 3, 5, 7]),
    pooling=st.sampled_from(["avg", "max"]),
    budget=st.integers(1, 90),
    sinks=st.integers(0, 5),
    recent=st.integers(0, 50),
    sharp=st.sampled_from([0.2, 1.0]),
)
@settings(deadline=None, max_examples=60)
def test_the_kept_set_is_the_definition(
    seed: int,
    shape: tuple[int, int, int],
    n: int,
    window: int,
    kernel: int,
    pooling: str,
    budget: int,
    sinks: int,
    recent: int,
    sharp: float,
) -> None:
    torch.manual_seed(seed)
    rows, heads, group = shape
    sinks = min(sinks, n)
    recent = min(recent, n - sinks)
    q, k = torch.randn(rows, heads * group, n, 8), torch.randn(rows, heads, n, 8)
    policy = SnapKV(budget=budget, window=window, kernel=kernel, pooling=pooling)
    kept = policy.select(chunk(q, k, sharp, sinks, recent))
    protected = {*range(sinks), *range(max(sinks, n - max(window, recent)), n)}
    size = min(max(budget, len(protected)), n)
    assert kept.sum(-1).unique().tolist() == [size]  # exactly the budget, in every head
    voters = min(window, n)
    for b in range(rows):
        scores = definition(q[b], k[b], sharp, voters, kernel, pooling)
        for h in range(heads):
            open_ = [j for j in range(n) if j not in protected]
            ranked = sorted(open_, key=lambda j, h=h, scores=scores: -float(scores[h, j]))
            best, rest = ranked[: size - len(protected)], ranked[size - len(protected) :]
            ours = set(kept[b, h].nonzero().flatten().tolist())
            assert protected <= ours
            if best and rest and scores[h, best[-1]] - scores[h, rest[0]] < 1e-6:
                continue  # a tie (max pooling makes them): any choice is right, as the size already is
            assert ours == protected | set(best)


def test_ties_keep_some_of_the_tied() -> None:
    q, k = torch.zeros(1, 2, 50, 8), torch.zeros(1, 1, 50, 8)
    kept = SnapKV(budget=20, window=5).select(chunk(q, k, 1.0, sinks=3))
    assert int(kept.sum()) == 20
    assert bool(kept[..., :3].all())
    assert bool(kept[..., -5:].all())


@pytest.mark.parametrize(("n", "budget"), [(1, 1), (30, 30), (30, 31), (30, 500), (64, 320)])
def test_a_prompt_within_the_budget_is_kept_whole(n: int, budget: int) -> None:
    q, k = torch.randn(1, 2, n, 8), torch.randn(1, 1, n, 8)
    assert bool(SnapKV(budget=budget).select(chunk(q, k, 1.0)).all())


@given(keep=st.floats(0.01, 1), n=st.integers(1, 300), window=st.integers(1, 64))
@settings(deadline=None, max_examples=40)
def test_a_share_is_of_the_prompt_and_never_less_than_the_window(keep: float, n: int, window: int) -> None:
    policy = SnapKV(keep=keep, window=window)
    q = torch.randn(1, 1, n, 4)
    kept = int(policy.select(chunk(q, q, 1.0)).sum())
    assert kept == policy.kept(n, 0, 0, 0, 1)
    assert abs(kept - keep * n) <= 0.5 or kept == min(window, n)
    assert kept >= min(window, n)


def test_the_defaults_are_those_published() -> None:
    """github.com/FasterDecoding/SnapKV: window_size 64, max_capacity_prompt 256 + 64, kernel_size 5, avgpool."""
    assert SnapKV() == SnapKV(budget=320, window=64, kernel=5, pooling="avg")


def test_a_needle_that_the_question_attends_to_survives() -> None:
    torch.manual_seed(0)
    n, needle = 500, 123
    q, k = 0.1 * torch.randn(1, 4, n, 16), 0.1 * torch.randn(1, 2, n, 16)
    k[:, 1, needle] = 3
    q[:, 3, -2] = 3  # one query of one of the two heads that share KV head 1
    kept = SnapKV(budget=40, window=16).select(chunk(q, k, 0.25))
    assert bool(kept[0, 1, needle - 2 : needle + 3].all())  # with its neighbours: the pooling
    assert not bool(kept[0, 0, needle - 2 : needle + 3].all())  # the other KV head chose for itself


@given(block=st.integers(1, 3000), window=st.integers(1, 20), n=st.integers(20, 60), dead=st.floats(0, 0.9))
@settings(deadline=None, max_examples=25)
def test_votes_are_attention_weights_in_blocks_of_any_size(block: int, window: int, n: int, dead: float) -> None:
    torch.manual_seed(n)
    q, k = torch.randn(2, 6, window, 8), torch.randn(2, 2, n, 8)
    alive = torch.rand(2, 2, n) >= dead
    alive[..., 0] = True
    whole = torch.cat([torch.zeros(2, 6, n - window, 8), q], 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "BLOCK", block)
        votes = received(q, k, 0.3, alive)
    for b in range(2):
        expected = attention_matrix(whole[b], k[b], 0.3, alive[b])[:, n - window :].sum(1)
        torch.testing.assert_close(votes[b], expected.float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(votes.sum(-1), torch.full((2, 6), float(window)), rtol=1e-5, atol=1e-5)


def test_rows_of_a_padded_batch_choose_as_they_would_alone() -> None:
    torch.manual_seed(0)
    lengths, n = (120, 77, 20), 120
    k, v, q = torch.randn(3, 2, n, 16), torch.randn(3, 2, n, 16), torch.randn(3, 6, n, 16)
    v[..., 0] = torch.arange(n)  # so that what is kept can be read off
    valid = torch.arange(n) >= torch.tensor([[n - length] for length in lengths])
    plan = Stack.parse("snapkv(keep=0.4, window=8) + window(sinks=2)").plan(0, 1)
    batch = LayerStore(plan)
    batch.start(k, v)
    batch.write(k, v, valid, q, 0.25)
    for b, length in enumerate(lengths):
        row = (slice(b, b + 1), slice(None), slice(n - length, None))
        alone = LayerStore(plan)
        alone.start(k[row], v[row])
        alone.write(k[row], v[row], None, q[row], 0.25)
        assert batch.kept.view(3, 2)[b].tolist() == alone.kept.tolist() == [max(round(0.4 * length), 8 + 2)] * 2
        alone_k, alone_v = alone.dense()
        one = deepcopy(batch)
        one.select_rows(torch.tensor([b]))
        assert torch.equal(one.dense()[0], alone_k)
        assert torch.equal(one.dense()[1], alone_v)
        assert alone_v[0, 0, :2, 0].tolist() == [n - length, n - length + 1]  # its own sinks, not the batch's


# -- after other policies -----------------------------------------------------------------------------------------


@given(
    seed=st.integers(0, 2**31),
    dead=st.floats(0, 1),
    n=st.integers(20, 80),
    window=st.integers(1, 16),
    budget=st.integers(1, 80),
)
@settings(deadline=None, max_examples=40)
def test_evicted_tokens_stay_evicted_and_get_no_attention(
    seed: int, dead: float, n: int, window: int, budget: int
) -> None:
    torch.manual_seed(seed)
    q, k = torch.randn(1, 4, n, 8), torch.randn(1, 2, n, 8)
    alive = torch.rand(1, 2, n) >= dead
    alive[..., :2] = True
    kept = SnapKV(budget=budget, window=window, kernel=1).select(chunk(q, k, 0.4, 0, 0, alive))
    assert not bool((kept & ~alive).any())
    size = max(budget, window)
    assert bool((kept.sum(-1) <= size).all())
    scores = definition(q[0], k[0], 0.4, window, 1, "avg", alive[0])
    for h in range(2):
        own = alive[0, h].nonzero().flatten().tolist()
        if n <= size:
            assert bool((kept == alive).all())
            return
        prefix = sorted((j for j in own if j < n - window), key=lambda j, h=h: -float(scores[h, j]))
        room = size - window
        gap = float(scores[h, prefix[room - 1]] - scores[h, prefix[room]]) if 0 < room < len(prefix) else 1.0
        assume(gap > 1e-6)
        expected = {*prefix[:room], *(j for j in own if j >= n - window)}
        assert set(kept[0, h].nonzero().flatten().tolist()) == expected


def test_policies_act_in_the_order_of_the_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reg, "_stages", dict(reg.stages()))
    log = []

    @reg.register("odd_out")
    @dataclass(frozen=True)
    class OddOut(Policy):
        """Keeps every other token."""

        def select(self, chunk: Chunk) -> Tensor:
            log.append(chunk.alive.clone())
            return chunk.alive & (torch.arange(chunk.keys.shape[2]) % 2 == 0)

        def kept(self, tokens: int, sinks: int, recent: int, layer: int, layers: int) -> int:
            return (tokens + 1) // 2

    torch.manual_seed(0)
    n = 100
    q, k = torch.randn(1, 2, n, 16), torch.randn(1, 1, n, 16)
    v = torch.arange(n).float()[None, None, :, None].expand(1, 1, n, 16)

    def held(spec: str) -> list[int]:
        store = LayerStore(Stack.parse(spec).plan(0, 1))
        store.start(k, v)
        store.write(k, v, None, q, 0.25)
        return store.dense()[1][0, 0, :, 0].long().tolist()

    first = held("odd_out + snapkv(budget=40, window=10)")
    assert bool(log[-1].all())
    second = held("snapkv(budget=40, window=10) + odd_out")
    assert int(log[-1].sum()) == 40
    assert all(t % 2 == 0 for t in [*first, *second])
    assert len(first) == 40 - 5  # half of SnapKV's window was gone already: never revived, its share not refilled
    assert 5 <= len(second) < len(first)  # half of what SnapKV had chosen without knowing
    both = held("snapkv(budget=60, window=10) + snapkv(budget=40, window=10)")
    assert len(both) == 40
    assert set(both) <= set(held("snapkv(budget=60, window=10)"))
