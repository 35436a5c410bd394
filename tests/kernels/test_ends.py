"""The C kernels read nothing beyond the memory of what they are given, which may be the last that the process has."""

from __future__ import annotations

import ctypes
import mmap
import os

import pytest
import torch
from torch import Tensor

from kvcomp import Stack
from kvcomp.attention import Tokens, attend
from kvcomp.cache.layer import LayerStore
from kvcomp.kernels import cpu, dispatch

pytestmark = pytest.mark.skipif(cpu.library() is None, reason="the C kernel is not installed: no compiler")
ROWS = (1, 4, 5, 17, 300)
SPECS = ("none", "kivi(bits=4, group=16)", "int(bits=3)", "int(bits=5, per=channel)", "turboquant(bits=2.5)")
SPECS += ("klt(bits=2)", "fp8", "nvfp4", "mxfp4")


class Last:
    """Memory whose end is the end of a mapping: what lies after it cannot be read."""

    def __init__(self) -> None:
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.maps: list[mmap.mmap] = []

    def __call__(self, x: Tensor) -> Tensor:
        """x, contiguous, and moved there."""
        size = -(-x.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        self.maps.append(mmap.mmap(-1, size + mmap.PAGESIZE))
        whole = torch.frombuffer(self.maps[-1], dtype=torch.uint8)
        after = ctypes.c_void_p(whole.data_ptr() + size)
        assert self.libc.mprotect(after, ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
        there = whole[size - x.nbytes : size].view(x.dtype).view(x.shape)
        return there.copy_(x)


def survives(work: object) -> bool:
    """Whether a child that does this work ends by itself, without an error."""
    child = os.fork()
    if not child:
        code = 1
        try:
            torch.set_num_threads(1)
            work()  # type: ignore[operator]
            code = 0
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1] == 0


def test_memory_after_the_end_cannot_be_read() -> None:
    def beyond() -> None:
        x = Last()(torch.zeros(10))
        ctypes.string_at(x.data_ptr() + x.nbytes, 1)

    assert not survives(beyond)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dims", [(64, 64), (80, 96), (128, 16), (576, 512), (24, 7)])
def test_exact_tokens_end_with_their_memory(dims: tuple[int, int], dtype: torch.dtype) -> None:
    def work() -> None:
        last = Last()
        for slots in (1, 7, 16, 33, 65):
            keys, values = (last(torch.randn(3, slots, dim).to(dtype)) for dim in dims)
            counts = torch.tensor([slots // 2, 0, slots])
            there = torch.arange(slots) < counts[:, None]
            for rows in ROWS:
                q = torch.randn(3, rows, dims[0])
                found = cpu.attend(q, None, Tokens(keys, values, counts), 0.1)
                right = attend(q, keys.float(), values.float(), 0.1, there[:, None])
                torch.testing.assert_close(found.out, right.out, atol=1e-4, rtol=1e-4)

    assert survives(work)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("dim", [64, 80, 96])
def test_pages_end_with_their_memory(spec: str, dim: int) -> None:
    def work() -> None:
        torch.manual_seed(dim)
        store = LayerStore(Stack.parse(f"{spec} + window(recent=0)").plan(0, 1))
        k, v = torch.randn(2, 1, 3, 2 * store.plan.page_size, dim)
        store.start(k, v)
        store.write(k, v, None)
        table = store.table
        pool = Last()(store.pool.data[: int(table.ids().max()) + 1])
        for rows in ROWS:
            given = torch.randn(3, rows, dim), pool, table.ids(), table.counts, store.layout, store.codec, 0.1
            found = dispatch.attend_pages(*given)
            with dispatch.reference_only():
                right = dispatch.attend_pages(*given)
            torch.testing.assert_close(found.out, right.out, atol=1e-3, rtol=1e-3)

    assert survives(work)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("dim", [64, 80])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_that_are_written_end_with_their_memory(spec: str, dim: int, dtype: torch.dtype) -> None:
    def work() -> None:
        torch.manual_seed(dim)
        stack = Stack.parse(spec).plan(0, 1)
        codec, layout = stack.build(stack.shape(dim, dim, 3, dtype))
        k, v = torch.randn(2, 3, stack.page_size, dim).to(dtype)
        streams, last = torch.arange(3), Last()
        codec.fit(streams, k, v)
        pool = last(torch.zeros(3, layout.bytes_per_page, dtype=torch.uint8))
        assert dispatch.encode_pages(pool, streams, layout, codec, last(k), last(v), streams)
        between = (last(x.transpose(0, 1).contiguous()).transpose(0, 1)[:, None] for x in (k, v))  # heads of a token
        assert dispatch.encode_pages(pool, streams, layout, codec, *between, streams)

    assert survives(work)


@pytest.mark.parametrize("selector", ["quest(pages=1)", "moba(pages=1)", "nsa(pages=1)", "sketch(keep=0.3)"])
def test_pages_that_are_chosen_end_with_their_memory(selector: str) -> None:
    """The pool ends with its newest page: its bounds, means and codes are read, and its tokens copied."""

    def work() -> None:
        torch.manual_seed(0)
        store = LayerStore(Stack.parse(f"int(bits=4) + {selector} + window(recent=16)").plan(2, 4))
        k, v = torch.randn(2, 1, 3, 5 * store.plan.page_size + 40, 64)
        store.start(k, v)
        store.write(k, v, None)
        store.end_prompt()
        pool = store.pool
        used = int(store.table.ids().max()) + 1
        for rows in (1, 4):
            q = torch.randn(1, 3 * rows, 1, 64)
            expected = store.attend(q, 0.1)
            pool.data = Last()(pool.data[:used])
            found = store.attend(q, 0.1)
            torch.testing.assert_close(found.out, expected.out)

    assert survives(work)
