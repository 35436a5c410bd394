"""A chunk of a prompt after a long past, on a device that is not looked at: how many operators, how large tensors."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from far_device import FAR, Counted

from kvcomp import Stack
from kvcomp.attention import attend_causal, merge
from kvcomp.kernels import dispatch
from kvcomp.kernels.backends import using
from kvcomp.kernels.triton_backend import Triton
from kvcomp.stages import PageShape

if find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

HEADS, GROUP, DIM = 8, 4, 128
CHUNK, PAST = 8192, 120 * 1024
MOST_OPERATORS, MOST_BYTES = 60, 256 << 20


@pytest.mark.parametrize("spec", ["none", "kivi(bits=4)", "int(bits=4)", "turboquant(bits=4)", "nvfp4", "klt(bits=2)"])
def test_a_chunk_is_some_operators_and_holds_no_logits(spec: str) -> None:
    stack = Stack.parse(spec).plan(0, 1)
    shape = PageShape(stack.page_size, DIM, DIM, HEADS, torch.bfloat16, torch.device("cpu"), 0)
    codec, layout = stack.build(shape)
    seen = torch.randn(HEADS, 512, DIM)
    codec.fit(torch.arange(HEADS), seen, seen)
    far = stack.build(PageShape(stack.page_size, DIM, DIM, HEADS, torch.bfloat16, FAR, 0))[0]
    far.restore({name: x if name.endswith("widths") else x.to(FAR) for name, x in codec.state().items()})
    pages = PAST // stack.page_size
    pool = torch.empty(HEADS * pages, layout.bytes_per_page, dtype=torch.uint8, device=FAR)
    ids = torch.empty(HEADS, pages, dtype=torch.int32, device=FAR)
    counts = torch.empty(HEADS, dtype=torch.int32, device=FAR)
    q = torch.empty(HEADS, GROUP, CHUNK, DIM, dtype=torch.bfloat16, device=FAR)
    k, v = (torch.empty(HEADS, CHUNK, DIM, dtype=torch.bfloat16, device=FAR) for _ in range(2))
    with using(Triton(anywhere=True)):
        dispatch.attend_pages(q.flatten(1, 2), pool, ids, counts, layout, far, 0.1)  # what is made once
        with Counted() as counted:
            past = dispatch.attend_pages(q.flatten(1, 2), pool, ids, counts, layout, far, 0.1)
            part = merge([past, attend_causal(q, k, v, 0.1)])
    assert part.out.shape == (HEADS, GROUP * CHUNK, DIM)
    assert len(counted.operators) <= MOST_OPERATORS, counted.operators
    assert counted.largest <= MOST_BYTES


def test_a_mask_of_all_pairs_would_be_seen() -> None:
    with Counted() as counted:
        torch.ones(1, 1 << 15, 1 << 15, dtype=torch.bool, device=FAR)
    assert counted.largest > MOST_BYTES
