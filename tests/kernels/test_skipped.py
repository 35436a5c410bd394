"""Tokens at the start of a stream's first page that a sliding window has passed: no backend sees them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from kvcomp import Stack
from kvcomp.attention import Part, Tokens, attend, merge
from kvcomp.cache.layer import LayerStore
from kvcomp.errors import KvcompError
from kvcomp.kernels import cpu, dispatch
from kvcomp.kernels.dispatch import attend_pages, reference_only

SPECS = (
    "none",
    "kivi(bits=4, group=16)",
    "kivi(bits=2, group=64)",
    "int(bits=3)",
    "int(bits=5, per=channel)",
    "int(bits=4, basis=hadamard)",
    "int8",
    "turboquant(bits=2.5)",
    "klt(bits=2)",
    "fp8",
    "nvfp4",
)
STREAMS, DIM = 3, 64
pytestmark = pytest.mark.filterwarnings("ignore:.*C kernel")


def case(spec: str, pages: int) -> tuple[LayerStore, Tensor, Tensor]:
    """A store of three streams with so many pages, and what they decode to: [S, n * P, D] each."""
    store = LayerStore(Stack.parse(f"{spec} + window(recent=0)").plan(0, 1))
    k, v = torch.randn(2, 1, STREAMS, pages * store.plan.page_size, DIM)
    store.start(k, v)
    store.write(k, v, None)
    return store, *(x.flatten(0, 1) for x in store.padded())


def written_out(q: Tensor, k: Tensor, v: Tensor, skipped: Tensor, softcap: float | None) -> Part:
    seen = torch.arange(k.shape[1]) >= skipped[:, None]
    return attend(q, k, v, DIM**-0.5, seen[:, None], softcap)


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("pages", [1, 2, 9])
@pytest.mark.parametrize("spec", SPECS)
def test_attention_skips_the_first_tokens(spec: str, pages: int, softcap: float | None) -> None:
    torch.manual_seed(pages)
    store, k, v = case(spec, pages)
    size, table = store.plan.page_size, store.table
    for rows in (1, 4, 17):
        for at in (0, 1, size // 2 - 1, size // 2, size - 1):
            skipped = torch.tensor([at, 0, (at + 5) % size])
            q = torch.randn(STREAMS, rows, DIM)
            own = Tokens(*torch.randn(2, STREAMS, 7, DIM), torch.tensor([7, 0, 3]))
            expected = written_out(q, k, v, skipped, softcap)
            for tokens in (None, own):
                given = q, store.pool.data, table.ids(), table.counts, store.layout, store.codec, DIM**-0.5, softcap
                there = torch.arange(7) < own.counts[:, None]
                if tokens is not None:
                    exact = attend(q, own.keys, own.values, DIM**-0.5, there[:, None], softcap)
                    expected = merge([expected, exact])
                found = attend_pages(*given, tokens=tokens, skipped=skipped)
                torch.testing.assert_close(found.out, expected.out, atol=1e-4, rtol=1e-4)
                torch.testing.assert_close(found.lse, expected.lse, atol=1e-4, rtol=1e-4)
                with reference_only():
                    found = attend_pages(*given, tokens=tokens, skipped=skipped)
                torch.testing.assert_close(found.out, expected.out, atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(cpu.library() is None, reason="the C kernel is not installed: no compiler")
@pytest.mark.parametrize("skipped", [-1, 16])
def test_more_than_a_page_is_refused(skipped: int) -> None:
    store, *_ = case("kivi(bits=4, group=16)", 3)
    assert dispatch.obstacle(store.codec, store.layout, torch.device("cpu")) is None
    given = store.pool.data, store.table.ids(), store.table.counts, store.layout, store.codec, 1.0
    with pytest.raises(KvcompError, match="beyond"):
        attend_pages(torch.randn(STREAMS, 1, DIM), *given, skipped=torch.full((STREAMS,), skipped))


def test_triton_does_so_too() -> None:
    """In its interpreter, in a process that asks for it before triton is imported."""
    pytest.importorskip("triton")
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]


def interpreted() -> None:
    from kvcomp.kernels import triton

    for spec in ("none", "kivi(bits=4, group=16)", "int(bits=4, basis=hadamard)", "klt(bits=2)", "nvfp4"):
        for pages, softcap in ((1, None), (5, 1.5)):
            torch.manual_seed(pages)
            store, k, v = case(spec, pages)
            size, table = store.plan.page_size, store.table
            skipped = torch.tensor([size - 1, 0, size // 2])
            q = torch.randn(STREAMS, 3, DIM)
            rotated, bias = store.codec.read_query(q) if store.codec.rotates else (q, None)
            sides = store.codec.kernel_layouts()
            assert sides is not None
            held = triton.Pages(
                store.pool.data, table.ids(), table.counts, triton.prepared(sides, store.layout, True, q.device)
            )
            found = triton.attend(rotated, held, None, DIM**-0.5, softcap, bias, pages_of_split=2, skipped=skipped)
            out = store.codec.read_output(found.out) if store.codec.rotates else found.out
            expected = written_out(q, k, v, skipped, softcap)
            torch.testing.assert_close(out, expected.out, atol=2e-3, rtol=2e-3)
            torch.testing.assert_close(found.lse, expected.lse, atol=2e-3, rtol=2e-3)


if __name__ == "__main__":
    interpreted()
