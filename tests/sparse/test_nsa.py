"""NSA: the compressed branch against its definition."""

from __future__ import annotations

import math

import pytest
import torch

from kvcomp import Stack
from kvcomp.attention import attend
from kvcomp.cache.layer import LayerStore
from kvcomp.cache.reader import choose


@pytest.mark.parametrize("block", [8, 32, 64])
@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_blocks_of_pages_that_are_not_read_stand_for_their_tokens(block: int, bits: int, softcap: float | None) -> None:
    torch.manual_seed(block)
    lengths = torch.tensor([700, 400])
    k, v = torch.randn(2, 2, 700, 64), torch.randn(2, 2, 700, 32)
    spec = f"nsa(pages=3, first=1, last=1, block={block}, summary_bits={bits}) + window(sinks=2, recent=16)"
    store = LayerStore(Stack.parse(spec).plan(0, 1))
    store.start(k, v)
    store.write(k, v, torch.arange(700) >= 700 - lengths[:, None])
    q = torch.randn(2, 6, 1, 64)
    ours = store.attend(q, 0.3, softcap)
    choice, _ = choose(store.records, store.storage.view(), q.view(4, 3, 64), 0.3, softcap)
    assert choice is not None
    for s in range(4):
        length, head = int(lengths[s // 2]), s % 2
        keys, values = (x[s // 2, head, 700 - length :] for x in (k, v))
        pages = int(store.table.counts[s])
        read = choice.positions[s, : int(choice.valid[s])].tolist()
        assert len(read) == 3
        assert {0, pages - 1} <= set(read)
        parts = [(keys[:2], values[:2], torch.zeros(2))]
        for page in range(pages):
            at = slice(2 + 64 * page, 2 + 64 * (page + 1))
            if page in read:
                parts.append((keys[at], values[at], torch.zeros(64)))
            else:
                mean_k, mean_v = (x[at].unflatten(0, (-1, block)).mean(1) for x in (keys, values))
                parts.append((mean_k, mean_v, torch.full((64 // block,), math.log(block))))
        parts.append((keys[2 + 64 * pages :], values[2 + 64 * pages :], torch.zeros(length - 2 - 64 * pages)))
        all_k, all_v, bias = (torch.cat(x)[None] for x in zip(*parts, strict=True))
        expected = attend(q.view(4, 3, 64)[s : s + 1], all_k, all_v, 0.3, None, softcap, key_bias=bias)
        tolerance = {"rtol": 2e-3, "atol": 2e-3} if bits == 16 else {"rtol": 0.05, "atol": 0.05}
        torch.testing.assert_close(ours.out.view(4, 3, 32)[s], expected.out[0], **tolerance)
        torch.testing.assert_close(ours.lse.view(4, 3)[s], expected.lse[0], **tolerance)


def test_what_stands_for_the_rest_is_nearer_to_attention_than_nothing() -> None:
    torch.manual_seed(0)
    k, v = (torch.randn(1, 2, 2000, 64) + 0.5 * torch.randn(1, 2, 1, 64) for _ in range(2))
    q = torch.randn(1, 4, 1, 64)
    error = {}
    for name in ("nsa(pages=4)", "moba(pages=4) + window(recent=512)"):
        store = LayerStore(Stack.parse(name).plan(0, 1))
        store.start(k, v)
        store.write(k, v, None)
        expected = attend(q.view(2, 2, 64), k[0], v[0], 0.125).out
        error[name] = float((store.attend(q, 0.125).out.view(2, 2, 64) - expected).norm() / expected.norm())
    assert error["nsa(pages=4)"] < 0.5 * error["moba(pages=4) + window(recent=512)"]
