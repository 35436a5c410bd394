"""StreamingLLM: the sinks and the newest tokens, whatever came before, in bytes that stay flat."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcomp import SpecError, Stack
from kvcomp.cache.layer import LayerStore
from kvcomp.policies.streaming import StreamingLLM
from kvcomp.stages import Chunk

pytestmark = pytest.mark.filterwarnings("ignore::kvcomp.KvcompWarning")  # drop + select, here on purpose


def started(spec: str, rows: int = 1, heads: int = 1, dim: int = 8) -> LayerStore:
    store, x = LayerStore(Stack.parse(spec).plan(0, 1)), torch.zeros(rows, heads, 1, dim)
    store.start(x, x)
    return store


def token(position: int, n: int = 1, rows: int = 1, heads: int = 1) -> torch.Tensor:
    """Tokens whose content is their position."""
    return torch.arange(position, position + n).float()[None, None, :, None].expand(rows, heads, n, 8)


@given(
    n=st.integers(1, 200),
    past=st.sampled_from([0, 3, 500]),
    sinks=st.integers(0, 8),
    recent=st.integers(1, 90),
    window=st.integers(0, 120),
    dead=st.floats(0, 1),
)
@settings(deadline=None, max_examples=50)
def test_a_chunk_keeps_its_sinks_and_its_newest(
    n: int, past: int, sinks: int, recent: int, window: int, dead: float
) -> None:
    sinks = min(max(sinks - past, 0), n)
    window = min(window, n - sinks)
    x = torch.randn(2, 3, n, 4)
    alive = torch.rand(2, 3, n) >= dead
    kept = StreamingLLM(sinks=9, recent=recent).select(Chunk(None, x, x, alive, past, sinks, window, 1.0, 0, 1))
    for b, h, t in [(b, h, t) for b in range(2) for h in range(3) for t in range(n)]:
        wanted = past > 0 or t < sinks or n - t <= max(recent, window)  # of later chunks pages leave, not tokens
        assert bool(kept[b, h, t]) == (wanted and bool(alive[b, h, t]))


@pytest.mark.parametrize(("recent", "window"), [(100, ""), (128, ""), (200, " + window(sinks=4, recent=30)")])
@pytest.mark.parametrize("stage", ["none", "int", "kivi(bits=4, group=16) + quest"])
def test_generation_holds_the_newest_and_stays_flat(recent: int, window: str, stage: str) -> None:
    store, heads = started(f"streaming(sinks=4, recent={recent}) + {stage}{window}", heads=2), 2
    page, own, held = store.plan.page_size, store.plan.recent, set()
    for i in range(3000):
        store.append(token(i, heads=heads), token(i, heads=heads))
        store.settle()
        kept = store.kept.tolist()
        assert kept[0] == kept[1]
        if i >= recent + own + 3 * page:
            assert 4 + recent <= kept[0] < 4 + max(recent, own) + page
            held.add(sum(store.held(set()).values()))
        else:
            assert kept[0] >= min(i + 1, 4 + recent)
    # flat: one page a head more or less, with its table entries
    assert max(held) - min(held) <= 2 * heads * store.layout.bytes_per_page + 1024
    content = store.dense()[1][0, :, :, 0]
    positions = list(range(4)) + list(range(3000 - kept[0] + 4, 3000))
    if "none" in stage:
        assert content.tolist() == [positions] * heads
    else:
        torch.testing.assert_close(content, torch.tensor([positions] * heads).float(), rtol=0.01, atol=1)
    assert store.history.length == 3000


def test_attention_is_that_over_sinks_and_newest() -> None:
    torch.manual_seed(0)
    store = started("streaming(sinks=3, recent=50) + quest(dense_layers=0, pages=99)", rows=2, heads=2, dim=16)
    k, v = torch.randn(2, 2, 2, 700, 16).unbind()
    store.write(k[:, :, :260], v[:, :, :260], None)
    for i in range(260, 700):
        store.append(k[:, :, i : i + 1], v[:, :, i : i + 1])
        store.settle()
    last = int(store.kept[0]) - 3
    assert 50 <= last < 66
    index = torch.tensor([*range(3), *range(700 - last, 700)])
    q = torch.randn(2, 2, 1, 16)
    weights = (torch.einsum("bhid,bhnd->bhin", q, k[:, :, index]) / 4).softmax(-1)
    torch.testing.assert_close(store.attend(q, 0.25).out, weights @ v[:, :, index], rtol=1e-5, atol=1e-5)


@given(chunks=st.lists(st.integers(1, 200), min_size=1, max_size=6))
@settings(deadline=None, max_examples=25)
def test_chunks_of_any_size_leave_sinks_and_newest(chunks: list[int]) -> None:
    store, seen = started("streaming(sinks=4, recent=60) + quest(dense_layers=0)"), 0
    for n in chunks:
        store.write(token(seen, n), token(seen, n), None)
        seen += n
        held = store.dense()[1][0, 0, :, 0].long().tolist()
        assert held[: min(4, seen)] == list(range(min(4, seen)))
        newest = held[4:]
        assert newest == list(range(seen - len(newest), seen))
        assert min(60, seen - min(4, seen)) <= len(newest) < 60 + 16


@pytest.mark.parametrize("tokens", [1, 4, 5, 63, 64, 65, 1000])
def test_kept_says_what_a_prefill_keeps(tokens: int) -> None:
    for spec in ("streaming(sinks=4, recent=60)", "streaming(sinks=2, recent=60) + window(sinks=7, recent=90)"):
        store = started(spec)
        store.write(token(0, tokens), token(0, tokens), None)
        stack = Stack.parse(spec)
        assert store.kept.tolist() == [stack.policies[0].kept(tokens, stack.window.sinks, stack.window.recent, 0, 1)]


def test_chunks_of_the_prompt() -> None:
    assert Stack.parse("streaming").prefill_chunk is None
    assert Stack.parse("streaming(chunk=512) + kivi(bits=4) + streaming(chunk=64) + streaming").prefill_chunk == 64
    for wrong in (0, -1):
        with pytest.raises(SpecError, match=rf"streaming\(chunk={wrong}\): chunk must be positive, or left out"):
            Stack.parse(f"streaming(chunk={wrong})")
    with pytest.raises(SpecError, match="expected int or None"):
        Stack.parse("streaming(chunk=0.5)")
